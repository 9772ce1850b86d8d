"""The quantisers beside a copy: each reads bfloat16 once and writes FP8 and scales, and no more.

The share of the copy speed counts only the bytes a perfect quantiser moves, so one that reads its
input twice shows a smaller share.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefp8 import quantize_mx, quantize_mx_jagged
from moefp8.bench.ceilings import copy_step
from moefp8.bench.peers import import_or_error, no_torchao
from moefp8.bench.problem import Problem, equal_offs, unequal_offs
from moefp8.bench.refusals import explain, may_raise
from moefp8.bench.timing import Step, Timer, summary

COPY = "copy"


class Inputs(NamedTuple):
    """An activation (M, K) with its groups, and expert weights (G, N, K)."""

    activation: Tensor
    weight: Tensor
    offs: Tensor


class Quantiser(NamedTuple):
    """Something that quantises.

    Attributes:
        name: as it stands in tables.
        run: the call to time.
        refuse: why it cannot run, or None.
        group: elements that share a scale, -1 for the whole contraction: too few scales to count.
        source: "activation" or "weight".
        copies: quantised copies that it writes.
    """

    name: str
    run: Callable[[Inputs], Any]
    refuse: Callable[[torch.device], str | None] = lambda device: None
    group: int = -1
    source: str = "activation"
    copies: int = 1

    def bytes_moved(self, inputs: Inputs) -> int:
        """bfloat16 read once, each copy and its scales written once."""
        elements: int = getattr(inputs, self.source).numel()
        scales = 0 if self.group < 0 else -(-elements // self.group)  # E8M0: a byte each
        return 2 * elements + self.copies * (elements + scales)


OURS = [
    Quantiser("moefp8 rows, mx 32", lambda x: quantize_mx(x.activation), group=32),
    Quantiser("moefp8 rows, mx whole", lambda x: quantize_mx(x.activation, group=-1)),
    Quantiser(
        "moefp8 columns per group, mx 32", lambda x: quantize_mx_jagged(x.activation, x.offs), group=32
    ),
    Quantiser(
        "moefp8 columns per group, mx whole", lambda x: quantize_mx_jagged(x.activation, x.offs, group=-1)
    ),
    Quantiser(
        "moefp8 weights both ways, mx whole",
        lambda x: [quantize_mx(x.weight, axis, group=-1) for axis in (-1, -2)],
        source="weight",
        copies=2,
    ),
]


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


PEERS = [
    Quantiser(
        "torchao rows, fp8 rowwise",
        lambda x: _kernels("triton_fp8_rowwise_2d_scale_and_cast")(x.activation),
        _no_cuda_torchao,
    ),
    Quantiser(
        "torchao columns per group, fp8",
        lambda x: _kernels("triton_fp8_per_group_colwise_scales")(x.activation, x.offs),
        _no_cuda_torchao,
    ),
    Quantiser("torchao rows, mx 32", _torchao_mx_kernel, _no_sm100_torchao, group=32),
    Quantiser("torchao rows, mx 32 emulated", _torchao_to_mx, lambda device: no_torchao(), group=32),
]


class Row(NamedTuple):
    """One quantiser on one shape."""

    problem: Problem
    layout: str
    candidate: str
    missing: str | None
    figures: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        row = {**self._asdict(), "problem": self.problem._asdict()}
        return {**{k: v for k, v in row.items() if k != "figures"}, **self.figures}


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
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)

    offs = equal_offs(problem, device) if unequal is None else unequal_offs(problem, device, unequal)
    inputs = Inputs(normal(problem.m, problem.k), normal(problem.groups, problem.n, problem.k), offs)
    copy_call, copied = copy_step(2 * problem.m * problem.k, device)
    steps: dict[str, Step] = {COPY: copy_call}
    missing: dict[str, str | None] = {}
    for quantiser in quantisers:
        reason = quantiser.refuse(device)
        if reason is None:
            reason = _first_call(quantiser, inputs, timer)
        missing[quantiser.name] = reason
        if reason is None:
            steps[quantiser.name] = partial(quantiser.run, inputs)
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


def _first_call(quantiser: Quantiser, inputs: Inputs, timer: Timer) -> str | None:
    """Call once, compiling what needs compiling; the reason if a peer cannot or memory runs out."""
    try:
        timer.first_call(lambda: quantiser.run(inputs))
    except may_raise(quantiser.name) as error:
        timer.check_device(quantiser.name, error)
        return explain(error)
    return None
