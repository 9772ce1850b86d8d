"""Laws of the grouped product, for every preset, on drawn group layouts and on operands that find bugs.

All hold bit for bit: the reference multiplies the rows of a group by its matrix in one call of the
same shape, wherever they lie. Where the two sides make different calls, operands come from the grid of
``specs.py``, whose sums are exact in any order.
"""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from specs import grid
from torch.func import grad, vmap

from moefp8 import FP8_ROWWISE, scaled_grouped_mm, scaled_mm
from moefp8.recipe import PRESETS
from moefp8.testing import (
    check_empty_groups,
    check_expert_permutation,
    check_one_group_is_dense,
    check_row_locality,
    check_tail_rows_are_zero,
    check_unused_gradients_are_zero,
    check_vjp_homogeneity,
    group_layouts,
    mx_arrays,
)

K, N = 48, 16

recipes = st.sampled_from(list(PRESETS.values()))
# Products of two such operands and their sums stay far from the ends of float32.
arrays = partial(mx_arrays, exponents=(-10, 10))
layouts = group_layouts(max_groups=5, max_size=40)


@st.composite
def problems(draw):
    """A product under a preset, and operands for it."""
    layout = draw(layouts)
    a = draw(arrays((layout.rows, K)))
    b = draw(arrays((len(layout.offs), N, K))).mT
    return partial(scaled_grouped_mm, recipe=draw(recipes)), a, b, layout.offs


@given(problem=problems(), data=st.data())
def test_row_locality(problem, data):
    product, a, b, offs = problem
    if offs[-1]:
        check_row_locality(product, a, b, offs, data.draw(st.integers(0, int(offs[-1]) - 1)))


@given(problem=problems(), data=st.data())
def test_expert_permutation(problem, data):
    _, _, b, _ = problem
    check_expert_permutation(*problem, data.draw(st.permutations(range(b.shape[0]))))


@given(problem=problems())
def test_empty_groups(problem):
    check_empty_groups(*problem)


@given(problem=problems())
def test_tail_rows_are_zero(problem):
    check_tail_rows_are_zero(*problem)


@given(problem=problems(), data=st.data())
def test_unused_gradients_are_zero(problem, data):
    _, a, _, _ = problem
    check_unused_gradients_are_zero(*problem, data.draw(arrays((a.shape[0], N))))


@given(problem=problems(), data=st.data(), k=st.integers(-20, 20))
def test_vjp_homogeneity(problem, data, k):
    _, a, _, _ = problem
    check_vjp_homogeneity(*problem, data.draw(arrays((a.shape[0], N))), k)


#: Presets whose sums on the grid are exact: all but the one with float32 row scales.
exact = st.sampled_from([recipe for recipe in PRESETS.values() if recipe != FP8_ROWWISE])


@given(rows=st.integers(0, 70), seed=st.integers(0, 99), recipe=exact)
def test_one_group_is_the_dense_product(rows, seed, recipe):
    generator = torch.Generator().manual_seed(seed)
    a, b = grid((rows, K), generator), grid((K, N), generator)
    product, dense = partial(scaled_grouped_mm, recipe=recipe), partial(scaled_mm, recipe=recipe)
    check_one_group_is_dense(product, dense, a, b)


@given(rows=st.integers(1, 64), seed=st.integers(0, 99), recipe=exact)
def test_one_group_has_the_gradients_of_the_dense_product(rows, seed, recipe):
    generator = torch.Generator().manual_seed(seed)
    a, b, g = grid((rows, K), generator), grid((K, N), generator), grid((rows, N), generator)
    offs = torch.tensor([rows], dtype=torch.int32)
    grouped = grad(lambda a, b: (scaled_grouped_mm(a, b[None], offs, recipe=recipe) * g).sum(), (0, 1))
    dense = grad(lambda a, b: (scaled_mm(a, b, recipe=recipe) * g).sum(), (0, 1))
    for got, want in zip(grouped(a, b), dense(a, b), strict=True):
        assert torch.equal(got, want)


@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=3), recipe=recipes
)
def test_vmap_is_the_loop(sizes, recipe):
    """Over data and group ends together, values and gradients."""
    offs = torch.tensor(sizes).T.cumsum(1).to(torch.int32)  # two layouts of three groups
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 30, K, generator=generator), torch.randn(3, K, N, generator=generator)

    def f(a, offs):
        return scaled_grouped_mm(a, b, offs, recipe=recipe)

    loop = [f(x, ends) for x, ends in zip(a, offs, strict=True)]
    assert torch.equal(vmap(f)(a, offs), torch.stack(loop))
    df = grad(lambda a, offs: f(a, offs).square().sum())
    loop = [df(x, ends) for x, ends in zip(a, offs, strict=True)]
    assert torch.equal(vmap(df)(a, offs), torch.stack(loop))


@pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS.keys())
def test_merging_neighbours_with_the_same_weights(recipe):
    """Two groups that share a matrix are one group: forward and dgrad do not see the boundary."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, K, generator=generator), torch.randn(K, N, generator=generator)
    g = torch.randn(64, N, generator=generator)

    def run(ends):
        offs = torch.tensor(ends, dtype=torch.int32)
        x = a.clone().requires_grad_()
        out = scaled_grouped_mm(x, b.expand(len(ends), K, N), offs, recipe=recipe)
        return out.detach(), *torch.autograd.grad(out, x, g)

    for got, want in zip(run([23, 64]), run([64]), strict=True):
        # Different calls of the multiplication: 2 gamma_n sum|a b|, n = 48, |a b| summed by Cauchy-Schwarz.
        bound = 2 * 50 * 2.0**-24 * 1.2 * (a.norm(dim=1).max() + g.norm(dim=1).max()) * b.norm()
        assert (got - want).abs().max() <= bound
