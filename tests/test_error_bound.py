"""mx_error_bound holds for every input, and equality occurs: no smaller bound of its form would do."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_inputs import (
    DEVICES,
    DTYPES,
    E4M3,
    FLOATS,
    LARGEST,
    RULES,
    every_value,
    same_bits,
    under_a_leader,
)

from moefp8 import dequantize_mx, mx_error_bound, quantize_mx
from moefp8.formats import element_format
from moefp8.testing import check_error_bound, mx_arrays

GROUPS = [32, 64, -1]


def error_and_bound(x, dtype, rule, group=32):
    q = quantize_mx(x, dtype=dtype, rule=rule, group=group)
    return (x.double() - dequantize_mx(q, torch.float64)).abs(), mx_error_bound(x, q).double()


def finite_values_in_blocks(source, dtype):
    """Every finite value alone, and every one up to the format's largest value under a scale of one."""
    x = every_value(source)
    x = x[x.isfinite()]
    return x[:, None], under_a_leader(x[x.abs() <= LARGEST[dtype]], LARGEST[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_holds_for_every_16_bit_value(source, dtype, rule, device):
    for x in finite_values_in_blocks(source, dtype):
        error, bound = error_and_bound(x.to(device), dtype, rule)
        assert (error <= bound).all()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(x=st.sampled_from(FLOATS).flatmap(lambda d: mx_arrays(dtype=d, specials=True)))
def test_holds(dtype, rule, group, x):
    quantize = partial(quantize_mx, dtype=dtype, rule=rule, group=group)
    check_error_bound(quantize, partial(dequantize_mx, dtype=torch.float64), x)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_rounding_term_is_attained(dtype, rule):
    """Among the values under a scale of one: |x|/17 (|x|/9) by a normal element, 2^-10 (2^-17) by a
    subnormal one."""
    fmt = element_format(dtype)
    x = under_a_leader(every_value(torch.float16).nan_to_num(0, 0, 0), LARGEST[dtype])
    x = torch.where(x.abs() <= LARGEST[dtype], x, 0)
    error, _ = error_and_bound(x, dtype, rule)
    normal = x.double().abs() >= 2.0**fmt.min_exponent
    assert (error == x.double().abs() * fmt.half_ulp)[normal].any()
    assert (error == fmt.half_min_subnormal)[~normal].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturation_term_is_attained_and_stays_under_an_eighth(dtype):
    """Under "floor" an element past max is off by exactly x - max; just below 2^(emax + 1), by amax/8."""
    top = LARGEST[dtype] / 1.75 * 2  # 2^(emax + 1), where the exponent changes
    for x in (
        torch.tensor([top * (1 - 2.0**-24)]),
        torch.tensor([top * (1 - 2.0**-50)], dtype=torch.float64),
    ):
        error, bound = error_and_bound(x, dtype, "floor")
        assert error == bound == x.double() - LARGEST[dtype]
        assert 0.1249 * x < error < x.double() / 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_floor_saturation_is_under_an_eighth_of_amax_everywhere(dtype):
    x, _ = finite_values_in_blocks(torch.bfloat16, dtype)
    error, _ = error_and_bound(x, dtype, "floor")
    tiny = 2.0**-126  # under it the scale stops at 2^-127 and an element may be all rounding error
    assert (error < x.double().abs() / 8)[x.abs() >= tiny].all()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(x=st.sampled_from(FLOATS).flatmap(lambda d: mx_arrays(dtype=d)))
def test_rceil_never_saturates(dtype, group, x):
    """|x| <= max 2^E for every element, so the saturation term of the bound is never positive."""
    q = quantize_mx(x, dtype=dtype, group=group)
    span = group if group > 0 else 128
    s = torch.exp2(q.scale.double() - 127).repeat_interleave(span, -1)[..., : x.shape[-1]]
    assert (x.double().abs() <= LARGEST[dtype] * s).all()


def test_is_nan_in_poisoned_blocks_only():
    """Under an aligned scale too, where the scale itself is finite."""
    for group in (32, 64, -1):
        x = torch.ones(2, 70)
        x[0, 40] = torch.inf
        bound = mx_error_bound(x, quantize_mx(x, group=group))
        poisoned = torch.zeros(2, 70, dtype=torch.bool)
        poisoned[0, 32:64] = True
        assert torch.equal(bound.isnan(), poisoned)


def test_values_and_dtypes():
    x = torch.tensor([1.0625, 448.0, 2.0**-10])
    for source in FLOATS:
        y = x.to(source)
        bound = mx_error_bound(y, quantize_mx(y))
        assert bound.dtype == (torch.float64 if source == torch.float64 else torch.float32)
        # 448/17 is no binary fraction: it is rounded once, to the dtype of the result.
        want = torch.tensor([1 / 16, 448 / 17, 2.0**-10], dtype=torch.float64)
        assert torch.equal(bound, want.to(bound.dtype))


def test_float64_past_the_range_of_float32():
    x = torch.tensor([3e40, 1.0], dtype=torch.float64)
    error, bound = error_and_bound(x, E4M3, "rceil")
    assert torch.isfinite(bound).all()
    assert (error <= bound).all()


def test_follows_the_axis():
    x = torch.arange(1.0, 121.0).view(3, 40)
    along_rows = quantize_mx(x, 1)
    along_columns = quantize_mx(x.mT, 0)
    same_bits(quantize_mx(x.mT.contiguous(), 0), along_columns)
    assert torch.equal(mx_error_bound(x, along_rows), mx_error_bound(x.mT, along_columns).mT)
