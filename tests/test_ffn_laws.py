"""Laws of the feed-forward of the experts, bit for bit, for every group layout."""

import pytest
import torch
from ffn_cases import cases
from specs import LAYOUTS, Layout
from torch.func import vjp

from moefp8 import scaled_mm
from moefp8.kernels.ffn import swiglu

every = pytest.mark.parametrize("case", cases())
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
JAGGED = Layout("jagged", (10, 0, 33, 1), 7)


def bits(x):
    return x.contiguous().view(torch.uint8)


def same(got, want):
    assert torch.equal(bits(got), bits(want))


def gradients(case, params, x, offs, g):
    out, pullback = vjp(lambda p, x: case.ffn(p, x, offs), params, x)
    d_params, dx = pullback(g)
    return out, d_params, dx


def of_layout(case, layout):
    params = case.params(len(layout.sizes))
    return params, case.rows(layout.rows), case.offs(layout), case.rows(layout.rows, seed=8)


@every
@layouts
def test_rows_of_no_group_give_and_get_nothing(case, layout):
    """Whatever they and their cotangents hold."""
    params, x, offs, g = of_layout(case, layout)
    inside = sum(layout.sizes)
    out, d_params, dx = gradients(case, params, x, offs, g)
    x[inside:], g[inside:] = torch.nan, torch.inf
    poisoned_out, poisoned_params, poisoned_dx = gradients(case, params, x, offs, g)
    assert not out[inside:].any()
    assert not dx[inside:].any()
    same(poisoned_out, out)
    same(poisoned_dx, dx)
    for name, d in d_params.items():
        same(poisoned_params[name], d)


@every
@layouts
def test_an_empty_group_gets_a_zero_gradient(case, layout):
    _, d_params, _ = gradients(case, *of_layout(case, layout))
    for size, *own in zip(layout.sizes, *d_params.values(), strict=True):
        for d in own:
            assert d.any() == (size > 0)
            assert d.isfinite().all()


@every
def test_a_row_depends_on_its_own_expert_and_itself(case):
    params, x, offs, _ = of_layout(case, JAGGED)
    out = case.ffn(params, x, offs)
    others = {name: torch.cat([p[:2] * 3, p[2:3], p[3:] * 3]) for name, p in params.items()}
    same(case.ffn(others, x, offs)[10:43], out[10:43])
    changed = x.clone()
    changed[:20] *= 3
    same(case.ffn(params, changed, offs)[20:], out[20:])


@every
def test_permuting_the_experts_with_their_rows_commutes(case):
    params, x, offs, g = of_layout(case, JAGGED)
    order = [2, 3, 1, 0]
    starts = [0, 10, 10, 43, 44]
    device = case.backend.device
    rows = torch.cat([torch.arange(starts[e], starts[e + 1]) for e in order] + [torch.arange(44, 51)])
    rows = rows.to(device)
    ends = torch.tensor([33, 34, 34, 44], dtype=torch.int32, device=device)
    out, d_params, dx = gradients(case, params, x, offs, g)
    permuted = {name: p[order] for name, p in params.items()}
    got, got_params, got_dx = gradients(case, permuted, x[rows], ends, g[rows])
    same(got, out[rows])
    same(got_dx, dx[rows])
    for name, d in d_params.items():
        same(got_params[name], d[order])


@every
def test_one_group_is_three_dense_products(case):
    params, x, offs, _ = of_layout(case, Layout("one", (48,)))

    def linear(x, i):
        bias = params[f"b{i}"][0] if f"b{i}" in params else None
        return scaled_mm(x, params[f"w{i}"][0].mT, bias=bias, **case.options)

    same(case.ffn(params, x, offs), linear(swiglu(linear(x, 1), linear(x, 3)), 2))


@every
@pytest.mark.parametrize("factor", [-1.0, 2.0**9, -(2.0**-5)])
def test_the_vjp_is_odd_and_homogeneous_in_the_cotangent(case, factor):
    params, x, offs, g = of_layout(case, JAGGED)
    _, d_params, dx = gradients(case, params, x, offs, g)
    _, got_params, got_dx = gradients(case, params, x, offs, factor * g)
    assert torch.equal(got_dx, factor * dx)
    for name, d in d_params.items():
        assert torch.equal(got_params[name], factor * d), name


@pytest.mark.parametrize("case", cases("mxfp8", "fp8_rowwise"))
def test_strides_of_tokens_and_cotangents_do_not_matter(case):
    """Every second column of a wider matrix, and the cotangent of a sum, which has stride 0."""
    params, x, offs, _ = of_layout(case, JAGGED)
    g = x.new_ones(()).expand(x.shape)
    wide = x.repeat_interleave(2, 1)
    got = gradients(case, params, wide[:, ::2], offs, g)
    want = gradients(case, params, x, offs, g.contiguous())
    for a, b in zip(
        torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True
    ):
        same(a, b)
