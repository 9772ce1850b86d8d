"""Round a matrix to FP8 under one scale for every superblock of 64 elements and more, and back.

The same as ``fake_quantize_blocks.py``, which does the blocks of 32, for longer spans. A span of more than
128 elements is read twice, the second time mostly out of the cache.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8._quantize import dequantize, quantize
from moefp8.formats import BLOCK
from moefp8.groups import segments as segments_of
from moefp8.kernels._fp8 import INF_BITS, MX_BLOCK, TRITON_DTYPES, encoding, scale_of
from moefp8.kernels._round import widened
from moefp8.kernels.fake_quantize_blocks import block_amax, fake_quantize_blocks, fake_quantized, spread
from moefp8.kernels.plan import SEGMENT, Plan, plan
from moefp8.recipe import Gemm


@triton.jit
def _span_amax(
    blocks, ALONG_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr
):
    """Bits of the largest magnitude of each span of a tile, given its blocks'; poisoned ones left out."""
    amax = tl.where(blocks < INF_BITS, blocks, 0)
    if SPAN > MX_BLOCK:
        if ALONG_ROWS:
            amax = tl.max(tl.reshape(amax, (ROWS // SPAN, SPAN // MX_BLOCK, COLUMNS)), 1)
        else:
            amax = tl.max(tl.reshape(amax, (ROWS, COLUMNS // SPAN, SPAN // MX_BLOCK)), 2)
    return amax


@triton.jit
def _fake_quantize_kernel(
    x, out, blocks, num_groups, columns, stride,
    ALONG_ROWS: tl.constexpr, OUT: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    # One program: a tile of whole spans, whichever way they lie, or the tiles (PIECES) of one span.
    across = tl.cdiv(columns, COLUMNS if ALONG_ROWS else COLUMNS * PIECES)
    block = tl.program_id(0) // across
    if tl.load(blocks + 3 * block) < num_groups:
        first = tl.load(blocks + 3 * block + 1)
        end = tl.load(blocks + 3 * block + 2)
        left = tl.program_id(0) % across * (COLUMNS if ALONG_ROWS else COLUMNS * PIECES)
        down: tl.constexpr = ROWS if ALONG_ROWS else 0
        right: tl.constexpr = 0 if ALONG_ROWS else COLUMNS
        pieces = PIECES
        if PIECES > 1:  # the last span of an axis may be short
            reach = tl.cdiv(end - first, ROWS) if ALONG_ROWS else tl.cdiv(columns - left, COLUMNS)
            pieces = tl.minimum(PIECES, reach)
            amax = tl.zeros((1, COLUMNS) if ALONG_ROWS else (ROWS, 1), tl.int32)
            for i in range(pieces):
                row = first + i * down + tl.arange(0, ROWS)
                column = left + i * right + tl.arange(0, COLUMNS)
                here = (row < end)[:, None] & (column < columns)[None, :]
                at = row.to(tl.int64)[:, None] * stride + column[None, :]
                v = widened(tl.load(x + at, mask=here, other=0), HARDWARE)
                mine = _span_amax(block_amax(v, ALONG_ROWS, ROWS, COLUMNS), ALONG_ROWS, ROWS, COLUMNS, SPAN)
                amax = tl.maximum(amax, mine)
        for i in range(pieces):
            row = first + i * down + tl.arange(0, ROWS)
            column = left + i * right + tl.arange(0, COLUMNS)
            here = (row < end)[:, None] & (column < columns)[None, :]
            at = row.to(tl.int64)[:, None]
            v = widened(tl.load(x + at * stride + column[None, :], mask=here, other=0), HARDWARE)
            by_block = block_amax(v, ALONG_ROWS, ROWS, COLUMNS)
            if PIECES == 1:
                amax = _span_amax(by_block, ALONG_ROWS, ROWS, COLUMNS, SPAN)
            factor, inverse = scale_of(amax, ROWWISE, CARRY, EMAX, MAX)
            value = fake_quantized(
                v, spread(inverse, ALONG_ROWS, ROWS, COLUMNS, SPAN),
                spread(factor, ALONG_ROWS, ROWS, COLUMNS, SPAN),
                spread(by_block >= INF_BITS, ALONG_ROWS, ROWS, COLUMNS, MX_BLOCK),
                OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE,
            )  # fmt: skip
            tl.store(out + at * columns + column[None, :], value, mask=here)


class Tiling(NamedTuple):
    """How programs walk over spans, as constants of the kernel."""

    ROWS: int
    COLUMNS: int
    #: Elements that share a scale, of those of one tile.
    SPAN: int
    #: Tiles to a span.
    PIECES: int


def tiling(span: int, axis: int) -> Tiling:
    """Tiles of 128 rows, or of what divides both 128 and the ``span``, where they stand for part of it."""
    part = math.gcd(span, SEGMENT)
    pieces = span // part
    if axis == -1:
        return Tiling(SEGMENT, max(part, 64) if pieces == 1 else part, part, pieces)
    return Tiling(SEGMENT if pieces == 1 else part, 64, part, pieces)


def _fake(
    x: Tensor, offs: Tensor, segments: Tensor, axis: int, dtype: torch.dtype, rule: str, group: int
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16)


@leaf("fake_quantize", fake=_fake, vmap=by_loop)
def _fake_quantize(
    x: Tensor, offs: Tensor, segments: Tensor, axis: int, dtype: torch.dtype, rule: str, group: int
) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    out = _fake(x, offs, segments, axis, dtype, rule, group)
    if x.numel() == 0:
        return out
    # A span longer than the axis is the axis.
    tile = tiling(min(group, triton.cdiv(x.shape[axis], SEGMENT) * SEGMENT), axis)
    blocks, across = segments, tile.COLUMNS
    if axis == -1:
        across *= tile.PIECES
    elif tile.PIECES > 1:  # spans do not begin where segments do
        blocks = plan(offs, x.shape[0], tile.ROWS * tile.PIECES).tiles
    _fake_quantize_kernel[(blocks.shape[0] * triton.cdiv(x.shape[1], across),)](
        x, out, blocks, offs.shape[0], x.shape[1], x.stride(0),
        ALONG_ROWS=axis == -2, OUT=TRITON_DTYPES[dtype],
        **encoding(Gemm("mx", dtype, rule), x.device)._asdict(), **tile._asdict(), num_warps=8,
    )  # fmt: skip
    return out


def span(gemm: Gemm) -> int:
    """Elements that share a scale."""
    return BLOCK if gemm.group is None else gemm.group


def fake_quantize(x: Tensor, offs: Tensor, layout: Plan, axis: int, gemm: Gemm) -> Tensor:
    """``x`` (M, K) rounded to MX in spans along ``axis`` (-1, or -2 within groups), in bfloat16.

    ``gemm.group`` elements share a scale, any multiple of 32. Rows past the last group are not written.
    """
    group = span(gemm)
    if group == BLOCK:
        return fake_quantize_blocks(x, layout, *((gemm, None) if axis == -1 else (None, gemm)))[axis == -2]
    return _fake_quantize(x, offs, layout.segments, axis, gemm.dtype, gemm.rule, group)


def reference(x: Tensor, offs: Tensor, axis: int, gemm: Gemm) -> Tensor:
    """The twin of :func:`fake_quantize`, in torch; rows past ``offs[-1]`` are zero."""
    group = span(gemm)
    layout = segments_of(offs, x.shape[0], group)
    padded = layout.pad(x)
    codes = quantize(padded, axis, gemm.dtype, gemm.rule, group, None)
    value = dequantize(*codes, axis, group, torch.float32)
    out = value.new_zeros(x.shape).index_put((layout.source[layout.valid],), value[layout.valid])
    return out.to(torch.bfloat16)
