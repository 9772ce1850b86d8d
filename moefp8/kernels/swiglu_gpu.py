"""SwiGLU and its backward in one pass each, for feed-forwards that do not quantise what comes of them.

The bits are those of ``ffn.swiglu`` and ``ffn.swiglu_backward``, which in eager torch take six and eleven
passes, most of them over float32. Bytes an element in bf16: forward 4 read, 2 written; backward 6 and 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8.kernels._swiglu import d_gate_of, d_up_of, hidden_of, load_wide, sigmoid_at, sigmoid_for

#: Elements to a program: 16 to each of 128 threads.
_ELEMENTS = 2048


@triton.jit
def _swiglu_kernel(
    gate, up, sigmoid, hidden, count, HARDWARE: tl.constexpr, ELEMENTS: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = at < count
    g, u = load_wide(gate, at, mask, HARDWARE), load_wide(up, at, mask, HARDWARE)
    s = sigmoid_at(g, sigmoid, at, mask, True, HARDWARE)
    tl.store(hidden + at, hidden_of(g, u, s, hidden.dtype.element_ty, HARDWARE), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    gate, up, cotangent, sigmoid, d_gate, d_up, count, HARDWARE: tl.constexpr, ELEMENTS: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = at < count
    g, u = load_wide(gate, at, mask, HARDWARE), load_wide(up, at, mask, HARDWARE)
    c = load_wide(cotangent, at, mask, HARDWARE)
    s = sigmoid_at(g, sigmoid, at, mask, True, HARDWARE)
    dtype: tl.constexpr = d_gate.dtype.element_ty
    tl.store(d_gate + at, d_gate_of(g, u, c, s, dtype, HARDWARE), mask=mask)
    tl.store(d_up + at, d_up_of(g, c, s, dtype, HARDWARE), mask=mask)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See ``ffn.swiglu``."""
    gate, up = gate.contiguous(), up.contiguous()
    hidden = torch.empty_like(gate)
    if gate.numel():
        _swiglu_kernel[(triton.cdiv(gate.numel(), _ELEMENTS),)](
            gate, up, sigmoid_for(gate), hidden, gate.numel(),
            HARDWARE=gate.device.type == "cuda", ELEMENTS=_ELEMENTS, enable_fp_fusion=False,
        )  # fmt: skip
    return hidden


def swiglu_backward(gate: Tensor, up: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """See ``ffn.swiglu_backward``."""
    gate, up, cotangent = gate.contiguous(), up.contiguous(), cotangent.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        _swiglu_backward_kernel[(triton.cdiv(gate.numel(), _ELEMENTS),)](
            gate, up, cotangent, sigmoid_for(gate), d_gate, d_up, gate.numel(),
            HARDWARE=gate.device.type == "cuda", ELEMENTS=_ELEMENTS, enable_fp_fusion=False,
        )  # fmt: skip
    return d_gate, d_up
