"""The feed-forward as one operation has the bits of three products by hand, forward and backward."""

import functools
from typing import Any

import pytest
import torch
from moe_oracle import VARIANTS, make, tokens
from specs import LAYOUTS, Layout, randn
from torch import Tensor
from torch.func import vjp

from moefp8 import expert_ffn, moe_ffn, route, scaled_grouped_mm
from moefp8._custom_vjp import custom_vjp
from moefp8._ffn import Routed, ffn
from moefp8.kernels.sm90 import in_fp8
from moefp8.moe import sort_by_expert
from moefp8.recipe import MXFP8, PRESETS, Recipe

DIM, HIDDEN = 32, 48


def _swiglu_fwd(static: None, gate: Tensor, up: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    g = gate.float()
    return (g * g.sigmoid() * up.float()).to(gate.dtype), (gate, up)


def _swiglu_bwd(static: None, needed: Any, gate: Tensor, up: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    g, u, d = gate.float(), up.float(), d.float()
    s = g.sigmoid()
    return (d * u * (s * (1 + g * (1 - s)))).to(gate.dtype), (d * (g * s)).to(up.dtype)


swiglu = custom_vjp("swiglu", _swiglu_fwd, _swiglu_bwd)


def by_hand(params: dict[str, Tensor], x: Tensor, offs: Tensor, **options: Any) -> Tensor:
    def linear(x: Tensor, i: int) -> Tensor:
        return scaled_grouped_mm(x, params[f"w{i}"].mT, offs, bias=params.get(f"b{i}"), **options)

    return linear(swiglu(None, linear(x, 1), linear(x, 3)), 2)


def add_copies(rows: Tensor, back: Tensor, copies: int, weights: Tensor | None = None) -> Tensor:
    """The rows of each token one after the other in float32, rounded once."""
    wide = rows[back].float().unflatten(0, (-1, copies))
    wide = wide if weights is None else wide * weights.unsqueeze(-1)
    return functools.reduce(torch.add, wide.unbind(1)).to(rows.dtype)


# Each the transpose of the other, which autograd would round at every copy.
_gather = custom_vjp(
    "gather",
    lambda copies, x, source, slot: (x[source // copies], (slot,)),
    lambda copies, needed, slot, g: (add_copies(g, slot, copies), None, None),
)
_combine = custom_vjp(
    "combine",
    lambda copies, y, source, slot, weights: (add_copies(y, slot, copies, weights), (source, weights)),
    lambda copies, needed, source, weights, g: (
        (g[source // copies].float() * weights.flatten()[source, None]).to(g.dtype), None, None, None,
    ),
)  # fmt: skip


def experts(count: int, *, bias: bool, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    params = {
        "w1": randn(count, HIDDEN, DIM, seed=1),
        "w2": randn(count, DIM, HIDDEN, seed=2),
        "w3": randn(count, HIDDEN, DIM, seed=3),
    }
    if bias:
        params |= {"b1": randn(count, HIDDEN), "b2": randn(count, DIM), "b3": randn(count, HIDDEN)}
    return {name: p.to(device, dtype) for name, p in params.items()}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def check_same_bits(
    layout: Layout, recipe: Recipe, implementation: str, dtype: torch.dtype, device: str = "cpu"
) -> None:
    takes_bias = implementation == "reference" or in_fp8(recipe.fwd)
    params = experts(len(layout.sizes), bias=takes_bias, dtype=dtype, device=device)
    x, g = (randn(layout.rows, DIM, seed=seed).to(device, dtype) for seed in (4, 5))
    options = {"recipe": recipe, "implementation": implementation}
    offs = layout.offs(device)
    got, got_vjp = vjp(lambda p, x: expert_ffn(p, x, offs, **options), params, x)
    want, want_vjp = vjp(lambda p, x: by_hand(p, x, offs, **options), params, x)
    assert torch.equal(bits(got), bits(want))
    assert want.any() or not layout.sizes or not any(layout.sizes)
    (got_params, got_x), (want_params, want_x) = got_vjp(g), want_vjp(g)
    assert torch.equal(bits(got_x), bits(want_x))
    for name, gradient in want_params.items():
        assert torch.equal(bits(got_params[name]), bits(gradient)), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", PRESETS)
def test_reference(name, layout):
    check_same_bits(layout, PRESETS[name], "reference", torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.gpu
def test_kernels(name, layout):
    check_same_bits(layout, PRESETS[name], "triton", torch.bfloat16, "cuda")


def test_kernels_interpreted():
    """One recipe and one group: the interpreter is slow."""
    check_same_bits(Layout("tail", (5,), 2), MXFP8, "triton", torch.float32)


def test_each_gradient_alone():
    """What is not asked for is not computed, and takes nothing else along."""
    layout = Layout("", (5, 9), 2)
    params, x, offs = experts(2, bias=True, dtype=torch.float32), randn(16, DIM), layout.offs()
    g = randn(16, DIM, seed=5)
    every = torch.func.grad(lambda p: (expert_ffn(p, x, offs) * g).sum())(params)
    for name, p in params.items():
        alone = torch.func.grad(lambda p, n=name: (expert_ffn(params | {n: p}, x, offs) * g).sum())(p)
        assert torch.equal(alone, every[name]), name
    dx = torch.func.grad(lambda x: (expert_ffn(params, x, offs) * g).sum())(x)
    assert torch.equal(dx, vjp(lambda x: by_hand(params, x, offs, recipe=MXFP8), x)[1](g)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["mixtral", "biases", "all experts", "olmoe", "llama4"])
def test_the_layer_is_gather_by_hand_and_combine(variant, dtype):
    """moe_ffn hands the order of the rows over instead of the rows; the copies of a token add up as in
    the transpose of a gather. Scores on the input: with one copy, so that scaling is the only rounding."""
    config, params = VARIANTS[variant].config, make(VARIANTS[variant], dtype=dtype)
    config = config._replace(shared_hidden=0)
    params = {name: p for name, p in params.items() if name != "shared"}
    x, g = tokens(13, dtype=dtype), tokens(13, seed=2, dtype=dtype)
    routing = route(params, x, config)
    order, weights = sort_by_expert(routing.indices, config.num_experts), routing.weights
    experts = {name: p for name, p in params.items() if name in ("w1", "w2", "w3", "b1", "b2", "b3")}

    def layer(params, x):
        into = _gather(config.top_k, x, order.source, order.slot)
        if config.scores_on == "input":
            into = (into * weights.reshape(-1, 1)[order.source]).to(dtype)
        rows = by_hand(params, into, order.offs, recipe=MXFP8)
        ones = torch.ones_like(weights)
        given = weights if config.scores_on == "output" else ones
        return _combine(config.top_k, rows, order.source, order.slot, given)

    def fused(params, x):
        routed = Routed(order.source, order.slot, weights, config.scores_on)
        return ffn(params, x, order.offs, MXFP8, None, routed=routed)

    want, want_vjp = vjp(layer, experts, x)
    got, got_vjp = vjp(fused, experts, x)
    assert torch.equal(got, want)
    assert torch.equal(got, moe_ffn(params, x, config=config)[0])
    (got_params, got_x), (want_params, want_x) = got_vjp(g), want_vjp(g)
    assert torch.equal(got_x, want_x)
    for name, gradient in want_params.items():
        assert torch.equal(got_params[name], gradient), name
