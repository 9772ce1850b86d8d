"""The fp32 scales of recipe FP8_ROWWISE: scale = amax / max, one a row, not rounded to a power of two."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_inputs import DEVICES, DTYPES, LARGEST

from moefp8._quantize import dequantize, quantize
from moefp8.formats import E4M3, element_format
from moefp8.testing import mx_arrays

U = 2.0**-24  # largest relative rounding error of float32


def rowwise(x, dtype):
    return quantize(x, -1, dtype, "fp32", -1, None)


def values(data, scale):
    return data.double() * scale.double()


arrays = st.sampled_from([torch.float32, torch.bfloat16, torch.float16]).flatmap(
    lambda d: mx_arrays((2, 100), dtype=d)
)


@pytest.mark.parametrize("dtype", DTYPES)
@given(x=arrays)
def test_error_bound(dtype, x):
    """|x - q s| <= |x| (1/17 + 3u) + 2^-10 s (E5M2: 1/9, 2^-17), with u = 2^-24.

    The element q is the rounding of y = fl(x r), r = fl(1/s), so y = (x/s)(1 + a) with |a| <= 2u + u^2, and
    |q - y| <= max(|y|/17, 2^-10): together |x/s| (1 + a)/17 + |x/s| a. Where y is cut at max it is because
    1/max and s were rounded down, by 2u + u^2 together, or y up: no more than 3u |x/s| again.
    """
    fmt = element_format(dtype)
    data, scale = rowwise(x, dtype)
    error = (x.double() - values(data, scale)).abs()
    bound = x.double().abs() * (fmt.half_ulp + 3 * U) + fmt.half_min_subnormal * scale.double()
    assert (error <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(x=arrays)
def test_scale_is_amax_over_max(dtype, x):
    """Within 2u + u^2: 1/max is rounded to float32, and so is its product with amax."""
    _, scale = rowwise(x, dtype)
    exact = (x.double().abs().amax(-1, keepdim=True) / LARGEST[dtype]).clamp(min=2.0**-126)
    assert (
        (scale.double() - exact).abs() <= exact * (2 * U + 2 * U * U)
    ).all()  # u^2 more for the float64 division here


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_amax_becomes_the_largest_value(dtype, device):
    """For every bfloat16 value whose scale is a normal number; the cast after a product that came out just
    above or below max rounds to it."""
    x = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)[:, None]
    x = x[x[:, 0] >= 2.0**-126 * LARGEST[dtype]]
    data, _ = rowwise(x.to(device), dtype)
    assert (data.float() == LARGEST[dtype]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_special_values(device):
    zero, tiny = rowwise(torch.tensor([[0.0, -0.0], [2.0**-149, 2.0**-133]], device=device), E4M3.dtype)
    assert zero.view(torch.uint8).tolist() == [[0x00, 0x80], [0x00, 0x04]]
    assert tiny.flatten().tolist() == [2.0**-126, 2.0**-126]
    x = torch.ones(2, 70, device=device)
    x[0, 40] = math.nan
    data, scale = rowwise(x, E4M3.dtype)
    poisoned = dequantize(data, scale, -1, -1, torch.float32).isnan()
    assert poisoned[0].nonzero().flatten().tolist() == list(range(32, 64))
    assert not poisoned[1].any()
    x[:] = math.inf
    assert rowwise(x, E4M3.dtype)[1].isnan().all()
