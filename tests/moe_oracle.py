"""The MoE layer one token and one expert at a time, in float64 and plain autograd: no sorting, no
grouping, no tensor of indices. Choices are made on Python numbers.

``VARIANTS`` are the routers of well-known models in miniature; every feature of ``MoEConfig`` is in
at least one of them.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moefp8 import MoEConfig, init_moe_ffn

D, H, E = 16, 24, 8


class Variant(NamedTuple):
    config: MoEConfig
    #: Names of the optional parameters to have, flags of ``init_moe_ffn``.
    options: tuple[str, ...] = ()


_BASE = MoEConfig(dim=D, hidden=H, num_experts=E, top_k=2)

VARIANTS = {
    "mixtral": Variant(_BASE),
    "olmoe": Variant(_BASE._replace(top_k=3, normalize=False)),
    "deepseek-v3": Variant(
        _BASE._replace(
            top_k=3, score="sigmoid", route_scale=2.5, num_groups=4, top_groups=2, shared_hidden=20
        ),
        ("expert_bias",),
    ),
    "llama4": Variant(
        _BASE._replace(top_k=1, score="sigmoid", normalize=False, scores_on="input", shared_hidden=H)
    ),
    "biases": Variant(_BASE._replace(shared_hidden=20), ("bias", "router_bias")),
    "input scores, groups of one": Variant(
        _BASE._replace(scores_on="input", route_scale=0.5, num_groups=E, top_groups=3),
        ("bias", "expert_bias"),
    ),
    "all experts": Variant(_BASE._replace(top_k=E)),
    "one expert": Variant(_BASE._replace(num_experts=1, top_k=1), ("bias",)),
}


def make(variant: Variant, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Parameters without a zero in them: biases are drawn too."""
    generator = torch.Generator().manual_seed(seed)
    params = init_moe_ffn(
        generator, variant.config, dtype=torch.float64, **dict.fromkeys(variant.options, True)
    )

    def fill(tree: dict[str, Any]) -> dict[str, Any]:
        return {
            name: fill(p)
            if isinstance(p, dict)
            else 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if "b" in name
            else p
            for name, p in tree.items()
        }

    return {
        name: p.to(dtype) if isinstance(p, Tensor) else {k: v.to(dtype) for k, v in p.items()}
        for name, p in fill(params).items()
    }


def tokens(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D, generator=generator, dtype=torch.float64).to(dtype)


def choose(scores: list[float], bias: list[float], config: MoEConfig) -> list[int]:
    """Experts of one token, best first."""
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = config.num_experts // config.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.num_groups)]
    groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:2]))
    reachable = [e for group in groups[: config.top_groups] for e in group]
    return sorted(reachable, key=lambda e: -choice[e])[: config.top_k]


def route_token(params: dict[str, Any], x: Tensor, config: MoEConfig) -> tuple[list[int], list[Tensor]]:
    """Experts and weights of the token x (D,)."""
    logits = [params["router"][e] @ x for e in range(config.num_experts)]
    if "router_bias" in params:
        logits = [z + params["router_bias"][e] for e, z in enumerate(logits)]
    if config.score == "softmax":
        total = sum(z.exp() for z in logits)
        scores = [z.exp() / total for z in logits]
    else:
        scores = [1 / (1 + (-z).exp()) for z in logits]
    bias = params["expert_bias"].tolist() if "expert_bias" in params else [0.0] * config.num_experts
    experts = choose([s.item() for s in scores], bias, config)
    weights = [scores[e] for e in experts]
    if config.normalize:
        total = sum(weights)
        weights = [w / total for w in weights]
    return experts, [w * config.route_scale for w in weights]


def ffn(params: dict[str, Any], x: Tensor, e: int | None = None) -> Tensor:
    """Expert e of ``params``, or the shared expert, on the token x (D,)."""
    p = {k: v if e is None else v[e] for k, v in params.items() if k[0] in "wb" and k[1:].isdigit()}
    gate = p["w1"] @ x + p.get("b1", 0)
    up = p["w3"] @ x + p.get("b3", 0)
    return p["w2"] @ (F.sigmoid(gate) * gate * up) + p.get("b2", 0)


def moe(params: dict[str, Any], x: Tensor, config: MoEConfig) -> Tensor:
    """The layer on x (T, D)."""
    out = []
    for token in x:
        y = torch.zeros_like(token)
        for e, weight in zip(*route_token(params, token, config), strict=True):
            scaled = config.scores_on == "input"
            y = y + (ffn(params, weight * token, e) if scaled else weight * ffn(params, token, e))
        out.append(y + ffn(params["shared"], token) if "shared" in params else y)
    return torch.stack(out)


#: float64 agreement, relative to the largest entry. A contraction of n <= 24 terms is off by n 2^-53
#: of its sum of magnitudes, at most n of its largest product; three follow one another, and each passes
#: on what it gets, grown by at most n.
TOLERANCE = 3 * 24**3 * 2.0**-53


def agree(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * max(want.abs().max().item(), 1e-30))
