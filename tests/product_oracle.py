"""The products written out: quantise, dequantise, multiply in float64, one group after another.

Only ``quantize_mx`` and ``dequantize_mx`` come from the library; they have oracles of their own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moefp8 import Gemm, MXArray, Recipe, dequantize_mx, quantize_mx

#: Unit roundoffs: half the distance from 1 to the next number.
ROUNDOFF = {
    dtype: torch.finfo(dtype).eps / 2
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


def fake(x: Tensor | MXArray, axis: int, gemm: Gemm) -> Tensor:
    """The values a product sees of ``x``, as float64."""
    if isinstance(x, MXArray):
        return dequantize_mx(x, torch.float64)
    if gemm.format == "none" or x.numel() == 0:
        return x.double()
    if gemm.format == "mx":
        q = quantize_mx(x, axis, dtype=gemm.dtype, rule=gemm.rule, group=gemm.group or 32)
        return dequantize_mx(q, torch.float64)
    # One float32 scale a row: amax over the largest value, applied by its float32 reciprocal.
    largest = torch.finfo(gemm.dtype).max
    scale = (x.float().abs().amax(axis, keepdim=True) * (1 / largest)).clamp(min=2.0**-126)
    codes = (x.float() * scale.reciprocal()).clamp(-largest, largest).to(gemm.dtype)
    return (codes.float() * scale).double()


class Product(NamedTuple):
    """An exact product of rounded operands, and what a float32 evaluation of it may be off by."""

    value: Tensor
    #: Sum of the magnitudes of the terms.
    magnitude: Tensor
    #: Terms of the longest sum.
    length: int

    def __add__(self, term: Tensor) -> "Product":
        return Product(self.value + term, self.magnitude + term.abs(), self.length + 1)

    @property
    def transposed(self) -> "Product":
        return Product(self.value.mT, self.magnitude.mT, self.length)

    def bound(self, dtype: torch.dtype, accumulator: torch.dtype = torch.float32) -> Tensor:
        """Error of n rounded products summed in any order, gamma_n sum|terms| with
        gamma_n = n u / (1 - n u) (Higham, section 3.1), then rounded to ``dtype``: u |value| more,
        or half its smallest subnormal."""
        n, u, v = self.length, ROUNDOFF[accumulator], ROUNDOFF[dtype]
        summation = n * u / (1 - n * u) * self.magnitude
        tiny = torch.finfo(dtype).smallest_normal * v
        return summation + v * (self.value.abs() + summation) + tiny

    def check(self, got: Tensor, accumulator: torch.dtype = torch.float32) -> None:
        """``got`` is this product within the bound; its dtype is the one rounded to."""
        assert got.shape == self.value.shape
        error = (got.double() - self.value).abs()
        bad = ~(error <= self.bound(got.dtype, accumulator))
        assert not bad.any(), f"{int(bad.sum())} of {bad.numel()} off, by up to {error[bad].max().item()}"


def multiply(a: Tensor | MXArray, b: Tensor, gemm: Gemm) -> Product:
    """``a @ b``, both quantised along the contraction."""
    left, right = fake(a, -1, gemm), fake(b, -2, gemm)
    return Product(left @ right, left.abs() @ right.abs(), left.shape[-1])


def ends_to_slices(offs: Tensor) -> list[slice]:
    ends = offs.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def rows(a: Tensor | MXArray, b: Tensor, offs: Tensor, gemm: Gemm) -> Product:
    """2D x 3D: the rows of a group times its matrix; zero for rows of no group."""
    value = torch.zeros(a.shape[0], b.shape[-1], dtype=torch.float64)
    magnitude = value.clone()
    left = fake(a, -1, gemm)
    for s, matrix in zip(ends_to_slices(offs), b, strict=True):
        right = fake(matrix, -2, gemm)
        value[s], magnitude[s] = left[s] @ right, left[s].abs() @ right.abs()
    return Product(value, magnitude, left.shape[-1])


def contraction(a: Tensor, b: Tensor, offs: Tensor, gemm: Gemm) -> Product:
    """2D x 2D: each group's columns of ``a`` times its rows of ``b``, quantised group by group."""
    parts = [multiply(a[:, s], b[s], gemm) for s in ends_to_slices(offs)]
    values, magnitudes, lengths = zip(*parts, strict=True)
    return Product(torch.stack(values), torch.stack(magnitudes), max(lengths))


def bias_rows(bias: Tensor, offs: Tensor, num_rows: int) -> Tensor:
    """The bias each row gets: its group's; none past the last group."""
    out = torch.zeros(num_rows, bias.shape[-1], dtype=torch.float64)
    per_group = bias.double().expand(offs.shape[0], -1)
    for s, row in zip(ends_to_slices(offs), per_group, strict=True):
        out[s] = row
    return out


def column_sums(g: Tensor) -> Product:
    """Sum over the rows of each matrix: the gradient of a bias."""
    return Product(g.double().sum(-2), g.double().abs().sum(-2), max(g.shape[-2], 1))


class Pullback(NamedTuple):
    """Output and gradients of a product with a bias."""

    out: Product
    da: Product
    db: Product
    dbias: Product


def rows_vjp(a: Tensor, b: Tensor, bias: Tensor, offs: Tensor, g: Tensor, recipe: Recipe) -> Pullback:
    out = rows(a, b, offs, recipe.fwd) + bias_rows(bias, offs, a.shape[0])
    sums = [column_sums(g[s]) for s in ends_to_slices(offs)]
    dbias = Product(
        torch.stack([s.value for s in sums]), torch.stack([s.magnitude for s in sums]), g.shape[0]
    )
    if bias.ndim == 1:
        dbias = Product(dbias.value.sum(0), dbias.magnitude.sum(0), max(g.shape[0], 1))
    return Pullback(out, rows(g, b.mT, offs, recipe.dgrad), contraction(a.mT, g, offs, recipe.wgrad), dbias)


def contraction_vjp(a: Tensor, b: Tensor, offs: Tensor, g: Tensor, recipe: Recipe) -> tuple[Product, ...]:
    """Output, da and db of the 2D x 2D form."""
    da = rows(b, g.mT, offs, recipe.dgrad).transposed
    return contraction(a, b, offs, recipe.fwd), da, rows(a.mT, g, offs, recipe.wgrad)


def dense_vjp(a: Tensor, b: Tensor, bias: Tensor, g: Tensor, recipe: Recipe) -> Pullback:
    """Of ``a @ b + bias``, batched over a leading axis if there is one."""
    added = bias.double() if bias.ndim == 1 else bias.double().unsqueeze(1)
    dbias = column_sums(g if bias.ndim == g.ndim - 1 else g.flatten(0, -2))
    return Pullback(
        multiply(a, b, recipe.fwd) + added,
        multiply(g, b.mT, recipe.dgrad),
        multiply(a.mT, g, recipe.wgrad),
        dbias,
    )
