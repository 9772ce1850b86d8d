"""``torch.compile(f)``: forward, and ``.backward()`` through it."""

import functools

import pytest
import torch

from moefp8 import (
    MXFP8,
    dequantize_mx,
    mx_error_bound,
    quantize_mx,
    quantize_mx_jagged,
    scaled_grouped_mm,
    scaled_mm,
)

# Inductor uses a part of torch that torch deprecates.
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

#: Traces forward and backward as inductor does, and runs the graphs with torch's own kernels.
compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")


def test_forward_and_backward(case):
    operands = case.operands()
    leaves = [x.clone().requires_grad_() for x in operands]
    out = compiled(case.call)(*leaves)
    case.agree(out.detach(), case.call(*operands))
    case.agree(torch.autograd.grad(out, leaves, case.cotangent()), case.eager(*operands))


def test_other_sizes_after_the_first():
    """The number of tokens changes from call to call; the second graph takes it as a symbol."""
    w, offs = torch.randn(3, 16, 48), torch.tensor([10, 10, 33], dtype=torch.int32)

    def gradients(f, rows):
        a = torch.ones(rows, 48).requires_grad_()
        weights = w.clone().requires_grad_()
        return torch.autograd.grad(f(a, weights), (a, weights))

    def f(a, w):
        return scaled_grouped_mm(a, w.mT, offs).square().sum() + scaled_mm(a, w[0].mT).square().sum()

    g = compiled(f)
    for rows in (40, 33, 57, 64):
        for got, want in zip(gradients(g, rows), gradients(f, rows), strict=True):
            assert torch.equal(got, want)


def test_group_ends_are_data():
    """New group ends need no new graph."""
    a, w = torch.randn(40, 48), torch.randn(3, 16, 48)
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    f = torch.compile(lambda offs: scaled_grouped_mm(a, w.mT, offs), backend=count, fullgraph=True)
    for ends in ([10, 10, 33], [0, 1, 40], [0, 0, 0]):
        offs = torch.tensor(ends, dtype=torch.int32)
        assert torch.equal(f(offs), scaled_grouped_mm(a, w.mT, offs))
    assert graphs == 1


def test_recipes_make_graphs_of_their_own():
    """A recipe is a constant of the graph: another one recompiles and does not reuse the first."""
    a, w, offs = torch.randn(40, 48), torch.randn(3, 16, 48), torch.tensor([10, 10, 33], dtype=torch.int32)
    f = compiled(lambda recipe: scaled_grouped_mm(a, w.mT, offs, recipe=recipe))
    for gemm in (MXFP8.fwd, MXFP8.fwd._replace(rule="floor"), MXFP8.fwd._replace(group=-1)):
        recipe = MXFP8._replace(fwd=gemm)
        assert torch.equal(f(recipe), scaled_grouped_mm(a, w.mT, offs, recipe=recipe))


def quantisers(x, offs):
    q = quantize_mx(x)
    jagged, ends = quantize_mx_jagged(x, offs)
    return dequantize_mx(q), mx_error_bound(x, q), dequantize_mx(jagged), ends


def check_quantisers(**options):
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(0))
    offs = torch.tensor([5, 5, 38], dtype=torch.int32)
    got = torch.compile(quantisers, fullgraph=True, **options)(x, offs)
    for y, want in zip(got, quantisers(x, offs), strict=True):
        assert torch.equal(y, want)


def test_quantisers():
    check_quantisers(backend="aot_eager")


def test_an_array_comes_out_of_a_graph():
    """An MXArray is a pytree that a compiled function returns and takes."""
    x = torch.randn(5, 48)
    q = compiled(quantize_mx)(x)
    assert (q.axis, q.group) == (-1, 32)
    assert torch.equal(compiled(dequantize_mx)(q), dequantize_mx(quantize_mx(x)))


class Layer(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, offs, *operands):
        return self.form.call(*operands, offs=offs)


def test_export(form):
    """A program with the leaves as operators, which runs on operands it has not seen."""
    program = torch.export.export(Layer(form), (form.offs, *form.operands())).module()
    other = form.operands(1)
    form.agree(program(form.offs, *other), form.call(*other))


# --- inductor ------------------------------------------------------------------------------------


@pytest.mark.inductor
def test_inductor_keeps_the_bits(form):
    """The leaves are opaque: the compiler fuses around them, not in them."""
    leaves = [x.clone().requires_grad_() for x in form.operands()]
    torch.compile(form.loss, fullgraph=True)(*leaves).backward()
    form.agree([x.grad for x in leaves], form.eager(*form.operands()))


@pytest.mark.inductor
def test_inductor_keeps_the_bits_of_quantisers():
    check_quantisers()
