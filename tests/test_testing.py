"""moefp8.testing itself: every check fails on a quantiser or product that breaks its law, and the
strategies draw the inputs they promise."""

from functools import partial
from random import Random

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from numerics_inputs import FLOATS

from moefp8 import MXArray, dequantize_mx, mx_error_bound, quantize_mx
from moefp8._custom_vjp import custom_vjp
from moefp8.groups import group_ids
from moefp8.testing import (
    check_canonical_encoding,
    check_empty_groups,
    check_error_bound,
    check_expert_permutation,
    check_monotone_within_block,
    check_one_group_is_dense,
    check_permutation_within_block,
    check_poison_is_local,
    check_power_of_two_equivariance,
    check_projection,
    check_rceil_minus_floor,
    check_row_locality,
    check_sign_symmetry,
    check_tail_rows_are_zero,
    check_unused_gradients_are_zero,
    check_vjp_homogeneity,
    group_layouts,
    mx_arrays,
    mx_blocks,
)
from moefp8.testing.strategies import _EXPONENTS, _edges

NAN = float("nan")
exact = partial(dequantize_mx, dtype=torch.float64)


def breaks(law, check, *args):
    with pytest.raises(AssertionError, match=law):
        check(*args)


# --- a small quantiser with one part to break at a time ------------------------------------------


def blocks(x):
    return torch.nn.functional.pad(x.double(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))


def largest(b):
    return b.abs().amax(-1, keepdim=True)


def rceil(amax):
    """2^E with E = ceil(log2(amax / 448)), by frexp: exact."""
    mantissa, exponent = torch.frexp(amax)
    return torch.ldexp(torch.ones_like(amax), exponent - 9 + (mantissa > 448 / 512)).clamp(min=2.0**-127)


def to_nearest(y):
    """E4M3, subnormals and ties to even included."""
    _, exponent = torch.frexp(y)
    step = torch.ldexp(torch.ones_like(y), exponent.clamp(min=-5) - 4)
    return (y / step).round() * step


def fake(x, *, amax=largest, scale=rceil, rounding=to_nearest):
    b = blocks(x)
    s = scale(amax(b))
    value = torch.where(amax(b).isfinite(), rounding(b / s) * s, torch.nan)
    return value.flatten(-2)[..., : x.shape[-1]]


def value(q):
    return q


@given(x=mx_arrays(specials=True))
def test_the_small_quantiser_is_right_when_whole(x):
    assert torch.equal(fake(x).nan_to_num(-1.0), exact(quantize_mx(x)).nan_to_num(-1.0))


# --- checks of a quantiser -----------------------------------------------------------------------

RAMP = torch.linspace(-3.0, 5.0, 64)[None]


def mutated(change_data=lambda codes: codes, change_scale=lambda scale: scale):
    """quantize_mx with its codes or scales tampered with."""

    def quantize(x):
        q = quantize_mx(x)
        codes = change_data(q.data.view(torch.uint8)).view(q.dtype)
        return MXArray(codes, change_scale(q.scale), q.axis, q.group)

    return quantize


@pytest.mark.parametrize(
    ("quantize", "dequantize"),
    [
        (mutated(change_data=lambda codes: codes + 1), exact),
        (mutated(change_data=lambda codes: codes ^ 0x80), exact),
        (mutated(change_data=lambda codes: codes & 0xFE), exact),  # one bit of mantissa short
        (quantize_mx, lambda q: exact(q).nan_to_num(0) * 1.07),
        (quantize_mx, lambda q: exact(MXArray(q.data, q.scale + 1, q.axis, q.group))),
        (quantize_mx, lambda q: exact(q).flip(-1)),
    ],
)
def test_error_bound_catches(quantize, dequantize):
    breaks(
        "error bound: .* first at .*x = .*value = .*error = .*bound =",
        check_error_bound,
        quantize,
        dequantize,
        RAMP,
    )


def test_error_bound_catches_nan_and_a_bound_of_ones_own():
    nan = lambda q: exact(q) * NAN  # noqa: E731
    breaks("error bound", check_error_bound, quantize_mx, nan, RAMP)
    half = lambda x, q: mx_error_bound(x, q) / 2  # noqa: E731
    breaks("error bound", check_error_bound, quantize_mx, exact, torch.tensor([[1.0625, 448.0]]), half)


def upward(y):
    _, exponent = torch.frexp(y)
    step = torch.ldexp(torch.ones_like(y), exponent.clamp(min=-5) - 4)
    return (y / step).ceil() * step


# A power of two too many or too few changes no normal element: a wrong amax shows where it saturates.
def saturating(y):
    return to_nearest(y.clamp(-448, 448))


def test_projection_catches_a_lossy_dequantiser():
    breaks("projection", check_projection, fake, lambda q: q * 0.9, RAMP)


