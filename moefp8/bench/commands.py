"""The subcommands: what each measures, in which order, and what it shows."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from moefp8.bench import accumulation as acc
from moefp8.bench import gemm, moe_layer, promotion, report
from moefp8.bench import grouped_mm as gmm
from moefp8.bench import quantize as quant
from moefp8.bench.candidates import Candidate, chosen, named_recipes, ours
from moefp8.bench.ceilings import measure_ceilings
from moefp8.bench.layers import LAYERS, SMALL_LAYERS
from moefp8.bench.peers import peers
from moefp8.bench.problem import PUBLISHED, SMALL, Problem
from moefp8.bench.session import Bar, Session
from moefp8.recipe import PRESETS, Recipe

#: Numbers of the other two axes of a long contraction, and the shape of the SQNR products.
BIAS_SIZE = {"cuda": 512, "cpu": 64}
SQNR_PROBLEM = {"cuda": Problem(4096, 4096, 4096, 1), "cpu": Problem(128, 256, 128, 1)}
#: Where the speed of promotion intervals is measured: Llama4, 8 experts.
PROMOTION_PROBLEM = {"cuda": PUBLISHED[3], "cpu": SMALL[0]}


def _ours(session: Session) -> list[Candidate]:
    """The recipes asked for; which implementation serves each goes with the environment."""
    args = session.args
    recipes = named_recipes(args.recipe or args.recipes, args.promote)
    session.environment["implementations"] = chosen(recipes, args.implementation, session.device)
    report.show_implementations(session.console, session.environment["implementations"])
    return ours(recipes, args.implementation)


def _each(
    session: Session, problems: Sequence[Any], measure: Callable[[Any, Callable[[], None]], Iterable[Any]]
) -> Callable[[Bar], None]:
    """``measure(problem, advance)`` for one problem after the other, its rows added to the session's."""

    def run(bar: Bar) -> None:
        for i, problem in enumerate(problems):
            bar.at(i / len(problems), getattr(problem, "name", str(problem)))
            session.rows.extend(measure(problem, bar.advance))
            gmm.release(session.device)

    return run


def grouped_mm(
    args: argparse.Namespace, problems: Sequence[Problem], device: torch.device, command: str
) -> None:
    """The table of grouped products, its JSON, and pictures of the speedups and the roofline."""
    session = Session(args, device, command)
    ceilings = session.ceilings = measure_ceilings(session.timer, 10)
    report.show_ceilings(session.console, ceilings)
    baseline, *rest = peers()
    candidates = session.kept([baseline, *_ours(session), *rest])
    layouts = 1 if args.unequal is None else 2
    rows: list[gmm.Row] = session.rows

    def measure(problem: Problem, advance: Callable[[], None]) -> Iterable[gmm.Row]:
        return gmm.measure_shape(
            problem,
            candidates,
            session.timer,
            ceilings,
            unequal=args.unequal,
            backward=not args.forward,
            repeats=args.repeats,
            advance=advance,
        )

    def show() -> None:
        session.console.print("Forward alone:" if args.forward else "Forward and both gradients:")
        report.show_measured(session.console, rows, {row.candidate for row in rows if not row.whole})
        session.console.print(report.GROUPED_MM_LEGEND, style="dim", highlight=False)
        if args.png is not None and rows:
            from moefp8.bench import plots

            if any("speedup" in row.figures for row in rows):
                session.written(plots.speedups(args.png, rows))
            session.written(plots.roofline(session.beside("roofline"), rows, ceilings))

    session.run(
        len(problems) * layouts * len(candidates) * args.repeats, _each(session, problems, measure), show
    )


def products(
    args: argparse.Namespace, problems: Sequence[Problem], device: torch.device, command: str
) -> None:
    """The table of the product alone, its JSON, and a picture of its speed over cuBLAS."""
    session = Session(args, device, command)
    sources = session.kept(gemm.sources(args.promote or [128]))
    rows: list[gemm.Row] = session.rows
    calls = len(gemm.PRODUCTS) * sum(len(source.names) for source in sources) * args.repeats

    def measure(problem: Problem, advance: Callable[[], None]) -> Iterable[gemm.Row]:
        return gemm.measure_gemm(
            problem, sources, session.timer, unequal=args.unequal, repeats=args.repeats, advance=advance
        )

    def show() -> None:
        report.show_measured(session.console, rows)
        session.console.print(report.GEMM_LEGEND, style="dim", highlight=False)
        if args.png is not None and rows:
            from moefp8.bench import plots

            session.written(plots.products(args.png, rows))

    total = len(problems) * calls
    session.run(total, _each(session, problems, measure), show)


