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

from moefp8.kernels._fp8 import INF_BITS, magnitude_bits

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
    """``silu(g) * u`` in float32, rounded to ``dtype``, given the sigmoid ``s`` of g."""
    return rounded(g * s * u, dtype, HARDWARE)


@triton.jit
def d_gate_of(g, u, c, s, dtype: tl.constexpr, HARDWARE: tl.constexpr):
    """Gradient of the gate, rounded to ``dtype``, for the cotangent ``c`` of hidden."""
    return rounded(c * u * (s * (1.0 + g * (1.0 - s))), dtype, HARDWARE)


@triton.jit
def d_up_of(g, c, s, dtype: tl.constexpr, HARDWARE: tl.constexpr):
    """Gradient of up, rounded to ``dtype``."""
    return rounded(c * (g * s), dtype, HARDWARE)


@triton.jit
def flagged_bits(x, g, EXACT: tl.constexpr):
    """Bits of |x|, but infinity where the gate is so steep that ``x`` must be worked out ``EXACT``."""
    bits = magnitude_bits(x)
    return bits if EXACT else tl.where(g < STEEP, INF_BITS, bits)


def sigmoid_for(gate: Tensor) -> Tensor:
    """What kernels read as ``sigmoid``: on a GPU nothing, and any tensor will do."""
    return gate if gate.device.type == "cuda" else gate.to(torch.float32).sigmoid()
