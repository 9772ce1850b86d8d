"""Group layouts: random ends, owners of rows, segmented copies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_inputs import DEVICES

from moefp8 import generate_jagged_offs
from moefp8.groups import group_ids, read_ends, segments
from moefp8.testing import group_layouts


@given(
    num_groups=st.integers(1, 20),
    units=st.integers(0, 50),
    multiple_of=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_generated_sizes_are_multiples_that_sum_to_the_total(num_groups, units, multiple_of, seed):
    generator = torch.Generator().manual_seed(seed)
    total = units * multiple_of
    offs = generate_jagged_offs(num_groups, total, multiple_of=multiple_of, generator=generator)
    assert offs.dtype == torch.int32
    assert offs.shape == (num_groups,)
    assert offs[-1] == total
    sizes = torch.diff(offs, prepend=torch.zeros(1, dtype=torch.int32))
    assert (sizes >= 0).all()
    assert (sizes % multiple_of == 0).all()


def test_generated_ends_depend_on_the_generator_alone():
    before = torch.random.get_rng_state()
    draws = [
        generate_jagged_offs(16, 10**6, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_placement_of_the_inner_boundary_is_equally_likely():
    """Two groups of three units: four places, 4000 draws; each within 5 standard deviations of 1000."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [generate_jagged_offs(2, 6, multiple_of=2, generator=generator) for _ in range(4000)]
    )
    counts = torch.bincount(draws[:, 0].long(), minlength=7)
    assert counts[1::2].sum() == 0
    assert (counts[::2] - 1000).abs().max() <= 5 * (4000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_generated_on_a_device(device):
    on_device = generate_jagged_offs(5, 99, generator=torch.Generator().manual_seed(0), device=device)
    assert on_device.device.type == device
    same = generate_jagged_offs(5, 99, generator=torch.Generator().manual_seed(0))
    assert torch.equal(on_device.cpu(), same)


@pytest.mark.parametrize(
    ("args", "multiple_of", "message"),
    [
        ((0, 8), 1, "num_groups: expected at least 1, got 0"),
        ((2, 8), 0, "multiple_of: expected at least 1, got 0"),
        ((2, -8), 1, "total: expected a non-negative multiple of 1, got -8"),
        ((2, 33), 32, "total: expected a non-negative multiple of 32, got 33"),
    ],
)
def test_generating_the_impossible(args, multiple_of, message):
    with pytest.raises(ValueError, match=message):
        generate_jagged_offs(*args, multiple_of=multiple_of)


@given(layout=group_layouts())
def test_every_row_has_the_owner_whose_range_holds_it(layout):
    owners = group_ids(layout.offs, layout.rows).tolist()
    starts = [0, *layout.offs.tolist()]
    for row, owner in enumerate(owners):
        if owner < len(layout.offs):
            assert starts[owner] <= row < starts[owner + 1]
        else:
            assert row >= starts[-1]


@given(layout=group_layouts(), multiple=st.sampled_from([1, 8, 32, 128]))
def test_segments_hold_each_group_in_order_and_zeros(layout, multiple):
    x = torch.arange(1.0, layout.rows + 1)[:, None]
    plan = segments(layout.offs, layout.rows, multiple)
    padded = plan.pad(x)
    rows, want = 0, []
    start = 0
    for end, segment_end, size in zip(
        layout.offs.tolist(),
        plan.ends.tolist(),
        torch.diff(plan.ends, prepend=plan.ends[:1] * 0),
        strict=True,
    ):
        assert size % multiple == 0
        assert 0 <= size - (end - start) < multiple
        want += [*range(start + 1, end + 1), *[0] * (segment_end - rows - (end - start))]
        rows, start = segment_end, end
    want += [0] * (len(padded) - len(want))
    assert padded[:, 0].tolist() == want
    assert len(padded) == multiple * ((layout.rows + len(layout.offs) * (multiple - 1)) // multiple)
    assert (plan.group[rows:] == len(layout.offs)).all()
    assert torch.equal(plan.valid, padded[:, 0] != 0)


def test_the_padded_length_is_reached():
    """G groups of one row each: every bound on the number of segments' rows is met with equality."""
    plan = segments(torch.arange(1, 6, dtype=torch.int32), 5, 32)
    assert len(plan.source) == plan.ends[-1] == 160


def test_reading_the_ends_checks_them():
    assert read_ends(torch.tensor([0, 2, 5], dtype=torch.int32), 7) == [0, 2, 5]
    for ends in ([3, 2], [-1, 2], [3, 8]):
        message = r"offs: expected non-decreasing group ends in \[0, 7\], got"
        with pytest.raises(ValueError, match=message):
            read_ends(torch.tensor(ends, dtype=torch.int32), 7)
