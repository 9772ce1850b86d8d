"""The MoE layer: route, lay the tokens out by expert, run the experts, add up what comes back.

::

    x (T, D) --route--> weights, indices (T, top_k)
             --gather-> rows (M, D), M = T top_k, sorted by expert
             --expert_ffn: three grouped products and SwiGLU--> (M, D)
             --combine--> y (T, D)

Dropless: every expert takes all tokens routed to it, however many. Parameters are a plain dict, and
an optional parameter is an absent key.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefp8._ffn import Routed, ffn, ffn_statistics
from moefp8._operands import check_operand
from moefp8.auto import Auto, resolve
from moefp8.experts import check_ffn, shared_ffn
from moefp8.quantized import QuantizedParams, shared_copies
from moefp8.recipe import BF16, MXFP8, Recipe, check_recipe
from moefp8.routing import (
    MoEConfig,
    MoEStats,
    check_config,
    count_tokens,
    route,
    routing_stats,
)
from moefp8.statistics import Statistics

Params = dict[str, Any]


def init_moe_ffn(
    generator: torch.Generator,
    config: MoEConfig,
    *,
    bias: bool = False,
    router_bias: bool = False,
    expert_bias: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Params:
    """Draw the parameters of :func:`moe_ffn`: normal weights of variance 1 / fan-in, zero biases.

    Args:
        generator: the only source of randomness. Numbers are drawn in float32 on its device, so one
            seed gives the same weights in every dtype, up to rounding.
        config: a :class:`MoEConfig`.
        bias: give every expert, the shared one included, biases ``b1, b2, b3``.
        router_bias: give the router a bias.
        expert_bias: add the selection-only bias of :func:`update_expert_bias`, always float32.
        dtype: of everything else.
        device: where the result lives; the generator's device if left out.

    Returns:
        A dict, E = num_experts, D = dim, H = hidden, S = shared_hidden::

            router (E, D)  w1 (E, H, D)  w2 (E, D, H)  w3 (E, H, D)
            b1 (E, H)  b2 (E, D)  b3 (E, H)                  if bias
            router_bias (E,)                                 if router_bias
            expert_bias (E,) float32                         if expert_bias
            shared {w1 (S, D), w2 (D, S), w3 (S, D), ...}    if S > 0

    Raises:
        TypeError, ValueError: ``generator`` is none, or a field of ``config`` is out of range.

    >>> config = MoEConfig(dim=8, hidden=16, num_experts=4, top_k=2)
    >>> params = init_moe_ffn(torch.Generator().manual_seed(0), config)
    >>> {name: tuple(p.shape) for name, p in params.items()}
    {'router': (4, 8), 'w1': (4, 16, 8), 'w2': (4, 8, 16), 'w3': (4, 16, 8)}
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    check_config(config)
    device = generator.device if device is None else torch.device(device)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, device=generator.device) * shape[-1] ** -0.5
        return x.to(device=device, dtype=dtype)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    def ffn(*lead: int, hidden: int) -> Params:
        dim = config.dim
        weights = {
            "w1": normal(*lead, hidden, dim),
            "w2": normal(*lead, dim, hidden),
            "w3": normal(*lead, hidden, dim),
        }
        biases = {"b1": zeros(*lead, hidden), "b2": zeros(*lead, dim), "b3": zeros(*lead, hidden)}
        return weights | biases if bias else weights

    num_experts = config.num_experts
    params: Params = {"router": normal(num_experts, config.dim), **ffn(num_experts, hidden=config.hidden)}
    if router_bias:
        params["router_bias"] = zeros(num_experts)
    if expert_bias:
        params["expert_bias"] = torch.zeros(num_experts, device=device)
    if config.shared_hidden:
        params["shared"] = ffn(hidden=config.shared_hidden)
    return params


# --- moving rows ---------------------------------------------------------------------------------


class RowOrder(NamedTuple):
    """The rows t * top_k + j (choice j of token t) sorted by expert, and the way back.

    Attributes:
        source: ``(M,)`` which t * top_k + j lies at each sorted row.
        slot: ``(M,)`` the sorted row of each t * top_k + j; the inverse of ``source``.
        offs: ``(E,)`` int32 end row of each expert.
    """

    source: Tensor
    slot: Tensor
    offs: Tensor


def sort_by_expert(indices: Tensor, num_experts: int) -> RowOrder:
    """Order the rows of ``indices`` (T, top_k) by expert, and by token within an expert.

    Ids of ``num_experts`` and above (tokens of other ranks) sort past ``offs[-1]``.
    """
    flat = indices.reshape(-1)
    source = flat.sort(stable=True).indices
    row = torch.arange(flat.shape[0], device=flat.device)
    slot = torch.zeros_like(source).scatter(0, source, row)
    return RowOrder(source, slot, count_tokens(flat, num_experts).cumsum(0).to(torch.int32))


# --- the layer ---------------------------------------------------------------------------------


