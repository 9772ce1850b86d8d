"""The product alone: operands quantised beforehand, ours beside torch's and cuBLAS's.

Each of the three products of a layer by itself, on the same FP8 numbers::

    fwd    (M, K) x (G, K, N)      groups of rows
    dgrad  (M, N) x (G, N, K)      groups of rows
    wgrad  (N, M) x (M, K)         groups along the contraction

cuBLAS has no groups: its dense product of as many operations is the ceiling, with a precise accumulator
(added up in float32 every 128, as here) and with a fast one (never).
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefp8.bench.ceilings import fp8_mm, no_fp8
from moefp8.bench.kernels import no_kernels
from moefp8.bench.peers import FAST, PRECISE, no_sm90, to_fp8
from moefp8.bench.problem import NEVER, Operands, Problem, common_multiple, draw, unequal_offs
from moefp8.bench.refusals import explain, may_raise
from moefp8.bench.timing import Timer, summary

PRODUCTS = ("fwd", "dgrad", "wgrad")
BF16 = "torch bf16"

Step = Callable[[], Tensor]


class Row(NamedTuple):
    """One candidate in one product of one shape."""

    problem: Problem
    layout: str
    product: str
    candidate: str
    missing: str | None
    figures: dict[str, float]

    @property
    def place(self) -> str:
        return f"{self.problem}, {self.layout} groups: {self.product}"

    def as_json(self) -> dict[str, Any]:
        row = {**self._asdict(), "problem": self.problem._asdict()}
        return {**{k: v for k, v in row.items() if k != "figures"}, **self.figures}


def ours_name(promote: int) -> str:
    return "moefp8, never promoted" if promote >= NEVER else f"moefp8, promoted every {promote}"


# --- steps ---------------------------------------------------------------------------------------


def _bf16_steps(x: Operands) -> dict[str, Step]:
    a, b, offs, g = (t.detach() for t in x)
    return {
        "fwd": lambda: torch._grouped_mm(a, b, offs=offs),
        "dgrad": lambda: torch._grouped_mm(g, b.mT, offs=offs),
        "wgrad": lambda: torch._grouped_mm(g.mT, a, offs=offs),
    }


def _dense_steps(x: Operands, fast: bool) -> dict[str, Step]:
    a, b, _, g = x
    a_rows, b_columns = to_fp8(a), to_fp8(b[0].mT).mT
    g_rows, bt_columns = to_fp8(g), to_fp8(b[0]).mT
    at, gt = to_fp8(a.T), to_fp8(g.T)
    return {
        "fwd": lambda: fp8_mm(a_rows, b_columns, fast=fast),
        "dgrad": lambda: fp8_mm(g_rows, bt_columns, fast=fast),
        "wgrad": lambda: fp8_mm(gt, at.T, fast=fast),
    }


def _grouped_steps(x: Operands, fast: bool) -> dict[str, Step]:
    """``torch._scaled_grouped_mm``, with a scale for each row and column."""
    a, b, offs, g = x
    groups, k, n = b.shape
    a_rows, b_columns = to_fp8(a), to_fp8(b.mT).mT
    g_rows, bt_columns = to_fp8(g), to_fp8(b).mT
    at, gt = to_fp8(a.T), to_fp8(g.T)

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=a.device)

    of_row, of_n, of_k = ones(a.shape[0]), ones(groups, n), ones(groups, k)
    product = partial(torch._scaled_grouped_mm, offs=offs, out_dtype=torch.bfloat16, use_fast_accum=fast)
    return {
        "fwd": lambda: product(a_rows, b_columns, of_row, of_n),
        "dgrad": lambda: product(g_rows, bt_columns, of_row, of_k),
        "wgrad": lambda: product(gt, at.T, of_n.flatten(), of_k.flatten()),
    }


def _our_steps(x: Operands, promotes: Sequence[int]) -> dict[str, dict[str, Step]]:
    """Ours for each promotion interval, by name; the operands are quantised once for all of them."""
    from moefp8.kernels.gemm import gemm_contraction, gemm_rows, tile_rows
    from moefp8.kernels.plan import plan
    from moefp8.kernels.sm90_operands import both_ways, weights_both_ways
    from moefp8.recipe import Gemm

    a, b, offs, g = (t.detach() for t in x)
    layout, gemm = plan(offs, a.shape[0], tile_rows(a.device)), Gemm()
    along_k, along_n = weights_both_ways(b, gemm, gemm)
    a_rows, a_columns = both_ways(a, layout, gemm, gemm)
    g_rows, g_columns = both_ways(g, layout, gemm, gemm)

    def rows(left: Any, right: Any, promote: int) -> Step:
        return lambda: gemm_rows(left.data, left.scale, right, layout.tiles, None, torch.bfloat16, promote)

    def contraction(promote: int) -> Step:
        (left, left_scale), (right, right_scale) = g_columns, a_columns
        return lambda: gemm_contraction(
            left, left_scale, right, right_scale, layout, torch.bfloat16, promote
        )

    return {
        ours_name(promote): {
            "fwd": rows(a_rows, along_k, promote),
            "dgrad": rows(g_rows, along_n, promote),
            "wgrad": contraction(promote),
        }
        for promote in promotes
    }


# --- measurement ---------------------------------------------------------------------------------


def _our_cast_steps(x: Operands, promotes: Sequence[int]) -> dict[str, dict[str, Step]]:
    """The same on numbers that E4M3 represents: cast with scales of 1, so of any length; one group."""
    from moefp8.kernels.gemm import Weights, gemm_contraction, gemm_rows, tile_rows
    from moefp8.kernels.plan import plan

    a, b, offs, g = (t.detach() for t in x)
    layout, out = plan(offs, a.shape[0], tile_rows(a.device)), torch.bfloat16
    (m, k), n = a.shape, b.shape[2]

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=a.device)

    along_k, along_n = Weights(to_fp8(b[0].mT), ones(1, n)), Weights(to_fp8(b[0]), ones(1, k))
    a_rows, g_rows, a_columns, g_columns = to_fp8(a), to_fp8(g), to_fp8(a.T), to_fp8(g.T)

    def steps(promote: int) -> dict[str, Step]:
        columns = (g_columns, ones(1, n), a_columns, ones(1, k))
        return {
            "fwd": lambda: gemm_rows(a_rows, ones(m), along_k, layout.tiles, None, out, promote),
            "dgrad": lambda: gemm_rows(g_rows, ones(m), along_n, layout.tiles, None, out, promote),
            "wgrad": lambda: gemm_contraction(*columns, layout, out, promote),
        }

    return {ours_name(promote): steps(promote) for promote in promotes}


class Source(NamedTuple):
    """Something that makes the steps of one or more candidates."""

    names: Sequence[str]
    #: Steps by candidate and product.
    build: Callable[[Operands], dict[str, dict[str, Step]]]
    refuse: Callable[[Problem, torch.device, int], str | None]
    #: The same for operands that E4M3 represents in a single group of a multiple of 128 rows, quantised
    #: by a plain cast.
    cast: Callable[[Operands], dict[str, dict[str, Step]]]

    @property
    def name(self) -> str:
        return self.names[0]


def _refuse_dense(problem: Problem, device: torch.device, multiple: int) -> str | None:
    if reason := no_fp8(device):
        return reason
    m, k, n, _ = problem
    return "needs dimensions that are multiples of 16" if m % 16 or k % 16 or n % 16 else None


def _refuse_grouped(problem: Problem, device: torch.device, multiple: int) -> str | None:
    if reason := no_sm90(device):
        return reason
    if problem.k % 16 or problem.n % 16 or multiple % 16:
        return "needs K, N and group sizes that are multiples of 16"
    return None


def sources(promotes: Sequence[int]) -> list[Source]:
    """Everything that is compared."""

    def one(name: str, build: Callable[[Operands], dict[str, Step]], refuse: Callable) -> Source:
        def named(x: Operands) -> dict[str, dict[str, Step]]:
            return {name: build(x)}

        return Source([name], named, refuse, named)

    return [
        one(BF16, _bf16_steps, lambda *_: None),
        Source(
            [ours_name(p) for p in promotes],
            lambda x: _our_steps(x, promotes),
            lambda problem, device, multiple: no_kernels(device),
            lambda x: _our_cast_steps(x, promotes),
        ),
        *(
            one(f"torch fp8 grouped, {name}", partial(_grouped_steps, fast=name == FAST), _refuse_grouped)
            for name in (PRECISE, FAST)
        ),
        *(
            one(f"cuBLAS fp8 dense, {name}", partial(_dense_steps, fast=name == FAST), _refuse_dense)
            for name in (PRECISE, FAST)
        ),
    ]


def measure_gemm(
    problem: Problem,
    sources: Sequence[Source],
    timer: Timer,
    *,
    unequal: int | None,
    repeats: int,
    advance: Callable[[], None],
    products: Sequence[str] = PRODUCTS,
) -> list[Row]:
    """Rows of one shape; within a product all candidates take turns, and all products in one run."""
    device = timer.device
    x = draw(problem, device)
    if unequal is not None:
        x = x._replace(offs=unequal_offs(problem, device, unequal))
    multiple = common_multiple(x.offs)
    steps: dict[str, Step] = {}
    missing: dict[str, str] = {}
    for source in sources:
        reason = source.refuse(problem, device, multiple)
        if reason is None:
            try:
                built = source.build(x)
                for name, own in built.items():
                    for product in products:
                        timer.first_call(own[product])
                        steps[f"{product}\n{name}"] = own[product]
            except may_raise(source.names[0]) as error:
                timer.check_device(source.names[0], error)
                reason = explain(error)
        if reason is not None:
            missing |= dict.fromkeys(source.names, reason)
    times, exposed, failed = timer.alternate(
        steps, repeats, advance, lambda key: may_raise(key.split("\n")[1])
    )

    rows = []
    layout = "equal" if unequal is None else "unequal"
    for product in products:
        for name in (name for source in sources for name in source.names):
            key = f"{product}\n{name}"
            figures: dict[str, float] = {}
            if key in times:
                figures = {**summary(times[key]), "exposed": float(key in exposed)}
                figures["rate"] = problem.operations / figures["median_s"]
                for figure, other in OVER.items():
                    base = times.get(f"{product}\n{other}")
                    if base is not None:
                        ratios = (b / own for b, own in zip(base, times[key], strict=True))
                        figures[figure] = statistics.median(ratios)
            reason = failed.get(key, missing.get(name))
            rows.append(Row(problem, layout, product, name, reason, figures))
    return rows


#: Speed over another candidate, as a median over rounds: the two times come from the same moment.
OVER = {
    "over_bf16": BF16,
    "over_precise": f"cuBLAS fp8 dense, {PRECISE}",
    "over_fast": f"cuBLAS fp8 dense, {FAST}",
}
