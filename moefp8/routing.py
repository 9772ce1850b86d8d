"""Routing: which experts a token goes to, with what weight, and how evenly the tokens spread.

The router is small and decides discretely, so all of it runs in float32 (float64 if the operands
are) whatever the recipe. Sizes are static and nothing is read on the host, so routing can be mapped,
differentiated and compiled like the rest of the layer.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefp8._router import router_logits
from moefp8.mx import check_float
from moefp8.statistics import Statistics

SCORES = ("softmax", "sigmoid")
SIDES = ("output", "input")


class MoEConfig(NamedTuple):
    """Sizes and routing rule of one MoE layer. Hashable, comparable, edited with ``_replace``.

    The routers of well-known models, beside their sizes::

        Mixtral, Qwen3-MoE   the defaults
        OLMoE                normalize=False
        DeepSeek-V3          score="sigmoid", route_scale=2.5, num_groups=8, top_groups=4,
                             shared_hidden=hidden, and an expert bias in the parameters
        Llama4               score="sigmoid", normalize=False, scores_on="input", top_k=1,
                             shared_hidden=hidden

    >>> MoEConfig(dim=64, hidden=128, num_experts=8, top_k=2)._replace(score="sigmoid").score
    'sigmoid'
    """

    #: D, width of a token.
    dim: int
    #: H, width inside an expert.
    hidden: int
    #: E.
    num_experts: int
    #: Experts of a token.
    top_k: int
    #: "softmax" over the experts, or "sigmoid" of each logit.
    score: str = "softmax"
    #: Divide the weights of a token by their sum.
    normalize: bool = True
    #: Factor on the weights, after normalising.
    route_scale: float = 1.0
    #: Which side of an expert the weight multiplies: "output" or "input".
    scores_on: str = "output"
    #: Group-limited routing: experts lie in this many groups of neighbours ...
    num_groups: int = 1
    #: ... and a token goes to experts of its best ``top_groups`` groups only.
    top_groups: int = 1
    #: Width inside the shared expert, which every token goes through; 0 for none.
    shared_hidden: int = 0


class Routing(NamedTuple):
    """Where each token goes; ``...`` are the leading axes of ``x``.

    Attributes:
        logits: ``(..., E)`` float32, the router's output.
        scores: ``(..., E)`` softmax or sigmoid of the logits.
        indices: ``(..., top_k)`` int64, chosen experts, best first.
        weights: ``(..., top_k)`` what each chosen expert counts for.
    """

    logits: Tensor
    scores: Tensor
    indices: Tensor
    weights: Tensor


class MoEStats(NamedTuple):
    """What to watch, and what to add to the loss.

    Attributes:
        tokens_per_expert: ``(E,)`` int64, rows each expert got; they sum to T * top_k.
        load_balance_loss: scalar, 1 for an even spread and E for a single expert.
        z_loss: scalar, mean square of the router's log-partition.
        operands: what :func:`expert_statistics` returns, if it was asked for; else empty.
    """

    tokens_per_expert: Tensor
    load_balance_loss: Tensor
    z_loss: Tensor
    operands: Statistics | tuple[()] = ()  # not None, which transforms take for a leaf


def check_config(config: MoEConfig) -> None:
    """Reject a config with a field out of range; the error names the field."""
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config: expected a MoEConfig, got {config!r}")
    for name in ("dim", "hidden", "num_experts", "top_k", "num_groups", "top_groups"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"config.{name}: expected an integer of at least 1, got {value!r}")
    if not isinstance(config.shared_hidden, int) or config.shared_hidden < 0:
        raise ValueError(f"config.shared_hidden: expected a width, or 0, got {config.shared_hidden!r}")
    for name, allowed in (("score", SCORES), ("scores_on", SIDES)):
        value = getattr(config, name)
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"config.{name}: expected {expected}, got {value!r}")
    if config.num_experts % config.num_groups:
        raise ValueError(
            f"config.num_groups: expected a divisor of num_experts = {config.num_experts}, "
            f"got {config.num_groups}"
        )
    if config.top_groups > config.num_groups:
        raise ValueError(
            f"config.top_groups: expected at most num_groups = {config.num_groups}, got {config.top_groups}"
        )
    reachable = config.top_groups * (config.num_experts // config.num_groups)
    if config.top_k > reachable:
        raise ValueError(
            f"config.top_k: expected at most {reachable}, the experts a token can reach, got {config.top_k}"
        )


def check_param(
    params: Mapping[str, Any],
    key: str,
    shape: tuple[int, ...],
    where: str = "params",
    x: Tensor | None = None,
) -> None:
    """Reject a missing parameter, no float tensor, a wrong shape, or another device than that of ``x``."""
    name = f"{where}[{key!r}]"
    if key not in params:
        raise ValueError(f"{name}: is missing; expected a tensor of shape {shape}")
    if params[key] is None:
        raise TypeError(f"{name}: is None; leave the key out instead")
    check_float(params[key], name)
    if tuple(params[key].shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(params[key].shape)}")
    if x is not None and params[key].device != x.device:
        raise ValueError(f"{name}: is on {params[key].device}, x on {x.device}")


def _within_best_groups(choice: Tensor, config: MoEConfig) -> Tensor:
    """``choice`` with -inf for experts outside the token's best groups.

    The score of a group is the sum of its two largest entries (DeepSeek-V3, section 2.1.2; its
    second is missing where a group is a single expert).
    """
    grouped = choice.unflatten(-1, (config.num_groups, -1))
    best_two = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values
    chosen = best_two.sum(-1).topk(config.top_groups, dim=-1).indices
    allowed = (chosen.unsqueeze(-1) == torch.arange(config.num_groups, device=choice.device)).any(-2)
    return torch.where(allowed.unsqueeze(-1), grouped, -torch.inf).flatten(-2)


def route(params: Mapping[str, Any], x: Tensor, config: MoEConfig) -> Routing:
    """Choose ``top_k`` experts for each token, and what each counts for.

    In float32, for one token::

        logits  = router @ x + router_bias
        scores  = softmax(logits) or sigmoid(logits)              config.score
        choice  = scores + expert_bias, -inf outside the best groups
        indices = top_k(choice)
        weights = scores[indices]                                 without the expert bias
        weights = weights / (sum(weights) + 1e-20)                config.normalize
        weights = weights * route_scale

    Gradients flow through ``weights``; the choice has none, and so neither has ``expert_bias``.

    Args:
        params: ``router`` ``(E, D)``, and if present ``router_bias`` ``(E,)`` and ``expert_bias``
            ``(E,)``, the selection-only bias of :func:`update_expert_bias`. Other keys are ignored.
        x: ``(..., D)`` float64, float32, bfloat16 or float16.
        config: a :class:`MoEConfig`.

    Returns:
        A :class:`Routing`; its floats are float32 (float64 if ``x`` or the router is).

    Raises:
        TypeError: ``x`` or a parameter that is not floating point.
        ValueError: a field of ``config`` out of range, a shape that does not fit it, a parameter on
            another device than ``x``.
        NotImplementedError: second-order or forward-mode differentiation with ``x`` of 16 bits.

    Source: group limit and expert bias, DeepSeek-V3 (arXiv:2412.19437), section 2.1.2.

    >>> config = MoEConfig(dim=2, hidden=4, num_experts=3, top_k=2)
    >>> router = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> route({"router": router}, torch.tensor([2.0, 1.0]), config).indices
    tensor([0, 1])
    """
    check_config(config)
    check_float(x, "x")
    num_experts = config.num_experts
    check_param(params, "router", (num_experts, config.dim), x=x)
    for key in ("router_bias", "expert_bias"):
        if key in params:
            check_param(params, key, (num_experts,), x=x)
    if x.ndim < 1 or x.shape[-1] != config.dim:
        raise ValueError(f"x: expected shape (..., D) with D = {config.dim}, got {tuple(x.shape)}")

    logits = router_logits(x, params["router"])
    if "router_bias" in params:
        logits = logits + params["router_bias"].to(logits.dtype)
    scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()

    choice = scores.detach()
    if "expert_bias" in params:
        choice = choice + params["expert_bias"].detach().to(logits.dtype)
    if config.num_groups > 1:
        choice = _within_best_groups(choice, config)
    indices = choice.topk(config.top_k, dim=-1).indices

    weights = scores.gather(-1, indices)
    if config.normalize:
        # A sigmoid can underflow for all chosen experts: then the weights are 0, not 0 / 0.
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(logits, scores, indices, weights * config.route_scale)


def count_tokens(indices: Tensor, num_experts: int) -> Tensor:
    """Rows of each expert, ``(E,)`` int64; ids of E and above count for nobody."""
    # Not bincount: the size of its result depends on the data, so it cannot be mapped.
    flat = indices.reshape(-1).clamp(max=num_experts)
    return flat.new_zeros(num_experts + 1).scatter_add(0, flat, torch.ones_like(flat))[:num_experts]


def routing_stats(routing: Routing) -> MoEStats:
    """Tokens per expert and the two auxiliary losses of a :class:`Routing`.

    Over the T tokens of all leading axes::

        f[e]              = tokens_per_expert[e] / (T top_k)        no gradient
        P[e]              = mean over tokens of scores[e] / sum(scores)
        load_balance_loss = E sum(f P)
        z_loss            = mean over tokens of logsumexp(logits)^2

    ``f`` and ``P`` both sum to 1, so the load-balance loss of an even spread is 1 for any top_k
    (definitions with ``f`` summing to top_k give top_k times as much). Softmax scores already sum
    to 1. With no tokens both losses are 0.

    Args:
        routing: from :func:`route`, with any leading axes.

    Returns:
        A :class:`MoEStats`.

    Source: load balance, GShard (arXiv:2006.16668) and Switch Transformers (arXiv:2101.03961),
    equations 4 to 6; z-loss, ST-MoE (arXiv:2202.08906), equation 5.

    >>> even = torch.zeros(4, 2)
    >>> ids = torch.tensor([[0], [1], [0], [1]])
    >>> routing_stats(Routing(even, even.softmax(-1), ids, torch.ones(4, 1))).load_balance_loss
    tensor(1.)
    """
    num_experts = routing.scores.shape[-1]
    tokens = max(routing.scores.shape[:-1].numel(), 1)
    counts = count_tokens(routing.indices, num_experts)
    share = counts.to(routing.scores.dtype) / (tokens * routing.indices.shape[-1])
    total = routing.scores.sum(-1, keepdim=True)
    probability = (routing.scores / (total + 1e-20)).reshape(-1, num_experts).sum(0) / tokens
    log_partition = routing.logits.logsumexp(-1)
    return MoEStats(
        tokens_per_expert=counts,
        load_balance_loss=num_experts * (share * probability).sum(),
        z_loss=log_partition.square().sum() / tokens,
    )


def update_expert_bias(bias: Tensor, tokens_per_expert: Tensor, rate: float) -> Tensor:
    """Nudge the selection-only expert bias towards an even spread, without an auxiliary loss.

    ``bias + rate * sign(mean(tokens_per_expert) - tokens_per_expert)``: an expert with too many
    tokens becomes less likely to be chosen, one with too few more likely. Call it once a step, after
    the optimizer, with the tokens of all micro-batches and ranks summed.

    Args:
        bias: ``(E,)`` float32; in bfloat16 a rate of 0.001 is lost once the bias reaches 0.5.
        tokens_per_expert: ``(E,)``, from :class:`MoEStats`.
        rate: step, 0.001 in DeepSeek-V3.

    Returns:
        The new bias, ``(E,)`` of the dtype of ``bias``.

    Raises:
        ValueError: the shapes differ.

    Source: DeepSeek-V3 (arXiv:2412.19437), section 2.1.2.

    >>> update_expert_bias(torch.zeros(3), torch.tensor([9, 3, 0]), 0.5)
    tensor([-0.5000,  0.5000,  0.5000])
    """
    if bias.shape != tokens_per_expert.shape:
        raise ValueError(
            f"tokens_per_expert: expected the shape of bias, {tuple(bias.shape)}, "
            f"got {tuple(tokens_per_expert.shape)}"
        )
    load = tokens_per_expert.to(torch.promote_types(bias.dtype, torch.float32))
    return bias + (rate * (load.mean(-1, keepdim=True) - load).sign()).to(bias.dtype)
