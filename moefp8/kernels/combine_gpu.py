"""The kernels of ``combine.py``.

Bytes an element of the rows in bf16, k of them to a token: combine reads 2 and writes 2/k, spread the other
way round, row_dots reads 2 + 2/k and swiglu_dots 6. In torch the rows are gathered, widened, multiplied and
summed, each a pass. Lane operations an element, about 4: the roofline is the copy speed.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8.kernels._round import rounded

#: Longest piece of a row that a program takes: 16 elements to each of 128 threads.
_COLUMNS = 2048


@triton.jit
def _load(x, at, mask):
    """Elements of ``x`` in float32, 0 where masked."""
    return tl.load(x + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def _combine_kernel(
    y, out, slot, weights, columns,
    COPIES: tl.constexpr, WEIGHTED: tl.constexpr, HARDWARE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # One program: some columns of one token.
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros((COLUMNS,), tl.float32)
    for j in tl.static_range(COPIES):
        at = tl.load(slot + token * COPIES + j) * columns + column
        row = _load(y, at, inside)
        if WEIGHTED:
            row = row * tl.load(weights + token * COPIES + j).to(tl.float32)
        if j == 0:
            total = row
        else:
            total += row
    value = rounded(total, out.dtype.element_ty, HARDWARE).to(out.dtype.element_ty)
    tl.store(out + token.to(tl.int64) * columns + column, value, mask=inside)


@triton.jit
def _spread_kernel(
    x, out, copy, weights, columns,
    COPIES: tl.constexpr, WEIGHTED: tl.constexpr, HARDWARE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # One program: some columns of one row.
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    which = tl.load(copy + row)
    value = _load(x, which // COPIES * columns + column, inside)
    if WEIGHTED:
        value = value * tl.load(weights + which).to(tl.float32)
    value = rounded(value, out.dtype.element_ty, HARDWARE).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * columns + column, value, mask=inside)


@triton.jit
def _row_dots_kernel(y, x, slot, out, columns, COPIES: tl.constexpr, COLUMNS: tl.constexpr):
    # One program: one row. The rows of a token follow one another, so that all but one find x in L2.
    copy = tl.program_id(0)
    from_row = tl.load(slot + copy) * columns
    from_token = (copy // COPIES).to(tl.int64) * columns
    product = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < columns
        product += _load(y, from_row + column, inside) * _load(x, from_token + column, inside)
    tl.store(out + copy, tl.sum(product, 0))


@triton.jit
def _swiglu_dots_kernel(gate, up, x, out, columns, COLUMNS: tl.constexpr):
    # One program: one row.
    row = tl.program_id(0).to(tl.int64) * columns
    product = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < columns
        g = _load(gate, row + column, inside)
        hidden = g * tl.sigmoid(g) * _load(up, row + column, inside)
        product += hidden * _load(x, row + column, inside)
    tl.store(out + tl.program_id(0), tl.sum(product, 0))


def _columns(columns: int) -> int:
    return min(triton.next_power_of_2(columns), _COLUMNS)


def _launch(
    kernel: Any, rows: int, x: Tensor, index: Tensor, weights: Tensor | None, copies: int
) -> Tensor:
    out = x.new_empty(rows, x.shape[1])
    if out.numel():
        piece = _columns(x.shape[1])
        kernel[(rows, triton.cdiv(x.shape[1], piece))](
            x.contiguous(), out, index.contiguous(), out if weights is None else weights.contiguous(),
            x.shape[1], COPIES=copies, WEIGHTED=weights is not None, HARDWARE=x.device.type == "cuda",
            COLUMNS=piece, num_warps=max(piece // 512, 1), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def combine(y: Tensor, slot: Tensor, weights: Tensor | None, copies: int) -> Tensor:
    """See ``combine.combine``."""
    return _launch(_combine_kernel, slot.shape[0] // copies, y, slot, weights, copies)


def spread(x: Tensor, copy: Tensor, weights: Tensor | None, copies: int) -> Tensor:
    """See ``combine.spread``."""
    return _launch(_spread_kernel, copy.shape[0], x, copy, weights, copies)


def row_dots(y: Tensor, slot: Tensor, x: Tensor, copies: int) -> Tensor:
    """See ``combine.row_dots``."""
    y, x, slot = y.contiguous(), x.contiguous(), slot.contiguous()
    out = y.new_zeros(x.shape[0], copies, dtype=torch.float32)
    if y.numel():
        piece = _columns(y.shape[1])
        _row_dots_kernel[(y.shape[0],)](
            y, x, slot, out, y.shape[1], COPIES=copies, COLUMNS=piece, num_warps=max(piece // 512, 1)
        )
    return out


def swiglu_dots(gate: Tensor, up: Tensor, x: Tensor) -> Tensor:
    """See ``combine.swiglu_dots``."""
    gate, up, x = gate.contiguous(), up.contiguous(), x.contiguous()
    out = gate.new_zeros(gate.shape[0], dtype=torch.float32)
    if gate.numel():
        piece = _columns(gate.shape[1])
        _swiglu_dots_kernel[(gate.shape[0],)](
            gate, up, x, out, gate.shape[1], COLUMNS=piece, num_warps=max(piece // 512, 1)
        )
    return out
