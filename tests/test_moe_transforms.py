"""moe_ffn under every function transform gives what plain ``.backward()`` gives.

Tokens and router lie on a grid on which the router's sums are exact in any order, so a transform that
multiplies in another shape still routes the same way and feeds the experts the same bits. What is left
is the order of the sums behind them, at most 24 terms long: 24 roundings of 2^-24 to either side.
"""

import functools

import pytest
import torch
import torch.utils._pytree as pytree
from moe_oracle import VARIANTS, D, E, make
from specs import grid
from torch.func import functional_call, grad, grad_and_value, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from moefp8 import BF16, MXFP8, moe_ffn, remat

TOKENS, BATCH = 7, 3
ORDER = 2 * 24 * 2.0**-24
LAYERS = {
    f"{name}-{recipe_name}": (VARIANTS[name], recipe)
    for name in ("deepseek-v3", "input scores, groups of one")
    for recipe_name, recipe in (("mxfp8", MXFP8), ("bf16", BF16))
}


def make_layer(variant, recipe):
    """``loss(params, x)`` of one variant: every output of moe_ffn takes part in it."""

    def loss(params, x):
        y, stats = moe_ffn(params, x, config=variant.config, recipe=recipe)
        return y.square().sum() + stats.load_balance_loss + stats.z_loss

    loss.variant = variant
    return loss


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request):
    return make_layer(*request.param)


@pytest.fixture
def one_layer():
    """For the slow ones: the variant with most in it, quantised."""
    return make_layer(VARIANTS["deepseek-v3"], MXFP8)


def parameters(variant, seed=0):
    params = make(variant, seed, torch.float32)
    params["router"] = grid((E, D), torch.Generator().manual_seed(seed)) / 4
    return params


def inputs(*lead, seed=1):
    return grid((*lead, TOKENS, D), torch.Generator().manual_seed(seed))


def stack(trees):
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def eager(loss, params, x):
    """Gradients by ``.backward()``."""
    leaves, spec = pytree.tree_flatten((params, x))
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    loss(*pytree.tree_unflatten(leaves, spec)).backward()
    # The selection-only bias takes no part: None here, zero under torch.func.
    return pytree.tree_unflatten(
        [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves], spec
    )


def agree(got, want, order=ORDER):
    got, want = pytree.tree_leaves_with_path(got), pytree.tree_leaves(want)
    assert len(got) == len(want)
    for (key, a), b in zip(got, want, strict=True):
        torch.testing.assert_close(
            a, b, rtol=0, atol=order * b.abs().max().item(), msg=lambda m, key=key: f"{key}: {m}"
        )


def test_grad(layer):
    params, x = parameters(layer.variant), inputs()
    agree(grad(layer, (0, 1))(params, x), eager(layer, params, x), 0.0)


def test_grad_and_value_with_stats(layer):
    variant = layer.variant

    def loss(params, x):
        y, stats = moe_ffn(params, x, config=variant.config)
        return y.square().sum(), stats

    params, x = parameters(variant), inputs()
    gradient, (_, stats) = grad_and_value(loss, has_aux=True)(params, x)
    assert stats.tokens_per_expert.sum() == TOKENS * variant.config.top_k
    agree(gradient, eager(lambda p, x: loss(p, x)[0], params, x)[0], 0.0)


def test_vjp_and_jacrev(layer):
    params, x = parameters(layer.variant), inputs()
    want = eager(layer, params, x)
    agree(vjp(layer, params, x)[1](torch.tensor(1.0)), want, 0.0)
    agree(jacrev(layer, (0, 1))(params, x), want)


def test_vmap_over_data(layer):
    config = layer.variant.config
    params, x = parameters(layer.variant), inputs(BATCH)
    y, stats = vmap(lambda x: moe_ffn(params, x, config=config, recipe=MXFP8))(x)
    loop = [moe_ffn(params, one, config=config, recipe=MXFP8) for one in x]
    agree(y, torch.stack([y for y, _ in loop]))
    assert torch.equal(stats.tokens_per_expert, torch.stack([s.tokens_per_expert for _, s in loop]))


def test_vmap_of_grad_over_data(layer):
    params, x = parameters(layer.variant), inputs(BATCH)
    got = vmap(grad(layer, (0, 1)), (None, 0))(params, x)
    agree(got, stack([eager(layer, params, one) for one in x]))


