"""Products of torch as products of a weight and an activation, and how each runs under a recipe.

Every function in ``PRODUCTS`` turns a call into a :class:`Call` or raises :class:`Keep`. All but the
grouped products are contractions with labelled axes. An axis of the weight is then one of::

    batch  in both operands and the result
    K      in both operands, summed
    N      in the weight and the result

and the axes that only the activation has are M. Without batch axes the product is
``scaled_mm((M, K), (K, N))``, with them ``scaled_grouped_mm((batch, M, K), (batch, K, N))``.
"""

import math
import string
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moefp8.dense import scaled_mm
from moefp8.grouped import scaled_grouped_mm
from moefp8.recipe import Recipe

Labels = tuple[Hashable, ...]


class Keep(Exception):  # noqa: N818 - not an error: the product stays as it is
    """A product that stays as it is; the message says why."""


class How(NamedTuple):
    recipe: Recipe
    implementation: str | Sequence[str] | None


class Call(NamedTuple):
    """One product: ``run(left, right, bias, weight_on_right, how)`` computes it under a recipe."""

    left: Tensor
    right: Tensor
    bias: Tensor | None
    run: Callable[[Tensor, Tensor, Tensor | None, bool, How], Tensor]
    flops: int
    #: Whether autocast casts the operands of the original.
    autocast: bool = True


# --- contractions --------------------------------------------------------------------------------


def _contraction(
    left: Tensor, right: Tensor, labels: tuple[Labels, Labels, Labels], bias: Tensor | None = None
) -> Call:
    in_left, in_right, in_out = labels
    sizes = dict(zip(in_left, left.shape, strict=True))
    for label, size in zip(in_right, right.shape, strict=True):
        sizes[label] = max(size, sizes.get(label, 1))

    def run(left: Tensor, right: Tensor, bias: Tensor | None, weight_on_right: bool, how: How) -> Tensor:
        if weight_on_right:
            return _contract(left, right, in_left, in_right, in_out, bias, how)
        return _contract(right, left, in_right, in_left, in_out, bias, how)

    return Call(left, right, bias, run, 2 * math.prod(sizes.values()))


def _contract(
    x: Tensor, w: Tensor, in_x: Labels, in_w: Labels, in_out: Labels, bias: Tensor | None, how: How
) -> Tensor:
    """The product of activation ``x`` and weight ``w``, axes named by labels, plus ``bias``."""
    for label in set(in_x) & set(in_w) & set(in_out):
        if w.shape[in_w.index(label)] == 1:  # broadcast: every row of x meets the same matrix
            w = w.squeeze(in_w.index(label))
            in_w = tuple(other for other in in_w if other != label)
    batch = [n for n in in_w if n in in_x and n in in_out]
    k = [n for n in in_w if n in in_x and n not in in_out]
    n = [n for n in in_w if n not in in_x and n in in_out]
    m = [n for n in in_x if n not in in_w and n in in_out]
    if len(set(in_x)) < len(in_x) or len(set(in_w)) < len(in_w):
        raise Keep("takes a diagonal")
    if len(batch) + len(k) + len(n) < len(in_w) or len(batch) + len(k) + len(m) < len(in_x):
        raise Keep("sums over an axis of one operand alone")
    if not k:
        raise Keep("contracts over nothing")
    if not n:
        raise Keep("the weight enters as a vector")
    if not batch and len(in_w) == 2 and in_x[-1] == k[0] and in_out == (*in_x[:-1], n[0]):
        right = w if in_w[0] == k[0] else w.mT
        return scaled_mm(x, right, bias=bias, recipe=how.recipe, implementation=how.implementation)

    sizes = dict(zip(in_w, w.shape, strict=True))
    x = x.expand(
        [sizes[label] if label in batch else size for label, size in zip(in_x, x.shape, strict=True)]
    )
    sizes.update(zip(in_x, x.shape, strict=True))

    def lay_out(t: Tensor, labels: Labels, *axes: list) -> Tensor:
        order = [labels.index(label) for group in axes for label in group]
        return t.permute(order).reshape([math.prod(sizes[label] for label in group) for group in axes])

    axes = (batch,) if batch else ()
    product = scaled_grouped_mm if batch else scaled_mm
    out = product(
        lay_out(x, in_x, *axes, m, k),
        lay_out(w, in_w, *axes, k, n),
        recipe=how.recipe,
        implementation=how.implementation,
    )
    have = (*batch, *m, *n)
    out = out.reshape([sizes[label] for label in have]).permute([have.index(label) for label in in_out])
    return out if bias is None else out + bias


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:  # noqa: A002
    lead = tuple(range(input.ndim - 1))
    return _contraction(input, weight, ((*lead, "k"), ("n", "k")[-weight.ndim :], (*lead, "n")), bias)


