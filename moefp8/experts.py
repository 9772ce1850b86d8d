"""The experts: SwiGLU feed-forward networks on rows sorted by expert, and the shared one on all rows."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moefp8._custom_vjp import custom_vjp
from moefp8._operands import check_operand
from moefp8.dense import scaled_mm
from moefp8.grouped import scaled_grouped_mm
from moefp8.recipe import MXFP8, Recipe, check_recipe
from moefp8.routing import check_param


def _swiglu_fwd(static: None, gate: Tensor, up: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    wide = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(wide)
    return (g * g.sigmoid() * up.to(wide)).to(gate.dtype), (gate, up)


def _swiglu_bwd(
    static: None, needed: tuple[bool, ...], gate: Tensor, up: Tensor, cotangent: Tensor
) -> Sequence[Tensor | None]:
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, u, c = gate.to(wide), up.to(wide), cotangent.to(wide)
    s = g.sigmoid()
    d_gate = (c * u * (s * (1 + g * (1 - s)))).to(gate.dtype) if needed[0] else None
    d_up = (c * (g * s)).to(up.dtype) if needed[1] else None
    return d_gate, d_up


# Its own VJP, so that it computes in float32 and rounds once in both directions, and keeps two tensors
# for the backward, in the dtype they came in; autograd would keep four, in float32.
_swiglu = custom_vjp("expert_ffn", _swiglu_fwd, _swiglu_bwd)


def expert_ffn(
    params: Mapping[str, Any],
    x: Tensor,
    offs: Tensor,
    *,
    recipe: Recipe = MXFP8,
    implementation: str | Sequence[str] | None = None,
) -> Tensor:
    """The SwiGLU feed-forward of each expert on its own rows.

    For the rows i of expert e::

        gate   = w1[e] @ x[i] + b1[e]
        up     = w3[e] @ x[i] + b3[e]
        hidden = silu(gate) * up
        out[i] = w2[e] @ hidden + b2[e]

    with the three products under ``recipe``, and ``silu(gate) * up`` in float32, rounded once.

    Args:
        params: ``w1`` ``(E, H, D)``, ``w2`` ``(E, D, H)``, ``w3`` ``(E, H, D)``, and if present ``b1``
            ``(E, H)``, ``b2`` ``(E, D)``, ``b3`` ``(E, H)``. Other keys are ignored.
        x: ``(M, D)`` rows sorted by expert.
        offs: ``(E,)`` int32 end row of each expert. Rows at and past ``offs[-1]`` give zero.
        recipe, implementation: as for :func:`scaled_grouped_mm`.

    Returns:
        ``(M, D)`` of the dtype of ``x``.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`scaled_grouped_mm`; a missing parameter.

    >>> up, down = torch.ones(2, 64, 32), torch.ones(2, 32, 64)
    >>> offs = torch.tensor([2, 5], dtype=torch.int32)
    >>> expert_ffn({"w1": up, "w2": down, "w3": up}, torch.ones(5, 32), offs).shape
    torch.Size([5, 32])
    """
    check_recipe(recipe)
    check_operand(x, "x", recipe)
    if x.ndim != 2:
        raise ValueError(f"x: expected shape (M, D), got {tuple(x.shape)}")
    if "w1" not in params or getattr(params["w1"], "ndim", 0) != 3:
        raise ValueError("params['w1']: expected a tensor of shape (E, H, D)")
    check_ffn(params, (params["w1"].shape[0],), x.shape[1], params["w1"].shape[1], recipe, "params")

    product = partial(scaled_grouped_mm, offs=offs, recipe=recipe, implementation=implementation)
    return _swiglu_ffn(params, x, product)


def shared_ffn(
    params: Mapping[str, Any], x: Tensor, recipe: Recipe, implementation: str | Sequence[str] | None
) -> Tensor:
    """The same for the one expert that every token goes through."""
    return _swiglu_ffn(params, x, partial(scaled_mm, recipe=recipe, implementation=implementation))


def _swiglu_ffn(params: Mapping[str, Any], x: Tensor, product: Callable[..., Tensor]) -> Tensor:
    """The three products, each ``product(x, weight, bias=bias)``, and what lies between them."""

    def linear(x: Tensor, i: int) -> Tensor:
        return product(x, params[f"w{i}"].mT, bias=params.get(f"b{i}"))

    return linear(_swiglu(None, linear(x, 1), linear(x, 3)), 2)


def check_ffn(
    params: Mapping[str, Any], lead: tuple[int, ...], dim: int, hidden: int, recipe: Recipe, where: str
) -> None:
    """Check w1, w2, w3 and those of b1, b2, b3 that are there."""
    shapes = {"w1": (hidden, dim), "w2": (dim, hidden), "w3": (hidden, dim)}
    biases = {"b1": (hidden,), "b2": (dim,), "b3": (hidden,)}
    for key, shape in (shapes | biases).items():
        if key in shapes or key in params:
            check_param(params, key, (*lead, *shape), where)
    for key in shapes:
        check_operand(params[key], f"{where}[{key!r}]", recipe)
