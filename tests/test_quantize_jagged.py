"""quantize_mx_jagged is quantize_mx of every group by itself, filled up with zeros."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_inputs import DEVICES, DTYPES, E4M3, E5M2, FLOATS, RULES

from moefp8 import dequantize_mx, generate_jagged_offs, quantize_mx, quantize_mx_jagged
from moefp8.testing import group_layouts, mx_arrays

GROUPS = [32, 64, 96, -1]
every_case = pytest.mark.parametrize(("dtype", "rule"), [(d, r) for d in DTYPES for r in RULES])


def offsets(*ends):
    return torch.tensor(ends, dtype=torch.int32)


def one_by_one(x, ends, dtype, rule, group):
    """Codes, scales and ends of the segments, built by a loop over groups with ``quantize_mx``."""
    multiple = max(group, 32)
    codes, scales, segment_ends, start = [], [], [], 0
    for end in ends:
        rows = x[start:end]
        padded = torch.cat([rows, rows.new_zeros(-len(rows) % multiple, x.shape[1])])
        q = quantize_mx(padded, 0, dtype=dtype, rule=rule, group=group)
        scale = q.scale
        if group == -1:  # stored for every 32 rows; a poisoned block says so itself
            scale = scale.expand(len(padded) // 32, -1).clone()
            nan = dequantize_mx(q, torch.float32).isnan()
            scale[nan.unflatten(0, (-1, 32)).any(1)] = 255
        codes.append(q.data.view(torch.uint8))
        scales.append(scale)
        segment_ends.append(len(padded) + (segment_ends[-1] if segment_ends else 0))
        start = end
    return torch.cat(codes), torch.cat(scales), segment_ends


def check(x, offs, dtype, rule, group, device="cpu"):
    q, ends = quantize_mx_jagged(x.to(device), offs.to(device), dtype=dtype, rule=rule, group=group)
    codes, scales, want_ends = one_by_one(x, offs.tolist(), dtype, rule, group)

    multiple, stored = max(group, 32), (group if group > 0 else 32)
    padded = multiple * ((x.shape[0] + len(offs) * (multiple - 1)) // multiple)
    assert (q.shape, q.axis, q.group, q.dtype) == ((padded, x.shape[1]), -2, stored, dtype)
    assert q.scale.shape == (padded // stored, x.shape[1])
    assert ends.dtype == torch.int32
    assert ends.tolist() == want_ends

    data, scale, used = q.data.cpu().view(torch.uint8), q.scale.cpu(), want_ends[-1]
    assert torch.equal(data[:used], codes)
    assert torch.equal(scale[: used // stored], scales)
    # Past the last segment: zeros under the smallest scale.
    assert not data[used:].any()
    assert not scale[used // stored :].any()


@every_case
@given(
    layout=group_layouts(max_groups=5),
    source=st.sampled_from(FLOATS),
    group=st.sampled_from(GROUPS),
    draw=st.data(),
)
def test_equals_quantising_each_group(dtype, rule, layout, source, group, draw):
    columns = draw.draw(mx_arrays((3, layout.rows), dtype=source, specials=True)) if layout.rows else None
    x = torch.empty(0, 3, dtype=source) if columns is None else columns.mT
    check(x, layout.offs, dtype, rule, group)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    ("rows", "ends"),
    [
        (100, [100]),
        (100, [0, 0, 100, 100]),
        (100, [1, 2, 3, 35, 68, 100]),
        (100, [32, 64, 96]),
        (100, [40]),
        (100, [0]),
        (100, [0, 0, 0]),
        (1, [1]),
        (0, [0]),
        (0, [0] * 40),
    ],
)
def test_layouts(rows, ends, group, device):
    bits = torch.frombuffer(bytearray(hashlib.shake_256(b"jagged").digest(1200)), dtype=torch.int16)
    check(bits.view(torch.bfloat16).view(-1, 6)[:rows], offsets(*ends), E4M3, "rceil", group, device)


@pytest.mark.parametrize("group", GROUPS)
def test_256_groups(group):
    offs = generate_jagged_offs(256, 700, generator=torch.Generator().manual_seed(1))
    x = (torch.arange(2100.0) % 251 - 125).view(700, 3)
    check(x, offs, E5M2, "floor", group)


def test_no_columns():
    for group in GROUPS:
        q, ends = quantize_mx_jagged(torch.ones(5, 0), offsets(3, 5), group=group)
        assert q.shape[1] == q.scale.shape[1] == 0
        assert len(ends) == 2


@pytest.mark.parametrize("group", GROUPS)
def test_rows_past_the_last_end_are_left_out(group):
    x = torch.ones(50, 4)
    clean, _ = quantize_mx_jagged(x, offsets(10, 20), group=group)
    x[20:] = torch.nan
    dirty, _ = quantize_mx_jagged(x, offsets(10, 20), group=group)
    assert torch.equal(dirty.data.view(torch.uint8), clean.data.view(torch.uint8))
    assert torch.equal(dirty.scale, clean.scale)


@pytest.mark.parametrize("group", GROUPS)
def test_any_strides(group):
    x = (torch.arange(600.0) % 97 - 48).view(6, 100)
    offs = offsets(7, 50, 90)
    for view in (x.mT, x.mT[:, ::2], x[:1].mT.expand(100, 4)):
        q, _ = quantize_mx_jagged(view, offs, group=group)
        want, _ = quantize_mx_jagged(view.contiguous(), offs, group=group)
        assert torch.equal(q.data.view(torch.uint8), want.data.view(torch.uint8))
        assert torch.equal(q.scale, want.scale)
