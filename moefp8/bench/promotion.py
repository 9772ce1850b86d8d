"""What promotion of the accumulator costs in speed and buys in accuracy, for the product alone.

Speed: a published shape, all intervals and cuBLAS in turns (``gemm.py``). Accuracy: the relative bias of
the same kernels on positive numbers that E4M3 represents exactly (``accumulation.py``).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moefp8.bench.accumulation import bias_problem, exact_product, positive_operands
from moefp8.bench.gemm import PRODUCTS, Source, measure_gemm, ours_name
from moefp8.bench.problem import Problem
from moefp8.bench.timing import Timer


class Row(NamedTuple):
    """One candidate in one product: its speed, and its bias by contraction length."""

    candidate: str
    #: Interval, or None for what is not ours.
    promote: int | None
    product: str
    missing: str | None
    figures: dict[str, float]
    #: Relative bias by contraction length.
    bias: dict[int, float]

    def as_json(self) -> dict[str, Any]:
        row = {"kind": "promotion", **self._asdict()}
        return {**{k: v for k, v in row.items() if k != "figures"}, **self.figures}


def measure_promotion(
    sources: Sequence[Source],
    promotes: Sequence[int],
    problem: Problem,
    contractions: Sequence[int],
    other: int,
    timer: Timer,
    repeats: int,
    advance: Callable[[], None],
) -> list[Row]:
    """Rows of every candidate of ``sources`` in each of the three products."""
    speed = measure_gemm(problem, sources, timer, unequal=None, repeats=repeats, advance=advance)
    bias: dict[tuple[str, str], dict[int, float]] = {}
    for product in PRODUCTS:
        for contraction in contractions:
            long = bias_problem(product, contraction, other)
            operands = positive_operands(long, timer.device)
            exact = exact_product(operands, product)
            for source in sources:
                if source.refuse(long, timer.device, contraction) is None:
                    timer.beat()
                    for name, steps in source.cast(operands).items():
                        total = steps[product]().double().sum()
                        relative = (total / exact.sum() - 1).item()
                        bias.setdefault((name, product), {})[contraction] = relative
    intervals = {ours_name(promote): promote for promote in promotes}
    return [
        Row(
            row.candidate,
            intervals.get(row.candidate),
            row.product,
            row.missing,
            row.figures,
            bias.get((row.candidate, row.product), {}),
        )
        for row in speed
    ]
