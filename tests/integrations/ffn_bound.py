"""What quantisation can do to an expert FFN and its gradients at most: arithmetic on intervals.

A Ball is a float64 value with the largest distance that the computation under a recipe, in float32 or
bfloat16, can have from it. Every operation of the layer, forward and backward, is written on Balls
below, so the radius of a result is a bound that follows from the recipe alone.
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


class Ball(NamedTuple):
    mid: Tensor
    rad: Tensor
    #: Rounding of the results of operations on it.
    unit: float

    @classmethod
    def exact(cls, x: Tensor, dtype: torch.dtype = torch.float32) -> "Ball":
        """A tensor that computations in ``dtype`` take as it is."""
        return cls(x.detach().double(), torch.zeros_like(x, dtype=torch.float64), UNIT[dtype])

    @property
    def abs_max(self) -> Tensor:
        return self.mid.abs() + self.rad

    @property
    def mT(self) -> "Ball":  # noqa: N802  (the name tensors have)
        return Ball(self.mid.mT, self.rad.mT, self.unit)

    def columns(self, index: slice) -> "Ball":
        return Ball(self.mid[:, index], self.rad[:, index], self.unit)

    def rounded(self, operations: int = 1) -> "Ball":
        return Ball(self.mid, self.rad + operations * self.unit * self.abs_max, self.unit)

    def __add__(self, other: "Ball") -> "Ball":
        return Ball(self.mid + other.mid, self.rad + other.rad, self.unit).rounded()

    def __mul__(self, other: "Ball") -> "Ball":
        rad = self.mid.abs() * other.rad + self.rad * other.mid.abs() + self.rad * other.rad
        return Ball(self.mid * other.mid, rad, self.unit).rounded()

    def __matmul__(self, other: "Ball") -> "Ball":
        rad = self.mid.abs() @ other.rad + self.rad @ other.mid.abs() + self.rad @ other.rad
        # Accumulated in float32, in any order, and rounded once.
        accumulation = self.mid.shape[1] * UNIT[torch.float32] * (self.abs_max @ other.abs_max)
        return Ball(self.mid @ other.mid, rad + accumulation, self.unit).rounded()

    def sum(self, dim: int) -> "Ball":
        out = Ball(self.mid.sum(dim), self.rad.sum(dim), self.unit)
        return out._replace(rad=out.rad + self.mid.shape[dim] * self.unit * self.abs_max.sum(dim))

    def quantized(self, axis: int, gemm: Gemm) -> "Ball":
        """The bound of mx_error_bound at the worst point of the ball.

        The scale is at most 2 amax / max (rule rceil rounds amax / max up to a power of two; format
        "row" does not round), and the amax of a block at most that of the whole axis.
        """
        if gemm.format == "none":
            return self
        fmt = element_format(gemm.dtype)
        scale = 2 * self.abs_max.amax(axis, keepdim=True) / fmt.max
        error = torch.maximum(self.abs_max * fmt.half_ulp, scale * fmt.half_min_subnormal)
        error = error + 4 * UNIT[torch.float32] * self.abs_max  # format "row" divides and multiplies
        return Ball(self.mid, self.rad + error, self.unit)


def product(a: Ball, b: Ball, gemm: Gemm) -> Ball:
    return a.quantized(-1, gemm) @ b.quantized(-2, gemm)


class Gate(NamedTuple):
    """``f(gate) (up + shift)`` with f(x) = x sigmoid(alpha x): silu for alpha = 1."""

    gate: slice
    up: slice
    alpha: float = 1.0
    shift: float = 0.0

    def f(self, x: Ball) -> Ball:
        value = x.mid * torch.sigmoid(self.alpha * x.mid)
        return Ball(value, SILU_SLOPE * x.rad, x.unit).rounded(8)

    def slope(self, x: Ball) -> Ball:
        s = torch.sigmoid(self.alpha * x.mid)
        value = s * (1 + self.alpha * x.mid * (1 - s))
        return Ball(value, self.alpha * SILU_CURVATURE * x.rad, x.unit).rounded(16)

    def shifted(self, x: Ball) -> Ball:
        return Ball(x.mid + self.shift, x.rad, x.unit).rounded()


class Weights(NamedTuple):
    """One expert: up (D, 2H), down (H, D) and their biases (zeros where there are none)."""

    up: Ball
    up_bias: Ball
    down: Ball
    down_bias: Ball


class FFN(NamedTuple):
    """Results for the rows of one expert: output and gradients."""

    y: Ball
    dx: Ball
    dscore: Ball
    dup: Ball
    dup_bias: Ball
    ddown: Ball
    ddown_bias: Ball
    #: Largest magnitude that enters the gate, for families that clamp there.
    preactivation: float


def expert_ffn(x: Ball, score: Ball, w: Weights, gate: Gate, dy: Ball, recipe: Recipe) -> FFN:
    """Output ``score * ffn(x)`` of the rows of one expert, and every gradient for the cotangent dy."""
    u = product(x, w.up, recipe.fwd) + w.up_bias
    g, up = u.columns(gate.gate), gate.shifted(u.columns(gate.up))
    h = gate.f(g) * up
    y = product(h, w.down, recipe.fwd) + w.down_bias

    dh_out = score * dy
    dh = product(dh_out, w.down.mT, recipe.dgrad)
    dup_half, dgate_half = dh * gate.f(g), dh * up * gate.slope(g)
    du = Ball(torch.empty_like(u.mid), torch.empty_like(u.rad), u.unit)
    for part, half in ((gate.gate, dgate_half), (gate.up, dup_half)):
        du.mid[:, part], du.rad[:, part] = half.mid, half.rad
    return FFN(
        y=score * y,
        dx=product(du, w.up.mT, recipe.dgrad),
        dscore=(dy * y).sum(1),
        dup=product(x.mT, du, recipe.wgrad),
        dup_bias=du.sum(0),
        ddown=product(h.mT, dh_out, recipe.wgrad),
        ddown_bias=dh_out.sum(0),
        preactivation=float(u.abs_max.max()),
    )
