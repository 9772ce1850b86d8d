"""The dense product under a recipe, and its VJP."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moefp8._custom_vjp import custom_vjp
from moefp8._operands import Operands, Static, prepare
from moefp8.kernels.reference import high_precision
from moefp8.mx import MXArray
from moefp8.recipe import MXFP8, Recipe


def _dense_fwd(static: Static, *flat: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    x = Operands.unflatten(static, flat, grouped=False)
    out = static.products.dense(x.a, x.b, x.bias, static.recipe.fwd, static.out_dtype)
    return out, flat


def _dense_bwd(static: Static, needed: tuple[bool, ...], *residuals: Tensor) -> Sequence[Tensor | None]:
    *flat, g = residuals
    x = Operands.unflatten(static, flat, grouped=False)
    products, recipe = static.products, static.recipe
    grads: list[Tensor | None] = [None] * len(flat)
    a_leaves = 1 if static.a_group is None else 2
    if needed[0]:
        grads[0] = products.dense(g, x.b.mT, None, recipe.dgrad, x.differentiable_a().dtype)
    if needed[a_leaves]:
        grads[a_leaves] = products.dense(high_precision(x.a).mT, g, None, recipe.wgrad, x.b.dtype)
    if x.bias is not None and needed[a_leaves + 1]:
        wide = torch.promote_types(g.dtype, torch.float32)
        grads[a_leaves + 1] = g.to(wide).sum_to_size(x.bias.shape).to(x.bias.dtype)
    return grads


dense = custom_vjp("scaled_mm", _dense_fwd, _dense_bwd)


def scaled_mm(
    a: Tensor | MXArray,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    recipe: Recipe = MXFP8,
    out_dtype: torch.dtype | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Tensor:
    """Differentiable ``a @ b + bias`` with operands quantised as ``recipe`` says.

    With Q(x, axis) for quantising and dequantising x along an axis::

        out   = Q(a, K) @ Q(b, K) + bias          recipe.fwd
        da    = Q(g, N) @ Q(b, N)^T               recipe.dgrad
        db    = Q(a, M)^T @ Q(g, M)               recipe.wgrad
        dbias = sum of g over its rows

    accumulated in float32 and rounded once.

    Args:
        a: ``(..., K)`` float32, bfloat16 or float16, any strides; or an MXArray quantised along K
            (which then has no gradient). Leading axes count as rows, M in all.
        b: ``(K, N)``, any strides: usually the transpose of an ``(N, K)`` weight.
        bias: ``(N,)``.
        recipe: a :class:`Recipe`; ``BF16`` multiplies the operands as they come, float64 included.
        out_dtype: dtype of the result, ``a``'s if left out (``b``'s for an MXArray).
        implementation: a name, several in order of preference, or None for the first that serves.

    Returns:
        ``(..., N)`` of ``out_dtype``.

    Raises:
        TypeError: operands that are not floating point, float64 with a recipe that quantises, an
            MXArray under differentiation.
        ValueError: shapes that do not match, an MXArray along another axis than K, an unknown
            implementation.
        NotImplementedError: the implementation cannot serve the call; second-order or forward-mode
            differentiation.

    >>> x, w = torch.randn(5, 64), torch.randn(16, 64)
    >>> scaled_mm(x, w.T).shape
    torch.Size([5, 16])
    """
    static = prepare("dense", a, b, bias, recipe, out_dtype, implementation)
    if b.ndim != 2 or a.ndim < 1 or a.shape[-1] != b.shape[0]:
        raise ValueError(
            f"a, b: expected shapes (..., K) and (K, N), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if bias is not None and bias.shape != b.shape[1:]:
        raise ValueError(f"bias: expected shape (N,) = ({b.shape[1]},), got {tuple(bias.shape)}")
    lead = a.shape[:-1]

    def as_rows(x: Tensor) -> Tensor:
        return x.reshape(math.prod(lead), x.shape[-1])  # not -1, which is undefined where K = 0

    if isinstance(a, MXArray):
        rows: Tensor | MXArray = MXArray(as_rows(a.data), as_rows(a.scale), -1, a.group)
    else:
        rows = as_rows(a)
    out = dense(static, *Operands(rows, b, bias, None).flat())
    return out.reshape(*lead, b.shape[1])
