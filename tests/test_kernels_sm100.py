"""The kernels for SM100 beside their twins; no such card has run them.

On a CPU Triton's interpreter runs the source, ``tl.dot_scaled`` included. On a GPU of another generation
(``-m gpu``) Triton compiles it, and emulates ``tl.dot_scaled`` in bfloat16. ``test_cross_compile.py``
looks at the machine code for SM100.
"""

import pytest
import torch
from specs import LAYOUTS, OPS, Backend, Case, Layout
from test_kernels import DEVICES, FORMATS, draw, same_bits

from moefp8 import MXFP8, quantize_mx, scaled_grouped_mm, scaled_mm
from moefp8._dispatch import choose
from moefp8.kernels import gemm_scaled, plan, quantize_blocks, sm90, sm100, swizzle
from moefp8.recipe import BF16, HIGH_PRECISION, PRESETS, Gemm, Recipe

pytestmark = [
    # The interpreter computes with NumPy, which warns of what NaN and infinities do in float32.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]

NAMED = {x.name: x for x in LAYOUTS}
SMALL = [x for x in LAYOUTS if x.name != "256 groups"]
#: Groups of more than a tile, and a boundary inside one.
LONG = Layout("more than a tile", (129, 0, 300, 1), 5)
#: Not quite as many as the other kernels are tested with: the interpreter takes 20 ms a program.
MANY = Layout("24 groups", tuple((7 * i) % 4 for i in range(24)), 3)


def short(value):
    return getattr(value, "name", None) or str(value)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


# --- the layout of scales ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(128, 4), (1, 1), (130, 5), (256, 8), (300, 13)])
def test_swizzle_is_a_permutation_of_packs(shape):
    """The formula moves each byte where cutting into 4 packs of 32 rows and stacking them does."""
    rows, columns = shape
    scale = torch.arange(rows * columns).view(shape).to(torch.uint8)
    down, across = -(-rows // 128), -(-columns // 4)
    padded = torch.zeros(down * 128, across * 4, dtype=torch.uint8)
    padded[:rows, :columns] = scale
    packs = padded.view(down, 4, 32, across, 4).permute(0, 3, 2, 1, 4)
    tiles = swizzle.reference(scale)
    assert torch.equal(tiles, packs.reshape(down, across, 512))
    assert torch.equal(swizzle.unswizzle(tiles), padded)


def test_swizzle_offsets_worked_out_by_hand():
    scale = torch.zeros(256, 8, dtype=torch.uint8)
    places = {(0, 0): 0, (0, 3): 3, (1, 0): 16, (31, 0): 496, (32, 0): 4, (127, 3): 511, (0, 4): 512}
    places |= {(128, 0): 1024, (255, 7): 2047}
    for i, at in enumerate(places):
        scale[at] = i + 1
    flat = swizzle.reference(scale).flatten()
    assert [int(flat[at]) for at in places.values()] == list(range(1, len(places) + 1))
    assert int((flat != 0).sum()) == len(places)


@pytest.mark.parametrize("layout", [*SMALL, MANY, LONG], ids=lambda x: x.name)
def test_swizzle_of_grouped_rows(layout, device):
    offs = layout.offs(device)
    scale = torch.randint(256, (layout.rows, 5), device=device).to(torch.uint8)
    where = plan.plan(offs, layout.rows, 128)
    used = int(where.ends[-1]) // 128
    got, want = swizzle.swizzle_rows(scale, where), swizzle.reference_rows(scale, offs)
    assert got.shape == want.shape
    assert torch.equal(got[:used], want[:used])


# --- quantisers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "how", "dtype"),
    [(x, "mx", torch.bfloat16) for x in (*SMALL, MANY, LONG)]
    + [(NAMED["unaligned"], how, torch.float32) for how in ("mx", "floor", "e5m2")]
    + [(NAMED["tail"], "mx", torch.float16)],
    ids=short,
)
def test_quantize_blocks(layout, how, dtype, device):
    """Codes and scales both ways, poisoned blocks included, in buffers that held something else."""
    gemm, offs, columns = FORMATS[how], layout.offs(device), 176
    x = draw((layout.rows, columns), device, dtype=dtype, poison=5)
    where = plan.plan(offs, layout.rows, 128)
    by_column, by_row = quantize_blocks.quantize_blocks(x, where, gemm, gemm)
    want_columns = quantize_blocks.reference_columns(x, offs, gemm)
    want_rows = quantize_blocks.reference_rows(x, offs, gemm)
    used, end = int(offs[-1]), int(where.ends[-1])
    same_bits(by_column.data[:used], want_columns.data[:used])
    same_bits(by_column.scale[: end // 128], want_columns.scale[: end // 128])
    assert by_row.data.shape == want_rows.data.shape
    same_bits(by_row.data[:, :end], want_rows.data[:, :end])
    same_bits(by_row.scale[:, : end // 128], want_rows.scale[:, : end // 128])

    one = quantize_blocks.quantize_blocks(x, where, gemm, None)
    other = quantize_blocks.quantize_blocks(x, where, None, gemm)
    assert one[1].data.numel() == one[1].scale.numel() == 0
    assert other[0].data.numel() == other[0].scale.numel() == 0
    same_bits(one[0].data[:used], want_columns.data[:used])
    same_bits(other[1].data[:, :end], want_rows.data[:, :end])


def test_two_formats_at_once(device):
    """Where the two copies differ in format, each is what it would be alone."""
    x, offs = draw((40, 64), device), torch.tensor([33, 40], dtype=torch.int32, device=device)
    where = plan.plan(offs, 40, 128)
    e5m2 = Gemm(dtype=torch.float8_e5m2)
    by_column, by_row = quantize_blocks.quantize_blocks(x, where, Gemm(), e5m2)
    same_bits(by_column.data, quantize_blocks.reference_columns(x, offs, Gemm()).data)
    end = int(where.ends[-1])
    same_bits(by_row.data[:, :end], quantize_blocks.reference_rows(x, offs, e5m2).data[:, :end])


def test_strided_input(device):
    """A slice of a wider matrix, and a transposed one."""
    offs = torch.tensor([40], dtype=torch.int32, device=device)
    where = plan.plan(offs, 40, 128)
    for x in (draw((40, 96), device)[:, 16:64], draw((48, 40), device).T):
        got, _ = quantize_blocks.quantize_blocks(x, where, Gemm(), None)
        same_bits(got.data, quantize_blocks.reference_columns(x, offs, Gemm()).data)


# --- products ------------------------------------------------------------------------------------


def check(got, twin, length):
    """Products of codes and scales are exact in float32; a sum of n terms makes n roundings of 2^-24.

    Bfloat16 takes one rounding more: of half a unit in the last place on a GPU, of a whole one in the
    interpreter, which truncates. Hopper's tensor core, on which the emulation runs, truncates as well:
    n roundings of 2^-23.
    """
    exact, size = twin
    unit = 2.0**-24 if got.device.type == "cpu" else 2.0**-23
    rounding = 2.0**-7 if got.dtype == torch.bfloat16 else 0.0
    assert (
        (got.double() - exact).abs() <= size * length * unit * (1 + rounding) + exact.abs() * rounding
    ).all()


@pytest.mark.parametrize(
    ("layout", "how", "out_dtype", "sizes"),
    [
        (NAMED["unaligned"], "mx", torch.bfloat16, (80, 144)),
        (NAMED["tail"], "e5m2", torch.float32, (288, 32)),
        (NAMED["only tail"], "mx", torch.float32, (32, 96)),
        (NAMED["empty groups"], "mx", torch.float32, (96, 160)),
        (NAMED["single row"], "mx", torch.float32, (544, 32)),
        (LONG, "mx", torch.float32, (96, 288)),
        (MANY, "mx", torch.float32, (32, 32)),
    ],
    ids=short,
)
def test_products(layout, how, out_dtype, sizes, device):
    """Forward with a bias, dgrad and wgrad on the kernels' own operands; K and N no multiples of a tile."""
    gemm, offs, (n, k) = FORMATS[how], layout.offs(device), sizes
    groups, rows = len(layout.sizes), layout.rows
    a, g = (torch.randn(rows, x, device=device, dtype=torch.bfloat16) for x in (k, n))
    w = torch.randn(groups * n, k, device=device, dtype=torch.bfloat16)
    where = plan.plan(offs, rows, 128)
    # What lies past the last group is never read: poison it.
    a[int(offs[-1]) :], g[int(offs[-1]) :] = float("nan"), float("nan")
    ends = torch.arange(1, groups + 1, dtype=torch.int32, device=device) * n
    along_k, along_n = quantize_blocks.quantize_blocks(w, plan.plan(ends, groups * n, 128), gemm, gemm)
    a_last, a_rows = quantize_blocks.quantize_blocks(a, where, gemm, gemm)
    g_last, g_rows = quantize_blocks.quantize_blocks(g, where, gemm, gemm)

    bias = torch.randn(groups, n, device=device)
    out = gemm_scaled.gemm_scaled_rows(a_last, along_k, where.tiles, bias, groups, n, out_dtype)
    check(out, gemm_scaled.reference_rows(a_last, along_k, offs, bias, groups, n), k + 1)
    assert (out[int(offs[-1]) :] == 0).all()
    da = gemm_scaled.gemm_scaled_rows(g_last, along_n, where.tiles, None, groups, k, out_dtype)
    check(da, gemm_scaled.reference_rows(g_last, along_n, offs, None, groups, k), n)
    dw = gemm_scaled.gemm_scaled_contraction(g_rows, a_rows, where, out_dtype)
    check(dw, gemm_scaled.reference_contraction(g_rows, a_rows, where.ends), max(rows, 1))


def test_every_element_is_written(device, monkeypatch):
    """Whatever the buffers held: codes and scales that are read, and all of every result."""
    empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = empty(self, *args, **kwargs)
        out.view(torch.uint8).fill_(255) if out.numel() and out.is_contiguous() else None
        return out

    layout = NAMED["tail"]
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(layout.rows, 80, generator=generator).to(device)
    b = torch.randn(3, 48, 80, generator=generator).to(device).mT
    g = torch.randn(layout.rows, 48, generator=generator).to(device)
    offs = layout.offs(device)

    def run():
        out, kept = sm100.rows_forward(a, b, offs, None, MXFP8, torch.float32)
        needed, dtypes = (True, True), (torch.float32, torch.float32)
        return out, *sm100.rows_backward(kept, a, b, offs, g, MXFP8, needed, dtypes)

    want = run()
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for x, y in zip(run(), want, strict=True):
        assert torch.equal(x, y)


def test_a_poisoned_block_poisons_what_it_is_multiplied_with():
    """A NaN in one block of a: its row of the output; in g: its row of da; both: their group's columns."""
    layout = Layout("", (40, 33))
    a, w = torch.randn(73, 64), torch.randn(2, 32, 64)
    a[5, 40] = float("nan")
    options = {"recipe": MXFP8, "implementation": "triton-sm100"}
    leaves = a.requires_grad_(), w.requires_grad_()
    out = scaled_grouped_mm(leaves[0], leaves[1].mT, layout.offs(), **options)
    assert out[5].isnan().all()
    assert out[torch.arange(73) != 5].isfinite().all()
    da, dw = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert da.isfinite().all()
    assert dw[0, :, 40].isnan().all()
    assert dw[0, :, torch.arange(64) != 40].isfinite().all()
    assert dw[1].isfinite().all()


# --- whole products ------------------------------------------------------------------------------

#: Float32 where a kernel rounds the result: the interpreter's conversion to bfloat16 truncates.
PRESET_DTYPES = {"mxfp8": torch.float32, "mxfp8_exact": torch.float32, "bf16": torch.bfloat16}


def _case(op, recipe, dtype, implementation="triton-sm100"):
    return Case(op, recipe, Backend(implementation, "cpu", dtype))


@pytest.mark.parametrize("preset", PRESET_DTYPES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_product_and_its_gradients_are_those_of_the_reference(op, preset):
    """On numbers whose sums are exact in any order, so that the bits agree."""
    case = _case(op, PRESETS[preset], PRESET_DTYPES[preset])
    want = _case(op, PRESETS[preset], PRESET_DTYPES[preset], "reference")
    operands = want.operands()[: len(case.operands())]
    case.agree(case.call(*operands), want.call(*operands))
    case.agree(case.eager(*operands), want.eager(*operands))


def test_weights_stored_either_way_and_two_formats():
    """A (G, K, N) weight that is no transposed view, gradients in E5M2."""
    wide = MXFP8._replace(dgrad=Gemm(dtype=torch.float8_e5m2), wgrad=Gemm(dtype=torch.float8_e5m2))
    case = _case(OPS[1], wide, torch.float32)
    want = _case(OPS[1], wide, torch.float32, "reference")
    a, b, bias = case.operands()
    operands = a, b.contiguous(), bias
    case.agree(case.call(*operands), want.call(*operands))
    case.agree(case.eager(*operands), want.eager(*operands))


def test_a_row_scaled_recipe_runs_on_the_portable_kernel():
    case = _case(OPS[1], PRESETS["fp8_rowwise"], torch.float32)
    want = _case(OPS[1], PRESETS["fp8_rowwise"], torch.float32, "reference")
    operands = case.operands()
    case.agree(case.call(*operands), want.call(*operands))
    case.agree(case.eager(*operands), want.eager(*operands))


@pytest.mark.parametrize("group", [32, 64, -1])
def test_a_quantised_beforehand(group):
    """Blocks of 32 as they are, aligned scales repeated; the same bits as the reference."""
    a, w = OPS[1].shapes[0], OPS[1].shapes[1]
    x, b = torch.randn(a).round(decimals=1), torch.randn(w)
    q, offs = quantize_mx(x, group=group), OPS[1].layout.offs()
    got = scaled_grouped_mm(q, b, offs, out_dtype=torch.float32, implementation="triton-sm100")
    want = scaled_grouped_mm(q, b, offs, out_dtype=torch.float32, implementation="reference")
    # 48 terms below 4 * 448 * 2^-8 each in magnitude at most; two orders of a sum, n roundings each.
    limit = 2 * 48 * 2.0**-24 * (x.abs().max() * b.abs().max() * 1.13 * 48)
    assert ((got - want).abs() <= limit).all()


# --- which calls are served ----------------------------------------------------------------------


def test_what_is_refused():
    x, w = torch.randn(32, 64, dtype=torch.bfloat16), torch.randn(64, 32, dtype=torch.bfloat16)

    def refused(match, recipe=MXFP8, a=x, b=w, **options):
        with pytest.raises(NotImplementedError, match=match):
            scaled_mm(a, b, recipe=recipe, implementation="triton-sm100", **options)

    refused("on SM100 None, 32 or -1, got 64", Recipe(Gemm(group=64), HIGH_PRECISION, HIGH_PRECISION))
    refused("mixes products", MXFP8._replace(wgrad=Gemm(format="row")))
    refused("multiples of 16, got", a=x[:, :20], b=w[:20])
    refused("take and give bfloat16", recipe=BF16, a=x.float(), b=w.float())


@pytest.mark.parametrize(
    ("capability", "serves"), [((9, 0), "triton"), ((10, 0), "triton-sm100"), ((10, 3), "triton-sm100")]
)
def test_the_name_triton_means_the_kernels_for_the_card(capability, serves, monkeypatch):
    from moefp8._dispatch import Request
    from moefp8.kernels import REGISTRY

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    wide = torch.bfloat16
    request = Request(
        "rows", torch.device("cuda"), (wide, wide), MXFP8, wide, (64, 64), (2, 64, 64), None,
        named=True,
    )  # fmt: skip
    for wanted in ("triton", ["triton", "reference"], None):
        assert choose(wanted, [request], REGISTRY).name == serves
    other = sm100 if serves == "triton" else sm90
    assert "needs a" in other.refuse(request)


def test_a_card_that_is_neither_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (12, 0))
    assert sm100.name_on(torch.device("cuda")) == "triton"
