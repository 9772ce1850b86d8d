"""Round a matrix to true MX: every block of 32 to FP8 under its own scale, and back to bfloat16.

Hopper's tensor core has no block scales. Scaling inside the product costs a multiply-add an element
every 32 of the contraction, 290-321 TFLOP/s at best, half of bfloat16. An MX value however *is* a
bfloat16 number: four significant bits, and a power of two. So the exact product is the bfloat16 one
of rounded operands, and rounding them costs one pass: 2 bytes read, 2 written.

(Values below 2^-133 are the exception: bfloat16 ends there, MX reaches 2^-136.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8._quantize import dequantize, quantize
from moefp8.formats import BLOCK
from moefp8.groups import segments as segments_of
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
from moefp8.kernels.plan import SEGMENT, Plan
from moefp8.recipe import Gemm

TILE_COLUMNS = 64


@triton.jit
def _fake_quantize_kernel(
    x, out, segments, num_groups, columns, stride,
    ALONG_ROWS: tl.constexpr, OUT: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # One program: a tile of whole blocks, whichever way they lie.
    across = tl.cdiv(columns, COLUMNS)
    block = tl.program_id(0) // across
    if tl.load(segments + 3 * block) < num_groups:
        row = tl.load(segments + 3 * block + 1) + tl.arange(0, ROWS)
        end = tl.load(segments + 3 * block + 2)
        column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
        here = (row < end)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None]
        v = tl.load(x + at * stride + column[None, :], mask=here, other=0).to(tl.float32)
        bits = magnitude_bits(v)
        if ALONG_ROWS:  # blocks of 32 rows
            amax = tl.max(tl.reshape(bits, (ROWS // MX_BLOCK, MX_BLOCK, COLUMNS)), 1)
            amax = tl.broadcast_to(amax[:, None, :], (ROWS // MX_BLOCK, MX_BLOCK, COLUMNS))
        else:
            amax = tl.max(tl.reshape(bits, (ROWS, COLUMNS // MX_BLOCK, MX_BLOCK)), 2)
            amax = tl.broadcast_to(amax[:, :, None], (ROWS, COLUMNS // MX_BLOCK, MX_BLOCK))
        amax = tl.reshape(amax, (ROWS, COLUMNS))
        factor, inverse = scale_of(tl.where(amax < INF_BITS, amax, 0), ROWWISE, CARRY, EMAX, MAX)
        code = encode(v * inverse, OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE)
        value = code.to(OUT, bitcast=True).to(tl.float32) * factor
        value = tl.where(amax < INF_BITS, value.to(tl.int32, bitcast=True), NAN_BITS)
        value = value.to(tl.float32, bitcast=True).to(tl.bfloat16)
        tl.store(out + at * columns + column[None, :], value, mask=here)


def _fake(x: Tensor, segments: Tensor, num_groups: int, axis: int, dtype: torch.dtype, rule: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16)


@leaf("fake_quantize", fake=_fake, vmap=by_loop)
def _fake_quantize(
    x: Tensor, segments: Tensor, num_groups: int, axis: int, dtype: torch.dtype, rule: str
) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    out = _fake(x, segments, num_groups, axis, dtype, rule)
    launch = (segments.shape[0] * triton.cdiv(x.shape[1], TILE_COLUMNS),)
    if x.numel():
        _fake_quantize_kernel[launch](
            x, out, segments, num_groups, x.shape[1], x.stride(0),
            ALONG_ROWS=axis == -2, OUT=TRITON_DTYPES[dtype],
            **encoding(Gemm("mx", dtype, rule), x.device)._asdict(),
            ROWS=SEGMENT, COLUMNS=TILE_COLUMNS, num_warps=8,
        )  # fmt: skip
    return out


def fake_quantize(x: Tensor, plan: Plan, axis: int, gemm: Gemm) -> Tensor:
    """``x`` (M, K) rounded to MX in blocks of 32 along ``axis`` (-1, or -2 within groups), in bfloat16.

    Rows past the last group are not written.
    """
    return _fake_quantize(x, plan.segments, plan.ends.shape[0], axis, gemm.dtype, gemm.rule)


def reference(x: Tensor, offs: Tensor, axis: int, gemm: Gemm) -> Tensor:
    """The twin of :func:`fake_quantize`, in torch; rows past ``offs[-1]`` are zero."""

    def rounded(v: Tensor) -> Tensor:
        codes = quantize(v, axis, gemm.dtype, gemm.rule, BLOCK, None)
        return dequantize(*codes, axis, BLOCK, torch.float32)

    layout = segments_of(offs, x.shape[0], BLOCK)
    value = rounded(layout.pad(x))
    out = value.new_zeros(x.shape).index_put((layout.source[layout.valid],), value[layout.valid])
    return out.to(torch.bfloat16)
