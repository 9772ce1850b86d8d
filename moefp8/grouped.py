"""The grouped products under a recipe, and their VJPs.

The three forms are closed under differentiation, so the whole backward is written in them::

    rows         out[i in g] = a[i] @ b[g]          da: rows(g, b^T)      db: contraction(a^T, g)
    contraction  out[g] = a[:, t in g] @ b[t in g]  da: rows(b, g^T)^T    db: rows(a^T, g)
    dense        out[g] = a[g] @ b[g]               in dense.py
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moefp8._custom_vjp import custom_vjp
from moefp8._operands import Operands, Static, prepare
from moefp8.dense import dense
from moefp8.groups import check_offs
from moefp8.mx import MXArray
from moefp8.recipe import MXFP8, Recipe


def _rows_fwd(static: Static, *flat: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    x = Operands.unflatten(static, flat, grouped=True)
    forward = static.products.rows_forward
    out, kept = forward(x.a, x.b, x.offs, x.bias, static.recipe, static.out_dtype)
    return out, (*flat, *kept)


def _rows_bwd(static: Static, needed: tuple[bool, ...], *residuals: Tensor) -> Sequence[Tensor | None]:
    count = len(needed)
    flat, kept, g = residuals[:count], residuals[count:-1], residuals[-1]
    x = Operands.unflatten(static, flat, grouped=True)
    b_at = 1 if static.a_group is None else 2
    grads: list[Tensor | None] = [None] * count
    a_dtype = x.differentiable_a().dtype if needed[0] else torch.float32
    grads[0], grads[b_at] = static.products.rows_backward(
        kept, x.a, x.b, x.offs, g, static.recipe, (needed[0], needed[b_at]), (a_dtype, x.b.dtype)
    )
    if x.bias is not None and needed[b_at + 1]:
        per_group = static.products.group_sum(g, x.offs)
        grads[b_at + 1] = per_group.sum_to_size(x.bias.shape).to(x.bias.dtype)
    return grads


def _contraction_fwd(static: Static, *flat: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    a, b, offs = flat
    return static.products.contraction(a, b, offs, static.recipe.fwd, static.out_dtype), flat


def _contraction_bwd(
    static: Static, needed: tuple[bool, ...], a: Tensor, b: Tensor, offs: Tensor, g: Tensor
) -> Sequence[Tensor | None]:
    products, recipe = static.products, static.recipe
    da = products.rows(b, g.mT, offs, None, recipe.dgrad, a.dtype).mT if needed[0] else None
    db = products.rows(a.mT, g, offs, None, recipe.wgrad, b.dtype) if needed[1] else None
    return da, db, None


_rows = custom_vjp("scaled_grouped_mm", _rows_fwd, _rows_bwd)
_contraction = custom_vjp("scaled_grouped_mm", _contraction_fwd, _contraction_bwd)


def scaled_grouped_mm(
    a: Tensor | MXArray,
    b: Tensor,
    offs: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    recipe: Recipe = MXFP8,
    out_dtype: torch.dtype | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Tensor:
    """Differentiable grouped matrix product with operands quantised as ``recipe`` says.

    Three forms, told apart by rank as in ``torch.nn.functional.grouped_mm``; Q(x, axis) quantises
    and dequantises x along an axis, group g owns the entries ``offs[g-1] <= i < offs[g]``::

        2D x 3D   out[i] = Q(a, K)[i] @ Q(b, K)[g] + bias[g]     rows i of group g
        2D x 2D   out[g] = Q(a, T)[:, t] @ Q(b, T)[t]            contraction grouped, t in g
        3D x 3D   out[g] = Q(a, K)[g] @ Q(b, K)[g] + bias[g]     no offs

    The gradients, here of the first form, quantise afresh along their own contractions, blocks
    restarting at every group::

        da[i]    = Q(g, N)[i] @ Q(b, N)[g]^T                     recipe.dgrad
        db[g]    = Q(a, M)[rows of g]^T @ Q(g, M)[rows of g]     recipe.wgrad
        dbias[g] = sum of g over the rows of g

    Accumulated in float32 and rounded once. Groups may have any sizes, none included; rows at and
    past ``offs[-1]`` give zero output and get zero gradient, whatever they hold.

    Args:
        a: ``(M, K)``, ``(M, T)`` or ``(G, M, K)``: float32, bfloat16 or float16, any strides. In the
            first and last form also an MXArray quantised along K (which then has no gradient).
        b: ``(G, K, N)``, ``(T, N)`` or ``(G, K, N)``, any strides: usually the transpose of a
            ``(G, N, K)`` weight.
        offs: ``(G,)`` int32 group ends, on the device of ``a``; left out in the 3D x 3D form.
        bias: ``(N,)`` or ``(G, N)``; not in the 2D x 2D form.
        recipe: a :class:`Recipe`; ``BF16`` multiplies the operands as they come, float64 included.
        out_dtype: dtype of the result, ``a``'s if left out (``b``'s for an MXArray).
        implementation: a name, several in order of preference, or None for the first that serves.

    Returns:
        ``(M, N)``, ``(G, M, N)`` or ``(G, M, N)`` of ``out_dtype``.

    Raises:
        TypeError: operands that are not floating point, float64 with a recipe that quantises,
            ``offs`` not int32, an MXArray under differentiation.
        ValueError: shapes that do not match, an MXArray along another axis than K, ``offs`` of the
            wrong length or device, or decreasing (seen where it is read on the host).
        NotImplementedError: the implementation cannot serve the call; second-order or forward-mode
            differentiation.

    >>> x, w = torch.randn(6, 32), torch.randn(2, 8, 32)
    >>> scaled_grouped_mm(x, w.mT, torch.tensor([4, 5], dtype=torch.int32))[5]
    tensor([0., 0., 0., 0., 0., 0., 0., 0.])
    """
    form = {(2, 3): "rows", (2, 2): "contraction", (3, 3): "dense"}.get((a.ndim, b.ndim))
    if form is None:
        raise ValueError(
            f"a, b: expected 2D x 3D, 2D x 2D or 3D x 3D operands, got shapes {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    static = prepare(form, a, b, bias, recipe, out_dtype, implementation)
    _check_shapes(form, a, b, offs, bias)
    if form == "rows":
        return _rows(static, *Operands(a, b, bias, offs).flat())
    if form == "contraction":
        return _contraction(static, a, b, offs)
    if bias is not None and bias.ndim == 2:
        bias = bias.unsqueeze(1)  # (G, 1, N) broadcasts over rows
    return dense(static, *Operands(a, b, bias, None).flat())


def _check_shapes(
    form: str, a: Tensor | MXArray, b: Tensor, offs: Tensor | None, bias: Tensor | None
) -> None:
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"a, b: contraction lengths differ, got shapes {shapes}")
    if form == "dense":
        if a.shape[0] != b.shape[0]:
            raise ValueError(f"a, b: numbers of groups differ, got shapes {shapes}")
        if offs is not None:
            raise ValueError("offs: 3D x 3D operands have their groups in front; leave offs out")
    elif offs is None:
        raise ValueError(f"offs: group ends are needed for operands of shapes {shapes}")
    else:
        check_offs(offs, b.shape[0] if form == "rows" else None, b)
    if form == "contraction":
        if isinstance(a, MXArray):
            raise ValueError("a: an MXArray is accepted in the 2D x 3D and 3D x 3D forms only")
        if bias is not None:
            raise ValueError("bias: is not defined for the 2D x 2D form")
    if bias is not None:
        num_groups, n = b.shape[0], b.shape[-1]
        if tuple(bias.shape) not in ((n,), (num_groups, n)):
            raise ValueError(f"bias: expected shape ({n},) or ({num_groups}, {n}), got {tuple(bias.shape)}")
