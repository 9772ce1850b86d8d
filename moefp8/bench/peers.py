"""The other ways to compute a grouped product: torch, cuBLAS and torchao, where they are installed.

torch's FP8 products have no derivative and take operands that are quantised already. They are timed
as three bare products, which is a lower limit for whatever is built on them.
"""

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moefp8.bench.apart import TUNING_CACHE
from moefp8.bench.candidates import Candidate, Case, Results, differentiable
from moefp8.bench.ceilings import fp8_mm, no_fp8

BASELINE = "torch bf16"
TORCHAO = "torchao fp8 rowwise"
#: Accumulators of FP8 products: added up in float32 every 128 of the contraction, or never.
PRECISE, FAST = "precise", "fast"


def peers() -> list[Candidate]:
    """The baseline first, then every peer there could be; each says itself why it cannot run."""
    return [
        Candidate(BASELINE, lambda case: differentiable(_torch_bf16, case), fp8=False),
        # It tunes 36 forms of one kernel, 8 of another, at every new number of rows and groups.
        Candidate(TORCHAO, _torchao_rowwise, _refuse_torchao_rowwise, tunes=True),
        Candidate("torchao mxfp8", _torchao_mx("AUTO"), _refuse_torchao_mx, tunes=True),
        Candidate("torchao mxfp8 emulated", _torchao_mx("EMULATED"), _refuse_torchao_emulated),
        *(
            Candidate(
                f"torch fp8 products, {FAST if fast else PRECISE}",
                functools.partial(_torch_products, fast),
                _refuse_torch_products,
                whole=False,
            )
            for fast in (True, False)
        ),
        *(
            Candidate(
                f"cuBLAS fp8 dense, {FAST if fast else PRECISE}",
                functools.partial(_dense_products, fast),
                _refuse_dense_products,
                whole=False,
            )
            for fast in (True, False)
        ),
    ]


def _torch_bf16(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return torch._grouped_mm(a, b, offs=offs)


# --- torch and cuBLAS: bare products of quantised operands ---------------------------------------


def to_fp8(x: Tensor) -> Tensor:
    """Cast with a scale of 1; the operands of a problem lie well inside E4M3's range."""
    return x.detach().contiguous().to(torch.float8_e4m3fn)


def _torch_products(fast: bool, case: Case) -> Callable[[], Results]:
    """``torch._scaled_grouped_mm``, one float32 scale for each row and column."""
    m, k, n, groups = case.problem
    a, b, offs, g = case.operands
    # The left operand is row-major, the right one column-major: both K-major, as Hopper wants them.
    a_rows, b_columns = to_fp8(a), to_fp8(b.mT).mT
    g_rows, bt_columns = to_fp8(g), to_fp8(b).mT
    at, gt = to_fp8(a.T), to_fp8(g.T)

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=a.device)

    product = functools.partial(
        torch._scaled_grouped_mm, offs=offs, out_dtype=torch.bfloat16, use_fast_accum=fast
    )
    of_row, of_n, of_k = ones(m), ones(groups, n), ones(groups, k)

    def step() -> Results:
        out = product(a_rows, b_columns, of_row, of_n)
        if not case.backward:
            return (out,)
        da = product(g_rows, bt_columns, of_row, of_k)
        db = product(gt, at.T, of_n.flatten(), of_k.flatten())
        return out, da, db.mT

    return step


def _refuse_torch_products(case: Case) -> str | None:
    if reason := no_sm90(case.device):
        return reason
    return _unaligned(case, 16)


def _dense_products(fast: bool, case: Case) -> Callable[[], Results]:
    """As many operations in three dense cuBLAS products; not the grouped product's values if G > 1."""
    a, b, _, g = case.operands
    a_rows, b_columns = to_fp8(a), to_fp8(b[0].mT).mT
    g_rows, bt_columns = to_fp8(g), to_fp8(b[0]).mT
    at, gt = to_fp8(a.T), to_fp8(g.T)

    def step() -> Results:
        out = fp8_mm(a_rows, b_columns, fast=fast)
        if not case.backward:
            return (out,)
        return out, fp8_mm(g_rows, bt_columns, fast=fast), fp8_mm(gt, at.T, fast=fast).mT[None]

    return step


def _refuse_dense_products(case: Case) -> str | None:
    if reason := no_fp8(case.device):
        return reason
    m, k, n, _ = case.problem
    if (m if case.backward else 0) % 16 or k % 16 or n % 16:
        return "needs dimensions that are multiples of 16"
    return None


def no_sm90(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (9, 0) else f"needs compute capability 9.0, this is {capability}"


def _unaligned(case: Case, multiple: int) -> str | None:
    """Refuse what FP8 products outside this library refuse: shapes and groups off the grid."""
    _, k, n, _ = case.problem
    if k % multiple or n % multiple:
        return f"needs K and N that are multiples of {multiple}"
    if case.backward and case.multiple_of % multiple:
        return f"needs group sizes that are multiples of {multiple}"
    return None


# --- torchao -------------------------------------------------------------------------------------


@functools.cache
def import_or_error(name: str) -> Any:
    """The module, or the ImportError that says why there is none."""
    os.environ.setdefault(TUNING_CACHE, "1")  # what a peer tuned apart is not tuned again here
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return error


def no_torchao() -> str | None:
    module = import_or_error("torchao.prototype.moe_training")
    if not isinstance(module, ImportError):
        return None
    missing = isinstance(module, ModuleNotFoundError) and (module.name or "").split(".")[0] == "torchao"
    return "torchao is not installed" if missing else f"torchao cannot be imported: {module}"


def _torchao_rowwise(case: Case) -> Callable[[], Results]:
    product = import_or_error("torchao.prototype.moe_training")._to_fp8_rowwise_then_scaled_grouped_mm
    return differentiable(
        lambda a, b, offs: product(a, b, offs, pad_token_groups_for_grouped_mm=False), case
    )


def _refuse_torchao_rowwise(case: Case) -> str | None:
    return no_torchao() or no_sm90(case.device) or _unaligned(case, 16)


def _torchao_mx(preference: str) -> Callable[[Case], Callable[[], Results]]:
    def build(case: Case) -> Callable[[], Results]:
        product = import_or_error("torchao.prototype.moe_training")._to_mxfp8_then_scaled_grouped_mm
        kernels = import_or_error("torchao.quantization.quantize_.common").KernelPreference
        return differentiable(
            lambda a, b, offs: product(a, b, offs, kernel_preference=kernels[preference]), case
        )

    return build


def _refuse_torchao_emulated(case: Case) -> str | None:
    return no_torchao() or _unaligned(case, 32)


def _refuse_torchao_mx(case: Case) -> str | None:
    if reason := no_torchao():
        return reason
    if case.device.type != "cuda":
        return "needs a CUDA device"
    capability = torch.cuda.get_device_capability(case.device)
    if capability[0] != 10:
        return f"needs compute capability 10.0, this is {capability}"
    return _unaligned(case, 32)