def _matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Call:  # noqa: A002
    _no_out(out)
    depth = max(input.ndim, other.ndim) - 2

    def pad(x: Tensor) -> Tensor:
        """An operand of lower rank is broadcast over the batch axes of the other."""
        return x.reshape((1,) * (depth + 2 - x.ndim) + x.shape) if 1 < x.ndim < depth + 2 else x

    batch = tuple(range(depth))
    in_left = (*batch, "m", "k") if input.ndim > 1 else ("k",)
    in_right = (*batch, "k", "n") if other.ndim > 1 else ("k",)
    in_out = (*batch, *(label for label in "mn" if label in in_left + in_right))
    product = _contraction(pad(input), pad(other), (in_left, in_right, in_out))

    def run(left: Tensor, right: Tensor, bias: Tensor | None, weight_on_right: bool, how: How) -> Tensor:
        return product.run(pad(left), pad(right), bias, weight_on_right, how)

    return product._replace(left=input, right=other, run=run)


def _rmatmul(self: Tensor, other: Tensor) -> Call:
    return _matmul(other, self)


def _mm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None, **other: Any) -> Call:  # noqa: A002
    if other:
        raise Keep(f"has arguments {', '.join(other)}")
    return _matmul(input, mat2, out=out)


def _addmm(
    input: Tensor,  # noqa: A002
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
    **other: Any,
) -> Call:
    product = _mm(mat1, mat2, out=out, **other)

    def run(left: Tensor, right: Tensor, bias: Tensor | None, weight_on_right: bool, how: How) -> Tensor:
        if bias is not None and bias.ndim == 1 and beta == alpha == 1 and bias.shape == right.shape[-1:]:
            return product.run(left, right, bias, weight_on_right, how)
        result = product.run(left, right, None, weight_on_right, how)
        if alpha != 1:
            result = result * alpha
        return result if beta == 0 or bias is None else result + (bias if beta == 1 else bias * beta)

    return product._replace(bias=input, run=run)


def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, **keywords: Any) -> Call:  # noqa: A002
    return _addmm(input, batch1, batch2, **keywords)


def _einsum(equation: str, *operands: Any) -> Call:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if len(operands) != 2:
        raise Keep(f"einsum of {len(operands)} operands")
    inputs, _, output = equation.replace(" ", "").partition("->")
    left, right = inputs.split(",")
    if "->" not in equation:
        letters = sorted(c for c in set(inputs) & set(string.ascii_letters) if inputs.count(c) == 1)
        output = ("..." if "..." in inputs else "") + "".join(letters)

    def expand(term: str, ndim: int) -> Labels:
        before, dots, after = term.partition("...")
        depth = ndim - len(before) - len(after) if dots else 0
        return (*before, *range(-depth, 0), *after)  # counted from the right, as broadcasting does

    in_left, in_right = expand(left, operands[0].ndim), expand(right, operands[1].ndim)
    depth = max([0, *(-label for label in (*in_left, *in_right) if isinstance(label, int))])
    before, dots, after = output.partition("...")
    in_out = (*before, *(range(-depth, 0) if dots else ()), *after)
    return _contraction(operands[0], operands[1], (in_left, in_right, in_out))


# --- grouped products ----------------------------------------------------------------------------


def _grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Call:
    def run(left: Tensor, right: Tensor, bias: Tensor | None, weight_on_right: bool, how: How) -> Tensor:
        kept: dict[str, Any] = {
            "recipe": how.recipe,
            "out_dtype": out_dtype,
            "implementation": how.implementation,
        }
        if weight_on_right and right.ndim == 3:
            return scaled_grouped_mm(left, right, offs, bias=bias, **kept)
        if not weight_on_right and left.ndim == 3 and bias is None:
            return scaled_grouped_mm(right.mT, left.mT, offs, **kept).mT
        raise Keep("the weight is not stacked by groups")

    # Every form reads the left operand once and meets each of its entries with N of the right.
    flops = 2 * (mat_a.numel() * mat_b.shape[-1])
    if mat_a.ndim == 3 and mat_b.ndim == 2:
        flops //= mat_a.shape[0]
    return Call(mat_a, mat_b, bias, run, flops, autocast=False)


def _no_out(out: Tensor | None) -> None:
    if out is not None:
        raise Keep("writes into out=")


def _table() -> dict[Callable, Callable[..., Call]]:
    lowered: dict[Callable[..., Call], list[Any]] = {
        _linear: [functional.linear],
        _matmul: [torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.linalg.matmul],
        _rmatmul: [Tensor.__rmatmul__],
        _mm: [torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.mv, Tensor.mv],
        _addmm: [torch.addmm, Tensor.addmm],
        _baddbmm: [torch.baddbmm, Tensor.baddbmm],
        _einsum: [torch.einsum, torch.functional.einsum],
        _grouped_mm: [torch._grouped_mm, functional.grouped_mm],
    }
    return {function: lower for lower, functions in lowered.items() for function in functions}


#: The product functions of torch, as function modes see them.
PRODUCTS = _table()
