"""One run of a subcommand: candidates, progress bar, tables, files."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moefp8.bench import accumulation as acc
from moefp8.bench import grouped_mm as gmm
from moefp8.bench import quantize as quant
from moefp8.bench import report
from moefp8.bench.candidates import Candidate, chosen, named_recipes, ours
from moefp8.bench.ceilings import Ceilings, measure_ceilings
from moefp8.bench.peers import peers
from moefp8.bench.problem import Problem
from moefp8.bench.timing import DeviceLostError, Timer

#: Numbers of the other two axes of a long contraction, and the shape of the SQNR products.
BIAS_SIZE = {"cuda": 512, "cpu": 64}
SQNR_PROBLEM = {"cuda": Problem(4096, 4096, 4096, 1), "cpu": Problem(256, 512, 256, 1)}


class _Bar:
    """A progress bar over ``total`` calls; candidates that turn out missing make fewer."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self._task = progress.add_task("", total=total)

    def name(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def at(self, fraction: float, text: str) -> None:
        self._progress.update(self._task, completed=round(fraction * self._total), description=text)

    def advance(self) -> None:
        self._progress.advance(self._task)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[_Bar]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bar(progress, total)


def _begin(device: torch.device) -> tuple[Console, Timer, dict[str, Any]]:
    console = report.console()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and launches go to the current device
    environment = report.environment(device)
    console.print(", ".join(f"{name} {value}" for name, value in environment.items() if value is not None))
    return console, Timer(device), environment


def _ours(args: argparse.Namespace, device: torch.device, environment: dict[str, Any]) -> list[Candidate]:
    """The recipes asked for; which implementation serves each goes with the environment."""
    recipes = named_recipes(args.recipe or args.recipes, args.promote)
    environment["implementations"] = chosen(recipes, args.implementation, device)
    return ours(recipes, args.implementation)


@contextmanager
def _until_stopped() -> Iterator[list[str]]:
    """What was measured before Ctrl-C or the loss of the device is still shown and written.

    Yields a list that then holds why.
    """
    stopped: list[str] = []
    try:
        yield stopped
    except KeyboardInterrupt:
        stopped.append("stopped by Ctrl-C")
    except DeviceLostError as error:
        stopped.append(f"{error}. Leave it out with --without to measure the rest.")


def _stop(stopped: Sequence[str]) -> None:
    """Leave with an error status if the run is not complete."""
    if stopped:
        raise SystemExit(f"Not complete, the tables end with the last whole shape: {stopped[0]}")


def _kept(args: argparse.Namespace, named: Sequence[Any]) -> list[Any]:
    """Those whose names contain none of ``--without``."""
    return [x for x in named if not any(part in x.name for part in args.without)]


def _write(
    args: argparse.Namespace,
    command: str,
    environment: dict[str, Any],
    ceilings: Ceilings | None,
    rows: Sequence[report.AsJson],
    console: Console,
) -> None:
    if args.json is not None:
        report.write_json(args.json, command, environment, ceilings, rows)
        console.print(f"wrote {args.json}")


def _written(console: Console, *paths: Path) -> None:
    for path in paths:
        console.print(f"wrote {path}")


def grouped_mm(
    args: argparse.Namespace, problems: Sequence[Problem], device: torch.device, command: str
) -> None:
    """The table of grouped products, its JSON, and pictures of the speedups and the roofline."""
    console, timer, environment = _begin(device)
    ceilings = measure_ceilings(timer, 10)
    report.show_ceilings(console, ceilings)
    baseline, *rest = peers()
    candidates = _kept(args, [baseline, *_ours(args, device, environment), *rest])
    report.show_implementations(console, environment["implementations"])
    layouts = 1 if args.unequal is None else 2
    rows: list[gmm.Row] = []
    with (
        _until_stopped() as stopped,
        _progress(console, len(problems) * layouts * len(candidates) * args.repeats) as progress,
    ):
        for i, problem in enumerate(problems):
            progress.at(i / len(problems), str(problem))
            rows += gmm.measure_shape(
                problem,
                candidates,
                timer,
                ceilings,
                unequal=args.unequal,
                backward=not args.forward,
                repeats=args.repeats,
                advance=progress.advance,
            )
            gmm.release(device)
    console.print("Forward alone:" if args.forward else "Forward and both gradients:")
    report.show_measured(console, rows, {row.candidate for row in rows if not row.whole})
    console.print(report.GROUPED_MM_LEGEND, style="dim", highlight=False)
    _write(args, command, environment, ceilings, rows, console)
    if args.png is not None and rows:
        from moefp8.bench import plots

        if any("speedup" in row.figures for row in rows):
            _written(console, plots.speedups(args.png, rows))
        beside = args.png.with_stem(f"{args.png.stem}-roofline")
        _written(console, plots.roofline(beside, rows, ceilings))
    _stop(stopped)


def quantize(
    args: argparse.Namespace, problems: Sequence[Problem], device: torch.device, command: str
) -> None:
    """The table of quantisers, its JSON, and a picture of the shares of the copy speed."""
    console, timer, environment = _begin(device)
    quantisers = _kept(args, [*quant.OURS, *quant.PEERS])
    rows: list[quant.Row] = []
    with (
        _until_stopped() as stopped,
        _progress(console, len(problems) * (len(quantisers) + 1) * args.repeats) as progress,
    ):
        for i, problem in enumerate(problems):
            progress.at(i / len(problems), str(problem))
            rows += quant.measure_quantisers(
                problem,
                quantisers,
                timer,
                unequal=args.unequal,
                repeats=args.repeats,
                advance=progress.advance,
            )
            gmm.release(device)
    report.show_measured(console, rows)
    _write(args, command, environment, None, rows, console)
    if args.png is not None and rows:
        from moefp8.bench import plots

        _written(console, plots.quantisers(args.png, rows))
    _stop(stopped)


def accumulation(args: argparse.Namespace, device: torch.device, command: str) -> None:
    """Tables of bias and SQNR, their JSON, and a picture of each."""
    console, timer, environment = _begin(device)
    recipes = _ours(args, device, environment)
    report.show_implementations(console, environment["implementations"])
    biased = [*recipes, *peers()]
    # Products alone have no scales, and these distributions do not fit E4M3 without.
    noisy = [acc.true_mx(), *recipes, *(peer for peer in peers() if peer.whole)]
    size = args.size or BIAS_SIZE[device.type]
    rows: list[acc.Row] = []
    total = len(args.contraction) * len(acc.PRODUCTS) * len(biased) + len(acc.DISTRIBUTIONS) * len(noisy)
    with _progress(console, total) as progress:
        for contraction in args.contraction:
            progress.name(f"bias, contraction {contraction}")
            rows += acc.measure_bias(biased, contraction, size, timer, progress.advance)
        for distribution in acc.DISTRIBUTIONS:
            progress.name(f"SQNR, {distribution}")
            rows += acc.measure_sqnr(
                noisy, distribution, SQNR_PROBLEM[device.type], timer, progress.advance
            )
    report.show_accumulation(console, rows)
    _write(args, command, environment, None, rows, console)
    if args.png is not None:
        from moefp8.bench import plots

        beside = args.png.with_stem(f"{args.png.stem}-sqnr")
        _written(console, plots.accuracy(args.png, rows, "bias"), plots.accuracy(beside, rows, "sqnr"))
