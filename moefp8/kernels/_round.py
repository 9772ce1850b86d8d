"""Between float32 and the dtypes of 16 bits, with the bits of torch in the interpreter as on a GPU."""

import triton
import triton.language as tl

from moefp8.kernels._fp8 import INF_BITS


@triton.jit
def rounded(x, dtype: tl.constexpr, HARDWARE: tl.constexpr):
    """Float32 ``x`` rounded once to ``dtype``, nearest even, in float32 again."""
    if dtype == tl.float32:
        out = x
    elif dtype == tl.float16:
        out = x.to(dtype).to(tl.float32)
    elif HARDWARE:
        # Two at a time. One at a time the conversion runs at an eighth of the rate.
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2;"
            " shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
            "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:  # the interpreter's conversion truncates
        bits = x.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
        out = tl.where((bits & 0x7FFFFFFF) > INF_BITS, bits, near).to(tl.float32, bitcast=True)
    return out


@triton.jit
def narrowed(x, dtype: tl.constexpr, HARDWARE: tl.constexpr):
    """The same, held in ``dtype``."""
    if dtype != tl.bfloat16:
        out = x.to(dtype)
    elif HARDWARE:
        out = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        bits = rounded(x, dtype, HARDWARE).to(tl.int32, bitcast=True)
        out = (bits >> 16).to(tl.int16).to(dtype, bitcast=True)
    return out


@triton.jit
def widened(x, HARDWARE: tl.constexpr):
    """``x`` in float32. From bfloat16, two at a time, it is one instruction an element."""
    if (x.dtype == tl.bfloat16) & HARDWARE:
        out = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=r,r", [x],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    elif x.dtype == tl.bfloat16:  # the interpreter's conversion fails subnormal ones
        bits = x.to(tl.uint16, bitcast=True).to(tl.int32) << 16
        out = bits.to(tl.float32, bitcast=True)
    else:
        out = x.to(tl.float32)
    return out
