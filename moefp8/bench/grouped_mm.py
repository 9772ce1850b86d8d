"""The grouped product, forward and backward, under each recipe and beside its peers.

Under every shape all candidates take turns (``timing.py``), dense cuBLAS products of as many
operations among them, so the share of the FP8 peak is that of the same moment on the same card.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from moefp8.bench.candidates import Candidate, Case, make_case
from moefp8.bench.ceilings import Ceilings
from moefp8.bench.peers import BASELINE, TORCHAO
from moefp8.bench.problem import Operands, Problem, draw, unequal_offs
from moefp8.bench.refusals import may_raise
from moefp8.bench.run import Outcome, start
from moefp8.bench.timing import Timer, summary

#: A step that is dense cuBLAS FP8 with precise accumulation: the peak beside this shape.
PEAK = "cuBLAS fp8 dense, precise"


class Row(NamedTuple):
    """One line of the table: a candidate on a shape and a layout of groups."""

    problem: Problem
    layout: str
    candidate: str
    whole: bool
    #: Why there are no figures, or None.
    missing: str | None
    figures: dict[str, float]

    @property
    def place(self) -> str:
        return f"{self.problem}, {self.layout} groups"

    def as_json(self) -> dict[str, Any]:
        row = {**self._asdict(), "problem": self.problem._asdict()}
        return {**{k: v for k, v in row.items() if k != "figures"}, **self.figures}


def measure_shape(
    problem: Problem,
    candidates: Sequence[Candidate],
    timer: Timer,
    ceilings: Ceilings,
    *,
    unequal: int | None,
    backward: bool,
    repeats: int,
    advance: Callable[[], None],
) -> list[Row]:
    """Rows of one shape. ``unequal`` adds random group sizes, multiples of it, in the same turns."""
    equal = draw(problem, timer.device)
    cases = {"equal": make_case(problem, equal, backward)}
    if unequal is not None and problem.groups > 1:
        offs = unequal_offs(problem, timer.device, unequal)
        cases["unequal"] = make_case(problem, Operands(equal.a, equal.b, offs, equal.cotangent), backward)

    outcomes: dict[tuple[str, str], Outcome] = {}
    for layout, case in cases.items():
        for candidate in candidates:
            outcomes[layout, candidate.name] = start(candidate, case, timer)
    steps = {key: o.step for key, o in outcomes.items() if o.step is not None}
    named = {"\n".join(key): step for key, step in steps.items()}
    seconds, exposed, failed = timer.alternate(
        named, repeats, advance, lambda name: may_raise(name.split("\n")[1])
    )
    times = {key: seconds["\n".join(key)] for key in steps if "\n".join(key) in seconds}
    rows = []
    for (layout, name), outcome in outcomes.items():
        key = "\n".join((layout, name))
        figures: dict[str, float] = {}
        if (layout, name) in times:
            figures = _figures(outcome, cases[layout], times[layout, name], times, layout, ceilings)
            figures["exposed"] = float(key in exposed)
        reason = failed.get(key, outcome.reason)
        rows.append(Row(problem, layout, name, outcome.candidate.whole, reason, figures))
    return rows


def _figures(
    outcome: Outcome,
    case: Case,
    own: list[float],
    times: dict[tuple[str, str], list[float]],
    layout: str,
    ceilings: Ceilings,
) -> dict[str, float]:
    """What the times of one candidate mean, beside those of the others.

    Ratios are medians over the rounds: the two numbers of a round come from the same moment.
    """
    problem, backward = case.problem, case.backward
    figures = summary(own)
    median = figures["median_s"]
    operations = (3 if backward else 1) * problem.operations
    figures["rate"] = operations / median
    figures["first_call_s"] = outcome.first_call or 0.0
    if outcome.candidate.whole:
        moved = problem.bytes_moved(backward, outcome.candidate.fp8)
        figures["bytes"] = float(moved)
        figures["copy_share"] = moved / median / ceilings.copy

    def over(key: tuple[str, str]) -> float | None:
        if key not in times:
            return None
        return statistics.median(other / mine for other, mine in zip(times[key], own, strict=True))

    if (speedup := over((layout, BASELINE))) is not None:
        figures["speedup"] = speedup
    if (ratio := over((layout, TORCHAO))) is not None:
        figures["over_torchao"] = ratio
    if (equal := over(("equal", outcome.candidate.name))) is not None and layout == "unequal":
        figures["over_equal"] = 1 / equal
    peak_share = over((layout, PEAK))
    fp8_peak = ceilings.fp8
    if peak_share is not None:
        figures["peak_share"] = peak_share
        fp8_peak = operations / statistics.median(times[layout, PEAK])
    if outcome.candidate.fp8 and outcome.candidate.whole and not math.isnan(fp8_peak):
        figures["limit_share"] = problem.least_seconds(backward, fp8_peak, ceilings.copy) / median
    return figures


def release(device: torch.device) -> None:
    """Give a shape's memory back before the next one is drawn."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
