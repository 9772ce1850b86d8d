"""Operands of the products on Hopper: weights both ways, and what the bfloat16 product reads."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moefp8.formats import BLOCK
from moefp8.kernels.fake_quantize import fake_quantize
from moefp8.kernels.fake_quantize_blocks import fake_quantize_blocks
from moefp8.kernels.gemm import Weights, gemm_contraction
from moefp8.kernels.high_precision import high_precision_contraction
from moefp8.kernels.plan import SEGMENT, Plan, plan
from moefp8.kernels.quantize_columns import quantize_columns
from moefp8.kernels.quantize_rows import RowQuantized, quantize_rows
from moefp8.recipe import Gemm


def in_fp8(gemm: Gemm) -> bool:
    """Multiplied by the FP8 tensor core; the rest goes through bfloat16."""
    return gemm.format == "row" or (gemm.format == "mx" and gemm.group in (None, -1))


def equal_groups(num_groups: int, rows: int, device: torch.device) -> Tensor:
    """Ends of ``num_groups`` groups of ``rows`` rows."""
    return torch.arange(1, num_groups + 1, dtype=torch.int32, device=device) * rows


def is_transposed(x: Tensor) -> bool:
    """Whether the last axis but one is the contiguous one, as in a view of the transpose."""
    return x.stride(-2) == 1 and x.stride(-1) != 1


#: Plans of the rows of weights, by a name for their shape (sizes cannot be hashed while they are symbols)
#: and by whether they are transposed views.
Plans = dict[tuple[str, bool], Plan]


def as_stored(b: Tensor, plans: Plans | None = None, shape: str = "") -> tuple[Tensor, Plan]:
    """``b`` (G, K, N) in its memory order, (G, N, K) if it is a transposed view, and a plan of its rows.

    A plan is taken from ``plans`` if there is one for that ``shape``, or is put there.
    """
    transposed = is_transposed(b)
    stored = (b.mT if transposed else b).contiguous()
    plans = {} if plans is None else plans
    if (shape, transposed) not in plans:
        num_groups, rows, _ = stored.shape
        ends = equal_groups(num_groups, rows, b.device)
        plans[shape, transposed] = plan(ends, num_groups * rows, SEGMENT)
    return stored, plans[shape, transposed]


def both_ways(
    x: Tensor, layout: Plan, along: Gemm | None, across: Gemm | None
) -> tuple[RowQuantized, tuple[Tensor, ...]]:
    """``x`` (M, K) quantised along K under ``along`` and along the rows of each group under ``across``.

    Either may be None: the rows are then not to be read, or the columns ``()``.
    """
    by_row = quantize_rows(x, layout, along or across or Gemm(), column_amax=across is not None)
    return by_row, quantize_columns(x, layout, by_row, across) if across else ()


def weights_both_ways(
    b: Tensor, along_k: Gemm | None, along_n: Gemm | None
) -> tuple[Weights | None, Weights | None]:
    """``b`` (G, K, N) quantised along K, for the forward, and along N, for dgrad; either may be None.

    The copy along the axis that is contiguous in memory is one of rows, the other one of columns.
    """
    if along_k is None and along_n is None:
        return None, None
    stored, layout = as_stored(b)
    flat = stored.flatten(0, 1)
    last, across = (along_k, along_n) if is_transposed(b) else (along_n, along_k)
    by_row, columns = both_ways(flat, layout, last, across)
    one = Weights(by_row.data, by_row.scale.view(stored.shape[:2])) if last else None
    other = Weights(*columns) if columns else None
    return (one, other) if is_transposed(b) else (other, one)


def exact_weights(b: Tensor, gemm: Gemm, axis: int) -> Tensor:
    """``b`` (G, K, N) rounded to MX along ``axis``, in bfloat16, its memory order kept."""
    if gemm.format == "none":
        return b
    stored, layout = as_stored(b)
    axis = -3 - axis if is_transposed(b) else axis
    flat, ends = stored.flatten(0, 1), equal_groups(stored.shape[0], stored.shape[1], b.device)
    rounded = fake_quantize(flat, ends, layout, axis, gemm).view(stored.shape)
    return rounded.mT if is_transposed(b) else rounded


def exact_operand(x: Tensor, offs: Tensor, layout: Plan, axis: int, gemm: Gemm) -> Tensor:
    """``x`` (M, K) as the bfloat16 product reads it: rounded to MX along ``axis``, or as it is."""
    return x if gemm.format == "none" else fake_quantize(x, offs, layout, axis, gemm)


def exact_both_ways(
    x: Tensor, offs: Tensor, layout: Plan, along: Gemm | None, across: Gemm | None
) -> tuple[Tensor, Tensor]:
    """``x`` (M, K) as bfloat16 products read it, rounded along K and along the rows of each group.

    Either may be None, and is then not to be read. True MX both ways takes one pass.
    """
    if along and across and along.format == across.format == "mx" and along.group == across.group == BLOCK:
        return fake_quantize_blocks(x, layout, along, across)
    return (
        exact_operand(x, offs, layout, -1, along) if along else x,
        exact_operand(x, offs, layout, -2, across) if across else x,
    )


def in_memory_order(product: Callable[[Any, Any], Tensor], left: Any, right: Any, like: Tensor) -> Tensor:
    """``product(left, right)`` in the memory order of ``like``, which autograd would copy it to."""
    return product(right, left).mT if is_transposed(like) else product(left, right)


def contract_high_precision(left: Tensor, right: Tensor, offs: Tensor, like: Tensor) -> Tensor:
    """``left^T right`` of each group in bfloat16, in the memory order of ``like``."""
    return in_memory_order(lambda a, b: high_precision_contraction(a.mT, b, offs), left, right, like)


def contract(
    left: Sequence[Tensor], right: Sequence[Tensor], layout: Plan,
    dtype: torch.dtype, gemm: Gemm, like: Tensor,
) -> Tensor:  # fmt: skip
    """``left . right`` per segment, in the memory order of ``like``."""

    def product(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        return gemm_contraction(a[0], a[1], b[0], b[1], layout, dtype, gemm.promote)

    return in_memory_order(product, left, right, like)
