"""Products of an ``a`` that is quantised already, as an MXArray."""

import product_oracle as oracle
import pytest
import torch
from specs import Layout, grads, randn

from moefp8 import MXFP8, Gemm, Recipe, quantize_mx, scaled_grouped_mm, scaled_mm

N = 80


@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("rule", ["rceil", "floor"])
def test_prequantised_a(group, rule):
    """The product sees the values ``a`` stands for; the weight gradient quantises those again."""
    layout = Layout("", (5, 0, 33), 2)
    q = quantize_mx(randn(layout.rows, 96, seed=1), rule=rule, group=group)
    b, bias = randn(3, 96, N, seed=2).requires_grad_(), randn(3, N, seed=3).requires_grad_()
    g = randn(layout.rows, N, seed=4)
    out = scaled_grouped_mm(q, b, layout.offs(), bias=bias)
    db, dbias = grads(out, g, b, bias)
    values = oracle.fake(q, -1, MXFP8.fwd).float()
    added = oracle.bias_rows(bias.detach(), layout.offs(), layout.rows)
    (oracle.rows(q, b.detach(), layout.offs(), MXFP8.fwd) + added).check(out.detach())
    oracle.contraction(values.mT, g, layout.offs(), MXFP8.wgrad).check(db)
    oracle.rows_vjp(values, b.detach(), bias.detach(), layout.offs(), g, MXFP8).dbias.check(dbias)


@pytest.mark.parametrize("shape", [(37, 96), (2, 3, 96), (96,)], ids=str)
def test_prequantised_a_equals_dynamic_quantisation(shape):
    """Quantising ``a`` before or inside the product is the same, bit for bit."""
    a, b = randn(*shape, seed=1), randn(96, N, seed=2).requires_grad_()
    out = scaled_mm(quantize_mx(a), b)
    assert torch.equal(out, scaled_mm(a, b))
    rows = oracle.fake(quantize_mx(a), -1, MXFP8.fwd).float().reshape(-1, 96)
    db = oracle.multiply(rows.mT, torch.ones(rows.shape[0], N), MXFP8.wgrad)
    db.check(grads(out.sum(), torch.tensor(1.0), b)[0])


def test_prequantised_a_of_the_batched_form():
    a, b, bias = randn(3, 7, 96, seed=1), randn(3, 96, N, seed=2), randn(3, N, seed=3)
    q = quantize_mx(a)
    assert torch.equal(scaled_grouped_mm(q, b, bias=bias), scaled_grouped_mm(a, b, bias=bias))


def test_prequantised_a_with_an_axis_counted_from_the_front():
    a, b = randn(7, 96, seed=1), randn(96, N, seed=2)
    assert torch.equal(scaled_mm(quantize_mx(a, axis=1), b), scaled_mm(a, b))


def test_prequantised_a_in_e5m2():
    a, b = randn(7, 96, seed=1), randn(96, N, seed=2)
    e5m2 = Recipe(*(Gemm(dtype=torch.float8_e5m2),) * 3)
    q = quantize_mx(a, dtype=torch.float8_e5m2)
    assert torch.equal(scaled_mm(q, b, recipe=e5m2), scaled_mm(a, b, recipe=e5m2))
