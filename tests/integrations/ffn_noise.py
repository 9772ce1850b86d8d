"""How far quantisation moves an expert FFN and its gradients: error propagation from the recipe.

A worst case over all rounding errors says nothing here: added up with one sign they come to several
times the values themselves. Errors of rounding to nearest do not conspire, so this propagates second
moments: a Noisy is a float64 value with the variance of the error of the computation under a recipe.
Every single error enters with the square of its largest size, three times its variance if it is
uniform; errors of different elements count as independent. The result bounds the norm of the error
of a whole tensor: 0.15 to 0.22 of the norm of the tensor itself for FP8, where errors of a third of that
are measured.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moefp8 import Gemm, Recipe
from moefp8.formats import element_format

#: Relative rounding of one operation, 2^-(bits of the significand).
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
#: Largest slopes of silu: |silu'| <= 1.0999 near x = 2.4, |silu''| <= silu''(0) = 0.5.
SILU_SLOPE, SILU_CURVATURE = 1.1, 0.5


class Noisy(NamedTuple):
    mid: Tensor
    var: Tensor
    #: Rounding of the results of operations on it.
    unit: float

    @classmethod
    def exact(cls, x: Tensor, dtype: torch.dtype = torch.float32) -> "Noisy":
        """A tensor that computations in ``dtype`` take as it is."""
        return cls(x.detach().double(), torch.zeros_like(x, dtype=torch.float64), UNIT[dtype])

    @property
    def square(self) -> Tensor:
        """Expected square."""
        return self.mid.square() + self.var

    @property
    def mT(self) -> "Noisy":  # noqa: N802  (the name tensors have)
        return Noisy(self.mid.mT, self.var.mT, self.unit)

    def columns(self, index: slice) -> "Noisy":
        return Noisy(self.mid[:, index], self.var[:, index], self.unit)

    def rounded(self, operations: int = 1) -> "Noisy":
        return Noisy(self.mid, self.var + operations * self.unit**2 * self.square, self.unit)

    def __add__(self, other: "Noisy") -> "Noisy":
        return Noisy(self.mid + other.mid, self.var + other.var, self.unit).rounded()

    def __mul__(self, other: "Noisy") -> "Noisy":
        var = self.square * other.square - self.mid.square() * other.mid.square()
        return Noisy(self.mid * other.mid, var, self.unit).rounded()

    def __matmul__(self, other: "Noisy") -> "Noisy":
        products = self.square @ other.square
        var = products - self.mid.square() @ other.mid.square()
        # Accumulated in float32 (each of K partial sums has at most the square of all) and rounded once.
        accumulation = self.mid.shape[1] * UNIT[torch.float32] ** 2 * products
        return Noisy(self.mid @ other.mid, var + accumulation, self.unit).rounded()

    def sum(self, dim: int) -> "Noisy":
        accumulation = self.mid.shape[dim] * self.unit**2 * self.square.sum(dim)
        return Noisy(self.mid.sum(dim), self.var.sum(dim) + accumulation, self.unit)

    def quantized(self, axis: int, gemm: Gemm) -> "Noisy":
        """The errors of mx_error_bound: relative for normal elements, absolute for subnormal ones.

        The scale is at most 2 amax / max (rule rceil rounds amax / max up to a power of two; format
        "row" does not round), and the amax of a block at most that of the whole axis.
        """
        if gemm.format == "none":
            return self
        fmt = element_format(gemm.dtype)
        scale = 2 * self.square.amax(axis, keepdim=True).sqrt() / fmt.max
        error = torch.maximum(self.square * fmt.half_ulp**2, (scale * fmt.half_min_subnormal) ** 2)
        return Noisy(self.mid, self.var + error, self.unit)


def product(a: Noisy, b: Noisy, gemm: Gemm) -> Noisy:
    return a.quantized(-1, gemm) @ b.quantized(-2, gemm)


class Gate(NamedTuple):
    """``f(gate) (up + shift)`` with f(x) = x sigmoid(alpha x): silu for alpha = 1.

    f is computed with up to eight operations, its slope with up to sixteen.
    """

    gate: slice
    up: slice
    alpha: float = 1.0
    shift: float = 0.0

    def f(self, x: Noisy) -> Noisy:
        value = x.mid * torch.sigmoid(self.alpha * x.mid)
        return Noisy(value, SILU_SLOPE**2 * x.var, x.unit).rounded(8)

    def slope(self, x: Noisy) -> Noisy:
        s = torch.sigmoid(self.alpha * x.mid)
        value = s * (1 + self.alpha * x.mid * (1 - s))
        return Noisy(value, (self.alpha * SILU_CURVATURE) ** 2 * x.var, x.unit).rounded(16)

    def shifted(self, x: Noisy) -> Noisy:
        return Noisy(x.mid + self.shift, x.var, x.unit).rounded()


class Weights(NamedTuple):
    """One expert: up (D, 2H), down (H, D) and their biases (zeros where there are none)."""

    up: Noisy
    up_bias: Noisy
    down: Noisy
    down_bias: Noisy


class FFN(NamedTuple):
    """Results for the rows of one expert: output and gradients."""

    y: Noisy
    dx: Noisy
    dscore: Noisy
    dup: Noisy
    dup_bias: Noisy
    ddown: Noisy
    ddown_bias: Noisy
    #: Largest magnitude that enters the gate, for families that clamp there.
    preactivation: float


def expert_ffn(x: Noisy, score: Noisy, w: Weights, gate: Gate, dy: Noisy, recipe: Recipe) -> FFN:
    """Output ``score * ffn(x)`` of the rows of one expert, and every gradient for the cotangent dy."""
    u = product(x, w.up, recipe.fwd) + w.up_bias
    g, up = u.columns(gate.gate), gate.shifted(u.columns(gate.up))
    h = gate.f(g) * up
    y = product(h, w.down, recipe.fwd) + w.down_bias

    dh_out = score * dy
    dh = product(dh_out, w.down.mT, recipe.dgrad)
    dup_half, dgate_half = dh * gate.f(g), dh * up * gate.slope(g)
    du = Noisy(torch.empty_like(u.mid), torch.empty_like(u.var), u.unit)
    for part, half in ((gate.gate, dgate_half), (gate.up, dup_half)):
        du.mid[:, part], du.var[:, part] = half.mid, half.var
    return FFN(
        y=score * y,
        dx=product(du, w.up.mT, recipe.dgrad),
        dscore=(dy * y).sum(1),
        dup=product(x.mT, du, recipe.wgrad),
        dup_bias=du.sum(0),
        ddown=product(h.mT, dh_out, recipe.wgrad),
        ddown_bias=dh_out.sum(0),
        preactivation=float(u.square.max()) ** 0.5,
    )


def check_within_noise(name: str, got: Tensor, noisy: Noisy) -> None:
    """The norm of the error is at most what the recipe's rounding errors add up to."""
    error, allowed = (got.double() - noisy.mid).norm(), noisy.var.sum().sqrt()
    assert allowed <= noisy.mid.norm() / 3, f"{name}: a bound of {allowed} would say nothing"
    assert error <= allowed, f"{name}: error {error} > {allowed}, of a norm of {noisy.mid.norm()}"
