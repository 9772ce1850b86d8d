"""Every kernel beside its twin: on a CPU through Triton's interpreter, on a GPU with ``-m gpu``.

Quantisers agree bit for bit. Products agree within the error of their accumulators (:func:`bound`).
"""

import pytest
import torch
import torch.utils._pytree as pytree
from specs import LAYOUTS, OPS, Backend, Case, Layout
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from moefp8 import expert_ffn, scaled_grouped_mm
from moefp8.kernels import (
    combine,
    fake_quantize,
    fake_quantize_blocks,
    gemm,
    group_sum,
    high_precision,
    quantize_columns,
    quantize_rows,
)
from moefp8.kernels import plan as plans
from moefp8.kernels.gathered import Gathered
from moefp8.recipe import PRESETS, Gemm, Recipe

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FORMATS = {
    "mx": Gemm(),
    "floor": Gemm(rule="floor"),
    "e5m2": Gemm(dtype=torch.float8_e5m2),
    "row": Gemm(format="row"),
}

#: Groups of several segments, each of several bands.
LONG = Layout("long", (1, 300, 0, 131), 5)
ODD_LAYOUTS = [
    x for x in LAYOUTS if x.name in ("unaligned", "single row", "empty groups", "no rows", "tail")
]

pytestmark = [
    # The interpreter computes with NumPy, which warns of what NaN and infinities do in float32.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def draw(shape, device, *, dtype=torch.bfloat16, poison=0, seed=0):
    """Numbers over seventeen binades, a zero row, and ``poison`` NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * torch.exp2(torch.randint(-12, 5, shape, generator=generator).float())
    x[: shape[0] // 7] = 0
    flat = x.view(-1)
    if flat.numel():
        for i in range(poison):
            at = int(torch.randint(flat.numel(), (), generator=generator))
            flat[at] = (float("nan"), float("inf"), -float("inf"))[i % 3]
    return x.to(device, dtype)


def same_bits(got, want):
    """Equal as bytes, but that every NaN equals every NaN."""
    if got.dtype.is_floating_point and got.itemsize > 1:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(
            got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8), rtol=0, atol=0
        )


@pytest.mark.parametrize("tile", [128, 192])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.name)
def test_plan(layout, tile, device):
    offs = layout.offs(device)
    got, want = plans.plan(offs, layout.rows, tile), plans.reference(offs, layout.rows, tile)
    for name, x, y in zip(got._fields, got, want, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("ends", [(500, 30, 900), (-5, 30, -7)])
def test_a_plan_never_points_past_the_rows(ends, device):
    """Ends that lie, as those of a corrupted ``offs``, lead no kernel out of bounds."""
    got = plans.plan(torch.tensor(ends, dtype=torch.int32, device=device), 64, 128)
    for table in (got.tiles, got.segments):
        assert int(table[:, 1:].min()) >= 0
        assert int(table[:, 1:].max()) <= 64
    assert int(got.ends.max()) <= 128 * got.segments.shape[0]
    assert sorted(got.order.tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("layout", "gemm_format", "poison"),
    [(x, "mx", 5) for x in ODD_LAYOUTS]
    + [(LONG, f, 5) for f in ("mx", "row")]
    + [(ODD_LAYOUTS[0], f, p) for f in FORMATS for p in (0, 5)],
    ids=str,
)
def test_quantisers(layout, gemm_format, poison, device):
    gemm = FORMATS[gemm_format]
    offs, columns = layout.offs(device), 80
    dtype = torch.float32 if gemm_format == "floor" else torch.bfloat16
    x = draw((layout.rows, columns), device, dtype=dtype, poison=poison)
    where = plans.plan(offs, layout.rows, 192)
    used = int(offs[-1])

    got = quantize_rows.quantize_rows(x, where, gemm, column_amax=True)
    want = quantize_rows.reference(x, offs, gemm)
    same_bits(got.data[:used], want.data[:used])
    same_bits(got.scale[:used], want.scale[:used])
    same_bits(got.column_amax, want.column_amax)
    same_bits(got.poisoned, want.poisoned)

    data, scale = quantize_columns.quantize_columns(x, where, got, gemm)
    want_data, want_scale = quantize_columns.reference(x, offs, want, gemm)
    end = int(where.ends[-1])
    assert data.shape == want_data.shape
    same_bits(data[:, :end], want_data[:, :end])
    filled = torch.diff(offs, prepend=offs.new_zeros(1)) > 0
    same_bits(scale[filled], want_scale[filled])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_scored", [True, False])
@pytest.mark.parametrize("layout", [x for x in ODD_LAYOUTS if x.name in ("single row", "tail")])
def test_gathered_rows(layout, is_scored, dtype, device):
    """Copies of tokens, scaled or not, are quantised as if they had been written out first."""
    copies = 2 if layout.rows % 2 == 0 else 1
    offs, tokens = layout.offs(device), draw((layout.rows // copies, 80), device, poison=3, dtype=dtype)
    where = plans.plan(offs, layout.rows, 192)
    generator = torch.Generator().manual_seed(0)
    copy = torch.randperm(layout.rows, generator=generator).to(device)
    scores = torch.rand(len(tokens), copies, generator=generator).to(device) if is_scored else None
    gathered = Gathered(tokens, copy, copy.argsort(), copies, scores)
    x = combine.reference_spread(tokens, copy, scores, copies)
    got, want = (quantize_rows.quantize_rows(a, where, Gemm(), column_amax=True) for a in (gathered, x))
    used, end = int(offs[-1]), int(where.ends[-1])
    same_bits(got.data[:used], want.data[:used])
    same_bits(got.scale[:used], want.scale[:used])
    same_bits(got.column_amax, want.column_amax)
    same_bits(got.poisoned, want.poisoned)
    columns, _ = quantize_columns.quantize_columns(gathered, where, got, Gemm())
    same_bits(columns[:, :end], quantize_columns.quantize_columns(x, where, want, Gemm())[0][:, :end])


LONG_ROWS = [pytest.param("cuda", n, marks=pytest.mark.gpu) for n in (16, 1040, 5120, 8192, 16400)]


@pytest.mark.parametrize(("device", "columns"), [("cpu", 16), ("cpu", 1040), ("cpu", 5120), *LONG_ROWS])
def test_row_lengths(columns, device):
    """Every tiling of the row quantiser, poisoned blocks at the ends of the row included."""
    rows = 70 if device == "cuda" else 3
    x = draw((rows, columns), device)
    x[0, 0], x[rows - 1, -1] = float("nan"), float("inf")
    x[1] = float("nan")
    offs = torch.tensor([rows], dtype=torch.int32, device=device)
    got = quantize_rows.quantize_rows(x, plans.plan(offs, rows, 192), Gemm(), column_amax=True)
    for a, b in zip(got, quantize_rows.reference(x, offs, Gemm()), strict=True):
        same_bits(a, b)


def test_strided_rows(device):
    """A slice of a wider matrix, and a transposed one."""
    offs = torch.tensor([40], dtype=torch.int32, device=device)
    where = plans.plan(offs, 40, 192)
    for x in (draw((40, 96), device)[:, 16:64], draw((48, 40), device).T):
        got = quantize_rows.quantize_rows(x, where, Gemm(), column_amax=True)
        same_bits(got.data, quantize_rows.reference(x, offs, Gemm()).data)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(
    ("layout", "gemm_format", "group"),
    [
        *((x, "mx", 32) for x in ODD_LAYOUTS),
        (ODD_LAYOUTS[0], "floor", 32),
        (ODD_LAYOUTS[0], "e5m2", 64),
        *((x, "mx", group) for x in ODD_LAYOUTS for group in (64, 96)),
        (LONG, "mx", 128),
        (LONG, "mx", 160),
        (LONG, "mx", 256),
        (LONG, "mx", 2**30),
    ],
    ids=str,
)
def test_fake_quantize(layout, gemm_format, group, axis, device):
    gemm, offs = FORMATS[gemm_format]._replace(group=group), layout.offs(device)
    columns = 80 if group < 128 else 304
    x = draw((layout.rows, columns), device, poison=3)
    got = fake_quantize.fake_quantize(x, offs, plans.plan(offs, layout.rows, 192), axis, gemm)
    # Segments of the twin are as long as spans; the whole axis stands for a span that is longer.
    twin = gemm._replace(group=min(group, 512))
    used = int(offs[-1])
    same_bits(got[:used], fake_quantize.reference(x, offs, axis, twin)[:used])


@pytest.mark.parametrize(
    ("layout", "along", "across", "dtype"),
    [
        *((x, "mx", "mx", torch.bfloat16) for x in ODD_LAYOUTS),
        (LONG, "e5m2", "e5m2", torch.float16),
        (ODD_LAYOUTS[0], "mx", "floor", torch.float32),
    ],
    ids=str,
)
def test_fake_quantize_both_ways(layout, along, across, dtype, device):
    """One pass, or two where the copies are rounded differently; of a slice of a wider matrix."""
    along, across, offs = FORMATS[along], FORMATS[across], layout.offs(device)
    x = draw((layout.rows, 208), device, dtype=dtype, poison=3)[:, 48:192]
    got = fake_quantize_blocks.fake_quantize_blocks(x, plans.plan(offs, layout.rows, 128), along, across)
    used = int(offs[-1])
    for copy, axis, how in zip(got, (-1, -2), (along, across), strict=True):
        same_bits(copy[:used], fake_quantize.reference(x, offs, axis, how._replace(group=32))[:used])


@pytest.mark.parametrize("span", [32, 64, 256])
def test_fake_quantize_keeps_subnormal_numbers(span, device):
    x = torch.full((32, 256), 2.0**-130, dtype=torch.bfloat16, device=device)
    offs = torch.tensor([32], dtype=torch.int32, device=device)
    gemm = Gemm(group=span)
    got = fake_quantize.fake_quantize(x, offs, plans.plan(offs, 32, 128), -1, gemm)
    assert (got != 0).all()
    same_bits(got, fake_quantize.reference(x, offs, -1, gemm))


@pytest.mark.parametrize(("dtype", "least"), [(torch.float8_e4m3fn, 3), (torch.float8_e5m2, 10)])
def test_what_mx_represents_bfloat16_does(dtype, least):
    """Every code under every scale from byte ``least`` on, but NaN and what float32 has no room for."""
    codes = torch.arange(256).to(torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()]
    values = (codes[:, None].double() * torch.exp2(torch.arange(least, 255).double() - 127)).float()
    values = values[values.isfinite()]
    assert torch.equal(values.to(torch.bfloat16).float(), values)
    below = codes.abs()[codes != 0].min().double() * 2.0 ** (least - 1 - 127)
    assert below.float().to(torch.bfloat16).double() != below


def bound(exact, size, out_dtype, length):
    """How far a product may be from ``exact``, with ``size`` the same sum over magnitudes.

    An accumulator of p bits that takes 33 terms at a time truncates each at 2^-p of the largest: at
    most 33 * 2^-p * size for each instruction. Hopper's has p = 13 and 4 instructions of 32 between
    promotions; the float32 sums around it add ``length`` roundings of 2^-24; the result is rounded.
    """
    rounding = torch.finfo(out_dtype).eps / 2
    return size * (33 * 4 * 2.0**-13 + length * 2.0**-24) + exact.abs() * rounding


def check(got, twin, length):
    exact, size = twin
    error = (got.double() - exact).abs()
    assert (error <= bound(exact, size, got.dtype, length)).all()


@pytest.mark.parametrize(
    ("layout", "gemm_format", "out_dtype"),
    [
        ("unaligned", "mx", torch.bfloat16),
        ("tail", "row", torch.float32),
        ("only tail", "e5m2", torch.bfloat16),
    ],
)
def test_products(layout, gemm_format, out_dtype, device):
    """Forward with a bias, dgrad and wgrad on the kernels' own operands; K and N no multiples of a tile."""
    layout = next(x for x in LAYOUTS if x.name == layout)
    how, offs, (n, k) = FORMATS[gemm_format], layout.offs(device), (80, 144)
    groups, rows = len(layout.sizes), layout.rows
    a, g = (torch.randn(rows, x, device=device, dtype=torch.bfloat16) for x in (k, n))
    w = torch.randn(groups, n, k, device=device, dtype=torch.bfloat16)
    where = plans.plan(offs, rows, gemm.tile_rows(offs.device))
    # What lies past the last group is never read: poison it.
    a[int(offs[-1]) :], g[int(offs[-1]) :] = float("nan"), float("nan")

    flat = w.view(groups * n, k)
    ends = torch.arange(1, groups + 1, dtype=torch.int32, device=device) * n
    w_plan = plans.plan(ends, groups * n, 128)
    w_rows = quantize_rows.quantize_rows(flat, w_plan, how, column_amax=True)
    along_k = gemm.Weights(w_rows.data, w_rows.scale.view(groups, n))
    along_n = gemm.Weights(*quantize_columns.quantize_columns(flat, w_plan, w_rows, how))
    a_rows, g_rows = (quantize_rows.quantize_rows(x, where, how, column_amax=True) for x in (a, g))
    a_cols = quantize_columns.quantize_columns(a, where, a_rows, how)
    g_cols = quantize_columns.quantize_columns(g, where, g_rows, how)

    bias = torch.randn(groups, n, device=device)
    out = gemm.gemm_rows(a_rows.data, a_rows.scale, along_k, where.tiles, bias, out_dtype, 128)
    check(out, gemm.reference_rows(a_rows.data, a_rows.scale, along_k, offs, bias), k)
    assert (out[int(offs[-1]) :] == 0).all()
    strided = torch.stack([bias, bias + 1], -1)[..., 0]
    again = gemm.gemm_rows(a_rows.data, a_rows.scale, along_k, where.tiles, strided, out_dtype, 128)
    same_bits(again, out)
    da = gemm.gemm_rows(g_rows.data, g_rows.scale, along_n, where.tiles, None, out_dtype, 128)
    check(da, gemm.reference_rows(g_rows.data, g_rows.scale, along_n, offs, None), n)
    tripled = g_rows.data, 3 * g_rows.scale, along_n
    other = gemm.gemm_rows(*tripled, where.tiles, None, out_dtype, 128)
    both = gemm.gemm_rows_sum(tripled, (*g_rows[:2], along_n), where.tiles, out_dtype, 128)
    same_bits(both, other + da)
    dw = gemm.gemm_contraction(*g_cols, *a_cols, where, out_dtype, 128)
    check(dw, gemm.reference_contraction(*g_cols, *a_cols, where.ends), max(rows, 1))


def test_bfloat16_product_with_a_bias_of_views_at_odd_addresses(device):
    """As weights in one flat buffer may lie; the tensor memory accelerator wants multiples of 16 bytes."""
    layout = LAYOUTS[0]
    offs, groups, rows, (n, k) = layout.offs(device), len(layout.sizes), layout.rows, (16, 32)
    a, w = draw((rows, k), device), draw((groups, n, k), device, seed=1)
    tiles = plans.plan(offs, rows, gemm.tile_rows(offs.device)).tiles
    bias = torch.randn(groups, n, device=device)

    def moved(x):
        buffer = torch.cat([x.new_zeros(1), x.flatten()])
        return buffer[1:].view(x.shape)

    want = high_precision.high_precision_product(a, w.mT, offs, tiles, bias)
    same_bits(high_precision.high_precision_product(moved(a), moved(w).mT, offs, tiles, bias), want)


@pytest.mark.parametrize("stored", ["(G, N, K)", "(G, K, N)"])
@pytest.mark.parametrize("layout", ODD_LAYOUTS, ids=lambda x: x.name)
def test_bfloat16_product_with_a_bias(layout, stored, device):
    """One rounding of the float32 sum; K and N no multiples of a tile, one bias or one for each group."""
    offs, groups, rows, (n, k) = layout.offs(device), len(layout.sizes), layout.rows, (80, 144)
    a, b = draw((rows, k), device), draw((groups, n, k), device, seed=1).mT
    end = int(offs[-1])
    a[end:] = float("nan")  # never read
    if stored == "(G, K, N)":
        b = b.contiguous()
    tiles = plans.plan(offs, rows, gemm.tile_rows(offs.device)).tiles
    each = torch.randn(groups, n, device=device)
    for bias in (each, each[0], each.bfloat16(), each.half(), torch.stack([each, each + 1], -1)[..., 0]):
        out = high_precision.high_precision_product(a, b, offs, tiles, bias)
        ones = gemm.Weights(b.mT.reshape(-1, k), torch.ones(groups, n, device=device))
        exact, size = gemm.reference_rows(a, torch.ones(rows, device=device), ones, offs, bias)
        error = (out.double() - exact).abs()
        # A float32 sum in any order, truncated or rounded k times, and one rounding to bfloat16.
        assert (error <= (k + 1) * 2.0**-23 * size + exact.abs() * 2.0**-8).all()
        assert (out[end:] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.name)
def test_group_sum(layout, device):
    """The sum of at most n terms in float32 is within n roundings of the sum of magnitudes."""
    offs, x = layout.offs(device), torch.randn(layout.rows, 48, device=device, dtype=torch.bfloat16)
    got, start = group_sum.group_sum(x, offs), 0
    for g, end in enumerate(offs.tolist()):
        mine = x[start:end].double()
        limit = (end - start + 1) * 2.0**-24 * mine.abs().sum(0)
        assert ((got[g].double() - mine.sum(0)).abs() <= limit).all()
        start = end


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.name)
def test_high_precision_products(layout, device):
    """torch._grouped_mm, but that rows past the last group and empty groups are zero."""
    offs, groups = layout.offs(device), len(layout.sizes)
    a = torch.randn(layout.rows, 32, device=device, dtype=torch.bfloat16)
    b = torch.randn(groups, 32, 48, device=device, dtype=torch.bfloat16)
    a[int(offs[-1]) :] = float("nan")
    out = high_precision.high_precision_rows(a, b, offs)
    assert (out[int(offs[-1]) :] == 0).all()
    both = high_precision.high_precision_contraction(a.nan_to_num().mT, out, offs)
    start = 0
    for g, end in enumerate(offs.tolist()):
        want = a[start:end].double() @ b[g].double()
        size = a[start:end].double().abs() @ b[g].double().abs()
        assert ((out[start:end].double() - want).abs() <= size * 2.0**-8).all()
        want = a[start:end].double().mT @ out[start:end].double()
        size = a[start:end].double().abs().mT @ out[start:end].double().abs()
        assert ((both[g].double() - want).abs() <= size * 2.0**-8).all()
        start = end


