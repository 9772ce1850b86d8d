"""The JSON of a run as Markdown tables, for pages of documentation."""

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NOTHING = "-"


def render(path: Path) -> str:
    """What a page needs of the run in ``path``: what it was measured on, with what, and its tables."""
    content = json.loads(path.read_text())
    command = content["command"]
    # python -m moefp8.bench SUBCOMMAND ...
    tables = TABLES[shlex.split(command)[3]](content["rows"])
    found = content["environment"]
    versions = ", ".join(
        f"{name} {found[name]}" for name in ("torch", "triton", "torchao") if found.get(name)
    )
    where = f"{found['device']}, {versions}, {found['date']}: `{command}`"
    stopped = [f"Not complete: {content['stopped']}"] if "stopped" in content else []
    reasons = {f"{row['candidate']}: {row['missing']}": None for row in content["rows"] if row["missing"]}
    missing = ["Missing: " + "; ".join(reasons) + "."] if reasons else []
    return "\n\n".join([where, *stopped, *tables, *missing]) + "\n"


def table(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heading, ["---"] * len(heading), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _distinct(rows: Sequence[Row], key: Callable[[Row], Any]) -> list[Any]:
    return list(dict.fromkeys(key(row) for row in rows))


def _matrix(
    rows: Sequence[Row], corner: str, down: Callable[[Row], str], across: Callable[[Row], str],
    cell: Callable[[Row], str],
) -> str:  # fmt: skip
    """A table with a line for each value of ``down`` and a column for each of ``across``."""
    columns = _distinct(rows, across)
    cells = {(down(row), across(row)): cell(row) for row in rows}
    lines = [[line, *(cells.get((line, c), NOTHING) for c in columns)] for line in _distinct(rows, down)]
    return table([corner, *columns], lines)


def _shape(row: Row) -> str:
    p = row["problem"]
    unequal = ", unequal" if row["layout"] == "unequal" else ""
    return f"{p['m']}, {p['n']}, {p['k']}, {p['groups']}{unequal}"


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "median_s" in row]


def _ms(row: Row) -> str:
    return f"{1e3 * row['median_s']:.2f} ms"


def _grouped_mm(rows: Sequence[Row]) -> list[str]:
    def cell(row: Row) -> str:
        ratio = f" = {row['speedup']:.2f}x" if row.get("speedup", 1.0) != 1.0 else ""
        return _ms(row) + ratio

    def more(row: Row) -> str:
        parts = [f"{row['rate'] / 1e12:.0f} TFLOP/s"]
        for key, text in (
            ("peak_share", "of FP8 peak"),
            ("copy_share", "of copy"),
            ("limit_share", "of limit"),
        ):
            if key in row:
                parts.append(f"{100 * row[key]:.0f} % {text}")
        if "over_torchao" in row:
            parts.append(f"{row['over_torchao']:.2f}x of torchao")
        if "over_equal" in row:
            parts.append(f"{100 * (row['over_equal'] - 1):+.1f} % over equal groups")
        return ", ".join(parts)

    whole = [row for row in _measured(rows) if row["whole"]]
    bare = [row for row in _measured(rows) if not row["whole"]]
    tables = [_matrix(whole, "M, N, K, G", _shape, _candidate, cell)]
    tables.append(_matrix(whole, "M, N, K, G", _shape, _candidate, more))
    if bare:
        tables.append(_matrix(bare, "M, N, K, G; bare products", _shape, _candidate, cell))
    return tables


def _candidate(row: Row) -> str:
    name: str = row["candidate"]
    return name


def _gemm(rows: Sequence[Row]) -> list[str]:
    def cell(row: Row) -> str:
        parts = [f"{row['rate'] / 1e12:.0f} TFLOP/s"]
        if "over_precise" in row:
            parts.append(f"{row['over_precise']:.3f}")
        return ", ".join(parts)

    return [
        _matrix(_measured(rows), "M, N, K, G", lambda r: f"{_shape(r)}: {r['product']}", _candidate, cell)
    ]


