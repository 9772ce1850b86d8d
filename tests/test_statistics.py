"""Statistics of operands: worked examples, a loop over groups, and cotangents through the probe."""

import pytest
import torch
import torch.utils._pytree as pytree
from moe_oracle import VARIANTS, make, tokens
from specs import LAYOUTS, Layout, randn
from torch.func import grad, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from moefp8 import (
    BF16,
    FP8_ROWWISE,
    MXFP8,
    MXFP8_WGRAD_HP,
    Gemm,
    MoEConfig,
    OperandStats,
    Recipe,
    cotangent_probe,
    dequantize_mx,
    expert_ffn,
    expert_statistics,
    init_moe_ffn,
    moe_ffn,
    quantize_mx,
    quantize_params,
    remat,
    route,
)
from moefp8.kernels.ffn import swiglu, swiglu_backward
from moefp8.kernels.reference import rows
from moefp8.moe import sort_by_expert
from moefp8.statistics import measure

E5M2 = Gemm(dtype=torch.float8_e5m2)
VARIANT = VARIANTS["biases"]


def stats(x, gemm=Gemm(), axis=-1, offs=None, native_group=32):  # noqa: B008 - a constant
    return OperandStats(*measure(x, offs, axis, gemm, native_group).tolist())


# --- worked examples -----------------------------------------------------------------------------


def test_flushed_and_subnormal_by_hand():
    """amax 1 has the scale 2^-8: normal from 2^-14, subnormal from 2^-17; 2^-18 is a tie with zero."""
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([1.0, 2.0**-14, -(2.0**-15), 2.0**-17, 2.0**-18, -(2.0**-20)])
    assert stats(x) == OperandStats(0.0, 2 / 32, 2 / 32, 0.0, 0.0, 1.0)


def test_subnormal_of_e5m2_by_hand():
    """amax 1 has the scale 2^-15: normal from 2^-29 on, subnormal from 2^-31 on."""
    x = torch.zeros(1, 32)
    x[0, :5] = torch.tensor([1.0, 2.0**-29, 2.0**-30, 2.0**-31, 2.0**-32])
    assert stats(x, E5M2) == OperandStats(0.0, 1 / 32, 2 / 32, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("gemm", "values", "saturated"),
    [  # the scale of floor is 2^-8; 1.8125 = 464 / 2^8 lies halfway to what would come next, and stays
        (Gemm(rule="floor"), [1.75, 1.8125, 1.82, -1.99], 2),
        (Gemm(rule="rceil"), [1.75, 1.8125, 1.82, -1.99], 0),
        (Gemm(format="row"), [1.75, 1.8125, 1.82, -1.99], 0),
        # 2^-15, 1.875 = 61440 / 2^15
        (Gemm(dtype=torch.float8_e5m2, rule="floor"), [1.75, 1.875, 1.88, -1.99], 2),
    ],
)
def test_saturated_by_hand(gemm, values, saturated):
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor(values)
    assert stats(x, gemm).saturated == saturated / 32


def test_spread_by_hand():
    """Blocks of 2^0, zero and 2^-20 in one row, of 2^3 alone in the other: 20 and 0 binades."""
    x = torch.zeros(2, 96)
    x[0, 0], x[0, 70], x[1, 40] = 1.0, 2.0**-20, 8.0
    got = stats(x)
    assert (got.spread, got.max_spread, got.amax) == (10.0, 20.0, 8.0)
    assert got.flushed == 0.0
    whole = stats(x, Gemm(group=-1))  # the same blocks, but 2^-20 does not survive the scale of 2^0
    assert (whole.max_spread, whole.flushed) == (20.0, pytest.approx(1 / 192, rel=2.0**-23))
    assert stats(x, native_group=-1) == whole
    assert stats(x.T, axis=-2, offs=torch.tensor([96], dtype=torch.int32)).max_spread == 20.0


