"""The laws of block quantisation, each for both formats and rules, every input type and span of scales."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_inputs import DTYPES, FLOATS, RULES

from moefp8 import dequantize_mx, quantize_mx
from moefp8.testing import (
    check_canonical_encoding,
    check_monotone_within_block,
    check_permutation_within_block,
    check_poison_is_local,
    check_power_of_two_equivariance,
    check_projection,
    check_rceil_minus_floor,
    check_sign_symmetry,
    mx_arrays,
)

# float64 holds every value exactly, whatever the input's type.
dequantize = partial(dequantize_mx, dtype=torch.float64)
every_case = pytest.mark.parametrize(("dtype", "rule"), [(d, r) for d in DTYPES for r in RULES])
groups = st.sampled_from([32, 64, 96, -1])


def arrays(dtypes=FLOATS, **options):
    return st.sampled_from(dtypes).flatmap(lambda d: mx_arrays(dtype=d, **options))


@every_case
@given(x=arrays(specials=True), group=groups)
def test_fake_quantisation_is_a_projection(dtype, rule, x, group):
    check_projection(partial(quantize_mx, dtype=dtype, rule=rule, group=group), dequantize, x)


@pytest.mark.parametrize("dtype", DTYPES)
@given(x=arrays(specials=True), group=groups)
def test_encoding_is_canonical_under_floor(dtype, x, group):
    check_canonical_encoding(partial(quantize_mx, dtype=dtype, rule="floor", group=group), dequantize, x)


def test_encoding_is_not_canonical_under_rceil():
    """225 becomes 224 = 1.75 * 2^7 with E = 0, and 224 is the largest value with E = -1."""
    once = quantize_mx(torch.tensor([225.0]))
    twice = quantize_mx(dequantize(once))
    assert dequantize(once) == dequantize(twice) == 224.0
    assert (once.scale.item(), twice.scale.item()) == (127, 126)
    with pytest.raises(AssertionError, match="canonical encoding"):
        check_canonical_encoding(quantize_mx, dequantize, torch.tensor([225.0]))


# Elements reach 2^-10 below their block, blocks 2^-24 below the rest: with exponents of +-40 and k of +-20,
# the smallest scale of E5M2 is over 2^(-10 - 24 - 40 - 20 - 16) = 2^-110, clear of 2^-127. float16 is too
# short to be multiplied without loss.
@every_case
@given(x=arrays(FLOATS[:3], exponents=(-40, 40)), group=groups, k=st.integers(-20, 20))
def test_commutes_with_powers_of_two(dtype, rule, x, group, k):
    quantize = partial(quantize_mx, dtype=dtype, rule=rule, group=group)
    check_power_of_two_equivariance(quantize, dequantize, x, k)


@every_case
@given(x=arrays(specials=True), group=groups)
def test_is_odd(dtype, rule, x, group):
    check_sign_symmetry(partial(quantize_mx, dtype=dtype, rule=rule, group=group), dequantize, x)


@every_case
@given(x=arrays(shape=(2, 96), specials=True), group=groups, order=st.permutations(range(32)))
def test_commutes_with_permutations_of_a_block(dtype, rule, x, group, order):
    quantize = partial(quantize_mx, dtype=dtype, rule=rule, group=group)
    check_permutation_within_block(quantize, dequantize, x, order)


@every_case
@given(x=arrays(specials=True), group=groups)
def test_is_monotone_within_a_block(dtype, rule, x, group):
    check_monotone_within_block(partial(quantize_mx, dtype=dtype, rule=rule, group=group), dequantize, x)


@pytest.mark.parametrize("dtype", DTYPES)
@given(x=arrays(specials=True), group=groups)
def test_rceil_is_floor_or_one_more(dtype, x, group):
    rceil, floor = (
        lambda x, rule=rule: quantize_mx(x, dtype=dtype, rule=rule, group=group).scale
        for rule in ("rceil", "floor")
    )
    check_rceil_minus_floor(rceil, floor, x)


@every_case
@given(
    x=arrays(shape=(2, 100)),
    group=groups,
    row=st.integers(0, 1),
    column=st.integers(0, 99),
    poison=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def test_poison_stays_in_its_block(dtype, rule, x, group, row, column, poison):
    quantize = partial(quantize_mx, dtype=dtype, rule=rule, group=group)
    span = group if group > 0 else 128
    check_poison_is_local(quantize, dequantize, x, (row, column), poison, span)


@every_case
@given(x=arrays(dtypes=FLOATS[1:], specials=True), group=groups)
def test_wider_types_give_the_same_bits(dtype, rule, x, group):
    """The same numbers quantise the same way in whatever type they come."""
    narrow = quantize_mx(x, dtype=dtype, rule=rule, group=group)
    for wide in (torch.float32, torch.float64):
        q = quantize_mx(x.to(wide), dtype=dtype, rule=rule, group=group)
        assert torch.equal(q.scale, narrow.scale)
        assert torch.equal(q.data.view(torch.uint8), narrow.data.view(torch.uint8))
