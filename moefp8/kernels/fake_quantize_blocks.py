"""Round a matrix to true MX, every 32 elements to FP8 under their own scale, and back, along either axis.

Or along both, out of one read.

Hopper's tensor core has no block scales. Scaling inside the product costs a multiply-add an element
every 32 of the contraction, 290-321 TFLOP/s at best, half of bfloat16. An MX value however *is* a
bfloat16 number: four significant bits, and a power of two. So the exact product is the bfloat16 one
of rounded operands, and rounding them costs one pass: 2 bytes an element read, 2 written for each copy.

(Values below 2^-133 are the exception, where bfloat16 ends: those under scales below 2^-124 for E4M3,
2^-117 for E5M2.)

Lane operations an element and copy, about 9: magnitude, maximum, multiply, half a conversion there and
two back, multiply, a selection for poisoned blocks, half a conversion. The roofline is the copy speed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8.kernels._fp8 import (
    INF_BITS,
    MX_BLOCK,
    NAN_BITS,
    TRITON_DTYPES,
    encode,
    encoding,
    magnitude_bits,
    scale_of,
)
from moefp8.kernels._round import narrowed, widened
from moefp8.kernels.plan import SEGMENT, Plan, Tile, tile_of
from moefp8.recipe import Gemm


@triton.jit
def block_amax(v, ALONG_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bits of the largest magnitude of each block of 32 of a tile."""
    bits = magnitude_bits(v)
    if ALONG_ROWS:
        amax = tl.max(tl.reshape(bits, (ROWS // MX_BLOCK, MX_BLOCK, COLUMNS)), 1)
    else:
        amax = tl.max(tl.reshape(bits, (ROWS, COLUMNS // MX_BLOCK, MX_BLOCK)), 2)
    return amax


@triton.jit
def spread(v, ALONG_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr):
    """One value for every ``SIZE`` elements of a tile, repeated."""
    if ALONG_ROWS:
        v = tl.broadcast_to(v[:, None, :], (ROWS // SIZE, SIZE, COLUMNS))
    else:
        v = tl.broadcast_to(v[:, :, None], (ROWS, COLUMNS // SIZE, SIZE))
    return tl.reshape(v, (ROWS, COLUMNS))


@triton.jit
def fake_quantized(
    v, inverse, factor, sick, OUT: tl.constexpr, MAX: tl.constexpr, MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """``v`` in FP8 under the scale ``factor``, back in bfloat16; NaN where it is ``sick``."""
    code = encode(v * inverse, OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE)
    value = code.to(OUT, bitcast=True).to(tl.float32) * factor
    value = tl.where(sick, NAN_BITS, value.to(tl.int32, bitcast=True))
    return narrowed(value.to(tl.float32, bitcast=True), tl.bfloat16, HARDWARE)


@triton.jit
def _rounded_blocks(
    v, ALONG_ROWS: tl.constexpr, OUT: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    amax = block_amax(v, ALONG_ROWS, ROWS, COLUMNS)
    factor, inverse = scale_of(amax, ROWWISE, CARRY, EMAX, MAX)  # of a poisoned block never used
    return fake_quantized(
        v, spread(inverse, ALONG_ROWS, ROWS, COLUMNS, MX_BLOCK),
        spread(factor, ALONG_ROWS, ROWS, COLUMNS, MX_BLOCK),
        spread(amax >= INF_BITS, ALONG_ROWS, ROWS, COLUMNS, MX_BLOCK),
        OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE,
    )  # fmt: skip


@triton.jit
def _fake_quantize_blocks_kernel(
    x, along_columns, along_rows, segments, num_groups, columns, stride,
    BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, OUT: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # One program: a tile of whole blocks, whichever way they lie.
    block, first, left = tile_of(tl.program_id(0), columns, SEGMENT, ROWS, COLUMNS)
    if tl.load(segments + 3 * block) < num_groups:
        end = tl.load(segments + 3 * block + 2)
        row = tl.load(segments + 3 * block + 1) + first + tl.arange(0, ROWS)
        column = left + tl.arange(0, COLUMNS)
        here = (row < end)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None]
        v = widened(tl.load(x + at * stride + column[None, :], mask=here, other=0), HARDWARE)
        to = at * columns + column[None, :]
        if BY_ROW:
            value = _rounded_blocks(
                v, False, OUT, ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, ROWS, COLUMNS
            )
            tl.store(along_columns + to, value, mask=here)
        if BY_COLUMN:
            value = _rounded_blocks(
                v, True, OUT, ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, ROWS, COLUMNS
            )
            tl.store(along_rows + to, value, mask=here)


#: Of fourteen the fastest on an H100. Low tiles win along the rows, whose maxima warps exchange: 32 rows
#: reach 99 % of the copy speed, 128 on 8 warps 48 %.
TILE = Tile(32, 128, 2)


def _fake(
    x: Tensor,
    segments: Tensor,
    num_groups: int,
    dtype: torch.dtype,
    rule: str,
    by_row: bool,
    by_column: bool,
) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return (
        x.new_empty((rows, columns) if by_row else (0, 0), dtype=torch.bfloat16),
        x.new_empty((rows, columns) if by_column else (0, 0), dtype=torch.bfloat16),
    )


@leaf("fake_quantize_blocks", fake=_fake, vmap=by_loop)
def _fake_quantize_blocks(
    x: Tensor,
    segments: Tensor,
    num_groups: int,
    dtype: torch.dtype,
    rule: str,
    by_row: bool,
    by_column: bool,
) -> tuple[Tensor, Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    out = _fake(x, segments, num_groups, dtype, rule, by_row, by_column)
    if x.numel() and (by_row or by_column):
        _fake_quantize_blocks_kernel[(TILE.programs(segments, x.shape[1]),)](
            x, *out, segments, num_groups, x.shape[1], x.stride(0),
            BY_ROW=by_row, BY_COLUMN=by_column, OUT=TRITON_DTYPES[dtype],
            **encoding(Gemm("mx", dtype, rule), x.device)._asdict(),
            SEGMENT=SEGMENT, ROWS=TILE.rows, COLUMNS=TILE.columns, num_warps=TILE.warps,
        )  # fmt: skip
    return out


def fake_quantize_blocks(
    x: Tensor, plan: Plan, along_columns: Gemm | None, along_rows: Gemm | None
) -> tuple[Tensor, Tensor]:
    """``x`` (M, K), grouped by ``plan``, rounded to MX in blocks along its columns and along its rows.

    Those that are asked for; in one pass if both are rounded alike, which is every preset.

    Returns:
        Two matrices ``(M, K)`` in bfloat16, one that is not asked for without elements. Rows past the last
        group are not written.
    """
    first, second = along_columns, along_rows
    if first and second and (first.dtype, first.rule) != (second.dtype, second.rule):
        return (
            fake_quantize_blocks(x, plan, first, None)[0],
            fake_quantize_blocks(x, plan, None, second)[1],
        )
    how = first or second or Gemm()
    asked = first is not None, second is not None
    return _fake_quantize_blocks(x, plan.segments, plan.ends.shape[0], how.dtype, how.rule, *asked)
