"""The experts: SwiGLU feed-forward networks on rows sorted by expert, and the shared one on all rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moefp8._ffn import ffn, ffn_statistics
from moefp8._operands import check_operand
from moefp8.auto import Auto, resolve
from moefp8.groups import check_offs
from moefp8.quantized import QuantizedParams
from moefp8.recipe import BF16, MXFP8, Recipe, check_recipe
from moefp8.routing import check_param
from moefp8.statistics import Statistics


def expert_ffn(
    params: Mapping[str, Any],
    x: Tensor,
    offs: Tensor,
    *,
    recipe: Recipe | Auto = MXFP8,
    implementation: str | Sequence[str] | None = None,
    quantized: QuantizedParams | None = None,
    probe: Statistics | None = None,
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
        recipe, implementation: as for :func:`scaled_grouped_mm`; or ``"auto"`` for the recipe that
            :func:`choose_recipe` chooses.
        quantized: the weights as :func:`quantize_params` quantised them, to be read instead of quantising
            again; gradients are those of ``params``.
        probe: from :func:`cotangent_probe`; its gradient is the statistics of the cotangents.

    Returns:
        ``(M, D)`` of the dtype of ``x``.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`scaled_grouped_mm`; a missing parameter;
            ``quantized`` is stale, of other weights, or for another recipe or implementation.

    >>> up, down = torch.ones(2, 64, 32), torch.ones(2, 32, 64)
    >>> offs = torch.tensor([2, 5], dtype=torch.int32)
    >>> expert_ffn({"w1": up, "w2": down, "w3": up}, torch.ones(5, 32), offs).shape
    torch.Size([5, 32])
    """
    if isinstance(recipe, str) and recipe == "auto":
        _check(params, x, offs, BF16)
        recipe = resolve(params, x, x.shape[0], quantized, probe)
    _check(params, x, offs, recipe, auto=True)
    return ffn(params, x, offs, recipe, implementation, quantized=quantized, probe=probe)


def expert_statistics(
    params: Mapping[str, Any],
    x: Tensor,
    offs: Tensor,
    *,
    recipe: Recipe = MXFP8,
    implementation: str | Sequence[str] | None = None,
) -> Statistics:
    """How the forward operands of :func:`expert_ffn` fare when they are quantised.

    It repeats the products of gate and up to know ``hidden``, so it costs two thirds of a forward, and
    some ten passes over each operand: something to do once in a while. For the cotangents see
    :func:`cotangent_probe`.

    Args:
        params, x, offs, recipe, implementation: as for :func:`expert_ffn`.

    Returns:
        A dict of dicts of :class:`OperandStats`: of ``"x"`` and ``"hidden"`` under ``"fwd"`` (along their
        columns) and ``"wgrad"`` (along the rows of each expert), of ``"w1"``, ``"w2"`` and ``"w3"`` under
        ``"fwd"`` and ``"dgrad"`` (along columns and rows of each matrix), where ``recipe`` quantises those.
        They have no gradient.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`expert_ffn`.

    >>> weight = torch.ones(1, 32, 32)
    >>> params = {"w1": weight, "w2": weight, "w3": weight}
    >>> x = torch.full((1, 32), 2.0**-16)
    >>> x[0, :8] = 1.0
    >>> expert_statistics(params, x, torch.tensor([1], dtype=torch.int32))["x"]["fwd"].subnormal
    tensor(0.7500)
    """
    _check(params, x, offs, recipe)
    return ffn_statistics(params, x, offs, recipe, implementation)


def _check(
    params: Mapping[str, Any], x: Tensor, offs: Tensor, recipe: Recipe, *, auto: bool = False
) -> None:
    check_recipe(recipe, auto=auto)
    check_operand(x, "x", recipe)
    if x.ndim != 2:
        raise ValueError(f"x: expected shape (M, D), got {tuple(x.shape)}")
    if "w1" not in params or getattr(params["w1"], "ndim", 0) != 3:
        raise ValueError("params['w1']: expected a tensor of shape (E, H, D)")
    num_experts, hidden, _ = params["w1"].shape
    check_ffn(params, (num_experts,), x.shape[1], hidden, recipe, "params", x)
    check_offs(offs, num_experts, x)


def shared_ffn(
    params: Mapping[str, Any],
    x: Tensor,
    recipe: Recipe,
    implementation: str | Sequence[str] | None,
    quantized: QuantizedParams | None,
) -> Tensor:
    """The same for the one expert that every token goes through: a group of all rows."""
    alone = {key: p.unsqueeze(0) for key, p in params.items()}
    every = torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)
    where = "params['shared']"
    return ffn(alone, x, every, recipe, implementation, quantized=quantized, where=where)


def check_ffn(
    params: Mapping[str, Any],
    lead: tuple[int, ...],
    dim: int,
    hidden: int,
    recipe: Recipe,
    where: str,
    x: Tensor,
) -> None:
    """Check w1, w2, w3 and those of b1, b2, b3 that are there; all on the device of ``x``."""
    shapes = {"w1": (hidden, dim), "w2": (dim, hidden), "w3": (hidden, dim)}
    biases = {"b1": (hidden,), "b2": (dim,), "b3": (hidden,)}
    for key, shape in (shapes | biases).items():
        if key in shapes or key in params:
            check_param(params, key, (*lead, *shape), where, x)
    for key in shapes:
        check_operand(params[key], f"{where}[{key!r}]", recipe)
