"""FP8 arithmetic inside Triton kernels: magnitudes as bits, scales from them, and encoding.

The bit pattern of a non-negative float32, read as an integer, orders as the number does, with
infinity and then NaN at the top. So kernels take maxima of ``bits & 0x7fffffff``: one integer
maximum sees the largest magnitude *and* whether anything is not finite.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moefp8.formats import BLOCK, NAN_CODE, element_format
from moefp8.recipe import Gemm

#: Bits of float32 infinity; a magnitude at or above it is not finite.
INF_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)
NAN = tl.constexpr(NAN_CODE)
MX_BLOCK = tl.constexpr(BLOCK)

TRITON_DTYPES = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


class Encoding(NamedTuple):
    """A number format as the constants that kernels are compiled for."""

    #: Scales are float32, amax / max; otherwise powers of two.
    ROWWISE: bool
    #: Added to the bits of amax, carries into the exponent where rule "rceil" rounds up.
    CARRY: int
    EMAX: int
    MAX: float
    MANTISSA: int
    MIN_EXPONENT: int
    #: Use the machine's conversion. The interpreter's does not round to nearest even, so there the
    #: codes are worked out in integers; both agree with torch bit for bit.
    HARDWARE: bool


def encoding(gemm: Gemm, device: torch.device) -> Encoding:
    """What a kernel on ``device`` needs to know of how ``gemm`` quantises."""
    fmt = element_format(gemm.dtype)
    fraction = fmt.max / 2.0**fmt.emax - 1.0
    carry = (1 << 23) - 1 - int(fraction * (1 << 23)) if gemm.rule == "rceil" else 0
    rowwise = gemm.format == "row"
    hardware = device.type == "cuda"
    return Encoding(rowwise, carry, fmt.emax, fmt.max, fmt.mantissa_bits, fmt.min_exponent, hardware)


@triton.jit
def magnitude_bits(x):
    """Bits of |x| for float32 ``x``, as int32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(amax_bits, ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr):
    """The scale of a span with this amax (bits, finite) and its reciprocal, both float32."""
    if ROWWISE:
        # The smallest normal number keeps the scale and its reciprocal finite.
        scale = tl.maximum(amax_bits.to(tl.float32, bitcast=True) * (1.0 / MAX), 1.1754943508222875e-38)
        return scale, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    byte = tl.maximum(((amax_bits + CARRY) >> 23) - EMAX, 0)
    # 2^-127, byte 0, is a subnormal: its exponent field is 0 and its first mantissa bit is set.
    scale = tl.where(byte == 0, 0x00400000, byte << 23).to(tl.float32, bitcast=True)
    return scale, ((254 - byte) << 23).to(tl.float32, bitcast=True)


@triton.jit
def encode(
    y,
    dtype: tl.constexpr,
    MAX: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Codes (uint8) of float32 ``y`` in the FP8 ``dtype``: nearest even, saturating. NaN is not handled."""
    if HARDWARE:  # cvt.rn.satfinite
        return y.to(dtype).to(tl.uint8, bitcast=True)
    y = tl.minimum(tl.maximum(y, -MAX), MAX)
    bits = y.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    # Normal: round the mantissa to nearest even, then rebias the exponent.
    shift: tl.constexpr = 23 - MANTISSA
    half_even = (1 << (shift - 1)) - 1 + ((bits >> shift) & 1)
    normal = (bits + half_even - ((126 + MIN_EXPONENT) << 23)) >> shift
    # Subnormal: adding 2^k leaves the float32 addition to round at the subnormal's last place.
    magic: tl.constexpr = 2.0 ** (23 + MIN_EXPONENT - MANTISSA)
    magic_bits: tl.constexpr = (127 + 23 + MIN_EXPONENT - MANTISSA) << 23
    subnormal = (bits.to(tl.float32, bitcast=True) + magic).to(tl.int32, bitcast=True) - magic_bits
    code = tl.where(bits < ((127 + MIN_EXPONENT) << 23), subnormal, normal)
    return (code | sign).to(tl.uint8)
