"""Where the numbers lie makes no difference: any axis, any strides, any length, none at all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_inputs import FLOATS, same_bits

from moefp8 import MXArray, dequantize_mx, mx_error_bound, quantize_mx
from moefp8.testing import mx_arrays

GROUPS = [32, 64, -1]


def moved(q, axis):
    """An array quantised along its last axis, that axis moved to ``axis`` (negative)."""
    return MXArray(q.data.movedim(-1, axis), q.scale.movedim(-1, axis), axis, q.group)


def numbers(*shape):
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 7919 % 1009 - 504).to(torch.float32).view(shape) / 3


@pytest.mark.parametrize("group", GROUPS)
@given(x=mx_arrays((3, 2, 70), specials=True), axis=st.integers(-3, 2))
def test_any_axis_is_the_last_axis_moved(axis, group, x):
    """Positive axes count from the front and are stored negative."""
    negative = axis - 3 if axis >= 0 else axis
    y = x.movedim(-1, axis)
    q = quantize_mx(y, axis, group=group)
    assert (q.axis, q.shape) == (negative, y.shape)
    same_bits(q, moved(quantize_mx(x, group=group), negative))
    value = dequantize_mx(quantize_mx(x, group=group), torch.float32)
    assert torch.equal(
        dequantize_mx(q, torch.float32).nan_to_num(-1.0), value.movedim(-1, axis).nan_to_num(-1.0)
    )


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.mT,
        lambda x: x[::2, ::3],
        lambda x: x[:, 5:],
        lambda x: x.mT[::5, 1:],
        lambda x: x[:1].expand(50, 80),
        lambda x: x[:, :1].expand(50, 80),
        lambda x: x[0, 0].expand(3, 40),
        lambda x: x.unflatten(1, (8, 10)).permute(2, 0, 1),
        lambda x: x.as_strided((10, 33), (3, 2)),
    ],
)
def test_any_strides(view, source):
    x = view(numbers(50, 80).to(source))
    for axis in range(-x.ndim, 0):
        for group in GROUPS:
            q = quantize_mx(x, axis, group=group)
            same_bits(q, quantize_mx(x.contiguous(), axis, group=group))
            assert q.data.is_contiguous()
            assert q.scale.is_contiguous()


def test_leading_axes_are_independent():
    x = numbers(2, 3, 45)
    q = quantize_mx(x)
    for i in range(2):
        for j in range(3):
            alone = quantize_mx(x[i, j])
            same_bits(MXArray(q.data[i, j], q.scale[i, j], -1, 32), alone)


@pytest.mark.parametrize("group", [32, 64, 96, 128, -1])
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 63, 64, 65, 95, 100, 128, 129])
def test_a_short_block_is_a_block_filled_with_zeros(n, group):
    x = numbers(2, n)
    padded = torch.zeros(2, 512)
    padded[:, :n] = x
    q, full = quantize_mx(x, group=group), quantize_mx(padded, group=group)
    count = 1 if group == -1 else -(-n // group)
    assert q.scale.shape == (2, count)
    assert torch.equal(q.scale, full.scale[:, :count])
    assert torch.equal(q.data.view(torch.uint8), full.data[:, :n].view(torch.uint8))
    assert not full.data[:, n:].view(torch.uint8).any()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0), (2, 0, 40), (0, 0)])
@pytest.mark.parametrize("source", FLOATS)
def test_empty(shape, group, source):
    x = torch.empty(shape, dtype=source)
    for axis in range(-len(shape), 0):
        q = quantize_mx(x, axis, group=group)
        n = shape[axis]
        scales = list(shape)
        scales[axis] = 0 if n == 0 else 1 if group == -1 else -(-n // group)
        assert (q.shape, list(q.scale.shape), q.scale.dtype) == (x.shape, scales, torch.uint8)
        assert dequantize_mx(q, source).shape == x.shape
        assert mx_error_bound(x, q).shape == x.shape


@given(x=mx_arrays((4, 40)), axis=st.sampled_from([0, 1]))
def test_the_input_is_left_alone(x, axis):
    before = x.clone()
    q = quantize_mx(x, axis)
    data, scale = q.data.clone().view(torch.uint8), q.scale.clone()
    dequantize_mx(q)
    mx_error_bound(x, q)
    assert torch.equal(x, before)
    assert torch.equal(q.data.view(torch.uint8), data)
    assert torch.equal(q.scale, scale)


def test_dequantised_dtypes_are_the_exact_value_rounded_once():
    x = numbers(4, 70)
    q = quantize_mx(x)
    exact = dequantize_mx(q, torch.float64)
    for dtype in FLOATS:
        assert torch.equal(dequantize_mx(q, dtype), exact.to(dtype))
    assert dequantize_mx(q).dtype == torch.bfloat16
