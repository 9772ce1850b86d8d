"""What a run prints and writes: tables for people, JSON for machines."""

import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moefp8.bench import accumulation, moe_layer, promotion
from moefp8.bench.ceilings import Ceilings
from moefp8.bench.where import PARTS


class AsJson(Protocol):
    def as_json(self) -> dict[str, Any]: ...


def environment(device: torch.device) -> dict[str, Any]:
    """Card and versions: what a figure means nothing without."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("moefp8", "torch", "triton", "torchao")
    found: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    found["python"] = platform.python_version()
    found |= {package: version(package) for package in packages}
    # torch knows its own local version ("+cu130"), which the package's metadata may lack.
    found["torch"] = torch.__version__
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    else:
        found["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return found


def write_json(
    path: Path,
    command: str,
    environment: dict[str, Any],
    ceilings: Ceilings | None,
    rows: Sequence[AsJson],
    stopped: Sequence[str] = (),
) -> None:
    """One object: command, environment, ceilings and rows; NaN becomes null. ``stopped`` says why it is
    not complete."""
    peaks = None
    if ceilings is not None:
        peaks = {name: None if math.isnan(rate) else rate for name, rate in ceilings._asdict().items()}
    content = {
        "command": command,
        "environment": environment,
        "ceilings": peaks,
        "rows": [row.as_json() for row in rows],
    }
    if stopped:
        content["stopped"] = stopped[0]
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


# --- tables --------------------------------------------------------------------------------------


def console() -> Console:
    """A terminal's own width; room for the tables where output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 110)


def _rate(x: float, unit: str) -> str:
    """Three digits of a rate in G or T units: ``3.02 TB/s``."""
    scale, prefix = (1e12, "T") if x >= 1e12 else (1e9, "G")
    return f"{x / scale:.3g} {prefix}{unit}"


def show_implementations(console: Console, implementations: dict[str, str]) -> None:
    console.print(", ".join(f"{recipe}: {name}" for recipe, name in implementations.items()), markup=False)


def show_ceilings(console: Console, ceilings: Ceilings) -> None:
    parts = [f"copy {_rate(ceilings.copy, 'B/s')}", f"bf16 {_rate(ceilings.bf16, 'FLOP/s')}"]
    if not math.isnan(ceilings.fp8):
        parts.append(f"FP8, precise accumulation, {_rate(ceilings.fp8, 'FLOP/s')}")
    console.print("Ceilings measured now: " + "; ".join(parts))


def _percent(x: float) -> str:
    return f"{100 * x:.0f} %"


def _milliseconds(x: float) -> str:
    return f"{1e3 * x:.3g}"


#: Heading and form of each figure, in the order of the columns; one that no row has is left out.
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "median_s": ("ms", _milliseconds),
    "speedup": ("over bf16", "{:.2f}x".format),
    "over_torchao": ("over torchao", "{:.2f}x".format),
    "over_bf16": ("over bf16", "{:.2f}x".format),
    "over_precise": ("over precise", "{:.3f}x".format),
    "over_fast": ("over fast", "{:.3f}x".format),
    "rate": ("rate", lambda x: _rate(x, "FLOP/s")),
    "peak_share": ("of FP8 peak", _percent),
    "bytes_per_s": ("bytes", lambda x: _rate(x, "B/s")),
    "copy_share": ("of copy", _percent),
    "limit_share": ("of limit", _percent),
    "over_equal": ("time over equal groups", lambda x: f"{100 * (x - 1):+.1f} %"),
    "kept_bytes": ("kept by experts", lambda x: f"{x / 2**30:.2f} GiB"),
    "kept_bytes_ratio": ("over bf16's", "{:.2f}x".format),
    "peak_bytes": ("peak", lambda x: f"{x / 2**30:.2f} GiB"),
    "peak_bytes_ratio": ("over bf16's", "{:.2f}x".format),
    "over_balanced": ("time over balanced", lambda x: f"{100 * (x - 1):+.1f} %"),
    "first_call_s": ("first call, s", "{:.2g}".format),
}


class Measured(AsJson, Protocol):
    """What the rows of products and of quantisers have in common."""

    @property
    def place(self) -> str: ...
    @property
    def candidate(self) -> str: ...
    @property
    def missing(self) -> str | None: ...
    @property
    def figures(self) -> dict[str, float]: ...


def show_measured(console: Console, rows: Sequence[Measured], partial: Collection[str] = ()) -> None:
    """A table for each place, then why candidates are missing. ``partial`` get a star."""
    for place in dict.fromkeys(row.place for row in rows):
        own = [row for row in rows if row.place == place and row.figures]
        table = Table(title=place, title_justify="left", box=SIMPLE_HEAD)
        table.add_column("", no_wrap=True)
        shown = {key: figure for key, figure in FIGURES.items() if any(key in row.figures for row in own)}
        for heading, _ in shown.values():
            table.add_column(heading, justify="right")
        for row in own:
            cells = (
                form(row.figures[key]) if key in row.figures else "" for key, (_, form) in shown.items()
            )
            marks = (" *" if row.candidate in partial else "") + (
                " +" if row.figures.get("exposed") else ""
            )
            table.add_row(row.candidate + marks, *cells)
        console.print(table)
    if any(row.figures.get("exposed") for row in rows):
        console.print(EXPOSED, style="dim", highlight=False)
    show_missing(console, [(row.candidate, row.missing) for row in rows])


