"""``remat``: the same values and gradients as without it, under every transform, and little kept."""

import functools

import pytest
import torch
from torch.func import functional_call, grad, grad_and_value, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from moefp8 import remat

pytestmark = pytest.mark.usefixtures("fresh_compiler")

compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")


# --- around the products -------------------------------------------------------------------------


def test_backward(case):
    leaves = [x.clone().requires_grad_() for x in case.operands()]
    remat(case.loss)(*leaves).backward()
    case.agree([x.grad for x in leaves], case.eager(*case.operands()))


def test_grad(case):
    operands = case.operands()
    gradients, value = grad_and_value(remat(case.loss), case.argnums)(*operands)
    case.agree(gradients, case.eager(*operands))
    case.agree(value, case.loss(*operands))


def test_vmap_grad(case):
    operands = case.operands(1, (2,))
    case.agree(
        vmap(grad(remat(case.loss), case.argnums))(*operands),
        vmap(grad(case.loss, case.argnums))(*operands),
    )


def test_grad_of_vmap(form):
    operands = form.operands(1, (2,))

    def total(f):
        return lambda *xs: vmap(f)(*xs).sum()

    form.agree(
        grad(total(remat(form.loss)), form.argnums)(*operands),
        grad(total(form.loss), form.argnums)(*operands),
    )
    form.agree(
        grad(remat(total(form.loss)), form.argnums)(*operands),
        grad(total(form.loss), form.argnums)(*operands),
    )


def test_jacrev_and_vjp(form):
    a, *weights = form.operands()

    def f(a):
        return form.call(a, *weights).flatten(0, -2)[:2, ::4]

    form.agree(jacrev(remat(f))(a), jacrev(f)(a))
    out, pullback = vjp(remat(f), a)
    form.agree(pullback(torch.ones_like(out)), vjp(f, a)[1](torch.ones_like(out)))


def constants_as_arguments(case):
    """``loss`` for the compiler, under which a rematerialised function may capture no tensor."""
    offs = () if case.offs is None else (case.offs,)
    block = remat(lambda offs, g, *xs: (case.call(*xs, offs=offs[0] if offs else None) * g).sum())
    return functools.partial(block, offs, case.cotangent())


def test_compile_grad(case):
    operands, loss = case.operands(), constants_as_arguments(case)
    case.agree(compiled(grad(loss, case.argnums))(*operands), case.eager(*operands))


def test_compile_backward(form):
    leaves = [x.clone().requires_grad_() for x in form.operands()]
    compiled(constants_as_arguments(form))(*leaves).backward()
    form.agree([x.grad for x in leaves], form.eager(*form.operands()))


def test_compile_vmap_grad(form):
    operands, loss = form.operands(1, (2,)), constants_as_arguments(form)
    want = vmap(grad(form.loss, form.argnums))(*operands)
    form.agree(compiled(vmap(grad(loss, form.argnums)))(*operands), want)


def test_a_layer_of_a_compiled_step(form):
    """Rematerialised in the middle of what is differentiated, as a block of a model is."""
    operands = form.operands()
    offs = () if form.offs is None else (form.offs,)

    def step(f):
        def loss(*xs):
            return (2 * f(offs, *(3 * x for x in xs)) * form.cotangent()).sum()

        return grad(loss, form.argnums)

    def block(offs, *xs):
        return form.call(*xs, offs=offs[0] if offs else None)

    form.agree(compiled(step(remat(block)))(*operands), step(block)(*operands))


def test_make_fx(form):
    operands, loss = form.operands(), constants_as_arguments(form)
    graph = make_fx(grad(loss, form.argnums))(*operands)
    form.agree(graph(*operands), form.eager(*operands))


def test_inside_checkpoint(form):
    leaves = [x.clone().requires_grad_() for x in form.operands()]
    checkpoint(remat(form.loss), *leaves, use_reentrant=False).backward()
    form.agree([x.grad for x in leaves], form.eager(*form.operands()))


# --- what it keeps -------------------------------------------------------------------------------


