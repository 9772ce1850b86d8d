"""Grouped products of bfloat16 operands, by ``torch._grouped_mm``, with the contract of this library.

Torch leaves rows past the last group unwritten. A kernel that looks at them alone costs a few
microseconds; masking the result in torch would read and write all of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8.kernels.plan import SEGMENT, Plan


@triton.jit
def _zero_tail_kernel(out, offs, num_groups, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    first = tl.program_id(0) * ROWS
    end = tl.load(offs + num_groups - 1)
    if first + ROWS > end:
        row = first + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        tail = (row >= end)[:, None] & (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(out + at, tl.zeros((ROWS, COLUMNS), out.dtype.element_ty), mask=tail)


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
    out = torch._grouped_mm(_aligned(a), _aligned(b), offs)
    rows, columns = out.shape
    grid = (triton.cdiv(rows, 64), triton.cdiv(columns, 256))
    _zero_tail_kernel[grid](out, offs, offs.shape[0], rows, columns, ROWS=64, COLUMNS=256)
    return out


@triton.jit
def _pad_segments_kernel(
    x,
    out,
    segments,
    num_groups,
    columns,
    stride_row,
    stride_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(columns, COLUMNS)
    block = tl.program_id(0) // across
    if tl.load(segments + 3 * block) < num_groups:
        row = tl.load(segments + 3 * block + 1) + tl.arange(0, ROWS)
        end = tl.load(segments + 3 * block + 2)
        column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
        inside = (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * stride_row + column[None, :] * stride_column
        v = tl.load(x + at, mask=(row < end)[:, None] & inside, other=0)
        at = (block.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None] * columns + column[None, :]
        tl.store(out + at, v, mask=tl.broadcast_to(inside, (ROWS, COLUMNS)))


def _fake_pad(x: Tensor, segments: Tensor, num_groups: int) -> Tensor:
    return x.new_empty(segments.shape[0] * SEGMENT, x.shape[1])


@leaf("pad_segments", fake=_fake_pad, vmap=by_loop)
def _pad_segments(x: Tensor, segments: Tensor, num_groups: int) -> Tensor:
    out = _fake_pad(x, segments, num_groups)
    if out.numel():
        _pad_segments_kernel[(segments.shape[0] * triton.cdiv(x.shape[1], 64),)](
            x, out, segments, num_groups, x.shape[1], *x.stride(), ROWS=SEGMENT, COLUMNS=64, num_warps=8
        )
    return out


def pad_segments(x: Tensor, plan: Plan) -> Tensor:
    """The rows of each group of ``x`` (M, K) in its segment of ``plan``, filled up with zeros: (P, K).

    Past ``ends[-1]`` nothing is written. The twin is ``groups.segments(offs, M, 128).pad``.
    """
    return _pad_segments(x, plan.segments, plan.ends.shape[0])


def _fake_contraction(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(ends.shape[0], a.shape[0], b.shape[1])


@leaf("high_precision_contraction", fake=_fake_contraction, vmap=by_loop)
def high_precision_contraction(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """``out[g] = a[:, t in g] @ b[t in g]`` in bfloat16 over segments (R, P) and (P, C).

    Torch asserts on the device that contracted groups are multiples of 16 bytes; segments are.
    """
    if a.numel() == 0 or b.numel() == 0:
        return _fake_contraction(a, b, ends).zero_()
    return torch._grouped_mm(_aligned(a), _aligned(b), ends)
