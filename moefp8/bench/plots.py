"""The pictures of a run; needs matplotlib, which the extra ``bench`` installs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot: a benchmark runs where there is no display

from moefp8.bench import accumulation, gemm, grouped_mm, moe_layer, quantize
from moefp8.bench import promotion as promotion_
from moefp8.bench.ceilings import Ceilings
from moefp8.bench.peers import BASELINE
from moefp8.bench.problem import Problem
from moefp8.bench.where import PARTS

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
    letters = max((len(line) for place in places for line in place.split("\n")), default=0)
    figure, axes = _axes(max(6.4, 1.5 + 0.2 * bars, 1.5 + len(places) * (0.06 * letters + 0.1)), 4.4)
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


def products(path: Path, rows: Sequence[gemm.Row]) -> Path:
    """Speed of the product alone over dense cuBLAS FP8, or its rate where there is no cuBLAS FP8."""
    own = "over_precise" if any("over_precise" in row.figures for row in rows) else "rate"
    at: dict[tuple[Problem, str], dict[str, float]] = {}
    for row in rows:
        if own in row.figures:
            at.setdefault((row.problem, row.product), {})[row.candidate] = row.figures[own]
    names = dict.fromkeys(name for place in at.values() for name in place)
    factor = 1.0 if own == "over_precise" else 1e-12
    series = {n: [factor * place.get(n, math.nan) for place in at.values()] for n in names}
    places = [f"{product}\n{_label(problem, 'equal')}" for problem, product in at]
    label = "speed over cuBLAS FP8, precise" if own == "over_precise" else "TFLOP/s"
    return _bars(path, places, series, label, ".2f")


def promotion(path: Path, rows: Sequence[promotion_.Row]) -> Path:
    """Speed against bias, a panel for each product: a line of our intervals, and the peers beside it."""
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    relative = any("over_precise" in row.figures for row in rows)
    longest = max((length for row in rows for length in row.bias), default=0)
    peers = dict.fromkeys(r.candidate for r in rows if r.promote is None and r.candidate != gemm.BF16)
    marks = dict(zip(peers, "xX+Pvs", strict=False))
    for axes, product in zip(
        figure.subplots(1, 3, sharey=True, sharex=True), accumulation.PRODUCTS, strict=True
    ):

        def point(row: promotion_.Row) -> tuple[float, float]:
            speed = row.figures["over_precise"] if relative else row.figures["rate"]
            return max(100.0 * abs(row.bias[longest]), 1e-3), speed

        mine = [r for r in rows if r.product == product and r.figures and longest in r.bias]
        ours = [row for row in mine if row.promote is not None]
        if ours:
            axes.plot(*zip(*map(point, ours), strict=True), "o-", color="C0", label="moefp8")
        for row in ours:
            interval = row.candidate.removeprefix("moefp8, ").removeprefix("promoted every ")
            interval = interval.removesuffix(" promoted")
            axes.annotate(interval, point(row), (0, 7), textcoords="offset points", fontsize=8, ha="center")
        for row in mine:
            if row.candidate in marks:
                axes.plot(*point(row), marks[row.candidate], color="0.35", label=row.candidate)
        axes.set_xscale("log")
        axes.set_title(product, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.margins(x=0.12, y=0.15)
    figure.axes[0].set_ylabel("speed over cuBLAS FP8, precise" if relative else "FLOP/s")
    figure.axes[1].set_xlabel(f"results too small at a contraction of {longest} by, % (labels: interval)")
    handles = {
        text: handle
        for axes in figure.axes
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=5, fontsize=8, frameon=False
    )
    return _save(figure, path)


def layers(path: Path, rows: Sequence[moe_layer.Row]) -> Path:
    """Speed of every candidate over the faster bfloat16 layer."""
    baselines = (moe_layer.EAGER, moe_layer.COMPILED)
    measured = [row for row in rows if "speedup" in row.figures and row.candidate not in baselines]
    at: dict[tuple[str, str], dict[str, float]] = {}
    for row in measured:
        at.setdefault((row.problem.name, row.layout), {})[row.candidate] = row.figures["speedup"]
    names = dict.fromkeys(row.candidate for row in measured)
    series = {name: [place.get(name, math.nan) for place in at.values()] for name in names}
    return _bars(path, ["\n".join(place) for place in at], series, "speed over the bf16 layer", ".2f")


def where(path: Path, rows: Sequence[moe_layer.Row]) -> Path:
    """Stacked bars of device time by part, in percent of the slowest candidate on the same layer."""
    profiled = [row for row in rows if row.parts]
    total = [sum(row.parts.values()) for row in profiled]
    slowest: dict[str, float] = {}
    for row, seconds in zip(profiled, total, strict=True):
        slowest[row.problem.name] = max(seconds, slowest.get(row.problem.name, 0.0))
    unit = np.array([slowest[row.problem.name] / 100 for row in profiled])
    figure, axes = _axes(8.0, 1.2 + 0.32 * len(profiled))
    at, left = np.arange(len(profiled)), np.zeros(len(profiled))
    for part in PARTS:
        widths = np.array([row.parts[part] for row in profiled]) / unit
        drawn = axes.barh(at, widths, left=left, label=part, height=0.7)
        left += widths
    axes.bar_label(drawn, [f"{1e3 * seconds:.3g} ms" for seconds in total], fontsize=7, padding=3)
    axes.set_yticks(at, [f"{row.problem.name}: {row.candidate}" for row in profiled], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0.0)
    axes.grid(axis="x", alpha=0.3)
    axes.margins(x=0.12)
    axes.set_xlabel("device time, forward and backward, % of the slowest on the layer")
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return _save(figure, path)
