"""Why kernels cannot serve a call, where Hopper's and Blackwell's have the same reasons."""

from collections.abc import Callable

import torch
import triton

from moefp8._dispatch import Request
from moefp8.recipe import Gemm

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Read once, as triton.jit does where kernels are defined; Dynamo cannot trace a look at the knob.
_INTERPRETED = triton.knobs.runtime.interpret


def refuse_device(request: Request, major: int, card: str, capability: str) -> str | None:
    """Kernels for GPUs of one ``major`` compute capability, interpreted on a CPU if called by name."""
    device = request.device
    if device.type == "cuda":
        got = torch.cuda.get_device_capability(device)
        if got[0] == major:
            return None
        return f"needs a {card} GPU (compute capability {capability}), got {got[0]}.{got[1]}"
    if device.type == "cpu" and _INTERPRETED and request.named:
        return None
    by_name = "called by name, TRITON_INTERPRET=1 runs its kernels on a CPU"
    return f"needs a {card} GPU, got {device.type} ({by_name})"


def refuse_dtypes(request: Request) -> str | None:
    a_dtype, b_dtype = request.dtypes
    operands = [b_dtype] if request.a_group is not None else [a_dtype, b_dtype]
    if any(dtype not in _DTYPES for dtype in (*operands, request.out_dtype)):
        return f"takes bfloat16, float16 and float32, got {operands} to {request.out_dtype}"
    return None


def refuse_sizes(request: Request, longest: int | None = None) -> str | None:
    """TMA wants rows of multiples of 16 bytes; ``longest`` is the most that a quantiser holds."""
    if request.form == "contraction":
        sizes = request.a_shape[0], request.b_shape[1]
    else:
        sizes = request.b_shape[-2], request.b_shape[-1]
    if any(n == 0 or n % 16 or (longest is not None and n > longest) for n in sizes):
        limit = "" if longest is None else f" up to {longest}"
        return f"needs the axes that are not grouped in multiples of 16{limit}, got {sizes}"
    return None


def refuse_products(
    request: Request, refuse_gemm: Callable[[str, Gemm, torch.dtype, torch.dtype], str | None]
) -> str | None:
    """``refuse_gemm(name, gemm, operand, out)`` of the three products."""
    recipe, out, (a_dtype, b_dtype) = request.recipe, request.out_dtype, request.dtypes
    high = a_dtype if request.a_group is None else torch.float32
    refusals = (
        refuse_gemm("fwd", recipe.fwd, torch.promote_types(high, b_dtype), out),
        refuse_gemm("dgrad", recipe.dgrad, torch.promote_types(out, b_dtype), high),
        refuse_gemm("wgrad", recipe.wgrad, torch.promote_types(out, high), b_dtype),
    )
    return next((reason for reason in refusals if reason), None)
