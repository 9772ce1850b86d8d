"""What the device can do at most, measured in the same process as everything else."""

import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from moefp8.bench.timing import Step, Timer


class Ceilings(NamedTuple):
    """Rates in bytes and operations a second; NaN where the device has no such operation."""

    copy: float
    bf16: float
    fp8: float


def copy_step(num_bytes: int, device: torch.device) -> tuple[Step, int]:
    """A copy inside device memory, and the bytes it moves (read and written)."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * num_bytes


def fp8_mm(a: Tensor, b: Tensor, *, fast: bool, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """cuBLAS: ``a (M, K) @ b (K, N)``, both float8, ``b`` column-major, one scale of 1 for each."""
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=out_dtype, use_fast_accum=fast)


def no_fp8(device: torch.device) -> str | None:
    """Why the device has no FP8 tensor cores, or None if it has."""
    if device.type != "cuda":
        return "needs a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 9) else f"needs compute capability 8.9, this is {capability}"


def measure_ceilings(timer: Timer, repeats: int) -> Ceilings:
    """Median rates of a large copy, and of cuBLAS bf16 and FP8 (precise accumulation) products."""
    device = timer.device
    large = device.type == "cuda"
    copy, moved = copy_step(2**30 if large else 2**26, device)
    m, n, k = (8192, 8192, 8192) if large else (1024, 1024, 1024)
    k8 = 2 * k
    a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, k, device=device, dtype=torch.bfloat16).mT
    steps: dict[str, Step] = {"copy": copy, "bf16": lambda: a @ b}
    if no_fp8(device) is None:
        # Random values: a multiplier that sees zeros draws less power and runs faster than it can.
        a8 = torch.randn(m, k8, device=device).to(torch.float8_e4m3fn)
        b8 = torch.randn(n, k8, device=device).to(torch.float8_e4m3fn).mT
        steps["fp8"] = lambda: fp8_mm(a8, b8, fast=False)
    for step in steps.values():
        timer.first_call(step)
    times = {name: statistics.median(t) for name, t in timer.alternate(steps, repeats).seconds.items()}
    fp8 = 2 * m * n * k8 / times["fp8"] if "fp8" in times else float("nan")
    return Ceilings(moved / times["copy"], 2 * m * n * k / times["bf16"], fp8)