def _check_moe(params: Mapping[str, Any], x: Tensor, config: MoEConfig, recipe: Recipe) -> None:
    """What ``route`` does not check: unknown names, the experts, and what the recipe asks of dtypes."""
    check_config(config)
    check_recipe(recipe, auto=True)
    check_operand(x, "x", recipe)
    experts = ("w1", "w2", "w3", "b1", "b2", "b3")
    shared = ("shared",) if config.shared_hidden else ()
    _check_keys(params, ("router", "router_bias", "expert_bias", *experts, *shared), "params")
    check_ffn(params, (config.num_experts,), config.dim, config.hidden, recipe, "params", x)
    if shared:
        where = "params['shared']"
        if not isinstance(params.get("shared"), Mapping):
            raise ValueError(f"{where}: config.shared_hidden is {config.shared_hidden}; expected a dict")
        _check_keys(params["shared"], experts, where)
        check_ffn(params["shared"], (), config.dim, config.shared_hidden, recipe, where, x)


def _check_keys(params: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = [key for key in params if key not in known]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; expected some of {', '.join(known)}")


def moe_ffn(
    params: Mapping[str, Any],
    x: Tensor,
    *,
    config: MoEConfig,
    recipe: Recipe | Auto = MXFP8,
    implementation: str | Sequence[str] | None = None,
    quantized: QuantizedParams | None = None,
    statistics: bool = False,
    probe: Statistics | None = None,
) -> tuple[Tensor, MoEStats]:
    """Dropless Mixture-of-Experts feed-forward layer, as a function of a plain dict.

    With the ``indices`` and ``weights`` of :func:`route`, for each token::

        y = sum over j of  weights[j] * ffn[indices[j]](x)        scores_on "output"
        y = sum over j of  ffn[indices[j]](weights[j] * x)        scores_on "input"
        y = y + ffn[shared](x)                                    if shared_hidden

    where ``ffn[e]`` is :func:`expert_ffn`. The recipe governs the products of the experts, the shared
    one included; the router stays in float32. The sum runs in float32 and is rounded once. Each row of
    ``y`` depends on its own row of ``x`` only.

    Args:
        params: as :func:`init_moe_ffn` makes them. Leave an optional parameter out, never None.
        x: ``(..., D)`` float32, bfloat16 or float16; float64 if the recipe does not quantise.
        config: a :class:`MoEConfig`.
        recipe, implementation: as for :func:`scaled_grouped_mm`; or ``"auto"`` for the recipe that
            :func:`choose_recipe` chooses for the routed experts.
        quantized: the experts' weights as :func:`quantize_params` quantised them, to be read instead of
            quantising again; gradients are those of ``params``.
        statistics: measure the forward operands of the routed experts as well, as
            :func:`expert_statistics` does and at its cost.
        probe: from :func:`cotangent_probe`; its gradient is the statistics of the cotangents of the
            routed experts.

    Returns:
        ``(y, stats)``: ``y`` of the shape and dtype of ``x``, and :class:`MoEStats`.

    Raises:
        TypeError: ``x`` or a parameter that is not floating point, or float64 with a recipe that
            quantises.
        ValueError: a field of ``config`` out of range; a missing or unknown parameter, or one of the
            wrong shape or on another device than ``x``; ``quantized`` is stale, of other weights, or for
            another recipe or implementation.
        NotImplementedError: the implementation cannot serve the call; second-order or forward-mode
            differentiation.

    >>> config = MoEConfig(dim=32, hidden=64, num_experts=4, top_k=2)
    >>> params = init_moe_ffn(torch.Generator().manual_seed(0), config)
    >>> y, stats = moe_ffn(params, torch.ones(3, 5, 32), config=config)
    >>> y.shape, stats.tokens_per_expert.sum()
    (torch.Size([3, 5, 32]), tensor(30))
    """
    if isinstance(recipe, str) and recipe == "auto":
        _check_moe(params, x, config, BF16)
        recipe = resolve(params, x, x.shape[:-1].numel() * config.top_k, quantized, probe)
    _check_moe(params, x, config, recipe)
    routing = route(params, x, config)
    tokens = x.reshape(-1, config.dim)
    weights = routing.weights.reshape(-1, config.top_k)

    order = sort_by_expert(routing.indices, config.num_experts)
    # Gathering and combining go with the feed-forward, which may quantise rows as it copies them.
    routed = Routed(order.source, order.slot, weights, config.scores_on)
    arguments = (params, tokens, order.offs, recipe, implementation)
    y = ffn(*arguments, routed=routed, quantized=quantized, probe=probe)

    if "shared" in params:
        shared = None if quantized is None else shared_copies(quantized)
        y = y + shared_ffn(params["shared"], tokens, recipe, implementation, shared)
    stats = routing_stats(routing)
    if statistics:
        measured = ffn_statistics(*arguments, routed=routed, quantized=quantized)
        stats = stats._replace(operands=measured)
    return y.reshape(x.shape), stats