def test_runs_again_in_the_backward_and_keeps_the_arguments_only():
    calls = 0

    def f(x):
        nonlocal calls
        calls += 1
        return x.sin().exp().cos()

    saved = []
    x = torch.randn(5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = remat(f)(x)
    assert calls == 1
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    y.sum().backward()
    assert calls == 2


# --- structures ----------------------------------------------------------------------------------


def test_pytrees_and_keyword_arguments():
    """Dicts and tuples in and out; leaves that are no tensors and tensors that are no floats pass."""

    def f(params, x, *, scale, flags):
        ids, power = flags
        y = (x[ids] @ params["w"]) ** power * scale
        return {"y": y, "extra": (y.sum(), params["b"] * 2)}

    params = {"w": torch.randn(3, 4), "b": torch.randn(2)}
    x, flags = torch.randn(5, 3), (torch.tensor([0, 2, 2]), 2)

    def loss(f, params, x):
        out = f(params, x, scale=3.0, flags=flags)
        return out["y"].sum() + out["extra"][0] + out["extra"][1].sum()

    got = grad(functools.partial(loss, remat(f)), (0, 1))(params, x)
    want = grad(functools.partial(loss, f), (0, 1))(params, x)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert list(remat(f)(params, x, scale=3.0, flags=flags)) == ["y", "extra"]


def test_nested():
    """Inside itself, any depth; the gradient stays the same."""

    def inner(x):
        return x.sin() * x

    def outer(f):
        return lambda x: f(f(x)).sum()

    x = torch.randn(5)
    want = grad(outer(inner))(x)
    assert torch.equal(grad(remat(outer(remat(inner))))(x), want)
    assert torch.equal(grad(remat(remat(outer(inner))))(x), want)
    assert torch.equal(vmap(grad(remat(outer(remat(inner)))))(x[None])[0], want)
    assert torch.equal(compiled(grad(remat(outer(remat(inner)))))(x), want)


def test_unused_and_undifferentiated_arguments():
    def f(x, unused, constant):
        return (x * constant).sum()

    x, constant = torch.randn(3), torch.randn(3)
    gx, gu = grad(remat(f), (0, 1))(x, torch.randn(2), constant)
    assert torch.equal(gx, constant)
    assert torch.equal(gu, torch.zeros(2))


def test_a_module():
    """``functional_call`` binds the weights as arguments, so they have gradients."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    params, x = dict(model.named_parameters()), torch.randn(5, 3)

    def f(params, x):
        return functional_call(model, params, (x,)).sum()

    params = {name: p.detach() for name, p in params.items()}
    for name, g in grad(remat(f))(params, x).items():
        assert torch.equal(g, grad(f)(params, x)[name])


# --- what is refused -----------------------------------------------------------------------------


def test_a_captured_weight_is_refused():
    """Its gradient would be lost: the function sees a tensor under differentiation that is no argument."""
    x, w = torch.randn(3), torch.randn(3)
    captured = pytest.raises(ValueError, match=r"remat\(.*not one of its arguments \(shape \(3,\)\)")
    with captured:
        grad(lambda w: remat(lambda x: (x * w).sum())(x))(w)
    with captured:
        vmap(grad(lambda w: remat(lambda x: (x * w).sum())(x)))(w[None])
    w.requires_grad_()
    with captured:
        remat(lambda x: (x * w).sum())(x)


def test_captured_constants_are_fine():
    x, c = torch.randn(3), torch.randn(3)
    assert torch.equal(grad(remat(lambda x: (x * c).sum()))(x), c)
    batched = vmap(lambda c: grad(remat(lambda x, c: (x * c).sum()))(x, c))(torch.stack([c, 2 * c]))
    assert torch.equal(batched, torch.stack([c, 2 * c]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_is_refused():
    x = torch.randn(3)
    with pytest.raises(NotImplementedError, match=r"remat\(.*forward-mode"):
        jvp(remat(lambda x: x.sin()), (x,), (x,))


def test_calling_remat_inside_a_compiled_function_is_refused():
    """Its function would be traced without the wrapper that keeps it whole."""
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"call remat\(fn\) outside the compiled function"
    ):
        compiled(lambda x: remat(torch.sin)(x))(torch.randn(3))