def _quantize(rows: Sequence[Row]) -> list[str]:
    def cell(row: Row) -> str:
        return f"{row['bytes_per_s'] / 1e12:.2f} TB/s, {100 * row['copy_share']:.0f} %"

    # Many candidates, few shapes: shapes go across.
    return [_matrix(_measured(rows), "", _candidate, _shape, cell)]


def _percent(fraction: float | None) -> str:
    if fraction is None:
        return NOTHING
    return f"{100 * fraction:+.3f} %" if abs(fraction) < 0.01 else f"{100 * fraction:+.1f} %"


def _accumulation(rows: Sequence[Row]) -> list[str]:
    tables = []
    by_kernels = {row["candidate"] for row in rows if row.get("served_by") not in (None, "reference")}
    for kind, corner in (("bias", "relative bias"), ("sqnr", "SQNR, dB")):
        own = [row for row in rows if row["kind"] == kind and row["value"] is not None]

        def cell(row: Row, kind: str = kind) -> str:
            by = (
                " (reference)" if row["served_by"] == "reference" and row["candidate"] in by_kernels else ""
            )
            return (_percent(row["value"]) if kind == "bias" else f"{row['value']:.2f}") + by

        tables.append(
            _matrix(own, corner, _candidate, lambda row: f"{row['product']}, {row['setting']}", cell)
        )
    promotion = [row for row in _measured(rows) if row["kind"] == "promotion"]
    lengths = _distinct([{"n": n} for row in promotion for n in row["bias"]], lambda r: r["n"])
    lines = []
    for row in promotion:
        speed = f"{row['over_precise']:.3f}x" if "over_precise" in row else NOTHING
        rate = f"{row['rate'] / 1e12:.0f} TFLOP/s"
        lines.append(
            [
                row["product"],
                row["candidate"],
                rate,
                speed,
                *(_percent(row["bias"].get(n)) for n in lengths),
            ]
        )
    heading = ["product", "", "rate", "over cuBLAS precise", *(f"bias at {n}" for n in lengths)]
    return [*tables, table(heading, lines)] if lines else tables


def _moe_layer(rows: Sequence[Row]) -> list[str]:
    measured = _measured(rows)
    balanced = [row for row in measured if row["layout"] == "balanced"]
    skewed = {
        (row["problem"]["name"], row["candidate"]): row for row in measured if row["layout"] == "skewed"
    }
    lines = []
    for row in balanced:
        other = skewed.get((row["problem"]["name"], row["candidate"]), {})

        def of(row: Row, key: str, form: Callable[[float], str]) -> str:
            return form(row[key]) if key in row else NOTHING

        lines.append(
            [
                f"{row['problem']['name']}, {row['problem']['tokens']} tokens",
                row["candidate"],
                _ms(row),
                of(row, "speedup", "{:.2f}x".format),
                of(row, "kept_bytes", lambda x: f"{x / 2**30:.2f} GiB"),
                of(row, "kept_bytes_ratio", "{:.2f}x".format),
                of(row, "peak_bytes", lambda x: f"{x / 2**30:.2f} GiB"),
                of(row, "peak_bytes_ratio", "{:.2f}x".format),
                of(other, "over_balanced", lambda x: f"{100 * (x - 1):+.1f} %"),
            ]
        )
    heading = [
        "layer",
        "",
        "fwd+bwd",
        "over bf16",
        "kept",
        "over bf16",
        "peak",
        "over bf16",
        "skewed routing",
    ]
    parts = list(balanced[0]["parts"]) if balanced else []
    spent = [
        [row["problem"]["name"], row["candidate"], *(f"{1e3 * row['parts'][part]:.2f}" for part in parts)]
        for row in balanced
    ]
    return [table(heading, lines), table(["milliseconds", "", *parts], spent)]


TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "grouped-mm": _grouped_mm,
    "gemm": _gemm,
    "quantize": _quantize,
    "accumulation": _accumulation,
    "moe-layer": _moe_layer,
}