def test_nan_and_infinity_count_for_nothing():
    x = torch.ones(2, 64)
    x[0, 0], x[1, 40] = torch.nan, -torch.inf
    assert stats(x, Gemm(rule="floor")) == OperandStats(0.0, 0.0, 0.0, 0.0, 0.0, 1.0)


# --- against a loop over groups ------------------------------------------------------------------


def looped(x, gemm, axis, ends):
    """The same from quantize_mx and its bound on what is normal, group after group, contraction after
    contraction."""
    fmt = {torch.float8_e4m3fn: (464.0, -6, -10), torch.float8_e5m2: (61440.0, -14, -17)}
    halfway, min_exponent, half_subnormal = fmt[gemm.dtype]
    saturated = flushed = subnormal = count = 0
    spreads, amax = [], 0.0
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        part = x[start:end].double()
        if part.numel() == 0:
            continue
        group = gemm.group or 32
        q = quantize_mx(x[start:end].float(), axis, dtype=gemm.dtype, rule=gemm.rule, group=group)
        scale = torch.exp2(q.scale.double() - 127)
        group = part.shape[axis] if group == -1 else group
        scale = scale.repeat_interleave(group, axis).narrow(axis, 0, part.shape[axis])
        scaled = part.abs() / scale
        saturated += int((scaled > halfway).sum())
        flushed += int(((scaled <= 2.0**half_subnormal) & (scaled > 0)).sum())
        value = dequantize_mx(q, torch.float64).abs() / scale
        subnormal += int(((value > 0) & (value < 2.0**min_exponent)).sum())
        count += part.numel()
        amax = max(amax, part.abs().max().item())
        for line in part.abs().movedim(axis, -1):
            tops = [b.max().item() for b in line.split(32)]
            exponents = [torch.tensor(t).log2().floor().item() for t in tops if t]
            if exponents:
                spreads.append(max(exponents) - min(exponents))
    share = [n / max(count, 1) for n in (saturated, flushed, subnormal)]
    mean = sum(spreads) / max(len(spreads), 1)
    return OperandStats(*share, mean, max(spreads, default=0.0), amax)


@pytest.mark.parametrize("layout", LAYOUTS[:-1], ids=lambda layout: layout.name)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(
    "gemm",
    [Gemm(), Gemm(group=64), Gemm(group=-1), Gemm(rule="floor"), E5M2],
    ids=["mx", "64", "whole", "floor", "e5m2"],
)
def test_equals_the_loop(layout, axis, gemm):
    x = randn(layout.rows, 70)
    x = x * torch.exp2(-30 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)))
    x[sum(layout.sizes) :] = torch.nan  # rows of no group
    offs = layout.offs()
    got, want = stats(x, gemm, axis, offs), looped(x, gemm, axis, offs.tolist())
    assert got == pytest.approx(want, rel=2.0**-23)  # float32 against the same numbers in float64


def test_weights_along_both_axes():
    w = randn(3, 40, 70)
    for axis in (-1, -2):
        parts = [looped(part, Gemm(), axis, [40]) for part in w]
        want = OperandStats(*(sum(field) / 3 for field in zip(*parts, strict=True)))
        want = want._replace(max_spread=max(p.max_spread for p in parts), amax=w.abs().max().item())
        assert stats(w, axis=axis) == pytest.approx(want, rel=1e-6)


# --- of a feed-forward ---------------------------------------------------------------------------

LAYOUT = Layout("", (10, 0, 23), 7)


def experts():
    shapes = {"w1": (3, 48, 32), "w2": (3, 32, 48), "w3": (3, 48, 32), "b1": (3, 48), "b2": (3, 32)}
    params = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return params, randn(40, 32, seed=7), randn(40, 32, seed=8)


def inner(params, x, recipe):
    offs = LAYOUT.offs()
    gate = rows(x, params["w1"].mT, offs, params["b1"], recipe.fwd, x.dtype)
    return gate, rows(x, params["w3"].mT, offs, None, recipe.fwd, x.dtype)


