"""SwiGLU inside Triton kernels, with the bits of the same formulas in torch on the same device.

The formulas are ``swiglu`` and ``swiglu_backward`` of ``ffn.py``. Every step is one IEEE operation in
float32, and kernels that use it are launched with ``enable_fp_fusion=False``, or the compiler would make
one rounding of a product and a sum. What is left is the exponential. On a GPU it is the function that
torch calls (``__nv_expf``; a test goes through all bfloat16 and float16 numbers). The interpreter has no
such function, so there torch gives the sigmoid.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from moefp8.kernels._fp8 import INF_BITS
from moefp8.kernels._pieces import largest_of_row, paired

#: At this gate and below, 1 + exp(-gate) comes near 2^126, from where on its reciprocal is subnormal and
#: :func:`sigmoid_at` needs the exact division.
STEEP = tl.constexpr(-87.0)


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


@triton.jit
def sigmoid_at(g, sigmoid, at, mask, EXACT: tl.constexpr, HARDWARE: tl.constexpr):
    """The sigmoid of float32 ``g``, but where g < STEEP only if ``EXACT``.

    ``sigmoid`` holds it where the interpreter cannot compute it.
    """
    if not HARDWARE:
        out = tl.load(sigmoid + at, mask=mask, other=0)
    elif EXACT:
        out = tl.div_rn(tl.full(g.shape, 1.0, tl.float32), 1.0 + libdevice.exp(-g))
    else:
        # The same for 1 <= x < 2^126, without a branch for each element: a Newton step in fused
        # multiply-adds makes the machine's reciprocal the nearest number.
        out = tl.inline_asm_elementwise(
            "{ .reg .f32 r, e, x; rcp.approx.ftz.f32 r, $1; neg.f32 x, $1;"
            " fma.rn.f32 e, x, r, 0f3F800000; fma.rn.f32 $0, r, e, r; }",
            "=f,f", [1.0 + libdevice.exp(-g)], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return out


@triton.jit
def load_wide(x, at, mask):
    """Elements of ``x`` in float32, 0 where masked."""
    return tl.load(x + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def hidden_of(g, u, s, dtype: tl.constexpr, HARDWARE: tl.constexpr):
    """``silu(g) * u``, rounded to ``dtype`` once, given the sigmoid ``s`` of g; all in float32."""
    return narrowed(g * s * u, dtype, HARDWARE)


@triton.jit
def d_gate_of(g, u, c, s, dtype: tl.constexpr, HARDWARE: tl.constexpr):
    """Gradient of the gate, rounded to ``dtype``, for the cotangent ``c`` of hidden."""
    return narrowed(c * u * (s * (1.0 + g * (1.0 - s))), dtype, HARDWARE)


@triton.jit
def d_up_of(g, c, s, dtype: tl.constexpr, HARDWARE: tl.constexpr):
    """Gradient of up, rounded to ``dtype``."""
    return narrowed(c * (g * s), dtype, HARDWARE)


@triton.jit
def steepness(g):
    """Integers to take the ``larger`` of: the steeper a negative gate, the larger; the others' are less.

    A NaN with its sign set counts as steeper than all, and may: it poisons what it meets.
    """
    narrow: tl.constexpr = g.dtype.primitive_bitwidth == 16
    return paired(g) if narrow else g.to(tl.int32, bitcast=True) ^ -0x80000000


@triton.jit
def any_steep(largest, dtype: tl.constexpr):
    """Whether a gate lies below STEEP, given the ``largest`` that :func:`steepness` gave, two axes."""
    limit = steepness(tl.full((1, 2), STEEP, dtype))
    return tl.max(largest_of_row(largest), 0) > tl.max(largest_of_row(limit), 0)


def sigmoid_for(gate: Tensor) -> Tensor:
    """What kernels read as ``sigmoid``: on a GPU nothing, and any tensor will do."""
    return gate if gate.device.type == "cuda" else gate.to(torch.float32).sigmoid()
