"""Fit the model behind ``recipe="auto"`` on the GPU at hand.

    python -m moefp8.bench.fit_auto --json auto.json

Times forward and backward of ``expert_ffn`` under BF16 and MXFP8, taking turns, over layers from a few
hundred rows to published sizes, and fits the rates of ``moefp8.auto`` to them. It prints each time beside
what the other layers predict for it, and the entry for ``moefp8.auto.CARDS``. Some minutes.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefp8 import expert_ffn, init_moe_ffn
from moefp8.auto import ALLOWED, Card, Rates, Shape, choose_recipe
from moefp8.bench.timing import Step, Timer
from moefp8.groups import generate_jagged_offs
from moefp8.recipe import BF16, MXFP8
from moefp8.routing import MoEConfig

RECIPES = {"bf16": BF16, "mxfp8": MXFP8}
#: Rows, dim, hidden, experts: where FP8 wins by far, where it loses, and in between.
SHAPES = [
    *(Shape(rows, 5120, 8192, 8) for rows in (2048, 16384, 65536)),
    *(Shape(rows, 7168, 2048, 8) for rows in (2048, 16384, 131072)),
    *(Shape(rows, 2048, 768, 128) for rows in (4096, 32768, 131072)),
    *(Shape(rows, 2048, 1408, 64) for rows in (4096, 32768, 98304)),
    *(Shape(rows, 4096, 1536, 32) for rows in (4096, 32768, 131072)),
    *(Shape(rows, 1024, 512, 16) for rows in (1024, 16384, 131072)),
]
SMALL = [
    Shape(rows, dim, hidden, experts)
    for rows in (64, 256)
    for dim, hidden in ((32, 64), (64, 32))
    for experts in (2, 4)
]


class Measured(NamedTuple):
    """Median seconds of a shape under each recipe."""

    shape: Shape
    bf16: float
    mxfp8: float

    @property
    def ratio(self) -> float:
        return self.mxfp8 / self.bf16


def fit(points: Sequence[tuple[Shape, float]]) -> Rates:
    """Non-negative rates that minimise the sum of squared *relative* errors.

    With five of them the best set of those that are not zero is found by trying all: the constrained
    optimum is the unconstrained one on its own support.
    """
    work = torch.tensor([shape.work() for shape, _ in points], dtype=torch.float64)
    seconds = torch.tensor([t for _, t in points], dtype=torch.float64)
    rows = work / seconds[:, None]
    unit = rows.abs().amax(0).clamp(min=1e-300)  # columns differ by 20 orders of magnitude
    rows, best, found = rows / unit, float("inf"), torch.zeros(len(Rates._fields), dtype=torch.float64)
    for size in range(1, len(Rates._fields) + 1):
        for support in combinations(range(len(Rates._fields)), size):
            columns = rows[:, list(support)]
            rate = torch.linalg.lstsq(columns, torch.ones(len(points), 1, dtype=torch.float64)).solution
            loss = (columns @ rate - 1).square().sum().item()
            if (rate >= 0).all() and loss < best:
                best, found = loss, torch.zeros_like(found)
                found[list(support)] = rate[:, 0]
    return Rates(*(found / unit).tolist())


def fit_card(measured: Sequence[Measured], source: str) -> tuple[Card, list[float]]:
    """The card, and for each shape the ratio of times that the other shapes predict for it."""

    def rates(points: Sequence[Measured]) -> tuple[Rates, Rates]:
        return fit([(m.shape, m.bf16) for m in points]), fit([(m.shape, m.mxfp8) for m in points])

    def ratio(fitted: tuple[Rates, Rates], shape: Shape) -> float:
        bf16, mxfp8 = fitted
        return mxfp8.seconds(shape) / bf16.seconds(shape)

    whole = rates(measured)
    predicted = [ratio(rates([*measured[:i], *measured[i + 1 :]]), m.shape) for i, m in enumerate(measured)]
    # Where bfloat16 is predicted to win it is chosen, and an error costs nothing that was promised.
    off = [
        m.ratio / p - 1
        for m, left_out in zip(measured, predicted, strict=True)
        for p in (left_out, ratio(whole, m.shape))
        if p <= 1
    ]
    return Card(*whole, max([0.0, *off]), source), predicted


def measure(shape: Shape, timer: Timer, repeats: int) -> Measured:
    """Forward and backward of every gradient, on random groups."""
    device = timer.device
    config = MoEConfig(shape.dim, shape.hidden, shape.experts, 1)
    generator = torch.Generator(device).manual_seed(0)
    params = init_moe_ffn(generator, config, dtype=torch.bfloat16, device=device)
    leaves = [p.requires_grad_() for name, p in params.items() if name != "router"]
    drawn = torch.randn(2, shape.rows, shape.dim, generator=generator, device=device, dtype=torch.bfloat16)
    x, g = drawn[0].clone().requires_grad_(), drawn[1].clone()
    groups = torch.Generator().manual_seed(0)
    offs = generate_jagged_offs(shape.experts, shape.rows, generator=groups, device=device)

    def step(name: str) -> tuple[Tensor, ...]:
        out = expert_ffn(params, x, offs, recipe=RECIPES[name])
        return torch.autograd.grad(out, (x, *leaves), g)

    steps: dict[str, Step] = {name: partial(step, name) for name in RECIPES}
    for run in steps.values():
        timer.first_call(run)
    seconds = timer.alternate(steps, repeats).seconds
    return Measured(shape, *(statistics.median(seconds[name]) for name in RECIPES))


def report(measured: Sequence[Measured], card: Card, predicted: Sequence[float]) -> str:
    """The table, and how the choices would have turned out."""
    lines = ["   rows   dim hidden experts   bf16 ms  mxfp8 ms  ratio predicted  chosen"]
    worst = 0.0
    for m, p in zip(measured, predicted, strict=True):
        choice = choose_recipe(*m.shape, card=card)
        worst = max(worst, m.ratio if choice.recipe == MXFP8 else 1.0)
        rows, dim, hidden, experts = m.shape
        lines.append(
            f"{rows:>7} {dim:>5} {hidden:>6} {experts:>7} {1e3 * m.bf16:>9.3f} {1e3 * m.mxfp8:>9.3f} "
            f"{m.ratio:>6.3f} {p:>9.3f}  {'MXFP8' if choice.recipe == MXFP8 else 'BF16'}"
        )
    lines.append(
        f"\nWhere MXFP8 is predicted to win, its time is underestimated by up to {100 * card.error:.1f} %. "
        f"The slowest choice takes {worst:.3f} of the time of bfloat16; allowed are {ALLOWED}."
    )
    return "\n".join(lines)


def as_json(card: Card, measured: Sequence[Measured]) -> dict[str, Any]:
    points = [{**m.shape._asdict(), "bf16": m.bf16, "mxfp8": m.mxfp8} for m in measured]
    return {
        **card._asdict(),
        "bf16": card.bf16._asdict(),
        "mxfp8": card.mxfp8._asdict(),
        "measured": points,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moefp8.bench.fit_auto", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="calls of each recipe and shape")
    parser.add_argument("--json", type=Path, help="where to save the card and what it was fitted to")
    parser.add_argument(
        "--device", default="cuda", help="cpu tries the command out, in miniature; its rates mean nothing"
    )
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("No CUDA device here, and the model is about one.", file=sys.stderr)
        return 1
    timer, measured = Timer(device), []
    for shape in SHAPES if device.type == "cuda" else SMALL:
        measured.append(measure(shape, timer, args.repeats))
        print(*shape, f"bf16 {measured[-1].bf16:.6f} s, mxfp8 {measured[-1].mxfp8:.6f} s", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    cuda = f" (CUDA {torch.version.cuda})" if device.type == "cuda" else ""
    source = (
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}{cuda}, python -m moefp8.bench.fit_auto"
    )
    card, predicted = fit_card(measured, source)
    print(f"\n{report(measured, card, predicted)}\n\nFor moefp8.auto.CARDS:\n\n    {name!r}: {card!r},")
    if args.json is not None:
        args.json.write_text(json.dumps({name: as_json(card, measured)}, indent=1) + "\n")
        print(f"\nsaved: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
