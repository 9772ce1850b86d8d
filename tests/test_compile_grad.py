"""``torch.compile(grad(f))`` and ``torch.compile(vmap(grad(f)))``: the custom gradient survives.

Up to torch 2.13 a bare ``autograd.Function`` does not survive there: Dynamo differentiates its forward
instead and says nothing (pytorch #193279). The first tests here use a backward that is *not* the
derivative, so that the two can be told apart.
"""

import functools

import pytest
import torch
from torch.func import grad, grad_and_value, jacrev, vjp, vmap

from moefp8._custom_vjp import custom_vjp, remat

# Inductor uses parts of torch that torch deprecates.
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning"),
]

compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")


# --- the construct -------------------------------------------------------------------------------


def _tripled_fwd(static, x):
    return x * 1.0, ()


def _tripled_bwd(static, needed, g):
    return (3.0 * g,)


_tripled = custom_vjp("tripled", _tripled_fwd, _tripled_bwd)


def tripled(x):
    """The identity, whose backward multiplies by 3."""
    return _tripled(None, x)


class Bare(torch.autograd.Function):
    """The same as a Function that nothing protects."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * 1.0

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 3.0 * g


def total(op):
    return lambda x: op(x).sum()


TRANSFORMS = {
    "grad": grad,
    "vmap(grad)": lambda f: vmap(grad(f)),
    "grad_and_value": lambda f: lambda x: grad_and_value(f)(x)[0],
    "vjp": lambda f: lambda x: vjp(f, x)[1](torch.ones(()))[0],
    "jacrev": jacrev,
    "grad(vmap)": lambda f: grad(lambda x: vmap(f)(x).sum()),
    "grad(remat)": lambda f: grad(remat(f)),
}
transforms = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
backends = pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)


@backends
@transforms
def test_custom_backward_survives(transform, backend):
    x = torch.randn(2, 3)
    f = transform(total(tripled))
    three = torch.full((2, 3), 3.0)
    assert torch.equal(f(x), three)
    assert torch.equal(torch.compile(f, fullgraph=True, backend=backend)(x), three)


@transforms
def test_custom_backward_survives_inside_a_larger_function(transform):
    """Also where only a part of what is differentiated is custom: d/dx tripled(x^2) = 3 * 2x."""
    x = torch.randn(2, 3)
    f = transform(lambda x: tripled(x * x).sum())
    torch.testing.assert_close(compiled(f)(x), 6.0 * x)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
def test_a_bare_function_would_not_survive():
    """Shows that the tests above can fail: 3 in eager mode, and compiled 1, the silent failure.

    Fixed in torch 2.15; where it is, the construct costs nothing.
    """
    x = torch.randn(3)
    f = grad(total(Bare.apply))
    assert torch.equal(f(x), torch.full((3,), 3.0))
    got = torch.compile(f, backend="aot_eager")(x)
    version = tuple(int(v) for v in torch.__version__.split(".")[:2])
    assert torch.equal(got, torch.full((3,), 1.0 if version < (2, 15) else 3.0))


# --- the products --------------------------------------------------------------------------------


def test_grad(case):
    operands = case.operands()
    case.agree(compiled(grad(case.loss, case.argnums))(*operands), case.eager(*operands))


def test_vmap_grad(case):
    operands = case.operands(1, (2,))
    loop = [case.eager(*(x[i] for x in operands)) for i in range(2)]
    want = [torch.stack(entries) for entries in zip(*loop, strict=True)]
    case.agree(compiled(vmap(grad(case.loss, case.argnums)))(*operands), want)


def test_per_sample_gradients_of_shared_weights(form):
    a, *weights = (form.operands(1, (2,))[0], *form.operands()[1:])
    dims = (0, *(None for _ in weights))
    f = vmap(grad(form.loss, form.argnums), dims)
    form.agree(compiled(f)(a, *weights), f(a, *weights))


def test_other_group_ends_in_the_same_graph(grouped_case):
    case = grouped_case
    operands = case.operands()

    def gradients(offs):
        return grad(lambda *xs: case.loss(*xs, offs=offs), case.argnums)(*operands)

    f = compiled(gradients)
    for ends in ([10, 10, 33], [0, 1, 40]):
        offs = torch.tensor(ends, dtype=torch.int32, device=case.offs.device)
        case.agree(f(offs), gradients(offs))


@pytest.mark.inductor
def test_inductor_keeps_the_gradients(form):
    operands = form.operands()
    got = torch.compile(grad(form.loss, form.argnums), fullgraph=True)(*operands)
    form.agree(got, form.eager(*operands))
