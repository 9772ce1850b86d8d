"""Scales aligned over a span longer than a block: what changes against plain MX, and what does not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_inputs import DTYPES, E4M3, FLOATS, LARGEST, RULES, same_bits

from moefp8 import MXArray, dequantize_mx, quantize_mx
from moefp8.formats import element_format
from moefp8.testing import mx_arrays

every_case = pytest.mark.parametrize(("dtype", "rule"), [(d, r) for d in DTYPES for r in RULES])
arrays = st.sampled_from(FLOATS).flatmap(lambda d: mx_arrays((2, 200), dtype=d, specials=True))


def block_scales(q):
    """Scale bytes of the 7 blocks of a row of 200."""
    span = q.group if q.group > 0 else 224
    return q.scale.int().repeat_interleave(span // 32, -1)[..., :7]


def per_element(blocks):
    return blocks.repeat_interleave(32, -1)[..., :200]


@every_case
@given(x=arrays, group=st.sampled_from([64, 96, 224, 320, -1]))
def test_scale_is_the_largest_of_the_healthy_blocks(dtype, rule, x, group):
    plain = quantize_mx(x, dtype=dtype, rule=rule).scale.int()
    aligned = quantize_mx(x, dtype=dtype, rule=rule, group=group)
    healthy = torch.where(plain == 255, -1, plain)
    span = aligned.group // 32 if aligned.group > 0 else 7
    largest = torch.stack([part.amax(-1) for part in healthy.split(span, -1)], -1)
    assert torch.equal(aligned.scale.int(), torch.where(largest < 0, 255, largest))


@every_case
@given(x=arrays, group=st.sampled_from([64, 96, 224, -1]))
def test_elements_that_stay_normal_keep_their_value(dtype, rule, x, group):
    """The others move by half a subnormal step of the span's scale. What "floor" saturated in its own block
    is no longer cut off when the span's exponent is larger, so it is left out here."""
    fmt = element_format(dtype)
    plain = quantize_mx(x, dtype=dtype, rule=rule)
    aligned = quantize_mx(x, dtype=dtype, rule=rule, group=group)
    p, q = dequantize_mx(plain, torch.float64), dequantize_mx(aligned, torch.float64)
    assert torch.equal(p.isnan(), q.isnan())

    healthy = ~p.isnan()
    own = torch.exp2(per_element(block_scales(plain)).double() - 127)
    s = torch.exp2(per_element(block_scales(aligned)).double() - 127)
    compared = healthy & (x.double().abs() <= fmt.max * own)
    normal = compared & (x.double().abs() >= 2.0**fmt.min_exponent * s)
    assert torch.equal(p[normal], q[normal])
    assert ((p - q).abs() <= fmt.half_min_subnormal * s)[compared].all()


@every_case
@given(x=arrays, group=st.sampled_from([64, 96, 224]))
def test_an_aligned_array_is_an_mx_array(dtype, rule, x, group):
    """Repeating each scale gives the same values under plain blocks of 32."""
    aligned = quantize_mx(x, dtype=dtype, rule=rule, group=group)
    repeated = MXArray(aligned.data, block_scales(aligned).to(torch.uint8), -1, 32)
    got, want = dequantize_mx(repeated, torch.float64), dequantize_mx(aligned, torch.float64)
    assert torch.equal(got.nan_to_num(-1.0), want.nan_to_num(-1.0))


@given(x=mx_arrays((3, 100), specials=True))
def test_the_whole_axis_is_its_length_in_whole_blocks(x):
    whole, explicit = quantize_mx(x, group=-1), quantize_mx(x, group=128)
    same_bits(MXArray(whole.data, whole.scale, -1, 128), explicit)


@pytest.mark.parametrize("shift", range(21))
def test_a_block_below_its_neighbour(shift):
    """The table of docs/numerics.md, in units of the block's own scale: d binades below the span's largest,
    elements of 2^(d - 6) and more are kept, and the others move by at most 2^(d - 10)."""
    own = torch.cat([torch.tensor([448.0]), torch.linspace(0.0, 448.0, 4001)])[:3968].view(-1, 32)
    own[:, 0] = 448.0
    x = torch.cat([own, torch.zeros_like(own)], -1)
    x[:, 32] = 448.0 * 2.0**shift
    plain = dequantize_mx(quantize_mx(x), torch.float64)[:, :32]
    aligned = dequantize_mx(quantize_mx(x, group=64), torch.float64)[:, :32]
    kept = own.double() >= 2.0 ** (shift - 6)
    assert torch.equal(plain[kept], aligned[kept])
    assert ((plain - aligned).abs() <= 2.0 ** (shift - 10)).all()
    # 14 shifts leave the largest element normal, 18 leave it above half the smallest subnormal.
    assert (shift <= 14) == bool(kept.any())
    assert (shift <= 18) == bool((aligned != 0).any())


def test_floor_saturates_less_when_aligned():
    """500 alone is cut to 448; beside 512, with E = 1, it is 250 * 2 and rounds to 512."""
    x = torch.zeros(64)
    x[0], x[32] = 500.0, 512.0
    assert dequantize_mx(quantize_mx(x, rule="floor"), torch.float32)[0] == LARGEST[E4M3]
    assert dequantize_mx(quantize_mx(x, rule="floor", group=64), torch.float32)[0] == 512.0