def test_projection_catches_a_scale_taken_from_the_first_element():
    first = partial(fake, amax=lambda b: b[..., :1].abs() / 2, rounding=saturating)
    breaks("projection", check_projection, first, value, RAMP)


def test_canonical_encoding_catches_rceil():
    breaks(
        "canonical encoding, leaf", check_canonical_encoding, quantize_mx, exact, torch.tensor([[225.0]])
    )


@pytest.mark.parametrize(
    "broken",
    [
        partial(fake, scale=torch.ones_like),
        partial(fake, scale=lambda amax: rceil(amax).clamp(min=1.0)),
        # exponents in steps of 12
        partial(fake, scale=lambda amax: torch.exp2(12 * (amax.log2() / 12).ceil())),
    ],
)
def test_power_of_two_equivariance_catches_a_scale_that_does_not_follow(broken):
    breaks(
        "power-of-two equivariance, k = 5",
        check_power_of_two_equivariance,
        broken,
        value,
        RAMP * 2.0**-9,
        5,
    )


def test_sign_symmetry_catches():
    breaks("sign symmetry", check_sign_symmetry, partial(fake, rounding=upward), value, RAMP)
    signed = partial(fake, amax=lambda b: b.amax(-1, keepdim=True).clamp(min=1e-3), rounding=saturating)
    breaks("sign symmetry", check_sign_symmetry, signed, value, RAMP)


def test_permutation_catches_a_scale_taken_from_half_the_block():
    half = partial(fake, amax=lambda b: largest(b[..., :16]), rounding=saturating)
    breaks(
        "permutation within a block", check_permutation_within_block, half, value, RAMP, range(31, -1, -1)
    )


def test_monotone_catches():
    wraps = partial(fake, scale=lambda amax: rceil(amax) / 2, rounding=lambda y: to_nearest(y) % 448)
    breaks("monotone within a block", check_monotone_within_block, wraps, value, RAMP)
    swapped = lambda x: fake(x).flip(-1)  # noqa: E731
    breaks("monotone within a block", check_monotone_within_block, swapped, value, RAMP)


@pytest.mark.parametrize("off", [-2, 2])
def test_rceil_minus_floor_catches(off):
    def floor(x):
        return quantize_mx(x, rule="floor").scale

    breaks("rceil minus floor", check_rceil_minus_floor, lambda x: floor(x) + off, floor, RAMP)


def test_poison_catches():
    at = (0, 5)
    breaks("fills its block", check_poison_is_local, lambda x: fake(x.nan_to_num(0)), value, RAMP, at)

    def whole_row(x):
        return torch.where(x.isnan().any(-1, keepdim=True), torch.nan, fake(x))

    breaks("stays in its block", check_poison_is_local, whole_row, value, RAMP, at)

    def one_scale(x):  # for the whole row, NaN left out
        row = x.double().nan_to_num(0).abs().amax() / 448
        poisoned = largest(blocks(x)).isnan().expand(1, 2, 32).flatten(-2)
        return torch.where(
            poisoned, torch.nan, fake(x.nan_to_num(0), scale=lambda amax: row.expand(amax.shape))
        )

    x = RAMP.clone()
    x[0, 5] = 4000.0
    breaks("stays in its span", check_poison_is_local, one_scale, value, x, at)
    check_poison_is_local(one_scale, value, x, at, NAN, 64)


def test_shapes_must_agree():
    breaks("shape: got", check_sign_symmetry, lambda x: x if x[0, 0] > 0 else x[:, 1:], value, RAMP)


# --- checks of a product -------------------------------------------------------------------------

OFFS = torch.tensor([2, 2, 5], dtype=torch.int32)
A = torch.linspace(-1.0, 2.0, 24).view(6, 4)
B = torch.linspace(-2.0, 1.0, 36).view(3, 4, 3)
COTANGENT = torch.linspace(-1.0, 1.0, 18).view(6, 3)


def product(a, b, offs):
    ends = offs.tolist()
    parts = [a[s:e] @ w for s, e, w in zip([0, *ends], ends, b, strict=False)]
    return torch.cat([*parts, a.new_zeros(a.shape[0] - ends[-1], b.shape[2])])


def by_mask(a, b, offs):
    """Every row times every expert, then a sum with a mask: 0 * NaN is NaN."""
    mask = group_ids(offs, a.shape[0]) == torch.arange(b.shape[0])[:, None]
    return (mask[..., None] * (a @ b)).sum(0)


def ignoring_empty_groups(a, b, offs):
    """Counts a group only if it has rows."""
    sizes = torch.diff(offs, prepend=offs[:1] * 0)
    return product(a, b[: int((sizes > 0).sum())], offs[sizes > 0])