RECIPES = {**PRESETS, "superblocks": Recipe(Gemm(group=64), Gemm(group=128), Gemm(group=96))}

# Float32 where a kernel rounds the result: the interpreter's conversion to bfloat16 truncates.
RECIPE_DTYPES = {
    "mxfp8": torch.float32,
    "fp8_rowwise": torch.float32,
    "mxfp8_exact": torch.bfloat16,
    "superblocks": torch.bfloat16,
    "bf16": torch.bfloat16,
}


@pytest.mark.parametrize("recipe", RECIPE_DTYPES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_product_and_its_gradients_are_those_of_the_reference(op, recipe, device):
    """On numbers whose sums are exact in any order, so that the bits agree (but for float32 row scales)."""
    case = Case(op, RECIPES[recipe], Backend("triton", device, RECIPE_DTYPES[recipe]))
    want = case._replace(backend=case.backend._replace(implementation="reference"))
    operands = case.operands()
    case.agree(case.call(*operands), want.call(*operands))
    case.agree(case.eager(*operands), want.eager(*operands))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("transposed", [True, False])
def test_the_gradient_of_a_weight_lies_as_the_weight_does(recipe, transposed, device):
    """Autograd copies a gradient that lies otherwise, which for a weight takes as long as a product."""
    a = torch.randn(40, 32, device=device, dtype=torch.bfloat16)
    w = torch.randn(2, 48, 32, device=device, dtype=torch.bfloat16)
    b = (w.mT if transposed else w.mT.contiguous()).requires_grad_()
    offs = torch.tensor([16, 40], dtype=torch.int32, device=device)
    out = scaled_grouped_mm(a, b, offs, recipe=RECIPES[recipe], implementation="triton")
    (gradient,) = torch.autograd.grad(out.float().sum(), b)
    assert gradient.stride() == b.stride()


BLOCKS, SUPERBLOCKS, ROWWISE, NONE = Gemm(group=32), Gemm(group=64), Gemm(format="row"), Gemm("none")


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(BLOCKS, Gemm(), Gemm()),
        Recipe(BLOCKS, NONE, BLOCKS),
        Recipe(Gemm(), BLOCKS, NONE),
        Recipe(Gemm(), SUPERBLOCKS, BLOCKS),
        Recipe(NONE, Gemm(), SUPERBLOCKS),
        Recipe(NONE, BLOCKS, ROWWISE),
        Recipe(SUPERBLOCKS, ROWWISE, NONE),
        Recipe(ROWWISE, NONE, Gemm()),
    ],
    ids=lambda recipe: "-".join(f"{gemm.format}{gemm.group or ''}" for gemm in recipe),
)
def test_each_product_is_computed_as_its_own_field_says(recipe, device):
    """Bit for bit as under the recipe that computes all three so."""

    def products(recipe):
        a = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
        w = torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
        a, b = a.requires_grad_(), w.mT.requires_grad_()
        offs = torch.tensor([16, 40], dtype=torch.int32, device=device)
        out = scaled_grouped_mm(a, b, offs, recipe=recipe, implementation="triton")
        return out, *torch.autograd.grad(out.float().square().sum(), (a, b), torch.ones((), device=device))

    for i, own in enumerate(recipe):
        # Gradients depend on the product through its cotangent: the forward is the same.
        alone = Recipe(*(own if j == i or j > 0 else recipe.fwd for j in range(3)))
        assert torch.equal(products(recipe)[i], products(alone)[i])