def test_vmap_of_grad_over_weights(layer):
    ensemble = [parameters(layer.variant, seed) for seed in range(BATCH)]
    x = inputs()
    got = vmap(grad(layer, (0, 1)), (0, None))(stack(ensemble), x)
    agree(got, stack([eager(layer, params, x) for params in ensemble]))


def test_vmap_of_grad_over_both_along_the_last_axis(layer):
    ensemble = [parameters(layer.variant, seed) for seed in range(BATCH)]
    x = inputs(BATCH)
    stacked = pytree.tree_map(lambda p: p.movedim(0, -1), stack(ensemble))
    got = vmap(grad(layer, (0, 1)), (-1, 0))(stacked, x)
    agree(got, stack([eager(layer, *both) for both in zip(ensemble, x, strict=True)]))


def test_functional_call(layer):
    class Module(torch.nn.Module):
        def __init__(self, params):
            super().__init__()
            for name, p in params.items():
                if name != "shared":
                    self.register_parameter(name, torch.nn.Parameter(p))

        def forward(self, x, shared):
            return layer(dict(self.named_parameters()) | shared, x)

    params, x = parameters(layer.variant), inputs()
    shared = {k: params[k] for k in params if k == "shared"}
    own = {k: params[k] for k in params if k != "shared"}
    module = Module(own)
    got = grad(lambda own: functional_call(module, own, (x, shared)))(own)
    agree(got, {k: g for k, g in eager(layer, params, x)[0].items() if k != "shared"}, 0.0)


def test_make_fx(one_layer):
    params, x = parameters(one_layer.variant), inputs()
    traced = make_fx(grad(one_layer, (0, 1)))(params, x)
    agree(traced(params, x), eager(one_layer, params, x), 0.0)


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "backward"])
def test_compile(one_layer, transform):
    """The whole graph, so that nothing falls back to eager unnoticed."""
    torch._dynamo.reset()
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    params, x = parameters(one_layer.variant), inputs(BATCH)
    if transform == "vmap of grad":
        got = compiled(vmap(grad(one_layer, (0, 1)), (None, 0)))(params, x)
        agree(got, stack([eager(one_layer, params, one) for one in x]))
    elif transform == "grad":
        agree(compiled(grad(one_layer, (0, 1)))(params, x[0]), eager(one_layer, params, x[0]), 0.0)
    else:
        agree(eager(compiled(one_layer), params, x[0]), eager(one_layer, params, x[0]), 0.0)


def test_checkpoint_under_plain_autograd(layer):
    def checkpointed(params, x):
        return torch.utils.checkpoint.checkpoint(layer, params, x, use_reentrant=False)

    params, x = parameters(layer.variant), inputs()
    agree(eager(checkpointed, params, x), eager(layer, params, x), 0.0)


def test_remat(layer):
    params, x = parameters(layer.variant), inputs(BATCH)
    loop = [eager(layer, params, one) for one in x]
    agree(grad(remat(layer), (0, 1))(params, x[0]), loop[0], 0.0)
    agree(vmap(grad(remat(layer), (0, 1)), (None, 0))(params, x), stack(loop))


def test_remat_under_compile(one_layer):
    torch._dynamo.reset()
    params, x = parameters(one_layer.variant), inputs()
    gradient = torch.compile(grad(remat(one_layer), (0, 1)), backend="aot_eager", fullgraph=True)
    agree(gradient(params, x), eager(one_layer, params, x), 0.0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_second_order_and_forward_mode_raise_by_name(layer):
    op = "(moe_ffn|expert_ffn|scaled_grouped_mm|scaled_mm)"
    params, x = parameters(layer.variant), inputs()
    with pytest.raises(NotImplementedError, match=f"{op}: second-order"):
        grad(lambda x: grad(layer, 1)(params, x).sum())(x)
    with pytest.raises(NotImplementedError, match=f"{op}: forward-mode"):
        jvp(lambda x: layer(params, x), (x,), (x,))


@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compile_with_inductor(one_layer):
    """Inductor may fuse and reorder the routing arithmetic; the experts are opaque to it."""
    torch._dynamo.reset()
    params, x = parameters(one_layer.variant), inputs()
    agree(torch.compile(grad(one_layer, (0, 1)), fullgraph=True)(params, x), eager(one_layer, params, x))
