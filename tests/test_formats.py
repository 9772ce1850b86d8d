"""Every 8-bit code of the element formats and of the scale, one by one."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import EXACT, log2_floor

from moefp8.formats import (
    E4M3,
    E5M2,
    ELEMENT_FORMATS,
    NAN_CODE,
    decode_elements,
    decode_scale,
    element_format,
)
from moefp8.mx import MXArray, dequantize_mx

FORMATS = [E4M3, E5M2]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CODES = torch.arange(256, dtype=torch.uint8)


def same(got, want):
    """Equal to the bit, signs of zeros included; NaN equals NaN."""
    assert got.dtype == want.dtype
    assert torch.equal(got.isnan(), want.isnan())
    got, want = got.nan_to_num(0.0, math.inf, -math.inf), want.nan_to_num(0.0, math.inf, -math.inf)
    assert torch.equal(got, want)
    assert torch.equal(got.signbit(), want.signbit())


def every_element(fmt):
    """The 256 values of a format as float64, from the specification."""
    exact = EXACT[fmt.dtype]
    values = torch.tensor([exact.decode_float(code) for code in range(256)], dtype=torch.float64)
    return torch.where(values.isnan(), torch.nan, values)


def every_scale():
    """The 256 values of E8M0 as float64."""
    return torch.tensor([math.ldexp(1.0, b - 127) for b in range(255)] + [math.nan], dtype=torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_element_code_decodes(fmt, device):
    values = decode_elements(CODES.to(device).view(fmt.dtype)).cpu()
    same(values, every_element(fmt).float())


@pytest.mark.parametrize("fmt", FORMATS)
def test_decoding_takes_any_strides(fmt):
    codes = CODES.view(fmt.dtype).view(16, 16)
    for view in (codes.mT, codes[::3, 1::2], codes[:, :1].expand(16, 5)):
        same(decode_elements(view), view.contiguous().float())


@pytest.mark.parametrize("device", DEVICES)
def test_every_scale_byte_decodes(device):
    same(decode_scale(CODES.to(device)).cpu(), every_scale().float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_element_under_every_scale_dequantises(fmt, dtype, device):
    data = CODES.to(device).view(fmt.dtype).expand(256, 256)
    q = MXArray(data, CODES.to(device)[:, None], axis=-1, group=-1)
    # At most 4 bits of significand, so the float64 products are exact; and a value that float32 cannot
    # hold, bfloat16 and float16 cannot either, so going through float32 rounds once.
    want = every_element(fmt) * every_scale()[:, None]
    same(dequantize_mx(q, dtype).cpu(), want if dtype == torch.float64 else want.float().to(dtype))


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_constants_follow_from_the_code_table(fmt):
    exact = EXACT[fmt.dtype]
    assert fmt.max == exact.max
    assert fmt.emax == log2_floor(exact.max)
    assert fmt.mantissa_bits == exact.mantissa_bits
    # The first code with a non-zero exponent field is the smallest normal number.
    smallest_normal = exact.values[2**exact.mantissa_bits]
    assert 2.0**fmt.min_exponent == smallest_normal
    assert fmt.half_min_subnormal == exact.values[1] / 2
    normal = [v for v in exact.values if v >= smallest_normal]
    worst = max((hi - lo) / (hi + lo) for lo, hi in pairwise(normal))  # at midpoints
    assert fmt.half_ulp == float(worst)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_nan_code_is_nan(fmt):
    assert math.isnan(EXACT[fmt.dtype].decode_float(NAN_CODE))


def test_lookup_by_dtype():
    assert {element_format(d) for d in ELEMENT_FORMATS} == {E4M3, E5M2}


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float8_e4m3fnuz, torch.uint8, "float8_e4m3fn", None]
)
def test_lookup_of_anything_else_names_the_formats(dtype):
    with pytest.raises(TypeError, match=r"dtype: expected torch.float8_e4m3fn or torch.float8_e5m2, got"):
        element_format(dtype)
