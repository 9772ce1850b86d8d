"""Where the time of a step goes: its kernels, from the profiler, by what they are for.

A kernel is told by its name (``NAMES``). What a name does not tell, elementwise operations mostly, is
told by the shapes of the operation that launched it: as wide as an expert inside is SwiGLU, as wide as a
token is gathering or combining, anything else is routing.
"""

from collections.abc import Callable
from typing import Any

import torch

PARTS = ("routing", "quantise", "GEMM", "SwiGLU", "gather and combine")

#: Part by piece of a kernel's or operation's name in lower case; the first that fits.
NAMES = [
    # A fused kernel counts where its arithmetic is.
    ("swiglu", "SwiGLU"),
    ("silu", "SwiGLU"),
    ("sigmoid_mul", "SwiGLU"),
    ("quantize", "quantise"),
    ("repair_poisoned", "quantise"),
    ("_repair_kernel", "quantise"),
    ("swizzle_rows", "quantise"),  # and not the swizzles of torch's own grouped products
    ("reduce_bands", "quantise"),
    ("combine", "gather and combine"),
    ("spread", "gather and combine"),
    ("row_dots", "gather and combine"),
    ("gemm", "GEMM"),
    ("_scaled_kernel", "GEMM"),
    ("_portable_kernel", "GEMM"),
    ("zero_tail", "GEMM"),
    ("grouped_mm", "GEMM"),
    ("nvjet", "GEMM"),
    ("cutlass", "GEMM"),
    ("xmma", "GEMM"),
    ("addmm", "GEMM"),
    ("aten::mm", "GEMM"),
    ("aten::bmm", "GEMM"),
    ("plan", "routing"),
    ("list_blocks", "routing"),
    ("sort", "routing"),
    ("radix", "routing"),
    ("topk", "routing"),
    ("softmax", "routing"),
    ("scan", "routing"),
    ("searchsorted", "routing"),
]


def part_by_name(name: str) -> str | None:
    """The part that a kernel belongs to by its name, or None."""
    lower = name.lower()
    return next((part for piece, part in NAMES if piece in lower), None)


def part_by_shapes(shapes: list[Any], dim: int, hidden: int) -> str:
    """The part that an operation on these shapes belongs to, in a layer of such widths."""
    widths = {shape[-1] for shape in shapes if len(shape) > 1}
    if hidden in widths:
        return "SwiGLU"
    return "gather and combine" if dim in widths else "routing"


def time_by_part(step: Callable[[], Any], device: torch.device, dim: int, hidden: int) -> dict[str, float]:
    """Seconds of one call of ``step`` by part, of kernels on a GPU and of operations on a CPU."""
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        shapes = event.input_shapes or []
        if cuda:
            for kernel in event.kernels:
                part = part_by_name(kernel.name) or part_by_name(event.name)
                seconds[part or part_by_shapes(shapes, dim, hidden)] += kernel.duration / 1e6
        elif event.self_cpu_time_total > 0:
            part = part_by_name(event.name) or part_by_shapes(shapes, dim, hidden)
            seconds[part] += event.self_cpu_time_total / 1e6
    return seconds