def one_more_row_to_the_last(a, b, offs):
    return product(a, b, torch.where(offs == offs[-1], a.shape[0], offs))


def one_scale_for_all(a, b, offs):
    return product(a / a.nan_to_num(0).abs().max(), b, offs)


def weighted_by_place(a, b, offs):
    return product(a, b * torch.arange(1.0, b.shape[0] + 1)[:, None, None], offs)


def _rounded_bwd(static, needed, a, b, offs, cotangent):
    _, pullback = torch.func.vjp(lambda a, b: product(a, b, offs), a, b)
    return *pullback((cotangent * 8).round() / 8), None


_rounded = custom_vjp("rounded", lambda static, *xs: (product(*xs), xs), _rounded_bwd)


def absolute_rounding_of_the_cotangent(a, b, offs):
    return _rounded(None, a, b, offs)


def test_every_check_passes_the_right_product():
    check_row_locality(product, A, B, OFFS, 3)
    check_row_locality(product, A, B, OFFS, 0)
    check_expert_permutation(product, A, B, OFFS, [2, 0, 1])
    check_one_group_is_dense(product, torch.matmul, A, B[0])
    check_empty_groups(product, A, B, OFFS)
    check_tail_rows_are_zero(product, A, B, OFFS)
    check_unused_gradients_are_zero(product, A, B, OFFS, COTANGENT)
    check_vjp_homogeneity(product, A, B, OFFS, COTANGENT, 5)


@pytest.mark.parametrize(
    ("law", "check", "broken", "args"),
    [
        ("row 3 depends on expert 2 only", check_row_locality, by_mask, (OFFS, 3)),
        ("row 3 depends on expert 2 only", check_row_locality, one_scale_for_all, (OFFS, 3)),
        ("experts permuted by", check_expert_permutation, weighted_by_place, (OFFS, [2, 0, 1])),
        ("empty groups change nothing", check_empty_groups, ignoring_empty_groups, (OFFS,)),
        ("empty groups change nothing", check_empty_groups, by_mask, (OFFS,)),
        ("rows past offs.* are zero", check_tail_rows_are_zero, one_more_row_to_the_last, (OFFS,)),
        ("rows past offs.* are zero", check_tail_rows_are_zero, by_mask, (OFFS,)),
        ("gradient of rows past offs", check_unused_gradients_are_zero, by_mask, (OFFS, COTANGENT)),
        (
            "vjp of -2.5 times the cotangent, da",
            check_vjp_homogeneity,
            absolute_rounding_of_the_cotangent,
            (OFFS, COTANGENT, 5),
        ),
    ],
)
def test_each_check_fails_the_product_that_breaks_its_law(law, check, broken, args):
    breaks(law, check, broken, A, B, *args)


def test_one_group_is_dense_catches():
    for broken in (
        lambda a, b, offs: product(a, b, offs - 1),
        lambda a, b, offs: product(a.bfloat16(), b.bfloat16(), offs).float(),
    ):
        breaks("one group is the dense product", check_one_group_is_dense, broken, torch.matmul, A, B[0])


def test_gradients_of_empty_groups_are_looked_at():
    regularised = lambda a, b, offs: product(a, b, offs) + b.sum()  # noqa: E731
    empty_tail = torch.tensor([2, 2, 6], dtype=torch.int32)
    breaks(
        "gradient of empty groups",
        check_unused_gradients_are_zero,
        regularised,
        A,
        B,
        empty_tail,
        COTANGENT,
    )


def test_rtol_is_of_the_largest_entry_of_a_row():
    def off_by(amount):
        return lambda a, b, offs: product(a, b, offs) * (1 + amount)

    check_one_group_is_dense(off_by(2.0**-12), torch.matmul, A, B[0], 2.0**-11)
    breaks("dense product", check_one_group_is_dense, off_by(2.0**-10), torch.matmul, A, B[0], 2.0**-11)


# --- strategies ----------------------------------------------------------------------------------


def can_draw(strategy, condition):
    """An example that meets the condition, or hypothesis raises NoSuchExample."""
    found = settings(max_examples=2000, phases=[Phase.generate], database=None, deadline=None)
    return find(strategy, condition, settings=found, random=Random(0))


