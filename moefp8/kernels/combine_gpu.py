"""The kernels of ``combine.py``.

Bytes an element of y in bf16, k rows to a token: forward 2 read and 2/k written. In torch the rows are
gathered, widened, multiplied and summed, each a pass. Backward 2 + 2/k read and 2 written. Lane
operations an element, about 4: the roofline is the copy speed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8.kernels._swiglu import load_wide, rounded

#: Longest piece of a row that a program takes: 16 elements to each of 128 threads.
_COLUMNS = 2048


@triton.jit
def _combine_kernel(
    y, other, out, slot, weights, columns,
    COPIES: tl.constexpr, WEIGHTED: tl.constexpr, PAIR: tl.constexpr,
    HARDWARE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # One program: some columns of one token.
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros((COLUMNS,), tl.float32)
    for j in tl.static_range(COPIES):
        at = tl.load(slot + token * COPIES + j) * columns + column
        row = load_wide(y, at, inside)
        if PAIR:
            row = rounded(row + load_wide(other, at, inside), y.dtype.element_ty, HARDWARE)
        if WEIGHTED:
            row = row * tl.load(weights + token * COPIES + j).to(tl.float32)
        if j == 0:
            total = row
        else:
            total += row
    value = rounded(total, out.dtype.element_ty, HARDWARE).to(out.dtype.element_ty)
    tl.store(out + token.to(tl.int64) * columns + column, value, mask=inside)


@triton.jit
def _combine_backward_kernel(
    y, g, slot, weights, d_y, d_weights, columns,
    COPIES: tl.constexpr, HARDWARE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # One program: one row. The rows of a token follow one another, so that all but one find g in L2.
    copy = tl.program_id(0)
    from_row = tl.load(slot + copy) * columns
    from_token = (copy // COPIES).to(tl.int64) * columns
    weight = tl.load(weights + copy).to(tl.float32)
    product = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < columns
        cotangent = load_wide(g, from_token + column, inside)
        product += load_wide(y, from_row + column, inside) * cotangent
        value = rounded(cotangent * weight, d_y.dtype.element_ty, HARDWARE).to(d_y.dtype.element_ty)
        tl.store(d_y + from_row + column, value, mask=inside)
    tl.store(d_weights + copy, tl.sum(product, 0).to(d_weights.dtype.element_ty))


def _columns(columns: int) -> int:
    return min(triton.next_power_of_2(columns), _COLUMNS)


def _launch(y: Tensor, other: Tensor | None, slot: Tensor, weights: Tensor | None, copies: int) -> Tensor:
    tokens, columns = slot.shape[0] // copies, y.shape[1]
    out = y.new_empty(tokens, columns)
    if out.numel():
        piece = _columns(columns)
        scores = out if weights is None else weights.contiguous()
        second = out if other is None else other.contiguous()
        _combine_kernel[(tokens, triton.cdiv(columns, piece))](
            y.contiguous(), second, out, slot.contiguous(), scores, columns,
            COPIES=copies, WEIGHTED=weights is not None, PAIR=other is not None,
            HARDWARE=y.device.type == "cuda", COLUMNS=piece,
            num_warps=max(piece // 512, 1), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def combine(y: Tensor, slot: Tensor, weights: Tensor | None, copies: int) -> Tensor:
    """See ``combine.combine``."""
    return _launch(y, None, slot, weights, copies)


def combine_pair(y: Tensor, other: Tensor, slot: Tensor, copies: int) -> Tensor:
    """See ``combine.combine_pair``."""
    return _launch(y, other, slot, None, copies)


def combine_backward(y: Tensor, slot: Tensor, weights: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """See ``combine.combine_backward``."""
    y, g, slot, weights = y.contiguous(), g.contiguous(), slot.contiguous(), weights.contiguous()
    d_y, d_weights = torch.empty_like(y), torch.zeros_like(weights)
    if y.numel():
        piece = _columns(y.shape[1])
        _combine_backward_kernel[(y.shape[0],)](
            y, g, slot, weights, d_y, d_weights, y.shape[1],
            COPIES=weights.shape[1], HARDWARE=y.device.type == "cuda",
            COLUMNS=piece, num_warps=max(piece // 512, 1), enable_fp_fusion=False,
        )  # fmt: skip
    return d_y, d_weights
