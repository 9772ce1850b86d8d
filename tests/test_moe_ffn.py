"""The MoE layer: a float64 loop for every router, quantised recipes expert by expert, laws, bad input."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from moe_oracle import VARIANTS, D, E, H, agree, make, moe, tokens
from torch.func import grad, vjp

from moefp8 import (
    BF16,
    MXFP8,
    MoEConfig,
    expert_ffn,
    init_moe_ffn,
    moe_ffn,
    route,
    scaled_mm,
)
from moefp8.kernels.gathered import Gathered
from moefp8.moe import sort_by_expert
from moefp8.recipe import PRESETS

variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
recipes = pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS)
CONFIG = VARIANTS["mixtral"].config


def sqnr(value, reference):
    """Signal to noise, decibel."""
    noise = (value.double() - reference.double()).square().mean()
    return 10 * torch.log10(reference.double().square().mean() / noise).item()


# --- against the loop ----------------------------------------------------------------------------


@variants
def test_equals_the_loop_over_tokens_in_float64(variant):
    params, x = make(variant), tokens(3, 5)
    y, _ = moe_ffn(params, x, config=variant.config, recipe=BF16)
    agree(y.reshape(15, D), moe(params, x.reshape(15, D), variant.config))


@variants
def test_gradients_equal_the_loop_in_float64(variant):
    """Router, experts, every bias and the input; only the selection-only bias gets none."""
    params, x, g = make(variant), tokens(11), tokens(11, seed=2)
    config = variant.config
    got = grad(lambda p, x: (moe_ffn(p, x, config=config, recipe=BF16)[0] * g).sum(), (0, 1))(params, x)

    leaves, spec = pytree.tree_flatten((params, x))
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    looped_params, looped_x = pytree.tree_unflatten(leaves, spec)
    (moe(looped_params, looped_x, config) * g).sum().backward()
    for (key, value), leaf in zip(pytree.tree_leaves_with_path(got), leaves, strict=True):
        if "expert_bias" in pytree.keystr(key):
            assert not value.any()
        elif "router" in pytree.keystr(key) and config.num_experts == 1:
            agree(value, torch.zeros_like(value), 0.0)  # a softmax over one expert is 1
        else:
            assert leaf.grad.any(), key
            agree(value, leaf.grad)


@variants
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "bf16"])
def test_quantised_equals_each_expert_alone_under_the_same_recipe(variant, name):
    """Expert by expert with the dense product, whose quantisation is tested elsewhere.

    The expert weights' gradients see the same operands in both, and blocks that start at the
    expert's first row, so they agree to the order of summation of 24 tokens or less. Gradients of scores
    on the output come through the quantised products of the backward instead of the forward's: those of
    the router, and of x through it, are within the noise of that (test_moe_gradients.py), not of order.
    """
    config, recipe = variant.config, PRESETS[name]
    params, x, g = (
        make(variant, dtype=torch.float32),
        tokens(12, dtype=torch.float32),
        tokens(12, seed=2).float(),
    )

    def ffn(p, x):
        def product(x, i):
            return scaled_mm(x, p[f"w{i}"].mT, bias=p.get(f"b{i}"), recipe=recipe)

        return product(F.silu(product(x, 1)) * product(x, 3), 2)

    def looped(params, x):
        routing = route(params, x, config)
        y = torch.zeros_like(x)
        for e in range(config.num_experts):
            token, choice = (routing.indices == e).nonzero(as_tuple=True)
            weight = routing.weights[token, choice].unsqueeze(1)
            own = {k: p[e] for k, p in params.items() if k[1:].isdigit()}
            rows = x[token]
            scaled = config.scores_on == "input"
            out = ffn(own, rows * weight) if scaled else ffn(own, rows) * weight
            y = y.index_add(0, token, out)
        return y + ffn(params["shared"], x) if "shared" in params else y

    leaves, spec = pytree.tree_flatten((params, x))
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    want = looped(*pytree.tree_unflatten(leaves, spec))
    (want * g).sum().backward()
    got, pullback = vjp(lambda p, x: moe_ffn(p, x, config=config, recipe=recipe)[0], params, x)
    # Sums of top_k + 1 terms in y, of at most 2 * 24 in a gradient, in another order.
    order = 2 * 48 * 2.0**-24
    agree(got, want.detach(), order)
    gradients = pytree.tree_leaves_with_path(pullback(g))
    for (key, value), leaf in zip(gradients, leaves, strict=True):
        of_scores = config.scores_on == "output" and ("router" in str(key) or leaf is leaves[-1])
        some = leaf.grad is not None and bool(leaf.grad.any())
        assert bool(value.any()) == some, key
        if some and not of_scores:
            agree(value, leaf.grad, order)


def test_mxfp8_noise_is_that_of_three_products():
    """Independent roundings of both operands give a product a relative noise power n, 28.5 dB below
    it for Gaussian data (docs/numerics.md). The noises of gate, up and down add up, the gate's times
    how much silu amplifies it::

        gain = E[silu'(z)^2] E[z^2] / E[silu(z)^2]        z the gate, standard normal here

    Within 1 dB: rounding errors of one block are not quite independent.
    """
    config = MoEConfig(dim=256, hidden=256, num_experts=4, top_k=2)
    params = init_moe_ffn(torch.Generator().manual_seed(0), config)
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    exact, _ = moe_ffn(params, x, config=config, recipe=BF16)
    got, _ = moe_ffn(params, x, config=config, recipe=MXFP8)

    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    density = density / density.sum()
    slope = z.sigmoid() * (1 + z * (1 - z.sigmoid()))
    gain = (density * slope.square()).sum() / (density * F.silu(z).square()).sum()
    product = 10**-2.85
    expected = -10 * torch.log10(product * (gain + 2)).item()
    assert sqnr(got, exact) == pytest.approx(expected, abs=1.0)


# --- corners -------------------------------------------------------------------------------------


@recipes
def test_experts_without_tokens_get_no_gradient(recipe):
    params = make(VARIANTS["biases"], dtype=torch.float32)
    params["router_bias"][2:] = -1e4  # nobody goes to experts 2 to 7
    x = tokens(9, dtype=torch.float32)
    config = VARIANTS["biases"].config
    y, pullback, stats = vjp(lambda p: moe_ffn(p, x, config=config, recipe=recipe), params, has_aux=True)
    assert stats.tokens_per_expert.tolist() == [9, 9, 0, 0, 0, 0, 0, 0]
    (gradient,) = pullback(torch.ones_like(y))
    for name in ("w1", "w2", "w3", "b1", "b2", "b3"):
        assert not gradient[name][2:].any()
        assert gradient[name][:2].flatten(1).any(1).all()


@recipes
def test_one_expert_is_a_dense_feed_forward(recipe):
    variant = VARIANTS["one expert"]
    params, x = make(variant, dtype=torch.float32), tokens(7, dtype=torch.float32)

    def product(x, i):
        return scaled_mm(x, params[f"w{i}"][0].mT, bias=params[f"b{i}"][0], recipe=recipe)

    y, stats = moe_ffn(params, x, config=variant.config, recipe=recipe)
    gate, up = product(x, 1), product(x, 3)
    # The layer's own order of operations: F.silu divides where it multiplies, and rounds differently.
    assert torch.equal(y, product(gate * gate.sigmoid() * up, 2))
    assert stats.tokens_per_expert.tolist() == [7]
    assert stats.load_balance_loss == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@recipes
def test_dtype_and_shape_are_those_of_x(dtype, recipe):
    variant = VARIANTS["biases"]
    params = make(variant, dtype=dtype)
    for config in (variant.config, variant.config._replace(scores_on="input")):
        for shape in ((), (0,), (5,), (2, 0, 3), (2, 1, 3)):
            y, stats = moe_ffn(params, tokens(*shape, dtype=dtype), config=config, recipe=recipe)
            assert y.shape == (*shape, D)
            assert y.dtype == dtype
            assert stats.load_balance_loss.dtype == stats.z_loss.dtype == torch.float32


def test_bfloat16_tokens_on_float32_weights_need_no_cast():
    params = make(VARIANTS["biases"], dtype=torch.float32)
    x = tokens(5, dtype=torch.bfloat16)
    y, _ = moe_ffn(params, x, config=VARIANTS["biases"].config)
    gradient = grad(lambda p: moe_ffn(p, x, config=VARIANTS["biases"].config)[0].sum())(params)
    assert y.dtype == torch.bfloat16
    assert {g.dtype for g in pytree.tree_leaves(gradient)} == {torch.float32}


# --- laws ----------------------------------------------------------------------------------------


@variants
def test_permuting_the_experts_with_their_router_rows_changes_nothing(variant):
    if variant.config.num_groups > 1:
        variant = variant._replace(config=variant.config._replace(num_groups=1, top_groups=1))
    params, x = make(variant), tokens(13)
    order = torch.randperm(variant.config.num_experts, generator=torch.Generator().manual_seed(3))
    permuted = {k: p if k == "shared" else p[order] for k, p in params.items()}
    want, stats = moe_ffn(params, x, config=variant.config, recipe=BF16)
    got, permuted_stats = moe_ffn(permuted, x, config=variant.config, recipe=BF16)
    agree(got, want)
    assert torch.equal(permuted_stats.tokens_per_expert, stats.tokens_per_expert[order])


@recipes
@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "llama4"])
def test_a_row_depends_on_its_own_token_only(recipe, name):
    """Bit for bit. The other tokens are doubled, which moves none of them between experts (without
    biases), so the rows of the products stay where they are."""
    variant = VARIANTS[name]._replace(options=())
    params, x = make(variant, dtype=torch.float32), tokens(9, dtype=torch.float32)
    want, _ = moe_ffn(params, x, config=variant.config, recipe=recipe)
    others = torch.where((torch.arange(9) == 4)[:, None], x, 2 * x)
    got, _ = moe_ffn(params, others, config=variant.config, recipe=recipe)
    assert torch.equal(got[4], want[4])
    assert not torch.equal(got, want)


@recipes
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_token_poisons_no_other(recipe, poison):
    params, x = make(VARIANTS["biases"], dtype=torch.float32), tokens(9, dtype=torch.float32)
    x[4, 3] = poison
    y, _ = moe_ffn(params, x, config=VARIANTS["biases"].config, recipe=recipe)
    assert not y[4].isfinite().any()
    assert y[torch.arange(9) != 4].isfinite().all()


def test_scores_on_the_input_and_on_the_output_agree_for_a_linear_expert():
    """With an up projection of zero but for its bias an expert is silu(0) = 0: both give the biases."""
    params, x = make(VARIANTS["biases"]), tokens(6)
    config = VARIANTS["biases"].config._replace(shared_hidden=0, normalize=True)
    params = {k: p for k, p in params.items() if k != "shared"}
    params |= {"w1": torch.zeros_like(params["w1"]), "b1": torch.zeros_like(params["b1"])}
    params["b2"] = torch.ones_like(params["b2"])
    on_output, _ = moe_ffn(params, x, config=config, recipe=BF16)
    on_input, _ = moe_ffn(params, x, config=config._replace(scores_on="input"), recipe=BF16)
    agree(on_output, torch.ones(6, D, dtype=torch.float64))  # weights sum to 1
    agree(on_input, torch.full((6, D), 2.0, dtype=torch.float64))  # two experts, a bias each


# --- moving rows ---------------------------------------------------------------------------------


def test_rows_of_other_ranks_lie_behind_the_last_group():
    """Expert ids of E and above mark rows that no expert here owns."""
    order = sort_by_expert(torch.tensor([[2, 7], [0, 3], [3, 0]]), 3)
    assert order.source.tolist() == [2, 5, 0, 3, 4, 1]
    assert order.offs.tolist() == [2, 2, 3]
    assert order.slot[order.source].tolist() == list(range(6))


def test_gather_and_combine_are_transposes_of_each_other():
    """<gather(x), y> = <x, combine(y)> exactly, on integers, and so for their VJPs."""
    generator = torch.Generator().manual_seed(0)
    order = sort_by_expert(torch.randint(5, (7, 3), generator=generator), 5)
    x = torch.randint(-8, 9, (7, 4), generator=generator).float()
    y = torch.randint(-8, 9, (21, 4), generator=generator).float()
    gathered = Gathered(x, order.source, order.slot, 3)
    rows, (total, none) = gathered.rows(), gathered.collect(y)
    assert none is None
    assert (rows * y).sum() == (x * total).sum()
    assert torch.equal(rows, x[order.source // 3])
    assert torch.equal(total, y[order.slot].view(7, 3, 4).sum(1))


def test_the_gradient_of_a_token_is_rounded_once():
    """1 + 3 * 2^-9 summed copy by copy in bfloat16 stays 1; summed in float32 it rounds to 1 + 2^-7."""
    order = sort_by_expert(torch.tensor([[0, 1, 2, 3]]), 4)
    copies = torch.tensor([[1.0], [2.0**-9], [2.0**-9], [2.0**-9]], dtype=torch.bfloat16)
    x = torch.zeros(1, 1, dtype=torch.bfloat16)
    assert Gathered(x, order.source, order.slot, 4).collect(copies)[0].item() == 1 + 2.0**-7


@recipes
def test_expert_ffn_gives_zero_past_the_last_group(recipe):
    params, x = make(VARIANTS["biases"], dtype=torch.float32), tokens(9, dtype=torch.float32)
    offs = torch.tensor([1, 1, 1, 4, 5, 5, 6, 6], dtype=torch.int32)
    x[6:] = torch.nan
    out = expert_ffn(params, x, offs, recipe=recipe)
    assert out[:6].isfinite().all()
    assert out[:6].any(1).all()
    assert not out[6:].any()


# --- initial parameters --------------------------------------------------------------------------


def test_init_draws_from_the_generator_alone():
    config = CONFIG._replace(shared_hidden=5)
    state = torch.get_rng_state()
    first, second, other = (init_moe_ffn(torch.Generator().manual_seed(s), config) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    low = init_moe_ffn(torch.Generator().manual_seed(0), config, dtype=torch.bfloat16)
    for a, b, c, d in zip(*map(pytree.tree_leaves, (first, second, low, other)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.bfloat16(), c)
        assert not torch.equal(a, d)


def test_init_has_the_keys_and_shapes_it_documents():
    config = CONFIG._replace(shared_hidden=5)
    options = {"bias": True, "router_bias": True, "expert_bias": True}
    params = init_moe_ffn(torch.Generator(), config, dtype=torch.bfloat16, **options)
    shapes = pytree.tree_map(lambda p: tuple(p.shape), params, is_leaf=torch.is_tensor)
    experts = {"w1": (E, H, D), "w2": (E, D, H), "w3": (E, H, D), "b1": (E, H), "b2": (E, D), "b3": (E, H)}
    shared = {"w1": (5, D), "w2": (D, 5), "w3": (5, D), "b1": (5,), "b2": (D,), "b3": (5,)}
    router = {"router": (E, D), "router_bias": (E,), "expert_bias": (E,)}
    assert shapes == router | experts | {"shared": shared}
    assert params["expert_bias"].dtype == torch.float32
    assert params["w1"].dtype == params["shared"]["b2"].dtype == torch.bfloat16
    assert set(init_moe_ffn(torch.Generator(), CONFIG)) == {"router", "w1", "w2", "w3"}


def test_init_keeps_the_variance_of_what_passes_through():
    """Variance 1 / fan-in. The estimate from n entries is off by sqrt(2 / n); five of those."""
    params = init_moe_ffn(torch.Generator().manual_seed(0), MoEConfig(64, 128, 8, 2))
    for name, fan_in in (("router", 64), ("w1", 64), ("w2", 128), ("w3", 64)):
        spread = 5 * (2 / params[name].numel()) ** 0.5
        assert params[name].var().item() * fan_in == pytest.approx(1, abs=spread)


# --- wrong arguments -----------------------------------------------------------------------------


def without(*keys, **changes):
    params = make(VARIANTS["deepseek-v3"], dtype=torch.float32)
    return {k: p for k, p in params.items() if k not in keys} | changes


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (without("router"), ValueError, r"params\['router'\]: is missing"),
        (
            without("w2"),
            ValueError,
            r"params\['w2'\]: is missing; expected a tensor of shape \(8, 16, 24\)",
        ),
        (without("shared"), ValueError, r"params\['shared'\]: config.shared_hidden is 20; expected a dict"),
        (without(b1=None), TypeError, r"params\['b1'\]: is None; leave the key out instead"),
        (without(b2=torch.ones(8, 24)), ValueError, r"params\['b2'\]: expected shape \(8, 16\)"),
        (without(w4=torch.ones(8, 24)), ValueError, r"params: unknown key 'w4'; expected some of router"),
        (without(w1=torch.ones(8, 16, 24)), ValueError, r"params\['w1'\]: expected shape \(8, 24, 16\)"),
        (without(w3=torch.ones(8, 24, 16).long()), TypeError, r"params\['w3'\]: expected a float64"),
        (without(w3=torch.ones(8, 24, 16).double()), TypeError, r"params\['w3'\]: is float64, but recipe"),
        (
            without(router=torch.ones(8, 16, device="meta")),
            ValueError,
            r"params\['router'\]: is on meta, x on",
        ),
        (
            without(router_bias=torch.ones(8, device="meta")),
            ValueError,
            r"params\['router_bias'\]: is on meta",
        ),
        (
            without(expert_bias=torch.ones(8, device="meta")),
            ValueError,
            r"params\['expert_bias'\]: is on meta",
        ),
        (
            without(w2=torch.ones(8, 16, 24, device="meta")),
            ValueError,
            r"params\['w2'\]: is on meta, x on cpu",
        ),
        (without(shared={}), ValueError, r"params\['shared'\]\['w1'\]: is missing"),
        (without(shared={"gate": 1}), ValueError, r"params\['shared'\]: unknown key 'gate'"),
    ],
)
def test_wrong_params(params, error, message):
    with pytest.raises(error, match=message):
        moe_ffn(params, tokens(3).float(), config=VARIANTS["deepseek-v3"].config)


def test_a_shared_expert_that_the_config_does_not_know():
    with pytest.raises(ValueError, match="params: unknown key 'shared'"):
        moe_ffn(without("expert_bias"), tokens(3).float(), config=CONFIG)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(3, 5), {}, ValueError, r"x: expected shape \(..., D\) with D = 16, got \(3, 5\)"),
        (torch.ones(3, D).long(), {}, TypeError, "x: expected a float64, .*, got torch.int64"),
        (torch.ones(3, D).double(), {}, TypeError, "x: is float64, but recipe quantises fwd, dgrad, wgrad"),
        (torch.ones(3, D), {"recipe": "mxfp8"}, TypeError, "recipe: expected a Recipe"),
        (torch.ones(3, D), {"implementation": "cuda"}, ValueError, "implementation: expected one or more"),
        (torch.ones(3, D), {"config": CONFIG._replace(top_k=0)}, ValueError, "config.top_k: "),
    ],
)
def test_wrong_arguments(x, options, error, message):
    params = make(VARIANTS["mixtral"], dtype=torch.float32)
    with pytest.raises(error, match=message):
        moe_ffn(params, x, **{"config": CONFIG} | options)


@pytest.mark.parametrize(
    ("params", "x", "offs", "error", "message"),
    [
        ({}, torch.ones(3, D), torch.zeros(E), ValueError, r"params\['w1'\]: expected a tensor of shape"),
        (without("w3"), torch.ones(3, D), torch.zeros(E), ValueError, r"params\['w3'\]: is missing"),
        (without(), torch.ones(3), torch.zeros(E), ValueError, r"x: expected shape \(M, D\), got \(3,\)"),
        (without(), torch.ones(3, D), torch.zeros(E), TypeError, "offs: expected an int32 tensor"),
        (without(), torch.ones(3, D), torch.zeros(2).int(), ValueError, "offs: expected one end for each"),
    ],
)
def test_wrong_arguments_of_expert_ffn(params, x, offs, error, message):
    with pytest.raises(error, match=message):
        expert_ffn(params, x, offs)


def test_init_without_a_generator():
    with pytest.raises(TypeError, match=r"generator: expected a torch.Generator, got int"):
        init_moe_ffn(0, CONFIG)
    with pytest.raises(ValueError, match=r"config.dim: expected an integer"):
        init_moe_ffn(torch.Generator(), CONFIG._replace(dim=0))
