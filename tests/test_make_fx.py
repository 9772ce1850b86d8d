"""``make_fx``: the traced graph computes the custom gradient, real, fake or with symbolic shapes."""

import operator

import pytest
import torch
from specs import TRITON
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from moefp8 import dequantize_mx, quantize_mx, quantize_mx_jagged
from moefp8.kernels.sm90 import in_fp8

modes = pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])


def traceable(case, transform):
    """``transform(loss)`` as a function of the operands, of the group ends and of the cotangent: what
    a function captures, a trace takes for a constant."""

    def f(operands, offs, g):
        return transform(lambda *xs: (case.call(*xs, offs=offs) * g).sum())(*operands)

    return f, (case.offs, case.cotangent())


def test_grad(case):
    f, rest = traceable(case, lambda loss: grad(loss, case.argnums))
    graph = make_fx(f)(case.operands(), *rest)
    for seed in (0, 1):  # nothing of the first operands is baked in
        operands = case.operands(seed)
        case.agree(graph(operands, *rest), case.eager(*operands))


def test_graph_is_made_of_library_operators(case):
    """FP8 values come out of the library's own operators, so that no compiler can change their bits."""
    f, rest = traceable(case, lambda loss: grad(loss, case.argnums))
    graph = make_fx(f, tracing_mode="fake")(case.operands(), *rest).graph
    fp8 = [
        node
        for node in graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor) and "float8" in str(node.meta["val"].dtype)
    ]
    # On the GPU exact MX is rounded and multiplied in bfloat16: no FP8 value leaves a kernel.
    quantises = in_fp8 if case.backend is TRITON else lambda gemm: gemm.format != "none"
    assert bool(fp8) == any(map(quantises, case.recipe))
    for node in fp8:
        made_by = node.args[0] if node.target is operator.getitem else node
        assert str(made_by.target).startswith("moefp8.")


@modes
def test_vmap_grad(form, mode):
    f, rest = traceable(form, lambda loss: vmap(grad(loss, form.argnums)))
    operands = form.operands(1, (2,))
    graph = make_fx(f, tracing_mode=mode)(operands, *rest)
    form.agree(graph(operands, *rest), vmap(grad(form.loss, form.argnums))(*operands))


@modes
def test_quantisers(mode):
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(0))
    offs = torch.tensor([5, 5, 38], dtype=torch.int32)

    def f(x, offs):
        q, ends = quantize_mx_jagged(x, offs)
        return dequantize_mx(quantize_mx(x)), dequantize_mx(q), ends

    for got, want in zip(make_fx(f, tracing_mode=mode)(x, offs)(x, offs), f(x, offs), strict=True):
        assert torch.equal(got, want)
