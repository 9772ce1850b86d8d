"""One MoE layer as a problem to measure, and the same layer in bfloat16 on ``torch._grouped_mm``.

Routing is chosen, not learned: the first E channels of a token are its router logits, and the router
picks them out. Logits are log-probabilities of the experts plus Gumbel noise, so the chosen experts are
samples without replacement: from equal probabilities, or from Zipf's with every eighth expert empty.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moefp8 import MoEConfig, init_moe_ffn
from moefp8._custom_vjp import custom_vjp

Params = dict[str, Tensor]
#: ``(y, ...)`` of ``layer(params, x)``.
Layer = Callable[[Params, Tensor], Tensor]


class LayerProblem(NamedTuple):
    """A layer and how many tokens it is given."""

    name: str
    tokens: int
    config: MoEConfig

    def __str__(self) -> str:
        c = self.config
        return (
            f"{self.name}: {self.tokens} tokens, dim {c.dim}, hidden {c.hidden}, {c.num_experts} experts, "
            f"top-{c.top_k}"
        )

    @property
    def rows(self) -> int:
        return self.tokens * self.config.top_k

    @property
    def operations(self) -> int:
        """Of the products of the experts, forward and backward."""
        return 3 * 3 * 2 * self.rows * self.config.dim * self.config.hidden


_LLAMA4 = MoEConfig(5120, 8192, 8, 1, score="sigmoid", normalize=False, scores_on="input")
#: Published layers. Of Llama4 and DeepSeek-V3 the 8 experts of one rank, with the tokens dispatched to it.
LAYERS = [
    LayerProblem("Llama4 16e", 131072, _LLAMA4),
    LayerProblem("DeepSeekV3", 131072, MoEConfig(7168, 2048, 8, 1, score="sigmoid", normalize=False)),
    LayerProblem("Qwen3-30B-A3B", 16384, MoEConfig(2048, 768, 128, 8)),
    LayerProblem("DSV3-16B", 16384, MoEConfig(2048, 1408, 64, 6)),
]
SMALL_LAYERS = [LayerProblem("small", 256, MoEConfig(64, 96, 8, 2))]


class Inputs(NamedTuple):
    """A layer's parameters, tokens and output cotangent, in bfloat16."""

    params: Params
    x: Tensor
    cotangent: Tensor

    @property
    def differentiable(self) -> list[Tensor]:
        return [self.x, *self.params.values()]


def expert_probabilities(num_experts: int, skewed: bool) -> Tensor:
    """Equal, or 1 / rank for most experts in a random order and 0 for every eighth."""
    if not skewed:
        return torch.full((num_experts,), 1 / num_experts)
    empty = max(num_experts // 8, 1)
    p = torch.zeros(num_experts)
    p[: num_experts - empty] = 1 / torch.arange(1, num_experts - empty + 1)
    return (p / p.sum())[torch.randperm(num_experts, generator=torch.Generator().manual_seed(0))]


def draw_layer(problem: LayerProblem, device: torch.device, *, skewed: bool, seed: int = 0) -> Inputs:
    """Random inputs that need gradients; a layer of fewer live experts than ``top_k`` cannot be skewed."""
    config = problem.config
    generator = torch.Generator(device).manual_seed(seed)
    params = init_moe_ffn(generator, config, dtype=torch.bfloat16, device=device)
    params["router"] = torch.eye(config.num_experts, config.dim, dtype=torch.bfloat16, device=device)

    def normal() -> Tensor:
        shape = (problem.tokens, config.dim)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    x, cotangent = normal(), normal()
    uniform = torch.rand(problem.tokens, config.num_experts, generator=generator, device=device)
    gumbel = -torch.log(-torch.log(uniform.clamp(2.0**-24, 1 - 2.0**-24)))
    # An expert of probability 0 lies 50 below the others, where no noise reaches.
    log_p = expert_probabilities(config.num_experts, skewed).log().clamp(min=-50.0).to(device)
    x[:, : config.num_experts] = (log_p + gumbel).to(torch.bfloat16)
    for tensor in (x, *params.values()):
        tensor.requires_grad_()
    return Inputs(params, x, cotangent)


# --- the bfloat16 layer --------------------------------------------------------------------------


def _permute_fwd(static: int, x: Tensor, index: Tensor, back: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    return x.index_select(0, index), (back,)


def _permute_bwd(copies: int, needed: tuple[bool, ...], back: Tensor, g: Tensor) -> Sequence[Tensor | None]:
    rows = g.index_select(0, back)
    return (rows if copies == 1 else rows.unflatten(0, (-1, copies)).sum(1)), None, None


# Eager autograd would scatter with atomics; a gather's transpose is a gather by the inverse.
_permute = custom_vjp("permute", _permute_fwd, _permute_bwd)


def take_eager(x: Tensor, index: Tensor, back: Tensor, copies: int) -> Tensor:
    """Rows ``index`` of ``x``, every row ``copies`` times; ``back`` is where, row by row of ``x``."""
    return _permute(copies, x, index, back)


def take_plain(x: Tensor, index: Tensor, back: Tensor, copies: int) -> Tensor:
    """The same in one torch operation, for a compiler."""
    return x.index_select(0, index)


def bf16_experts(params: Params, rows: Tensor, offs: Tensor) -> Tensor:
    """SwiGLU experts on sorted rows: three grouped products in bfloat16."""
    gate = torch._grouped_mm(rows, params["w1"].mT, offs=offs)
    up = torch._grouped_mm(rows, params["w3"].mT, offs=offs)
    return torch._grouped_mm(F.silu(gate) * up, params["w2"].mT, offs=offs)


def bf16_layer(config: MoEConfig, take: Callable[..., Tensor]) -> Layer:
    """``layer(params, x)``: route, sort, gather, experts, combine, as one would write it in bfloat16.

    Probabilities in float32; no host reads; nothing quantised, nothing of this library but, in eager
    mode, the transposed gather.
    """
    top_k = config.top_k

    def layer(params: Params, x: Tensor) -> Tensor:
        logits = F.linear(x, params["router"]).float()
        scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
        weights, experts = scores.topk(top_k, dim=-1)
        if config.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = (weights * config.route_scale).to(x.dtype)

        ids, source = experts.flatten().sort(stable=True)
        slot = torch.empty_like(source).scatter_(0, source, torch.arange(len(source), device=x.device))
        every = torch.arange(config.num_experts, device=x.device)
        offs = torch.searchsorted(ids, every, right=True).to(torch.int32)

        rows = take(x, source // top_k if top_k > 1 else source, slot, top_k)
        if config.scores_on == "input":
            rows = rows * take(weights.reshape(-1, 1), source, slot, 1)
        out = take(bf16_experts(params, rows, offs), slot, source, 1).unflatten(0, (-1, top_k))
        if config.scores_on == "output":
            out = out * weights.unsqueeze(-1)
        return out.squeeze(1) if top_k == 1 else out.sum(1)

    return layer


def halved(problem: LayerProblem) -> LayerProblem:
    """The largest power of two of tokens below the problem's."""
    return problem._replace(tokens=2 ** (math.ceil(math.log2(problem.tokens)) - 1))
