"""Three independent oracles, no mismatch: exact rationals, ml_dtypes, gfloat.

Where each is right (facts measured against exact rationals):

* exact rationals: everywhere;
* ml_dtypes: casts of values up to the format's largest, and all code tables. It has no block scale, and
  past the largest value it does not saturate;
* gfloat: rule "floor" for finite blocks. It takes log2 of amax in floating point, which is exact enough
  for float32 input; for float64 an amax a few ulps below a power of two would round up to it.

torchao and JAX are no oracles here: their "rceil" is one too low at boundary blocks, or differs for blocks
that are tiny or zero.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_inputs import DTYPES, FLOATS, LARGEST, RULES, every_value, under_a_leader
from oracles import EXACT, exact_quantize, gfloat_fake_quantize, ml_dtypes_decode, ml_dtypes_encode

from moefp8 import dequantize_mx, quantize_mx
from moefp8.formats import decode_elements, decode_scale
from moefp8.testing import mx_arrays, mx_blocks

every_case = pytest.mark.parametrize(("dtype", "rule"), [(d, r) for d in DTYPES for r in RULES])


# --- exact rationals -----------------------------------------------------------------------------


@every_case
@given(
    x=st.sampled_from(FLOATS).flatmap(lambda d: mx_arrays(dtype=d, specials=True)),
    group=st.sampled_from([32, 64, -1]),
)
def test_exact_rationals(dtype, rule, x, group):
    q = quantize_mx(x, dtype=dtype, rule=rule, group=group)
    for row, data, scale in zip(
        x.tolist(), q.data.view(torch.uint8).tolist(), q.scale.tolist(), strict=True
    ):
        assert (data, scale) == exact_quantize(row, dtype, rule, group)


@every_case
@given(bits=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40))
def test_exact_rationals_on_any_float64(dtype, rule, bits):
    """Every bit pattern: subnormals, NaN, infinities, amax past the largest scale."""
    x = torch.tensor([b - 2**64 if b >= 2**63 else b for b in bits], dtype=torch.int64).view(torch.float64)
    q = quantize_mx(x, dtype=dtype, rule=rule)
    assert (q.data.view(torch.uint8).tolist(), q.scale.tolist()) == exact_quantize(x.tolist(), dtype, rule)


@every_case
def test_exact_rationals_at_every_scale_boundary(dtype, rule):
    """Each largest value times 2^k and each power of two, with its neighbours, for every k of float32."""
    x = torch.tensor([math.ldexp(m, k) for k in range(-149, 128) for m in (1.0, 1.75)], dtype=torch.float32)
    x = torch.cat([torch.nextafter(x, torch.zeros(())), x, torch.nextafter(x, torch.tensor(math.inf))])
    x = x[x.isfinite()][:, None]
    for source in (torch.float32, torch.float64):
        q = quantize_mx(x.to(source), dtype=dtype, rule=rule)
        want = [exact_quantize([v], dtype, rule) for v in x[:, 0].tolist()]
        assert q.scale.flatten().tolist() == [scale for _, (scale,) in want]
        assert q.data.view(torch.uint8).flatten().tolist() == [code for (code,), _ in want]


# --- ml_dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "decode"),
    [
        ("float8_e4m3fn", lambda codes: decode_elements(codes.view(torch.float8_e4m3fn))),
        ("float8_e5m2", lambda codes: decode_elements(codes.view(torch.float8_e5m2))),
        ("float8_e8m0fnu", decode_scale),
    ],
)
def test_ml_dtypes_code_tables(name, decode):
    codes = torch.arange(256, dtype=torch.uint8)
    got, want = decode(codes).double(), ml_dtypes_decode(codes, name)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))
    signed = ~want.isnan()
    assert torch.equal(got.signbit()[signed], want.signbit()[signed])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_ml_dtypes_casts_of_every_16_bit_value(source, dtype):
    x = every_value(source).float()
    x = x[x.abs() <= LARGEST[dtype]]
    q = quantize_mx(under_a_leader(x, LARGEST[dtype]), dtype=dtype)
    got = q.data.view(torch.uint8)[:, 1:].flatten()[: len(x)]
    assert torch.equal(got, ml_dtypes_encode(x, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@given(raw=st.binary(min_size=4 * 62, max_size=4 * 62))
def test_ml_dtypes_casts_of_any_float32(dtype, raw):
    x = torch.frombuffer(bytearray(raw), dtype=torch.float32).nan_to_num(0.0)
    x = torch.where(x.abs() <= LARGEST[dtype], x, x / 2.0**120).clamp(-LARGEST[dtype], LARGEST[dtype])
    got = quantize_mx(under_a_leader(x, LARGEST[dtype]), dtype=dtype).data.view(torch.uint8)[:, 1:]
    assert torch.equal(got.flatten(), ml_dtypes_encode(x, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@given(x=mx_arrays((2, 96)))
def test_ml_dtypes_casts_under_any_scale(dtype, x):
    """The exponent once known, the rest is a division by it and a cast. x / 2^E is exact in float64, and in
    float32 where it can round to anything but zero."""
    q = quantize_mx(x, dtype=dtype)
    scale = ml_dtypes_decode(q.scale, "float8_e8m0fnu").repeat_interleave(32, -1)
    assert torch.equal(q.data.view(torch.uint8), ml_dtypes_encode((x.double() / scale).float(), dtype))


def test_ml_dtypes_does_not_saturate():
    """Why it is compared up to the largest value only."""
    past = torch.tensor([464.0 + 2**-15])
    assert math.isnan(
        EXACT[torch.float8_e4m3fn].decode_float(ml_dtypes_encode(past, torch.float8_e4m3fn).item())
    )


# --- gfloat --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(x=st.sampled_from(FLOATS[1:]).flatmap(lambda d: mx_blocks(dtype=d)))
def test_gfloat_floor(dtype, x):
    got = dequantize_mx(quantize_mx(x, dtype=dtype, rule="floor"), torch.float64)
    assert torch.equal(got, gfloat_fake_quantize(x, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gfloat_floor_at_every_scale_boundary(dtype):
    x = torch.tensor([math.ldexp(1.0, k) for k in range(-149, 128, 3)], dtype=torch.float32)
    x = torch.cat([torch.nextafter(x, torch.zeros(())), x, torch.nextafter(x, torch.tensor(math.inf))])
    got = dequantize_mx(quantize_mx(x[:, None], dtype=dtype, rule="floor"), torch.float64)
    want = torch.stack([gfloat_fake_quantize(v[None], dtype) for v in x])
    assert torch.equal(got, want)