RECIPES = [MXFP8, FP8_ROWWISE, MXFP8_WGRAD_HP, Recipe(Gemm(rule="floor"), E5M2, Gemm(group=64)), BF16]
recipes = pytest.mark.parametrize("recipe", RECIPES, ids=["mx", "row", "wgrad hp", "mixed", "bf16"])


def expected(operands, recipe):
    """``operands[name] = (x, offs, {product: axis})``, those that the recipe quantises."""
    return {
        name: found
        for name, (x, offs, products) in operands.items()
        if (
            found := {
                product: stats(x, getattr(recipe, product), axis, offs)
                for product, axis in products.items()
                if getattr(recipe, product).format != "none"
            }
        )
    }


def as_floats(tree):
    return {
        name: {product: OperandStats(*(f.item() for f in s)) for product, s in products.items()}
        for name, products in tree.items()
    }


@recipes
def test_forward_operands(recipe):
    params, x, _ = experts()
    gate, up = inner(params, x, recipe)
    offs, along = LAYOUT.offs(), {"fwd": -1, "wgrad": -2}
    want = {"x": (x, offs, along), "hidden": (swiglu(gate, up), offs, along)}
    want |= {name: (params[name], None, {"fwd": -1, "dgrad": -2}) for name in ("w1", "w2", "w3")}
    assert as_floats(expert_statistics(params, x, offs, recipe=recipe)) == expected(want, recipe)


@recipes
def test_cotangents_are_the_gradient_of_the_probe(recipe):
    params, x, g = experts()
    offs, probe = LAYOUT.offs(), cotangent_probe(recipe)

    def ffn(params, x, probe):
        return expert_ffn(params, x, offs, recipe=recipe, probe=probe)

    out, pullback = vjp(ffn, params, x, probe)
    *gradients, measured = pullback(g)
    plain, plain_pullback = vjp(lambda p, x: expert_ffn(p, x, offs, recipe=recipe), params, x)
    assert torch.equal(out, plain)
    for a, b in zip(pytree.tree_leaves(gradients), pytree.tree_leaves(plain_pullback(g)), strict=True):
        assert torch.equal(a, b)

    d_hidden = rows(g, params["w2"], offs, None, recipe.dgrad, g.dtype)
    d_gate, d_up = swiglu_backward(*inner(params, x, recipe), d_hidden)
    along = {"dgrad": -1, "wgrad": -2}
    want = {"out": (g, offs, along), "gate": (d_gate, offs, along), "up": (d_up, offs, along)}
    assert as_floats(measured) == expected(want, recipe)


