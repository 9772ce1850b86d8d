"""What is not supported raises and says so: second order, forward mode, derivatives of a quantiser."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from moefp8 import dequantize_mx, quantize_mx, quantize_mx_jagged

# torch loads its own forward-mode formulas through torch.jit.script, which it deprecates.
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

NAMES = r"scaled_(grouped_)?mm: "
second_order = pytest.raises(NotImplementedError, match=NAMES + "second-order derivatives are not defined")
forward_mode = pytest.raises(NotImplementedError, match=NAMES + "forward-mode derivatives are not defined")


def curvature(case):
    """A loss that is quadratic in the product, so that its second derivative is not zero."""
    return lambda *operands: case.call(*operands).square().sum()


# --- second order --------------------------------------------------------------------------------


def test_grad_of_grad(case):
    """In every operand, and in one operand of the gradient of another."""
    operands, f = case.operands(), curvature(case)
    for i in case.argnums:
        for j in case.argnums[:2]:
            with second_order:
                grad(lambda *xs, j=j: grad(f, j)(*xs).sum(), i)(*operands)


def test_jacrev_of_jacrev(case):
    a, *weights = case.operands()
    with second_order:
        jacrev(jacrev(lambda a: curvature(case)(a, *weights)))(a)


def test_create_graph(case):
    leaves = [x.requires_grad_() for x in case.operands()]
    first = torch.autograd.grad(curvature(case)(*leaves), leaves, create_graph=True)
    for g in first[:2]:
        with second_order:
            torch.autograd.grad(g.sum(), leaves, retain_graph=True, allow_unused=True)


def test_gradient_penalty(case):
    """A penalty on a gradient is second order as well; a loss beside it does not hide that."""
    operands, f = case.operands(), curvature(case)

    def penalised(*xs):
        return f(*xs) + grad(f)(*xs).square().sum()

    with second_order:
        grad(penalised)(*operands)


def test_derivative_with_respect_to_the_cotangent(case):
    operands = case.operands()

    def pulled(g):
        return vjp(case.call, *operands)[1](g)[0].sum()

    with second_order:
        grad(pulled)(case.cotangent())


def test_second_order_under_vmap_and_compile(form):
    operands, f = form.operands(1, (2,)), curvature(form)

    def twice(*xs):
        return grad(lambda *ys: grad(f)(*ys).sum())(*xs)

    with second_order:
        vmap(twice)(*operands)
    with second_order:
        torch.compile(twice, backend="aot_eager")(*form.operands())


def test_autograd_hessian(form):
    a, *weights = form.operands()
    with second_order:
        torch.autograd.functional.hessian(lambda a: curvature(form)(a, *weights), a)


# --- forward mode --------------------------------------------------------------------------------


def test_jvp(case):
    operands = case.operands()
    with forward_mode:
        jvp(case.call, operands, operands)


def test_jvp_in_one_operand(case):
    for i in case.argnums[:2]:
        operands = list(case.operands())

        def f(x, i=i, operands=operands):
            return case.call(*operands[:i], x, *operands[i + 1 :])

        with forward_mode:
            jvp(f, (operands[i],), (operands[i],))


def test_jacfwd_hessian_and_linearize(form):
    a, *weights = form.operands()

    def f(a):
        return curvature(form)(a, *weights)

    with forward_mode:
        jacfwd(f)(a)
    with forward_mode:
        hessian(f)(a)  # forward over reverse
    with forward_mode:
        linearize(f, a)


def test_dual_numbers(form):
    operands = form.operands()
    with forward_ad.dual_level(), forward_mode:
        form.call(*(forward_ad.make_dual(x, x) for x in operands))


def test_jvp_under_compile(form):
    operands = form.operands()
    with forward_mode:
        torch.compile(lambda *xs: jvp(form.call, xs, xs), backend="aot_eager")(*operands)


# --- quantisers ----------------------------------------------------------------------------------

QUANTISERS = {
    "quantize_mx": lambda x: dequantize_mx(quantize_mx(x), torch.float32),
    "quantize_mx_jagged": lambda x: dequantize_mx(
        quantize_mx_jagged(x, torch.tensor([3, 8], dtype=torch.int32))[0], torch.float32
    ),
}


@pytest.mark.parametrize("name", QUANTISERS)
def test_derivatives_of_a_quantiser(name):
    """Rounding has the derivative zero almost everywhere; the error says what to write instead."""
    x = torch.randn(8, 32)

    def f(x):
        return QUANTISERS[name](x).sum()

    refused = pytest.raises(NotImplementedError, match=r"_mx.*has no useful derivative.*straight-through")
    for transform in (grad(f), jacrev(f), torch.compile(grad(f), backend="aot_eager")):
        with refused:
            transform(x)
    with refused:
        vmap(grad(f))(x[None])
    with refused:
        f(x.clone().requires_grad_()).backward()
    with refused:
        jvp(f, (x,), (x,))


def test_the_straight_through_estimate_that_the_error_proposes():
    x = torch.randn(8, 32)

    def f(x):
        q = x + (dequantize_mx(quantize_mx(x), x.dtype) - x).detach()
        return (q * q).sum()

    quantized = x + (dequantize_mx(quantize_mx(x), x.dtype) - x)
    assert torch.equal(grad(f)(x), 2 * quantized)
