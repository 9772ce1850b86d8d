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

from moefp8.kernels._pieces import largest_of_row, paired
from moefp8.kernels._round import narrowed, widened

#: At this gate and below, 1 + exp(-gate) comes near 2^126, from where on its reciprocal is subnormal and
#: :func:`sigmoid_at` needs the exact division.
STEEP = tl.constexpr(-87.0)


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
def load_wide(x, at, mask, HARDWARE: tl.constexpr):
    """Elements of ``x`` in float32, 0 where masked."""
    return widened(tl.load(x + at, mask=mask, other=0), HARDWARE)


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