SEEN = {
    "minus zero": lambda x: ((x == 0) & x.signbit()).any(),
    "a block of zeros": lambda x: (x == 0).all(),
    "an element that underflows": lambda x: ((x != 0) & (exact(quantize_mx(x)) == 0)).any(),
    "one that floor saturates": lambda x: (
        exact(quantize_mx(x, rule="floor")).abs() < x.double().abs() * 0.94
    ).any(),
    "rules that disagree": lambda x: (quantize_mx(x).scale != quantize_mx(x, rule="floor").scale).any(),
    "rules that agree": lambda x: (
        (x != 0).any() and (quantize_mx(x).scale == quantize_mx(x, rule="floor").scale).all()
    ),
    "an amax that exactly fits": lambda x: torch.frexp(x.double().abs().amax())[0] == 0.875,
    "an encoding that is not canonical": lambda x: (
        quantize_mx(exact(quantize_mx(x))).scale != quantize_mx(x).scale
    ).any(),
    "a tie": lambda x: (
        (mx_error_bound(x, quantize_mx(x)) == (x.double() - exact(quantize_mx(x))).abs()) & (x != 0)
    ).any(),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("what", SEEN)
def test_blocks_show(what, dtype):
    x = can_draw(mx_blocks(dtype=dtype), lambda x: bool(SEEN[what](x)))
    assert x.dtype == dtype
    assert x.shape == (32,)


def far_apart(x):
    """A healthy block whose exponent is 13 below that of another one in its row, zeros left out."""
    scale = quantize_mx(x).scale.int()
    counts = (scale > 0) & (scale < 255)
    lowest = torch.where(counts, scale, 255).amin(-1)
    return (torch.where(counts, scale, 0).amax(-1) - lowest >= 13).any()


ARRAYS = {
    "a short last block": lambda x: x.shape[-1] % 32 != 0,
    "whole blocks": lambda x: x.shape[-1] % 32 == 0,
    "a NaN": lambda x: x.isnan().any(),
    "an infinity": lambda x: x.isinf().any(),
    "neither": lambda x: x.isfinite().all() and (x != 0).any(),
    "blocks 13 binades apart": far_apart,
}


@pytest.mark.parametrize("what", ARRAYS)
def test_arrays_show(what):
    can_draw(mx_arrays(specials=True), lambda x: bool(ARRAYS[what](x)))


@given(draw=st.data(), dtype=st.sampled_from(FLOATS))
def test_arrays_keep_to_what_was_asked(draw, dtype):
    x = draw.draw(mx_arrays((2, 3, 40), dtype=dtype))
    assert (x.shape, x.dtype) == ((2, 3, 40), dtype)
    assert x.isfinite().all()
    small = draw.draw(mx_arrays((70,), dtype=dtype, exponents=(0, 0), spread=0))
    assert small.abs().max() <= 466  # 464 is the largest edge, and that its neighbour in bfloat16


@pytest.mark.parametrize("dtype", FLOATS)
def test_edges_are_neighbours_and_survive_every_exponent(dtype):
    edges = _edges(dtype)
    low, high = _EXPONENTS.get(dtype, (-100, 100))
    for k in range(low, high + 1):
        assert torch.equal((edges * 2.0**k).to(dtype).double(), edges * 2.0**k)
    below, tie, above = edges[6:].view(-1, 3).unbind(1)
    for between in ((below + tie) / 2, (tie + above) / 2):  # halfway to a neighbour there is no number
        if dtype != torch.float64:
            assert (between.to(dtype).double() != between).all()
        else:  # nor in float64, where the halves themselves are rounded
            assert ((between == below) | (between == tie) | (between == above)).all()


LAYOUTS = {
    "an empty group": lambda s, tail: 0 in s,
    "an empty first group": lambda s, tail: s[0] == 0 and sum(s) > 0,
    "an empty last group": lambda s, tail: s[-1] == 0 and sum(s) > 0,
    "a single row": lambda s, tail: 1 in s,
    "only aligned groups": lambda s, tail: sum(s) > 0 and all(n % 32 == 0 for n in s),
    "unaligned groups": lambda s, tail: any(n % 32 for n in s),
    "rows past the last end": lambda s, tail: tail > 0 and sum(s) > 0,
    "none past it": lambda s, tail: tail == 0 and sum(s) > 0,
    "no row": lambda s, tail: sum(s) + tail == 0,
    "eight groups": lambda s, tail: len(s) == 8,
    "one group": lambda s, tail: len(s) == 1,
}


@pytest.mark.parametrize("what", LAYOUTS)
def test_layouts_show(what):
    def condition(layout):
        ends = layout.offs.tolist()
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return LAYOUTS[what](sizes, layout.rows - ends[-1])

    can_draw(group_layouts(), condition)


@given(layout=group_layouts(max_groups=3, max_size=20, max_tail=2))
def test_layouts_keep_to_what_was_asked(layout):
    sizes = torch.diff(layout.offs, prepend=layout.offs[:1] * 0)
    assert layout.offs.dtype == torch.int32
    assert 1 <= len(sizes) <= 3
    assert ((sizes >= 0) & (sizes <= 20)).all()
    assert 0 <= layout.rows - layout.offs[-1] <= 2