@pytest.mark.parametrize("variant", ["biases", "llama4"], ids=["output", "input"])
def test_of_the_layer(variant):
    """Of the rows that the experts get, and nothing else about the layer changes."""
    config, params = VARIANTS[variant].config, make(VARIANTS[variant], dtype=torch.float32)
    x = tokens(9).float()
    routing = route(params, x, config)
    order = sort_by_expert(routing.indices, config.num_experts)
    into = x[order.source // config.top_k]
    if config.scores_on == "input":
        into = into * routing.weights.reshape(-1, 1)[order.source]
    want = expert_statistics(params, into, order.offs)
    plain, none = moe_ffn(params, x, config=config)
    for quantized in (None, quantize_params(params)):
        y, measured = moe_ffn(params, x, config=config, statistics=True, quantized=quantized)
        assert as_floats(measured.operands) == as_floats(want)
        assert torch.equal(y, plain)
    assert none.operands == ()


class Measurements(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.moefp8.operand_stats.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_measured_unasked():
    params, x, _ = experts()
    offs, probe = LAYOUT.offs(), cotangent_probe()
    with Measurements() as measurements:
        grad(lambda p: expert_ffn(p, x, offs).sum())(params)
        grad(lambda p: expert_ffn(p, x, offs, probe=probe).sum())(params)  # a probe, not differentiated
    assert measurements.count == 0
    with Measurements() as measurements:
        grad(lambda probe: expert_ffn(params, x, offs, probe=probe).sum())(probe)
        expert_statistics(params, x, offs)
    assert measurements.count == 6 + 10


# --- transforms ----------------------------------------------------------------------------------


def loss(params, probe, x):
    y, stats = moe_ffn(params, x, config=VARIANT.config, statistics=True, probe=probe)
    return y.square().sum(), stats.operands


def setup():
    return make(VARIANT, dtype=torch.float32), cotangent_probe(), tokens(9).float()


def measured():
    params, probe, x = setup()
    return grad(loss, (0, 1), has_aux=True)(params, probe, x)


def same(got, want):
    got, want = pytree.tree_leaves_with_path(got), pytree.tree_leaves(want)
    assert len(got) == len(want) > 0
    for (path, a), b in zip(got, want, strict=True):
        assert torch.equal(a, b), pytree.keystr(path)


def test_backward():
    params, probe, x = setup()
    probe = pytree.tree_map(lambda leaf: leaf.requires_grad_(), probe)
    value, forward = loss(params, probe, x)
    value.backward()
    (_, want), want_forward = measured()
    same(pytree.tree_map(lambda leaf: leaf.grad, probe), want)
    same(forward, want_forward)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(forward))


def test_vmap_measures_each_example():
    params, probe, _ = setup()
    xs = tokens(3, 9).float()
    # Powers of two move no row to another expert and change no share, only amax.
    xs[1], xs[2] = 4 * xs[0], xs[0]
    got, forward = vmap(grad(loss, 1, has_aux=True), (None, None, 0))(params, probe, xs)
    assert torch.equal(forward["x"]["fwd"].amax, xs.abs().amax((1, 2)))
    assert got["out"]["dgrad"].amax.shape == (3,)
    same(pytree.tree_map(lambda leaf: leaf[2], got), pytree.tree_map(lambda leaf: leaf[0], got))


def test_compile_and_make_fx(fresh_compiler):
    params, probe, x = setup()
    step = grad(loss, (0, 1), has_aux=True)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    same(compiled(params, probe, x), measured())
    same(make_fx(step)(params, probe, x)(params, probe, x), measured())


def test_remat():
    params, probe, x = setup()
    same(grad(lambda p, probe: remat(loss)(p, probe, x)[0], (0, 1))(params, probe), measured()[0])


def test_several_calls_add_up():
    params, probe, x = setup()
    twice = grad(lambda probe: loss(params, probe, x)[0] + loss(params, probe, x)[0])(probe)
    same(twice, pytree.tree_map(lambda leaf: leaf + leaf, measured()[0][1]))


# --- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [cotangent_probe(MXFP8_WGRAD_HP), {}, torch.zeros(36), {"out": 0}])
def test_a_probe_of_something_else(probe):
    params, _, x = setup()
    with pytest.raises(ValueError, match=r"probe: expected cotangent_probe\(recipe\) of this recipe"):
        moe_ffn(params, x, config=VARIANT.config, probe=probe)


def test_nothing_to_measure_in_high_precision():
    params, _, x = setup()
    assert cotangent_probe(BF16) == {}
    y, stats = moe_ffn(params, x, config=VARIANT.config, recipe=BF16, probe={}, statistics=True)
    assert stats.operands == {}
    assert torch.equal(y, moe_ffn(params, x, config=VARIANT.config, recipe=BF16)[0])


def test_gaussian_data_needs_no_more_than_a_few_subnormals():
    """Of a Gaussian block of 32 the amax is about 2 sigma, whose scale puts the smallest normal number
    near 2^-14 sigma: a share of 2 phi(0) 2^-14, 5e-5, lies below. Within a factor of 4 for the scale."""
    config = MoEConfig(dim=256, hidden=256, num_experts=4, top_k=2)
    params = init_moe_ffn(torch.Generator().manual_seed(0), config)
    x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(1))
    found = moe_ffn(params, x, config=config, statistics=True)[1].operands["x"]["fwd"]
    assert 5e-5 / 4 < found.subnormal < 5e-5 * 4
    assert found.saturated == 0
    assert found.max_spread <= 3