def quantize(
    args: argparse.Namespace, problems: Sequence[Problem], device: torch.device, command: str
) -> None:
    """The table of quantisers, its JSON, and a picture of the shares of the copy speed."""
    session = Session(args, device, command)
    quantisers = session.kept([*quant.OURS, *quant.PEERS])
    rows: list[quant.Row] = session.rows

    def measure(problem: Problem, advance: Callable[[], None]) -> Iterable[quant.Row]:
        return quant.measure_quantisers(
            problem, quantisers, session.timer, unequal=args.unequal, repeats=args.repeats, advance=advance
        )

    def show() -> None:
        report.show_measured(session.console, rows)
        if args.png is not None and rows:
            from moefp8.bench import plots

            session.written(plots.quantisers(args.png, rows))

    session.run(
        len(problems) * (len(quantisers) + 1) * args.repeats, _each(session, problems, measure), show
    )


def accumulation(args: argparse.Namespace, device: torch.device, command: str) -> None:
    """Tables of bias, SQNR and promotion, their JSON, and a picture of each."""
    session = Session(args, device, command)
    recipes = session.kept(_ours(session))
    others = session.kept(peers())
    biased = [*recipes, *others]
    # Products alone have no scales, and these distributions do not fit E4M3 without.
    noisy = [acc.true_mx(), *recipes, *(peer for peer in others if peer.whole)]
    size = args.size or BIAS_SIZE[device.type]
    sources = session.kept(gemm.sources(args.intervals))
    rows: list[acc.Row] = []
    by_interval: list[promotion.Row] = []
    total = len(args.contraction) * len(acc.PRODUCTS) * len(biased) + len(acc.DISTRIBUTIONS) * len(noisy)
    total += len(gemm.PRODUCTS) * sum(len(source.names) for source in sources) * args.repeats

    def measure(bar: Bar) -> None:
        for contraction in args.contraction:
            bar.name(f"bias, contraction {contraction}")
            rows.extend(acc.measure_bias(biased, contraction, size, session.timer, bar.advance))
        session.rows[:] = rows
        for distribution in acc.DISTRIBUTIONS:
            bar.name(f"SQNR, {distribution}")
            problem = SQNR_PROBLEM[device.type]
            rows.extend(acc.measure_sqnr(noisy, distribution, problem, session.timer, bar.advance))
        session.rows[:] = rows
        gmm.release(device)
        bar.name("promotion")
        problem = args.shape or PROMOTION_PROBLEM[device.type]
        by_interval.extend(
            promotion.measure_promotion(
                sources,
                args.intervals,
                problem,
                args.contraction,
                size,
                session.timer,
                args.repeats,
                bar.advance,
            )
        )
        session.rows[:] = [*rows, *by_interval]

    def show() -> None:
        report.show_accumulation(session.console, rows)
        report.show_promotion(session.console, by_interval)
        if args.png is not None:
            from moefp8.bench import plots

            session.written(
                plots.accuracy(args.png, rows, "bias"),
                plots.accuracy(session.beside("sqnr"), rows, "sqnr"),
                plots.promotion(session.beside("promotion"), by_interval),
            )

    session.run(total, measure, show)


def layer(args: argparse.Namespace, device: torch.device, command: str) -> None:
    """The table of whole layers, its JSON, and pictures of speed and of where the time goes."""
    session = Session(args, device, command)
    published = LAYERS if device.type == "cuda" else SMALL_LAYERS
    problems = [p for p in published if args.layer is None or any(n in p.name for n in args.layer)]
    if not problems:
        raise SystemExit(f"--layer: expected a part of one of {[p.name for p in published]}")
    if args.tokens is not None:
        problems = [problem._replace(tokens=args.tokens) for problem in problems]
    presets = {name: PRESETS[name] for name in args.recipe or args.recipes}
    session.environment["implementations"] = chosen(presets, args.implementation, device)
    report.show_implementations(session.console, session.environment["implementations"])
    recipes: dict[str, Recipe | str] = dict(presets)
    if args.auto:
        recipes["auto"] = "auto"
    own = moe_layer.ours(recipes, args.implementation, compiled=args.compile, quantized=args.quantized)
    candidates = session.kept([*moe_layer.baselines(), *own])
    rows: list[moe_layer.Row] = session.rows

    def measure(problem: Any, advance: Callable[[], None]) -> Iterable[moe_layer.Row]:
        return moe_layer.measure_layer(
            problem, candidates, session.timer, args.repeats, advance, session.console.print
        )

    def show() -> None:
        report.show_measured(session.console, rows)
        report.show_parts(session.console, rows)
        report.show_choices(session.console, rows)
        session.console.print(report.MOE_LAYER_LEGEND, style="dim", highlight=False)
        if args.png is not None and rows:
            from moefp8.bench import plots

            session.written(plots.layers(args.png, rows), plots.where(session.beside("where"), rows))

    session.run(
        len(problems) * len(moe_layer.LAYOUTS) * len(candidates) * args.repeats,
        _each(session, problems, measure),
        show,
    )