@pytest.mark.parametrize("recipe", RECIPES)
def test_ends_need_not_be_contiguous(recipe, device):
    a = torch.randn(40, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(2, 48, 32, device=device, dtype=torch.bfloat16).mT.requires_grad_()
    strided = torch.tensor([[16, 8], [40, 24]], dtype=torch.int32, device=device)[:, 0]

    def products(offs):
        out = scaled_grouped_mm(a, b, offs, recipe=RECIPES[recipe], implementation="triton")
        return out, *torch.autograd.grad(out.float().sum(), (a, b))

    for got, want in zip(products(strided), products(strided.contiguous()), strict=True):
        assert torch.equal(got, want)


def test_no_tail_lies_before_the_first_row(device):
    """A last end below zero, which only a corrupted ``offs`` has."""
    room = torch.ones(64, 32, device=device, dtype=torch.bfloat16)
    high_precision.zero_tail(room[32:], torch.tensor([-16], dtype=torch.int32, device=device))
    assert (room[:32] == 1).all()
    assert (room[32:] == 0).all()


@pytest.mark.parametrize("recipe", ["mxfp8", "mxfp8_exact"])
def test_sizes_may_be_symbols(recipe, device):
    """The kernels' launchers as ``make_fx`` traces them, under ``vmap(grad)`` and in the feed-forward."""
    recipe, offs = PRESETS[recipe], torch.tensor([16, 40], dtype=torch.int32, device=device)
    a = torch.randn(2, 40, 32).to(device, torch.bfloat16)
    weights = {
        "w1": torch.randn(2, 48, 32).to(device, torch.bfloat16),
        "w2": torch.randn(2, 32, 48).to(device, torch.bfloat16),
        "w3": torch.randn(2, 48, 32).to(device, torch.bfloat16),
    }

    def products(weights, a, offs):
        def loss(b, a):
            return scaled_grouped_mm(a, b.mT, offs, recipe=recipe, implementation="triton").float().sum()

        return vmap(grad(loss, (0, 1)), (None, 0))(weights["w1"], a)

    def feed_forward(weights, a, offs):
        def loss(weights, a):
            return expert_ffn(weights, a, offs, recipe=recipe, implementation="triton").float().sum()

        return grad(loss, (0, 1))(weights, a[0])

    for f in (products, feed_forward):
        traced = make_fx(f, tracing_mode="symbolic")(weights, a, offs)
        got, want = (pytree.tree_leaves(x(weights, a, offs)) for x in (traced, f))
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)
