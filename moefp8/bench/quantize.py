"""The quantisers beside a copy: each reads bfloat16 and writes FP8 and scales.

The share of the copy speed counts the least bytes that such a quantiser must move. One scale for a
whole row is found while the row is in registers: 2 bytes read and 1 written an element. Scales for
whole columns take the column maxima, gathered by whoever read the tensor before. Both ways is both of
these: 6 bytes one after the other, and 4 where a group stays in the cache between them.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefp8 import quantize_mx, quantize_mx_jagged
from moefp8.bench.apart import call_apart
from moefp8.bench.ceilings import copy_step
from moefp8.bench.kernels import no_kernels
from moefp8.bench.peers import import_or_error, no_torchao
from moefp8.bench.problem import Problem, equal_offs, unequal_offs
from moefp8.bench.refusals import explain, may_raise
from moefp8.bench.timing import Step, Timer, summary
from moefp8.recipe import Gemm

COPY = "copy"


class Inputs(NamedTuple):
    """An activation (M, K) and an output cotangent (M, N) with their groups, and weights (G, N, K)."""

    activation: Tensor
    cotangent: Tensor
    weight: Tensor
    offs: Tensor


class Quantiser(NamedTuple):
    """Something that quantises.

    Attributes:
        name: as it stands in tables.
        prepare: makes the call to time; what it does itself is not timed.
        refuse: why it cannot run, or None.
        group: elements that share a scale, -1 for the whole contraction: too few scales to count.
        source: a field of :class:`Inputs`.
        copies: quantised copies that it writes.
        tunes: whether its first call at a shape may take minutes, so that it is made apart first.
    """

    name: str
    prepare: Callable[[Inputs], Step]
    refuse: Callable[[torch.device], str | None] = lambda device: None
    group: int = -1
    source: str = "activation"
    copies: int = 1
    tunes: bool = False

    def bytes_moved(self, inputs: Inputs) -> int:
        """For each copy two bytes an element read and one written, and its scales."""
        elements: int = getattr(inputs, self.source).numel()
        scales = 0 if self.group < 0 else -(-elements // self.group)  # E8M0: a byte each
        return self.copies * (3 * elements + scales)


# --- ours ----------------------------------------------------------------------------------------


def _rows(source: str, gemm: Gemm, column_amax: bool, x: Inputs) -> Step:
    from moefp8.kernels.gemm import tile_rows
    from moefp8.kernels.plan import plan
    from moefp8.kernels.quantize_rows import quantize_rows

    tensor = getattr(x, source)
    layout = plan(x.offs, tensor.shape[0], tile_rows(tensor.device))
    return lambda: quantize_rows(tensor, layout, gemm, column_amax=column_amax)


def _columns(source: str, gemm: Gemm, x: Inputs) -> Step:
    from moefp8.kernels.gemm import tile_rows
    from moefp8.kernels.plan import plan
    from moefp8.kernels.quantize_columns import quantize_columns
    from moefp8.kernels.quantize_rows import quantize_rows

    tensor = getattr(x, source)
    layout = plan(x.offs, tensor.shape[0], tile_rows(tensor.device))
    by_row = quantize_rows(tensor, layout, gemm, column_amax=True)
    return lambda: quantize_columns(tensor, layout, by_row, gemm)


def _both(source: str, gemm: Gemm, x: Inputs) -> Step:
    """Both copies, the columns from a second reading."""
    from moefp8.kernels.gemm import tile_rows
    from moefp8.kernels.plan import plan
    from moefp8.kernels.sm90_operands import as_stored, both_ways

    tensor = getattr(x, source)
    if source == "weight":
        stored, layout = as_stored(tensor.mT)
        tensor = stored.flatten(0, 1)
    else:
        layout = plan(x.offs, tensor.shape[0], tile_rows(tensor.device))
    return lambda: both_ways(tensor, layout, gemm, gemm)


def _kernels_of(gemm: Gemm, label: str) -> list[Quantiser]:
    def quantiser(name: str, prepare: Callable[[Inputs], Step], **how: Any) -> Quantiser:
        return Quantiser(f"moefp8 {name}, {label}", prepare, no_kernels, **how)

    own = []
    for source in ("activation", "cotangent"):
        own += [
            quantiser(f"rows of {source}", partial(_rows, source, gemm, False), source=source),
            quantiser(
                f"rows and column maxima of {source}", partial(_rows, source, gemm, True), source=source
            ),
            quantiser(f"columns of {source}", partial(_columns, source, gemm), source=source),
        ]
    for source in Inputs._fields[:3]:
        both = quantiser(f"{source} both ways", partial(_both, source, gemm), source=source, copies=2)
        own.append(both)
    return own


KERNELS = [*_kernels_of(Gemm(), "mx"), *_kernels_of(Gemm(format="row"), "rowwise")]


def _on_cpu(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    return "the definition in torch, measured on a CPU only: it is not meant to be fast"


def _reference(name: str, run: Callable[[Inputs], Any], **how: Any) -> Quantiser:
    return Quantiser(f"moefp8 reference {name}", lambda x: partial(run, x), _on_cpu, **how)


REFERENCE = [
    _reference("rows, mx 32", lambda x: quantize_mx(x.activation), group=32),
    _reference("rows, mx whole", lambda x: quantize_mx(x.activation, group=-1)),
    _reference("columns per group, mx 32", lambda x: quantize_mx_jagged(x.activation, x.offs), group=32),
    _reference("columns per group, mx whole", lambda x: quantize_mx_jagged(x.activation, x.offs, group=-1)),
    _reference(
        "weights both ways, mx whole",
        lambda x: [quantize_mx(x.weight, axis, group=-1) for axis in (-1, -2)],
        source="weight",
        copies=2,
    ),
]
OURS = [*KERNELS, *REFERENCE]


# --- torchao -------------------------------------------------------------------------------------


def _kernels(name: str) -> Any:
    return getattr(import_or_error("torchao.prototype.moe_training.kernels"), name)


def _no_cuda_torchao(device: torch.device) -> str | None:
    return no_torchao() or (None if device.type == "cuda" else "needs a CUDA device")


def _no_sm100_torchao(device: torch.device) -> str | None:
    if reason := _no_cuda_torchao(device):
        return reason
    capability = torch.cuda.get_device_capability(device)
    return None if capability[0] == 10 else f"needs compute capability 10.0, this is {capability}"


def _torchao_mx_kernel(x: Inputs) -> Any:
    return import_or_error("torchao.prototype.mx_formats.kernels").triton_to_mxfp8_dim0(x.activation)


def _torchao_to_mx(x: Inputs) -> Any:
    mode = import_or_error("torchao.prototype.mx_formats.config").ScaleCalculationMode.RCEIL
    to_mx = import_or_error("torchao.prototype.mx_formats.mx_tensor").to_mx
    return to_mx(x.activation, torch.float8_e4m3fn, 32, mode)


def _peer(name: str, run: Callable[[Inputs], Any], refuse: Callable, **how: Any) -> Quantiser:
    return Quantiser(f"torchao {name}", lambda x: partial(run, x), refuse, **how)


PEERS = [
    _peer(
        "rows, fp8 rowwise",
        lambda x: _kernels("triton_fp8_rowwise_2d_scale_and_cast")(x.activation),
        _no_cuda_torchao,
    ),
    _peer(
        "columns per group, fp8",
        lambda x: _kernels("triton_fp8_per_group_colwise_scales")(x.activation, x.offs),
        _no_cuda_torchao,
        tunes=True,
    ),
    _peer("rows, mx 32", _torchao_mx_kernel, _no_sm100_torchao, group=32, tunes=True),
    _peer("rows, mx 32 emulated", _torchao_to_mx, lambda device: no_torchao(), group=32),
]


# --- measurement ---------------------------------------------------------------------------------


class Row(NamedTuple):
    """One quantiser on one shape."""

    problem: Problem
    layout: str
    candidate: str
    missing: str | None
    figures: dict[str, float]

    @property
    def place(self) -> str:
        return f"{self.problem}, {self.layout} groups"

    def as_json(self) -> dict[str, Any]:
        row = {**self._asdict(), "problem": self.problem._asdict()}
        return {**{k: v for k, v in row.items() if k != "figures"}, **self.figures}


def _draw(problem: Problem, device: torch.device, unequal: int | None) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)

    m, k, n, groups = problem
    offs = equal_offs(problem, device) if unequal is None else unequal_offs(problem, device, unequal)
    return Inputs(normal(m, k), normal(m, n), normal(groups, n, k), offs)


def measure_quantisers(
    problem: Problem,
    quantisers: Sequence[Quantiser],
    timer: Timer,
    *,
    unequal: int | None,
    repeats: int,
    advance: Callable[[], None],
) -> list[Row]:
    """Rows of one shape, all quantisers and a copy as large as the activation in turns."""
    device = timer.device
    inputs = _draw(problem, device, unequal)
    copy_call, copied = copy_step(2 * problem.m * problem.k, device)
    steps: dict[str, Step] = {COPY: copy_call}
    missing: dict[str, str | None] = {}
    for quantiser in quantisers:
        reason = quantiser.refuse(device)
        if reason is None and quantiser.tunes:
            timer.beat()
            argument = {"name": quantiser.name, "problem": list(problem), "unequal": unequal}
            argument |= {"device": str(device)}
            reason = call_apart("moefp8.bench.quantize:first_call", argument, timer.peer_seconds)
        if reason is None:
            try:
                step = quantiser.prepare(inputs)
                timer.first_call(step)
                steps[quantiser.name] = step
            except may_raise(quantiser.name) as error:
                timer.check_device(quantiser.name, error)
                reason = explain(error)
        missing[quantiser.name] = reason
    times, exposed, failed = timer.alternate(steps, repeats, advance, may_raise)
    missing |= failed

    layout = "equal" if unequal is None else "unequal"
    copy_figures = {**summary(times[COPY]), "bytes": float(copied)}
    copy_figures |= {"bytes_per_s": copied / copy_figures["median_s"], "copy_share": 1.0}
    rows = [Row(problem, layout, COPY, None, copy_figures)]
    for quantiser in quantisers:
        figures: dict[str, float] = {}
        if quantiser.name in times:
            moved = quantiser.bytes_moved(inputs)
            figures = {**summary(times[quantiser.name]), "bytes": float(moved)}
            figures["bytes_per_s"] = moved / figures["median_s"]
            # Medians over the rounds: the two times of a round come from the same moment.
            ratio = statistics.median(
                c / q for c, q in zip(times[COPY], times[quantiser.name], strict=True)
            )
            figures["copy_share"] = ratio * moved / copied
            figures["exposed"] = float(quantiser.name in exposed)
        rows.append(Row(problem, layout, quantiser.name, missing[quantiser.name], figures))
    return rows


def first_call(name: str, problem: list[int], unequal: int | None, device: str) -> str | None:
    """Call the peer ``name`` once on such inputs, in a process that the caller may end; why it cannot."""
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    peer = next(q for q in PEERS if q.name == name)
    try:
        Timer(where).first_call(peer.prepare(_draw(Problem(*problem), where, unequal)))
    except may_raise(name) as error:
        return explain(error)
    return None
