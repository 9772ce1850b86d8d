"""``low_precision``: each product equals the call by hand, bit for bit, with its gradients, everywhere."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from moefp8 import (
    BF16,
    FP8_ROWWISE,
    MXFP8,
    MXFP8_WGRAD_HP,
    Gemm,
    low_precision,
    remat,
    scaled_grouped_mm,
    scaled_mm,
)

compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")

#: Another format for each product, so that a gradient computed under the wrong one shows.
MIXED = MXFP8._replace(dgrad=Gemm(dtype=torch.float8_e5m2), wgrad=Gemm(format="row"))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def equal(got, want):
    """The same structure, dtypes and bits."""
    got_leaves, got_spec = pytree.tree_flatten(got)
    want_leaves, want_spec = pytree.tree_flatten(want)
    assert got_spec == want_spec
    for x, y in zip(got_leaves, want_leaves, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y), (x - y).abs().max()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- every kind of product -----------------------------------------------------------------------

OFFS = torch.tensor([2, 2, 5], dtype=torch.int32)

# name: (what the model writes, the call by hand, shape of x)
PRODUCTS = {
    "linear": (lambda p, x: F.linear(x, p["w"]), lambda p, x, mm, gmm: mm(x, p["w"].T), (2, 5, 64)),
    "linear with bias": (
        lambda p, x: F.linear(x, p["w"], bias=p["b"]),
        lambda p, x, mm, gmm: mm(x, p["w"].T, bias=p["b"]),
        (5, 64),
    ),
    "linear of a vector": (lambda p, x: F.linear(x, p["w"]), lambda p, x, mm, gmm: mm(x, p["w"].T), (64,)),
    "x @ w": (lambda p, x: x @ p["w"].T, lambda p, x, mm, gmm: mm(x, p["w"].T), (2, 5, 64)),
    "torch.matmul": (
        lambda p, x: torch.matmul(x, p["w"].T),
        lambda p, x, mm, gmm: mm(x, p["w"].T),
        (5, 64),
    ),
    "linalg.matmul": (
        lambda p, x: torch.linalg.matmul(x, p["w"].T),
        lambda p, x, mm, gmm: mm(x, p["w"].T),
        (5, 64),
    ),
    "w @ x": (lambda p, x: p["w"] @ x, lambda p, x, mm, gmm: mm(x.T, p["w"].T).T, (64, 5)),
    "w @ vector": (lambda p, x: p["w"] @ x, lambda p, x, mm, gmm: mm(x, p["w"].T), (64,)),
    "mv": (lambda p, x: torch.mv(p["w"], x), lambda p, x, mm, gmm: mm(x, p["w"].T), (64,)),
    "w @ batch": (lambda p, x: p["w"] @ x, lambda p, x, mm, gmm: mm(x.mT, p["w"].T).mT, (2, 64, 5)),
    "mm": (lambda p, x: torch.mm(x, p["w"].T), lambda p, x, mm, gmm: mm(x, p["w"].T), (5, 64)),
    "mm, w first": (lambda p, x: p["w"].mm(x), lambda p, x, mm, gmm: mm(x.T, p["w"].T).T, (64, 5)),
    "addmm": (
        lambda p, x: torch.addmm(p["b"], x, p["w"].T),
        lambda p, x, mm, gmm: mm(x, p["w"].T, bias=p["b"]),
        (5, 64),
    ),
    "addmm, alpha and beta": (
        lambda p, x: torch.addmm(p["b"], x, p["w"].T, beta=0.5, alpha=3.0),
        lambda p, x, mm, gmm: mm(x, p["w"].T) * 3.0 + p["b"] * 0.5,
        (5, 64),
    ),
    "addmm of a matrix": (
        lambda p, x: p["B"][0].addmm(x, p["w"].T),
        lambda p, x, mm, gmm: mm(x, p["w"].T) + p["B"][0],
        (5, 64),
    ),
    "bmm": (lambda p, x: torch.bmm(x, p["W"]), lambda p, x, mm, gmm: gmm(x, p["W"]), (3, 5, 64)),
    "bmm, w first": (
        lambda p, x: p["W"].mT.bmm(x),
        lambda p, x, mm, gmm: gmm(x.mT, p["W"]).mT,
        (3, 64, 5),
    ),
    "baddbmm": (
        lambda p, x: torch.baddbmm(p["B"], x, p["W"]),
        lambda p, x, mm, gmm: gmm(x, p["W"]) + p["B"],
        (3, 5, 64),
    ),
    "matmul 3D x 3D": (lambda p, x: x @ p["W"], lambda p, x, mm, gmm: gmm(x, p["W"]), (3, 5, 64)),
    "matmul, x broadcast": (
        lambda p, x: x @ p["W"],
        lambda p, x, mm, gmm: gmm(x.expand(3, 5, 64), p["W"]),
        (5, 64),
    ),
    "matmul, w broadcast": (
        lambda p, x: x @ p["W"],
        lambda p, x, mm, gmm: gmm(x.movedim(1, 0).flatten(1, 2), p["W"]).unflatten(1, (2, 5)).movedim(0, 1),
        (2, 3, 5, 64),
    ),
    "matmul, one group": (lambda p, x: x @ p["W"][:1], lambda p, x, mm, gmm: mm(x, p["W"][0]), (3, 5, 64)),
    "einsum": (
        lambda p, x: torch.einsum("b s d, f d -> b s f", x, p["w"]),
        lambda p, x, mm, gmm: mm(x, p["w"].T),
        (2, 5, 64),
    ),
    "einsum, implicit": (
        lambda p, x: torch.einsum("...d,fd", x, p["w"]),
        lambda p, x, mm, gmm: mm(x, p["w"].T),
        (2, 5, 64),
    ),
    "einsum of sublists": (
        lambda p, x: torch.einsum(x, [0, 1], p["w"], [2, 1], [0, 2]),
        lambda p, x, mm, gmm: mm(x, p["w"].T),
        (5, 64),
    ),
    "einsum, w first": (
        lambda p, x: torch.einsum("fd,td->ft", [p["w"], x]),
        lambda p, x, mm, gmm: mm(x, p["w"].T).T,
        (5, 64),
    ),
    "einsum, into heads": (
        lambda p, x: torch.einsum("bsd,dhe->bhse", x, p["w"].T.unflatten(1, (4, 8))),
        lambda p, x, mm, gmm: mm(x, p["w"].T).unflatten(-1, (4, 8)).permute(0, 2, 1, 3),
        (2, 5, 64),
    ),
    "einsum, out of heads": (
        lambda p, x: torch.einsum("bshe,hef->bsf", x, p["w"].unflatten(0, (4, 8))),
        lambda p, x, mm, gmm: mm(x.flatten(2), p["w"]),
        (2, 5, 4, 8),
    ),
    "einsum, groups": (
        lambda p, x: torch.einsum("gtd,gdf->tgf", x, p["W"]),
        lambda p, x, mm, gmm: gmm(x, p["W"]).movedim(0, 1),
        (3, 5, 64),
    ),
    "_grouped_mm": (
        lambda p, x: torch._grouped_mm(x, p["W"], OFFS),
        lambda p, x, mm, gmm: gmm(x, p["W"], OFFS),
        (5, 64),
    ),
    "grouped_mm": (
        lambda p, x: F.grouped_mm(x, p["W"], offs=OFFS),
        lambda p, x, mm, gmm: gmm(x, p["W"], OFFS),
        (5, 64),
    ),
    "grouped_mm 3D x 3D": (
        lambda p, x: F.grouped_mm(x, p["W"]),
        lambda p, x, mm, gmm: gmm(x, p["W"]),
        (3, 8, 64),
    ),
    "grouped_mm 3D x 2D": (
        lambda p, x: F.grouped_mm(p["W"].mT, x, offs=OFFS),
        lambda p, x, mm, gmm: gmm(x.mT, p["W"], OFFS).mT,
        (64, 8),
    ),
}


def params():
    return {
        "w": randn(32, 64),
        "W": randn(3, 64, 32, seed=1),
        "b": randn(32, seed=2),
        "B": randn(3, 5, 32, seed=3),
    }


def weighted(fn):
    """A scalar whose cotangent at the result of ``fn`` varies."""

    def loss(p, x):
        out = fn(p, x)
        return (out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).square().sum()

    return loss


@pytest.mark.parametrize("recipe", [MXFP8, MIXED, MXFP8_WGRAD_HP], ids=["mxfp8", "mixed", "wgrad_hp"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_equals_the_call_by_hand(name, recipe):
    model, by_hand, shape = PRODUCTS[name]
    x = randn(*shape, seed=4)
    kept = {"recipe": recipe}
    hand = functools.partial(
        by_hand, mm=functools.partial(scaled_mm, **kept), gmm=functools.partial(scaled_grouped_mm, **kept)
    )
    low = low_precision(model, [("[wW]", recipe)])
    equal(low(params(), x), hand(params(), x))
    equal(
        grad(low_precision(weighted(model), [("[wW]", recipe)]), (0, 1))(params(), x),
        grad(weighted(hand), (0, 1))(params(), x),
    )


@pytest.mark.parametrize("name", PRODUCTS)
def test_shape_and_dtype_are_those_of_the_original(name):
    model, _, shape = PRODUCTS[name]
    x, p = randn(*shape, seed=4).bfloat16(), {k: v.bfloat16() for k, v in params().items()}
    out = low_precision(model, [("[wW]", MXFP8)])(p, x)
    assert out.shape == model(p, x).shape
    assert out.dtype == torch.bfloat16


def test_products_of_activations_are_untouched():
    def attention(p, x):
        q, k = x @ p["q"].T, x @ p["k"].T
        return torch.einsum("td,sd->ts", q, k) @ torch.softmax(q @ k.T, -1)

    def by_hand(p, x):
        q, k = scaled_mm(x, p["q"].T), scaled_mm(x, p["k"].T)
        return torch.einsum("td,sd->ts", q, k) @ torch.softmax(q @ k.T, -1)

    p, x = {"q": randn(32, 64), "k": randn(32, 64, seed=1)}, randn(5, 64, seed=2)
    equal(low_precision(attention, [("*", MXFP8)])(p, x), by_hand(p, x))


# --- transforms ----------------------------------------------------------------------------------

RULES = [("layers.*", MIXED), ("head", FP8_ROWWISE), ("router", BF16)]


def loss(p, x):
    for layer in p["layers"]:
        x = F.linear(x, layer["w"], layer["b"]).relu()
    return (x @ p["head"]).square().mean() + (x @ p["router"]).square().mean()


def loss_by_hand(p, x):
    for layer in p["layers"]:
        x = scaled_mm(x, layer["w"].mT, bias=layer["b"], recipe=MIXED).relu()
    return scaled_mm(x, p["head"], recipe=FP8_ROWWISE).square().mean() + (x @ p["router"]).square().mean()


def tree(*lead):
    layers = [{"w": randn(*lead, 64, 64, seed=i), "b": randn(*lead, 64, seed=10 + i)} for i in range(2)]
    return {"layers": layers, "head": randn(*lead, 64, 8, seed=20), "router": randn(*lead, 64, 4, seed=21)}


X, XS = randn(5, 64, seed=30), randn(3, 5, 64, seed=31)

# name: (a transform, the parameters, the data)
TRANSFORMS = {
    "none": (lambda f: f, tree(), X),
    "grad": (grad, tree(), X),
    "vjp": (lambda f: lambda p, x: vjp(f, p, x)[1](torch.tensor(1.5)), tree(), X),
    "jacrev": (jacrev, tree(), X),
    "vmap over data": (lambda f: vmap(f, (None, 0)), tree(), XS),
    "vmap(grad) over data": (lambda f: vmap(grad(f), (None, 0)), tree(), XS),
    "vmap(grad) over weights": (lambda f: vmap(grad(f), (0, None)), tree(3), X),
    "vmap(grad) over both": (lambda f: vmap(grad(f)), tree(3), XS),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_inside_a_transform(name):
    transform, p, x = TRANSFORMS[name]
    equal(transform(low_precision(loss, RULES))(p, x), transform(loss_by_hand)(p, x))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_around_a_transform(name):
    transform, p, x = TRANSFORMS[name]
    equal(low_precision(transform(loss), RULES)(p, x), transform(loss_by_hand)(p, x))


@pytest.mark.parametrize("name", ["none", "grad", "vmap(grad) over data", "vmap(grad) over both"])
@pytest.mark.parametrize("order", ["inside", "around"])
def test_compiled(name, order):
    transform, p, x = TRANSFORMS[name]
    low = (
        transform(low_precision(loss, RULES))
        if order == "inside"
        else low_precision(transform(loss), RULES)
    )
    equal(compiled(low)(p, x), transform(loss_by_hand)(p, x))


def leaves_of(p):
    return pytree.tree_map(lambda x: x.clone().requires_grad_(), p)


def backward(fn, p, x):
    p = leaves_of(p)
    fn(p, x).backward()
    return pytree.tree_map(lambda x: x.grad, p)


@pytest.mark.parametrize("wrap", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_backward(wrap):
    equal(backward(wrap(low_precision(loss, RULES)), tree(), X), backward(loss_by_hand, tree(), X))


def test_make_fx():
    traced = make_fx(grad(low_precision(loss, RULES)))(tree(), X)
    equal(traced(tree(), X), grad(loss_by_hand)(tree(), X))


# torch loads its own forward-mode formulas through torch.jit.script, which it deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_raises():
    p = tree()
    with pytest.raises(NotImplementedError, match="scaled_mm: forward-mode"):
        torch.func.jvp(low_precision(loss, RULES), (p, X), (p, X))


def test_per_example_weights_inside_vmap():
    """The function maps over experts itself; inside, each weight is a slice of the leaf."""

    def experts(p, x):
        return vmap(F.linear)(x, p["w"]).square().sum()

    def by_hand(p, x):
        return vmap(lambda x, w: scaled_mm(x, w.mT))(x, p["w"]).square().sum()

    p, x = {"w": randn(3, 32, 64)}, randn(3, 5, 64, seed=1)
    equal(grad(low_precision(experts, [("w", MXFP8)]))(p, x), grad(by_hand)(p, x))


# --- remat and checkpoint ------------------------------------------------------------------------

block = remat(lambda p, x: F.linear(x, p["w"], p["b"]).relu())


def loss_with_remat(p, x):
    for layer in p["layers"]:
        # A cast, so that what remat sees is not the leaf itself.
        x = block({"w": layer["w"].double().float(), "b": layer["b"]}, x)
    return (x @ p["head"]).square().mean() + (x @ p["router"]).square().mean()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_remat_inside(name):
    transform, p, x = TRANSFORMS[name]
    equal(transform(low_precision(loss_with_remat, RULES))(p, x), transform(loss_by_hand)(p, x))
    equal(low_precision(transform(loss_with_remat), RULES)(p, x), transform(loss_by_hand)(p, x))


@pytest.mark.parametrize("wrap", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_remat_inside_backward(wrap):
    low = low_precision(loss_with_remat, RULES)
    equal(backward(wrap(low), tree(), X), backward(loss_by_hand, tree(), X))
    equal(wrap(grad(low))(tree(), X), grad(loss_by_hand)(tree(), X))


def test_nested_remat_inside():
    outer = remat(lambda p, x: block(p, x).square())

    def model(p, x):
        return outer(p, x).sum()

    def by_hand(p, x):
        return scaled_mm(x, p["w"].mT, bias=p["b"]).relu().square().sum()

    p = tree()["layers"][0]
    equal(grad(low_precision(model, [("w", MXFP8)]))(p, X), grad(by_hand)(p, X))


def test_remat_outside():
    equal(grad(remat(low_precision(loss, RULES)))(tree(), X), grad(loss_by_hand)(tree(), X))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_inside_raises(use_reentrant):
    """It would run the block again in the backward, after the function has ended."""

    def model(p, x):
        run = torch.utils.checkpoint.checkpoint
        return run(F.linear, x, p["w"], p["b"], use_reentrant=use_reentrant).sum()

    p = leaves_of(tree()["layers"][0])
    with pytest.raises(NotImplementedError, match=r"checkpoint inside.*moefp8\.remat"):
        low_precision(model, [("w", MXFP8)])(p, X)


def test_inside_checkpoint():
    def by_hand(p, x):
        return scaled_mm(x, p["w"].mT, bias=p["b"]).sum()

    def model(p, x):
        linear = low_precision(lambda p, x: F.linear(x, p["w"], p["b"]), [("w", MXFP8)])
        return torch.utils.checkpoint.checkpoint(linear, p, x, use_reentrant=False).sum()

    p = tree()["layers"][0]
    equal(backward(model, p, X), backward(by_hand, p, X))


# --- modules, closures, compile ------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 32), torch.nn.Linear(32, 16, bias=False)
        self.register_buffer("gain", randn(32, seed=40))

    def forward(self, x):
        return self.down((self.up(x) * self.gain).relu())


def module_losses():
    net = Net()

    def model(p, x):
        return functional_call(net, p, (x,)).square().sum()

    def by_hand(p, x):
        h = scaled_mm(x, p["up.weight"].mT, bias=p["up.bias"]) * net.gain
        return scaled_mm(h.relu(), p["down.weight"].mT).square().sum()

    return low_precision(model, [("*.weight", MXFP8)]), by_hand, dict(net.named_parameters()), net


@pytest.mark.parametrize("wrap", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_module(wrap):
    low, by_hand, p, _ = module_losses()
    want = grad(by_hand)({name: x.detach() for name, x in p.items()}, X)
    equal(wrap(grad(low))({name: x.detach() for name, x in p.items()}, X), want)
    wrap(low)(p, X).backward()
    equal({name: x.grad for name, x in p.items()}, want)


def test_compiled_reads_buffers_afresh():
    """A buffer the module closes over is an input of the graph, not a constant of it."""
    low, by_hand, p, net = module_losses()
    p = {name: x.detach() for name, x in p.items()}
    step = compiled(grad(low))
    equal(step(p, X), grad(by_hand)(p, X))
    net.gain.mul_(3.0)
    equal(step(p, X), grad(by_hand)(p, X))


def test_compiled_with_none_and_keywords():
    def model(p, x, mask=None, scale=1.0):
        out = F.linear(x, p["w"]) * scale
        return (out if mask is None else out * mask).sum()

    low, p = low_precision(model, [("w", MXFP8)]), {"w": randn(8, 64)}
    want = grad(low)(p, X, mask=None, scale=2.0)
    equal(compiled(grad(low))(p, X, mask=None, scale=2.0), want)


def test_compiled_refuses_a_tensor_it_cannot_lift():
    held = [randn(5, 8)]
    low = low_precision(lambda p, x: (F.linear(x, p["w"]) * held[0]).sum(), [("w", MXFP8)])
    with (
        pytest.warns(UserWarning, match="neither an argument nor held"),
        pytest.raises(torch._dynamo.exc.Unsupported),
    ):
        compiled(low)({"w": randn(8, 64)}, X)


def test_compile_inside_raises():
    def model(p, x):
        return compiled(F.linear)(x, p["w"]).sum()

    with pytest.raises(torch._dynamo.exc.Unsupported, match="Observed exception"):
        low_precision(model, [("w", MXFP8)])({"w": randn(8, 64)}, X)


def test_wrapping_inside_a_compiled_function_raises():
    def step(p, x):
        return low_precision(loss, RULES)(p, x)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(step)(tree(), X)


# --- nesting, explicit products ------------------------------------------------------------------


def test_nested_inner_rules_win():
    inner = low_precision(
        lambda p, x: x @ p["a"] + x @ p["b"] + x @ p["c"], [("a", FP8_ROWWISE), ("b", BF16)]
    )
    p = {name: randn(64, 8, seed=i) for i, name in enumerate("abc")}
    out = low_precision(inner, [("*", MXFP8)])(p, X)
    equal(out, scaled_mm(X, p["a"], recipe=FP8_ROWWISE) + X @ p["b"] + scaled_mm(X, p["c"], recipe=MXFP8))


def test_nested_outer_is_not_told_off():
    """An outer rule whose products an inner one settles is in use."""
    inner = low_precision(lambda p, x: x @ p["a"], [("a", BF16)])
    p = {"a": randn(64, 8)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        equal(low_precision(inner, [("a", MXFP8)])(p, X), X @ p["a"])


@pytest.mark.parametrize("recipe", [BF16, FP8_ROWWISE])
def test_a_product_asked_for_by_name_keeps_its_recipe(recipe):
    def model(p, x):
        return scaled_mm(x, p["w"].mT, recipe=recipe).square().sum()

    p = {"w": randn(8, 64)}
    equal(grad(low_precision(model, [("w", MXFP8)]))(p, X), grad(model)(p, X))
    equal(low_precision(grad(model), [("w", MXFP8)])(p, X), grad(model)(p, X))


# --- dtypes --------------------------------------------------------------------------------------


def under_autocast(fn):
    def run(p, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fn(p, x)

    return run


@pytest.mark.parametrize("name", ["linear with bias", "x @ w", "mm", "bmm", "einsum", "baddbmm"])
def test_autocast(name):
    """Operands are cast as autocast casts those of the original; the arithmetic inside is not."""
    model, by_hand, shape = PRODUCTS[name]
    x, p = randn(*shape, seed=4), params()
    low = low_precision(under_autocast(model), [("[wW]", MXFP8)])(p, x)
    assert low.dtype == under_autocast(model)(p, x).dtype == torch.bfloat16
    cast = {k: v.bfloat16() for k, v in p.items()}
    equal(low, by_hand(cast, x.bfloat16(), mm=scaled_mm, gmm=scaled_grouped_mm))


def test_autocast_leaves_grouped_mm_alone():
    model, by_hand, shape = PRODUCTS["grouped_mm"]
    x = randn(*shape, seed=4)
    low = low_precision(under_autocast(model), [("W", MXFP8)])(params(), x)
    assert under_autocast(model)(params(), x).dtype == torch.float32
    equal(low, by_hand(params(), x, mm=scaled_mm, gmm=scaled_grouped_mm))


def test_out_dtype_of_grouped_mm():
    x, p = randn(5, 64).bfloat16(), {"W": randn(3, 64, 32).bfloat16()}
    low = low_precision(
        lambda p, x: torch._grouped_mm(x, p["W"], OFFS, None, torch.float32), [("W", MXFP8)]
    )
    equal(low(p, x), scaled_grouped_mm(x, p["W"], OFFS, out_dtype=torch.float32))


def test_mismatched_dtypes_raise_as_the_original_does():
    low = low_precision(lambda p, x: x @ p["w"], [("w", MXFP8)])
    with pytest.raises(RuntimeError, match="same dtype"):
        low({"w": randn(64, 8).bfloat16()}, X)


def test_wrong_shapes_raise_as_the_original_does():
    low = low_precision(lambda p, x: F.linear(x, p["w"]), [("w", MXFP8)])
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        low({"w": randn(8, 63)}, X)


def test_float64_names_the_weight():
    w, x = randn(64, 8).double(), X.double()
    with pytest.raises(ValueError, match="weight 'w': a: is float64"):
        low_precision(lambda p, x: x @ p["w"], [("w", MXFP8)])({"w": w}, x)
    equal(low_precision(lambda p, x: x @ p["w"], [("w", BF16)])({"w": w}, x), x @ w)


def test_implementation_is_passed_on():
    low = low_precision(lambda p, x: x @ p["w"], [("w", MXFP8)], implementation="nonesuch")
    with pytest.raises(ValueError, match="nonesuch"):
        low({"w": randn(64, 8)}, X)
