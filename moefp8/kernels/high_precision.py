"""Grouped products of bfloat16 operands, by ``torch._grouped_mm``, with the contract of this library.

Torch leaves rows past the last group unwritten. A kernel that looks at them alone costs a few
microseconds; masking the result in torch would read and write all of it. With a bias, which torch does not
add, the portable kernel multiplies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8.kernels.gemm_portable import launch_bfloat16

#: Rows that a program fills with zeros at a time.
_TAIL_ROWS = 16


@triton.jit
def _zero_tail_kernel(out, offs, num_groups, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # Mostly there is no tail: as few programs as fill the card, each of which finds that out by one load.
    end = tl.maximum(tl.load(offs + num_groups - 1), 0)
    for first in range(end + tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        for left in range(0, columns, COLUMNS):
            column = left + tl.arange(0, COLUMNS)
            at = row.to(tl.int64)[:, None] * columns + column[None, :]
            tail = (row < rows)[:, None] & (column < columns)[None, :]
            tl.store(out + at, tl.zeros((ROWS, COLUMNS), out.dtype.element_ty), mask=tail)


def zero_tail(out: Tensor, offs: Tensor) -> None:
    """Fill the rows of ``out`` (M, N) past the last group with zeros."""
    rows, columns = out.shape
    grid = (min(triton.cdiv(rows, _TAIL_ROWS), 512),)
    _zero_tail_kernel[grid](out, offs, offs.shape[0], rows, columns, ROWS=_TAIL_ROWS, COLUMNS=256)


def _aligned(x: Tensor) -> Tensor:
    """In a memory order that torch accepts: one of the last two axes contiguous, the other packed."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def _fake_rows(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2])


@leaf("high_precision_rows", fake=_fake_rows, vmap=by_loop)
def high_precision_rows(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """``out[i] = a[i] @ b[g]`` in bfloat16, zero for rows past the last group."""
    if a.numel() == 0 or b.numel() == 0:
        return _fake_rows(a, b, offs).zero_()
    # Torch wants groups in multiples of 16 bytes where they run along contiguous memory: let them not.
    offs = offs.contiguous()
    out = torch._grouped_mm(a.contiguous(), _aligned(b), offs)
    zero_tail(out, offs)
    return out


def _for_tma(x: Tensor) -> Tensor:
    """``x`` contiguous and from a multiple of 16 bytes on, which a view into a buffer may not be."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _fake_biased(a: Tensor, b: Tensor, tiles: Tensor, bias: Tensor) -> Tensor:
    return _fake_rows(a, b, tiles)


@leaf("biased_rows", fake=_fake_biased, vmap=by_loop)
def biased_rows(a: Tensor, b: Tensor, tiles: Tensor, bias: Tensor) -> Tensor:
    """``out[i] = a[i] @ b[g] + bias[g]`` added up in float32 and rounded once; zero past the last group.

    Args:
        a, b: ``(M, K)`` and ``(G, K, N)`` bfloat16.
        tiles: of a plan for blocks of 128 rows.
        bias: ``(N,)`` or ``(G, N)``.

    Returns:
        ``(M, N)`` bfloat16, every element written.
    """
    out = _fake_biased(a, b, tiles, bias)
    if out.numel() == 0:
        return out
    a, bias, stacked = _for_tma(a), bias.contiguous(), _for_tma(b.mT).flatten(0, 1)
    launch_bfloat16(a, stacked, bias, out, tiles, b.shape[0])
    return out


def high_precision_product(
    a: Tensor, b: Tensor, offs: Tensor, tiles: Tensor, bias: Tensor | None
) -> Tensor:
    """``out[i] = a[i] @ b[g] + bias[g]``, rounded once; ``tiles`` are those of a plan for 128 rows.

    Torch's product takes no bias, and adding it to a rounded product would round twice.
    """
    return high_precision_rows(a, b, offs) if bias is None else biased_rows(a, b, tiles, bias)


def _fake_contraction(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])


@leaf("high_precision_contraction", fake=_fake_contraction, vmap=by_loop)
def high_precision_contraction(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """``out[g] = a[:, t in g] @ b[t in g]`` in bfloat16, zero for an empty group."""
    if a.numel() == 0 or b.numel() == 0:
        return _fake_contraction(a, b, offs).zero_()
    # Groups not along contiguous memory, as in the rows form.
    return torch._grouped_mm(a.mT.contiguous().mT, b.contiguous(), offs.contiguous())
