"""One grouped product as a problem to measure: its shape, its operands, its operations and bytes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moefp8.groups import generate_jagged_offs

#: A promotion interval longer than any contraction.
NEVER = 2**30


class Problem(NamedTuple):
    """``(M, K) x (G, K, N) -> (M, N)`` and its two gradients."""

    m: int
    k: int
    n: int
    groups: int

    def __str__(self) -> str:
        return f"M {self.m}, K {self.k}, N {self.n}, G {self.groups}"

    @property
    def operations(self) -> int:
        """Of one product; fwd, dgrad and wgrad each take as many."""
        return 2 * self.m * self.k * self.n

    @property
    def elements(self) -> int:
        """Of activations, weights and output cotangent together."""
        return self.m * self.k + self.groups * self.k * self.n + self.m * self.n

    def bytes_moved(self, backward: bool, fp8: bool) -> int:
        """Least traffic with device memory, everything read and written once by each step.

        bf16, fwd + bwd: every element of a, b and g is read by two products, and out, da and db are
        as many elements written once: 3 x 2 bytes. FP8: read to be quantised (2), two copies
        written (2) and read (2), and the same results (2): 8 bytes. Forward alone: a and b read and
        out written, 2 bytes each; FP8 adds a copy of a and b, written and read.
        """
        if backward:
            return self.elements * (8 if fp8 else 6)
        operands = self.elements - self.m * self.n
        return 2 * self.elements + (2 * operands if fp8 else 0)

    def least_seconds(self, backward: bool, fp8_peak: float, copy_speed: float) -> float:
        """Time that quantisers at copy speed and products at the FP8 peak would take, one after another.

        A quantised copy costs reading bf16 once for all copies of an operand and writing each:
        fwd + bwd 2 + 1 + 1 bytes an element, forward 2 + 1.
        """
        operands = self.elements if backward else self.elements - self.m * self.n
        quantise = (4 if backward else 3) * operands / copy_speed
        return (3 if backward else 1) * self.operations / fp8_peak + quantise


class Operands(NamedTuple):
    """The tensors of a problem. ``b`` is the transposed view of a (G, N, K) weight."""

    a: Tensor
    b: Tensor
    offs: Tensor
    cotangent: Tensor


#: The published shapes: Llama4 and DeepSeek-V3 experts, and 64 small experts.
PUBLISHED = [
    *(Problem(128000, 5120, 8192, g) for g in (1, 2, 4, 8)),
    *(Problem(128000, 7168, 2048, g) for g in (1, 2, 4, 8)),
    Problem(131072, 2048, 1408, 64),
]
#: What the CPU reference does in well under a second.
SMALL = [Problem(1024, 512, 512, 4)]


def draw(problem: Problem, device: torch.device, seed: int = 0) -> Operands:
    """Gaussian bfloat16 operands, groups of equal size (the last takes the remainder)."""
    m, k, n, groups = problem
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)

    return Operands(
        a=normal(m, k).requires_grad_(),
        b=normal(groups, n, k).mT.requires_grad_(),
        offs=equal_offs(problem, device),
        cotangent=normal(m, n),
    )


def common_multiple(offs: Tensor) -> int:
    """Largest number that divides every group size."""
    ends = offs.tolist()
    return math.gcd(*(end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)))


def equal_offs(problem: Problem, device: torch.device) -> Tensor:
    ends = torch.arange(1, problem.groups + 1) * (problem.m // problem.groups)
    ends[-1] = problem.m
    return ends.to(device, torch.int32)


def unequal_offs(problem: Problem, device: torch.device, multiple_of: int, seed: int = 0) -> Tensor:
    """Random group ends; all sizes but the last are multiples of ``multiple_of``."""
    generator = torch.Generator().manual_seed(seed)
    whole = problem.m // multiple_of * multiple_of
    offs = generate_jagged_offs(problem.groups, whole, multiple_of=multiple_of, generator=generator)
    offs[-1] = problem.m
    return offs.to(device)
