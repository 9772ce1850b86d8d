"""The pictures of a run; needs matplotlib, which the extra ``bench`` installs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot: a benchmark runs where there is no display

from moefp8.bench import accumulation, grouped_mm, quantize
from moefp8.bench.ceilings import Ceilings
from moefp8.bench.peers import BASELINE
from moefp8.bench.problem import Problem

#: Figures of one place (a shape, a distribution), by series.
Series = dict[str, list[float]]


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path


def _bars(
    path: Path,
    places: Sequence[str],
    series: Series,
    ylabel: str,
    form: str,
    *,
    threshold: float | None = None,
) -> Path:
    """Bars of several series over named places; NaN leaves a gap.

    With a ``threshold`` the axis is logarithmic above it and linear below.
    """
    bars = len(places) * (len(series) + 1)
    figure, axes = _axes(max(6.4, 1.5 + 0.2 * bars), 4.4)
    width = 0.85 / max(len(series), 1)
    for i, (name, values) in enumerate(series.items()):
        at = np.arange(len(places)) + (i - (len(series) - 1) / 2) * width
        drawn = axes.bar(at, values, width, label=name)
        labels = ["" if math.isnan(v) else format(v, form) for v in values]
        axes.bar_label(drawn, labels, fontsize=6, rotation=90, padding=2)
    axes.set_xticks(np.arange(len(places)), places, fontsize=7)
    axes.set_ylabel(ylabel)
    axes.margins(y=0.15)
    if threshold is not None:
        axes.set_yscale("symlog", linthresh=threshold)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return _save(figure, path)


def _by_place(
    rows: Sequence[grouped_mm.Row] | Sequence[quantize.Row], figure: str
) -> tuple[list[str], Series]:
    """One figure of every row that has it: names of the shapes, and a series for each candidate."""
    at: dict[tuple[Problem, str], dict[str, float]] = {}
    for row in rows:
        at.setdefault((row.problem, row.layout), {})[row.candidate] = row.figures[figure]
    names = dict.fromkeys(row.candidate for row in rows)
    series = {name: [place.get(name, math.nan) for place in at.values()] for name in names}
    return [_label(*place) for place in at], series


def _label(problem: Problem, layout: str) -> str:
    lines = [f"{axis} {size}" for axis, size in zip("MKNG", problem, strict=True)]
    return "\n".join(lines if layout == "equal" else [*lines, layout])


def speedups(path: Path, rows: Sequence[grouped_mm.Row]) -> Path:
    """Speed of every candidate over bf16, shape by shape."""
    measured = [row for row in rows if "speedup" in row.figures and row.candidate != BASELINE and row.whole]
    return _bars(path, *_by_place(measured, "speedup"), f"speed over {BASELINE}", ".2f")


def roofline(path: Path, rows: Sequence[grouped_mm.Row], ceilings: Ceilings) -> Path:
    """Achieved rate against operations per byte, under the measured copy speed and peaks."""
    measured = [row for row in rows if row.missing is None and row.whole]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in measured:
        rate = row.figures["rate"]
        intensity = rate * row.figures["median_s"] / row.figures["bytes"]
        points.setdefault(row.candidate, []).append((intensity, rate / 1e12))

    figure, axes = _axes(8.0, 4.8)
    reached = [x for own in points.values() for x, _ in own]
    span = np.geomspace(min(10.0, *reached) / 2, max(1e4, *reached) * 2, 200)
    for name, peak, style in (("bf16", ceilings.bf16, "--"), ("FP8", ceilings.fp8, "-")):
        if not math.isnan(peak):
            roof = np.minimum(peak, span * ceilings.copy) / 1e12
            axes.plot(span, roof, style, color="0.4", linewidth=1.2, label=f"{name} peak {peak / 1e12:.3g}")
    for name, own in points.items():
        axes.scatter(*zip(*own, strict=True), s=18, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte of least traffic")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"slope: copy at {ceilings.copy / 1e12:.3g} TB/s", fontsize=9, loc="left")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return _save(figure, path)


def quantisers(path: Path, rows: Sequence[quantize.Row]) -> Path:
    """Share of the copy speed, shape by shape."""
    measured = [row for row in rows if row.figures and row.candidate != quantize.COPY]
    return _bars(path, *_by_place(measured, "copy_share"), "share of the copy speed", ".2f")


def accuracy(path: Path, rows: Sequence[accumulation.Row], kind: str) -> Path:
    """By how many per cent results are too small, or their SQNR in dB."""
    factor = -100.0 if kind == "bias" else 1.0
    at: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row.kind == kind and row.value is not None:
            at.setdefault((row.setting, row.product), {})[row.candidate] = factor * row.value
    names = dict.fromkeys(name for place in at.values() for name in place)
    series = {name: [place.get(name, math.nan) for place in at.values()] for name in names}
    places = [f"{product}\n{setting.replace(' ', chr(10))}" for setting, product in at]
    if kind == "sqnr":
        return _bars(path, places, series, "output SQNR, dB", ".1f")
    return _bars(path, places, series, "results too small by, %", ".2g", threshold=1e-2)
