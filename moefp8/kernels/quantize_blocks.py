"""Quantise grouped tokens to true MX, every block of 32 under its own scale, along either axis or both.

For SM100, whose tensor core multiplies with block scales. A scale depends on 32 elements only, so one
tile of 128 x 128 is all a program needs to see, and both copies come from one read:

    along the columns   codes where the elements are; scales of a row beside one another
    along the rows      codes transposed, K-major, each group in a segment that is filled up with zeros

Scales leave in the tensor core's layout (``swizzle.py``): a tile of 128 rows is one row of tiles in the
first copy, one column of tiles in the second, so every program writes whole tiles and no other pass has
to touch them. Zeros fill the tiles up, as they fill the last block of a row up.

Bytes an element of a bf16 input: 2 read, 1 + 1/32 written for each copy; two passes would read it twice.
Lane operations an element, both copies, about 14: widen, magnitude, two maxima, two multiplications, two
half conversions, a transposition through shared memory. The roofline is the copy speed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8._quantize import quantize
from moefp8.formats import BLOCK
from moefp8.groups import segments as segments_of
from moefp8.kernels import swizzle
from moefp8.kernels._fp8 import (
    INF_BITS,
    MX_BLOCK,
    NAN,
    TRITON_DTYPES,
    encode,
    encoding,
    magnitude_bits,
    scale_of,
)
from moefp8.kernels.plan import SEGMENT, Plan
from moefp8.kernels.swizzle import place
from moefp8.recipe import Gemm

#: Columns to a tile: four blocks, one tile of scales.
TILE_COLUMNS = swizzle.TILE_COLUMNS * BLOCK


@triton.jit
def _scale_byte(amax, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr):
    """E8M0 scale of blocks with this amax (bits), 255 for a poisoned one, and its reciprocal."""
    sick = amax >= INF_BITS
    _, inverse = scale_of(tl.where(sick, 0, amax), False, CARRY, EMAX, MAX)
    byte = 254 - (inverse.to(tl.int32, bitcast=True) >> 23)  # the reciprocal is 2^(127 - byte)
    return tl.where(sick, 255, byte).to(tl.uint8), inverse, sick


@triton.jit
def _quantize_blocks_kernel(
    x, row_data, row_scale, column_data, column_scale, segments,
    num_groups, columns, stride, num_segments,
    OUT: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
    CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, COLUMNS)
    block = tl.program_id(0) // across
    if tl.load(segments + 3 * block) < num_groups:
        tile = tl.program_id(0) % across
        start = tl.load(segments + 3 * block + 1)
        end = tl.load(segments + 3 * block + 2)
        row = start + tl.arange(0, ROWS)
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        here = (row < end)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None]
        v = tl.load(x + at * stride + column[None, :], mask=here, other=0).to(tl.float32)
        bits = magnitude_bits(v)
        down: tl.constexpr = ROWS // MX_BLOCK
        blocks: tl.constexpr = COLUMNS // MX_BLOCK

        if BY_ROW:
            amax = tl.max(tl.reshape(bits, (ROWS, blocks, MX_BLOCK)), 2)
            byte, inverse, sick = _scale_byte(amax, CARRY, EMAX, MAX)
            factor = tl.broadcast_to(inverse[:, :, None], (ROWS, blocks, MX_BLOCK))
            poison = tl.broadcast_to(sick[:, :, None], (ROWS, blocks, MX_BLOCK))
            code = encode(
                v * tl.reshape(factor, (ROWS, COLUMNS)), OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE
            )
            code = tl.where(tl.reshape(poison, (ROWS, COLUMNS)), NAN, code).to(tl.uint8)
            tl.store(row_data + at * columns + column[None, :], code, mask=here)
            inner = place(tl.arange(0, ROWS)[:, None], tl.arange(0, blocks)[None, :])
            tl.store(row_scale + tl.program_id(0).to(tl.int64) * 512 + inner, byte)

        if BY_COLUMN:
            amax = tl.max(tl.reshape(bits, (down, MX_BLOCK, COLUMNS)), 1)
            byte, inverse, sick = _scale_byte(amax, CARRY, EMAX, MAX)
            factor = tl.broadcast_to(inverse[:, None, :], (down, MX_BLOCK, COLUMNS))
            poison = tl.broadcast_to(sick[:, None, :], (down, MX_BLOCK, COLUMNS))
            code = encode(
                v * tl.reshape(factor, (ROWS, COLUMNS)), OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE
            )
            code = tl.where(tl.reshape(poison, (ROWS, COLUMNS)), NAN, code).to(tl.uint8)
            position = block * ROWS + tl.arange(0, ROWS)
            # A single segment comes in as a constant, which has no method to widen it.
            pitch = tl.cast(num_segments, tl.int64) * ROWS
            tl.store(
                column_data + column[:, None] * pitch + position[None, :],
                tl.trans(code), mask=(column < columns)[:, None],
            )  # fmt: skip
            # In this copy the columns of x are the rows, and each segment is one column of tiles.
            inner = place(tl.arange(0, COLUMNS)[None, :], tl.arange(0, down)[:, None])
            tl.store(column_scale + (tile.to(tl.int64) * num_segments + block) * 512 + inner, byte)


class Blocks(NamedTuple):
    """One copy of a matrix in 32-element blocks.

    Attributes:
        data: float8, K-major: ``(M, K)``, or ``(K, P)`` with P = 128 times the segments of the plan.
        scale: uint8 E8M0 in tiles: ``(S, ceil(K / 128), 512)``, or ``(ceil(K / 128), S, 512)``.
    """

    data: Tensor
    scale: Tensor


def _fake(
    x: Tensor, segments: Tensor, num_groups: int, dtype: torch.dtype, rule: str,
    by_row: bool, by_column: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, columns = x.shape
    num_segments, across = segments.shape[0], triton.cdiv(columns, TILE_COLUMNS)
    return (
        x.new_empty((rows, columns) if by_row else (0, 0), dtype=dtype),
        x.new_empty((num_segments if by_row else 0, across, swizzle.TILE_BYTES), dtype=torch.uint8),
        x.new_empty((columns, num_segments * SEGMENT) if by_column else (0, 0), dtype=dtype),
        x.new_empty((across if by_column else 0, num_segments, swizzle.TILE_BYTES), dtype=torch.uint8),
    )


@leaf("quantize_blocks", fake=_fake, vmap=by_loop)
def _quantize_blocks(
    x: Tensor, segments: Tensor, num_groups: int, dtype: torch.dtype, rule: str,
    by_row: bool, by_column: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x = x if x.stride(1) == 1 else x.contiguous()
    out = _fake(x, segments, num_groups, dtype, rule, by_row, by_column)
    constants = encoding(Gemm("mx", dtype, rule), x.device)._asdict()
    constants.pop("ROWWISE")
    if x.numel() and (by_row or by_column):
        _quantize_blocks_kernel[(segments.shape[0] * triton.cdiv(x.shape[1], TILE_COLUMNS),)](
            x, out[0].view(torch.uint8), out[1], out[2].view(torch.uint8), out[3], segments,
            num_groups, x.shape[1], x.stride(0), segments.shape[0],
            OUT=TRITON_DTYPES[dtype], BY_ROW=by_row, BY_COLUMN=by_column, **constants,
            ROWS=SEGMENT, COLUMNS=TILE_COLUMNS, num_warps=8,
        )  # fmt: skip
    return out


def quantize_blocks(
    x: Tensor, plan: Plan, along_columns: Gemm | None, along_rows: Gemm | None
) -> tuple[Blocks, Blocks]:
    """``x`` (M, K), grouped by ``plan``, in blocks along its columns and along its rows, those asked for.

    One pass if both are quantised alike, which is every preset.

    Returns:
        along the columns: data (M, K). Rows past the last group are not written.
        along the rows: data (K, P); group g has its columns ``[ends[g-1], ends[g])``, past its rows
            zeros. Past ``ends[-1]`` nothing is written.

        A copy that is not asked for has no elements.
    """
    first, second = along_columns, along_rows
    if first and second and (first.dtype, first.rule) != (second.dtype, second.rule):
        return quantize_blocks(x, plan, first, None)[0], quantize_blocks(x, plan, None, second)[1]
    how = first or second or Gemm()
    num_groups = plan.ends.shape[0]
    asked = first is not None, second is not None
    out = _quantize_blocks(x, plan.segments, num_groups, how.dtype, how.rule, *asked)
    return Blocks(*out[:2]), Blocks(*out[2:])


def reference_columns(x: Tensor, offs: Tensor, gemm: Gemm) -> Blocks:
    """The twin of :func:`quantize_blocks` along the columns; rows past ``offs[-1]`` are quantised too."""
    data, scale = quantize(x, -1, gemm.dtype, gemm.rule, BLOCK, None)
    return Blocks(data, swizzle.reference_rows(scale, offs))


def reference_rows(x: Tensor, offs: Tensor, gemm: Gemm) -> Blocks:
    """The twin of :func:`quantize_blocks` along the rows; what follows the last segment is zero."""
    padded = segments_of(offs, x.shape[0], SEGMENT).pad(x)
    data, scale = quantize(padded, -2, gemm.dtype, gemm.rule, BLOCK, None)
    data = data.view(torch.uint8).mT.contiguous().view(gemm.dtype)
    return Blocks(data, swizzle.reference(scale.mT))
