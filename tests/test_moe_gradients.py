"""The gradients of the quantised layer beside a loop over tokens and experts in float64.

The bound is the recipe's own noise. Quantising multiplies each element by 1 + e with |e| <= 2^-4 (half
the last place of E4M3, 3 bits behind the point; subnormals lie 2^-13 under the largest element and
carry no weight). The errors of unlike elements are independent and even over that range, so the loop
draws them: an error for every element of both operands and of the cotangent of each product, used in
all products that read the tensor. What this does to a gradient, to all orders and in mean square over
``DRAWS``, is its noise. The layer may be off by three times that: real errors are smaller (an element of
mantissa 1.m is off by at most 2^-4 / 1.m), but their mean square over one gradient is not that over many
draws. Rounding to bfloat16, 2^-9, is 1/1000 of the noise in power.
"""

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from moe_oracle import route_token
from specs import REFERENCE, TRITON
from torch.func import vjp

from moefp8 import MoEConfig, init_moe_ffn, moe_ffn, route
from moefp8.kernels.sm90 import in_fp8
from moefp8.recipe import PRESETS

TOKENS, DRAWS, DEVIATIONS = 48, 6, 3
HALF_ULP = 2.0**-4
CONFIGS = {
    "output": MoEConfig(dim=32, hidden=48, num_experts=4, top_k=2),
    "input": MoEConfig(32, 48, 4, top_k=2, score="sigmoid", normalize=False, scores_on="input"),
}
BACKENDS = [REFERENCE, pytest.param(TRITON, marks=pytest.mark.gpu)]


def exactly(x):
    return x


def noisy(generator):
    """Multiply every element of a tensor by 1 + e."""

    def disturb(x):
        e = torch.rand(x.shape, generator=generator, dtype=x.dtype) * 2 - 1
        return x.detach() * (HALF_ULP * e)

    return lambda x: x + disturb(x)  # the error has no derivative: a cotangent passes as it is


def looped(params, x, config, quantise):
    """The layer; ``quantise`` sees what a recipe quantises."""

    def product(a, w, bias):
        y = a @ w.mT + (0 if bias is None else bias)
        if y.requires_grad:
            y.register_hook(quantise)
        return y

    rows = [[] for _ in range(config.num_experts)]
    for t, token in enumerate(x):
        for e, weight in zip(*route_token(params, token, config), strict=True):
            rows[e].append((t, weight))
    y = torch.zeros_like(x)
    for e, own in enumerate(rows):
        if not own:
            continue
        index, weight = torch.tensor([t for t, _ in own]), torch.stack([w for _, w in own])[:, None]
        w1, w2, w3 = (quantise(params[name][e]) for name in ("w1", "w2", "w3"))
        b1, b2, b3 = (params[name][e] if name in params else None for name in ("b1", "b2", "b3"))
        into = quantise(x[index] * weight if config.scores_on == "input" else x[index])
        hidden = quantise(F.silu(product(into, w1, b1)) * product(into, w3, b3))
        out = product(hidden, w2, b2)
        y = y.index_add(0, index, out if config.scores_on == "input" else out * weight)
    return y


def gradients(params, x, g, config, quantise=exactly):
    leaves, spec = pytree.tree_flatten((params, x))
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y = looped(*pytree.tree_unflatten(leaves, spec), config, quantise)
    return torch.autograd.grad(y, leaves, g)


@pytest.mark.parametrize("backend", BACKENDS, ids=["reference", "triton"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "bf16"])
def test_gradients_are_within_the_noise_of_the_recipe(name, config, backend):
    recipe = PRESETS[name]
    generator = torch.Generator().manual_seed(0)
    bias = backend is REFERENCE or in_fp8(recipe.fwd)
    params = init_moe_ffn(generator, config, bias=bias)
    params = {
        k: 0.3 * torch.randn(p.shape, generator=generator) if k[0] == "b" else p for k, p in params.items()
    }
    x, g = (torch.randn(TOKENS, config.dim, generator=generator) for _ in range(2))
    given = pytree.tree_map(lambda p: p.to(backend.device, backend.dtype), (params, x, g))
    params, x, g = pytree.tree_map(lambda p: p.double().cpu(), given)

    chosen = route(given[0], given[1], config).indices.cpu()
    for t, token in enumerate(x):
        assert route_token(params, token, config)[0] == chosen[t].tolist(), "not the same experts"

    options = {"config": config, "recipe": recipe, "implementation": backend.implementation}
    _, pullback = vjp(lambda p, x: moe_ffn(p, x, **options)[0], *given[:2])
    got = pytree.tree_leaves_with_path(pullback(given[2]))
    want = gradients(params, x, g, config)
    draws = [gradients(params, x, g, config, noisy(generator)) for _ in range(DRAWS)]
    for (key, value), true, *drawn in zip(got, want, *draws, strict=True):
        power = sum((d - true).square().sum() for d in drawn) / DRAWS
        bound = DEVIATIONS * power.sqrt()
        # A zero gradient and a doubled one are off by its norm, one of the wrong sign by twice that.
        assert bound < true.norm() / 2, pytree.keystr(key)
        assert (value.double().cpu() - true).norm() <= bound, pytree.keystr(key)