def show_missing(console: Console, reasons: Sequence[tuple[str, str | None]]) -> None:
    """Why candidates have no figures, each reason once."""
    missing: dict[str, dict[str, None]] = {}
    for candidate, reason in reasons:
        if reason is not None:
            missing.setdefault(reason, {})[candidate] = None
    for reason, names in missing.items():
        console.print(f"missing: {'; '.join(names)}: {reason}", style="dim", markup=False)


GEMM_LEGEND = """\
Operands quantised beforehand. Over precise, over fast: speed over dense cuBLAS FP8 with that accumulator
on as many operations, medians over rounds in which all candidates take turns."""
MOE_LAYER_LEGEND = """\
Forward and the gradients of tokens and all parameters; medians over rounds in which all candidates take
turns. over bf16: speed over the faster of the bfloat16 baselines. kept by experts: bytes that the expert
feed-forward saves for its backward, weights apart. peak: most memory that a step adds to its operands."""
BY_REFERENCE = "r: the kernels refuse this shape, so the reference served it."
EXPOSED = "+ waits for the device inside the step, so its time includes launching."
GROUPED_MM_LEGEND = """\
Medians; ratios are medians over rounds in which all candidates take turns.
* bare products of operands quantised beforehand, not a training step.
of FP8 peak: rate over that of dense cuBLAS FP8 with precise accumulation in the same rounds.
of copy: least bytes that must move, over the time, over the copy speed.
of limit: products at that FP8 peak plus quantisers at copy speed, over the time."""


def show_parts(console: Console, rows: Sequence[moe_layer.Row]) -> None:
    """Where the time of one profiled call goes, in milliseconds of device time."""
    for place in dict.fromkeys(row.place for row in rows if row.parts):
        title = f"{place}: milliseconds by part"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        table.add_column("", no_wrap=True)
        for part in PARTS:
            table.add_column(part, justify="right")
        for row in rows:
            if row.place == place and row.parts:
                table.add_row(row.candidate, *(_milliseconds(row.parts[part]) for part in PARTS))
        console.print(table)


def show_choices(console: Console, rows: Sequence[moe_layer.Row]) -> None:
    """What recipe "auto" chose for each layer, and why."""
    for row in rows:
        if row.choice is not None and row.layout == "balanced":
            console.print(f"{row.problem.name}, auto: {row.choice}", markup=False)


def show_accumulation(console: Console, rows: Sequence[accumulation.Row]) -> None:
    """Bias and SQNR of each candidate, product by product; a column for each length or distribution."""
    kinds: dict[str, tuple[str, Callable[[float], str]]] = {
        "bias": ("Bias of accumulation by contraction length, sum(out - exact) / sum(exact) in %", _bias),
        "sqnr": ("SQNR of the result in dB, by distribution of the operands", "{:.2f}".format),
    }
    missing: dict[str, None] = {}
    by_kernels = {row.candidate for row in rows if row.served_by not in (None, "reference")}
    for kind, (title, form) in kinds.items():
        mine = [row for row in rows if row.kind == kind]
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        table.add_column("product")
        table.add_column("", no_wrap=True)
        for setting in dict.fromkeys(row.setting for row in mine):
            table.add_column(setting, justify="right")
        for product in accumulation.PRODUCTS:
            table.add_section()
            for candidate in dict.fromkeys(row.candidate for row in mine):
                own = [row for row in mine if (row.candidate, row.product) == (candidate, product)]
                missing |= {f"{candidate}: {row.missing}": None for row in own if row.missing is not None}
                cells = [
                    "-" if row.value is None else form(row.value) + _mark(row, by_kernels) for row in own
                ]
                if set(cells) != {"-"}:
                    table.add_row(product, candidate, *cells)
        console.print(table)
    if any(_mark(row, by_kernels) for row in rows):
        console.print(BY_REFERENCE, style="dim", highlight=False)
    for reason in missing:
        console.print(f"missing: {reason}", style="dim", markup=False)


def _mark(row: accumulation.Row, by_kernels: Collection[str]) -> str:
    """A mark where the reference served a case of a recipe that kernels serve elsewhere."""
    return " r" if row.served_by == "reference" and row.candidate in by_kernels else ""


def show_promotion(console: Console, rows: Sequence[promotion.Row]) -> None:
    """Speed of the product alone and bias of its sums, by promotion interval."""
    lengths = sorted({length for row in rows for length in row.bias})
    table = Table(title="The product alone by promotion interval", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("product", "", "over precise", "rate", *(f"bias at {length}, %" for length in lengths)):
        table.add_column(heading, justify="left" if heading in ("product", "") else "right")
    for product in accumulation.PRODUCTS:
        table.add_section()
        for row in rows:
            if row.product == product and row.figures:
                ratio = row.figures.get("over_precise")
                speed = "-" if ratio is None else f"{ratio:.3f}x"
                biases = (_bias(row.bias[length]) if length in row.bias else "-" for length in lengths)
                table.add_row(product, row.candidate, speed, _rate(row.figures["rate"], "FLOP/s"), *biases)
    console.print(table)
    show_missing(console, [(row.candidate, row.missing) for row in rows])


def _bias(fraction: float) -> str:
    return f"{100 * fraction:+.4f}" if abs(fraction) < 1e-3 else f"{100 * fraction:+.2f}"
