"""scaled_mm and scaled_grouped_mm against the products written out in float64."""

import product_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from specs import LAYOUTS, Layout, grads, grid, randn
from torch import Tensor

from moefp8 import (
    BF16,
    FP8_ROWWISE,
    MXFP8,
    MXFP8_WGRAD_HP,
    Gemm,
    Recipe,
    quantize_mx,
    scaled_grouped_mm,
    scaled_mm,
)
from moefp8.recipe import PRESETS

K, N = 48, 80  # 1.5 and 2.5 blocks

RECIPES = {
    **PRESETS,
    "e5m2 gradients": Recipe(Gemm(), Gemm(dtype=torch.float8_e5m2), Gemm(dtype=torch.float8_e5m2)),
    "floor, aligned": Recipe(Gemm(rule="floor"), Gemm(group=-1), Gemm(group=64)),
    "wgrad over whole groups": Recipe(wgrad=Gemm(group=-1)),
}

#: Every layout under MXFP8, and every recipe under the layouts that mix all kinds of groups.
_MIXED = [layout for layout in LAYOUTS if layout.name in ("empty groups", "tail")]
GROUPED = {
    **{(layout.name, "mxfp8"): (layout, MXFP8) for layout in LAYOUTS},
    **{(layout.name, name): (layout, RECIPES[name]) for layout in _MIXED for name in RECIPES},
}

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
grouped = pytest.mark.parametrize(
    ("layout", "recipe"), GROUPED.values(), ids=[f"{layout}-{recipe}" for layout, recipe in GROUPED]
)
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


# --- every form, layout and recipe against the formula -------------------------------------------


def check_rows(layout: Layout, recipe: Recipe, dtype: torch.dtype, bias_shape: tuple[int, ...]) -> None:
    num_groups = len(layout.sizes)
    a = randn(layout.rows, K, seed=1, dtype=dtype).requires_grad_()
    w = randn(num_groups, N, K, seed=2, dtype=dtype).requires_grad_()
    bias = randn(*bias_shape, seed=3, dtype=dtype).requires_grad_()
    g = randn(layout.rows, N, seed=4, dtype=dtype)
    out = scaled_grouped_mm(a, w.mT, layout.offs(), bias=bias, recipe=recipe)
    da, dw, dbias = grads(out, g, a, w, bias)
    want = oracle.rows_vjp(a.detach(), w.detach().mT, bias.detach(), layout.offs(), g, recipe)
    want.out.check(out.detach())
    want.da.check(da)
    want.db.transposed.check(dw)
    want.dbias.check(dbias)
    tail = slice(sum(layout.sizes), None)
    assert not out[tail].any()
    assert not da[tail].any()
    assert out.dtype == da.dtype == dw.dtype == dbias.dtype == dtype


@grouped
def test_2d_by_3d(layout, recipe):
    check_rows(layout, recipe, torch.float32, (len(layout.sizes), N))


@recipes
def test_2d_by_3d_in_bfloat16(recipe):
    check_rows(Layout("", (5, 0, 33), 2), recipe, torch.bfloat16, (3, N))


@layouts
def test_2d_by_3d_one_bias_for_all(layout):
    check_rows(layout, MXFP8, torch.float32, (N,))


@grouped
def test_2d_by_2d(layout, recipe):
    a = randn(K, layout.rows, seed=1).requires_grad_()
    b = randn(layout.rows, N, seed=2).requires_grad_()
    g = randn(len(layout.sizes), K, N, seed=3)
    out = scaled_grouped_mm(a, b, layout.offs(), recipe=recipe)
    got = (out.detach(), *grads(out, g, a, b))
    want = oracle.contraction_vjp(a.detach(), b.detach(), layout.offs(), g, recipe)
    for x, y in zip(got, want, strict=True):
        y.check(x)
    tail = slice(sum(layout.sizes), None)
    assert not got[1][:, tail].any()
    assert not got[2][tail].any()


@dtypes
@recipes
@pytest.mark.parametrize("per_group", [True, False])
def test_3d_by_3d(recipe, dtype, per_group):
    a = randn(3, 37, K, seed=1, dtype=dtype).requires_grad_()
    w = randn(3, N, K, seed=2, dtype=dtype).requires_grad_()
    bias = randn(*((3, N) if per_group else (N,)), seed=3, dtype=dtype).requires_grad_()
    g = randn(3, 37, N, seed=4, dtype=dtype)
    out = scaled_grouped_mm(a, w.mT, bias=bias, recipe=recipe)
    da, dw, dbias = grads(out, g, a, w, bias)
    want = oracle.dense_vjp(a.detach(), w.detach().mT, bias.detach(), g, recipe)
    want.out.check(out.detach())
    want.da.check(da)
    want.db.transposed.check(dw)
    want.dbias.check(dbias)


@dtypes
@recipes
@pytest.mark.parametrize("lead", [(37,), (), (2, 3, 7), (0,)], ids=str)
def test_dense(recipe, dtype, lead):
    a = randn(*lead, K, seed=1, dtype=dtype).requires_grad_()
    w = randn(N, K, seed=2, dtype=dtype).requires_grad_()
    bias = randn(N, seed=3, dtype=dtype).requires_grad_()
    g = randn(*lead, N, seed=4, dtype=dtype)
    out = scaled_mm(a, w.mT, bias=bias, recipe=recipe)
    assert out.shape == (*lead, N)
    da, dw, dbias = grads(out, g, a, w, bias)
    rows, g_rows = a.detach().reshape(-1, K), g.reshape(-1, N)
    want = oracle.dense_vjp(rows, w.detach().mT, bias.detach(), g_rows, recipe)
    want.out.check(out.detach().reshape(-1, N))
    want.da.check(da.reshape(-1, K))
    want.db.transposed.check(dw)
    want.dbias.check(dbias)


# --- the high-precision recipe against torch -----------------------------------------------------


def test_bf16_recipe_is_torch_grouped_mm():
    """Same operands, same accumulation: both are within the bound of the exact product."""
    offs = torch.tensor([16, 16, 48], dtype=torch.int32)
    a = randn(48, 64, seed=1, dtype=torch.bfloat16).requires_grad_()
    w = randn(3, 32, 64, seed=2, dtype=torch.bfloat16).requires_grad_()
    g = randn(48, 32, seed=3, dtype=torch.bfloat16)
    ours = scaled_grouped_mm(a, w.mT, offs, recipe=BF16)
    torchs = F.grouped_mm(a, w.mT, offs=offs)
    exact = oracle.rows_vjp(a.detach(), w.detach().mT, torch.zeros(32), offs, g, BF16)
    for got, want, product in zip(
        (ours.detach(), *grads(ours, g, a, w)),
        (torchs.detach(), *grads(torchs, g, a, w)),
        (exact.out, exact.da, exact.db.transposed),
        strict=True,
    ):
        gap = (got.double() - want.double()).abs()
        assert (gap <= 2 * product.bound(torch.bfloat16)).all()


def test_bf16_recipe_takes_float64():
    """In float64 it is the product itself, to float64 rounding."""
    layout = Layout("", (5, 0, 33), 2)
    a = randn(layout.rows, K, seed=1, dtype=torch.float64)
    b = randn(3, K, N, seed=2, dtype=torch.float64)
    out = scaled_grouped_mm(a, b, layout.offs(), recipe=BF16)
    assert out.dtype == torch.float64
    oracle.rows(a, b, layout.offs(), BF16.fwd).check(out, accumulator=torch.float64)


@pytest.mark.parametrize("form", ["2Dx3D", "3Dx3D", "mm"])
def test_gradcheck_of_the_high_precision_recipe(form):
    """The backward is the derivative where nothing is rounded to FP8."""
    a, b, bias = (
        randn(6, 4, dtype=torch.float64),
        randn(2, 4, 3, seed=1, dtype=torch.float64),
        torch.ones(2, 3),
    )
    bias = bias.double()
    offs = torch.tensor([4, 5], dtype=torch.int32)
    call = {
        "2Dx3D": lambda a, b, bias: scaled_grouped_mm(a, b, offs, bias=bias, recipe=BF16),
        "3Dx3D": lambda a, b, bias: scaled_grouped_mm(a.view(2, 3, 4), b, bias=bias, recipe=BF16),
        "mm": lambda a, b, bias: scaled_mm(a, b[0], bias=bias[0], recipe=BF16),
    }[form]
    leaves = [x.requires_grad_() for x in (a, b, bias)]
    assert torch.autograd.gradcheck(call, leaves)


# --- dtypes --------------------------------------------------------------------------------------


@recipes
@pytest.mark.parametrize(
    "out_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_out_dtype(recipe, out_dtype):
    """The result is rounded once to ``out_dtype``; gradients keep the dtypes of their operands."""
    layout = Layout("", (5, 0, 33), 2)
    a = randn(layout.rows, K, seed=1, dtype=torch.bfloat16).requires_grad_()
    b = randn(3, K, N, seed=2).requires_grad_()
    bias = randn(3, N, seed=3, dtype=torch.float16).requires_grad_()
    out = scaled_grouped_mm(a, b, layout.offs(), bias=bias, recipe=recipe, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    g = randn(layout.rows, N, seed=4, dtype=out_dtype)
    da, db, dbias = grads(out, g, a, b, bias)
    assert (da.dtype, db.dtype, dbias.dtype) == (torch.bfloat16, torch.float32, torch.float16)
    want = oracle.rows_vjp(a.detach(), b.detach(), bias.detach(), layout.offs(), g, recipe)
    for got, product in zip((out.detach(), da, db, dbias), want, strict=True):
        product.check(got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_out_dtype_defaults_to_that_of_a(dtype):
    assert scaled_mm(torch.ones(2, 32, dtype=dtype), torch.ones(32, 16)).dtype == dtype
    q = quantize_mx(torch.ones(2, 32, dtype=torch.float64))
    assert scaled_mm(q, torch.ones(32, 16, dtype=dtype)).dtype == dtype


# --- strides -------------------------------------------------------------------------------------


def views(x: Tensor) -> dict[str, Tensor]:
    """The same values under other strides."""
    wide = torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]
    offset = torch.cat([torch.full_like(x[..., :3], torch.nan), x], -1)[..., 3:]
    return {"transposed": x.mT.contiguous().mT, "step 2": wide, "sliced": offset, "plain": x.contiguous()}


@pytest.mark.parametrize("recipe", [MXFP8, MXFP8_WGRAD_HP, BF16], ids=["mxfp8", "mxfp8_wgrad_hp", "bf16"])
@pytest.mark.parametrize("strides", ["transposed", "step 2", "sliced"])
def test_strides_change_nothing(recipe, strides):
    """Bit for bit, on operands whose sums are exact in any order."""
    offs = torch.tensor([5, 5, 38], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    a, b = grid((40, 48), generator), grid((3, 48, 16), generator)
    bias, g = grid((3, 16), generator), grid((40, 16), generator)

    def run(kind: str) -> tuple[Tensor, ...]:
        leaves = [views(x)[kind].requires_grad_() for x in (a, b, bias)]
        out = scaled_grouped_mm(*leaves[:2], offs, bias=leaves[2], recipe=recipe)
        return (out.detach(), *grads(out, views(g)[kind], *leaves))

    for got, want in zip(run(strides), run("plain"), strict=True):
        assert torch.equal(got, want)


@recipes
def test_stride_zero(recipe):
    """Operands expanded from one row or one expert, and the cotangent of a sum."""
    offs = torch.tensor([5, 38], dtype=torch.int32)
    row, matrix = randn(1, K, seed=1).requires_grad_(), randn(K, N, seed=2).requires_grad_()
    out = scaled_grouped_mm(row.expand(40, K), matrix.expand(2, K, N), offs, recipe=recipe)
    got = grads(out.sum(), torch.tensor(1.0), row, matrix)

    a = row.detach().repeat(40, 1).requires_grad_()
    b = matrix.detach().repeat(2, 1, 1).requires_grad_()
    out = scaled_grouped_mm(a, b, offs, recipe=recipe)
    da, db = grads(out, torch.ones(40, N), a, b)
    assert torch.equal(got[0], da.sum(0, keepdim=True))
    assert torch.equal(got[1], db.sum(0))


# --- rows of no group ----------------------------------------------------------------------------


@recipes
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 3e38])
def test_tail_rows_hold_anything(recipe, junk):
    """Rows past ``offs[-1]`` of ``a`` and of the cotangent are neither read nor written to."""
    layout = Layout("", (20, 0, 13), 9)
    end = sum(layout.sizes)

    def run(tail: float) -> tuple[Tensor, ...]:
        a, g = randn(layout.rows, K, seed=1), randn(layout.rows, N, seed=4)
        a[end:], g[end:] = tail, tail
        leaves = [x.requires_grad_() for x in (a, randn(3, K, N, seed=2), randn(3, N, seed=3))]
        out = scaled_grouped_mm(*leaves[:2], layout.offs(), bias=leaves[2], recipe=recipe)
        return (out.detach(), *grads(out, g, *leaves))

    for got, want in zip(run(junk), run(0.0), strict=True):
        assert torch.equal(got, want)


@recipes
def test_tail_of_a_grouped_contraction_holds_anything(recipe):
    layout = Layout("", (20, 0, 13), 9)
    end = sum(layout.sizes)

    def run(tail: float) -> tuple[Tensor, ...]:
        a, b = randn(K, layout.rows, seed=1), randn(layout.rows, N, seed=2)
        a[:, end:], b[end:] = tail, tail
        leaves = [a.requires_grad_(), b.requires_grad_()]
        out = scaled_grouped_mm(*leaves, layout.offs(), recipe=recipe)
        return (out.detach(), *grads(out, randn(3, K, N, seed=4), *leaves))

    for got, want in zip(run(float("nan")), run(0.0), strict=True):
        assert torch.equal(got, want)


def test_a_nan_stays_in_its_row():
    """A NaN in a token reaches its own output row only, under every recipe."""
    offs = torch.tensor([5, 38], dtype=torch.int32)
    a, b = randn(40, K, seed=1), randn(2, K, N, seed=2)
    for recipe in RECIPES.values():
        clean, poisoned = a.clone(), a.clone()
        poisoned[7, 3] = torch.nan
        got = scaled_grouped_mm(poisoned, b, offs, recipe=recipe)
        assert got[7].isnan().all()
        rest = torch.arange(40) != 7
        assert torch.equal(got[rest], scaled_grouped_mm(clean, b, offs, recipe=recipe)[rest])


# --- degenerate sizes ----------------------------------------------------------------------------


@recipes
@pytest.mark.parametrize(("m", "k", "n"), [(0, 48, 16), (5, 0, 16), (5, 48, 0), (0, 0, 0)])
def test_empty_operands(recipe, m, k, n):
    """An axis of no entries gives an empty result or zeros, and gradients of the operands' shapes."""
    a, b = torch.ones(m, k, requires_grad=True), torch.ones(2, k, n, requires_grad=True)
    offs = torch.tensor([0, m], dtype=torch.int32)
    out = scaled_grouped_mm(a, b, offs, recipe=recipe)
    assert out.shape == (m, n)
    assert not out.any() or k
    for x, g in zip((a, b), grads(out, torch.ones_like(out), a, b), strict=True):
        assert g.shape == x.shape
        assert g.isfinite().all()
    assert scaled_mm(a, b[0], recipe=recipe).shape == (m, n)


def test_rowwise_scales_differ_from_powers_of_two():
    """The recipes are told apart: FP8_ROWWISE keeps amax exact, MXFP8 need not."""
    a, b = torch.tensor([[3.0] + [1.1] * 31]), torch.eye(32)
    row = scaled_mm(a, b, recipe=FP8_ROWWISE)
    assert not torch.equal(row, scaled_mm(a, b, recipe=MXFP8))


@pytest.mark.parametrize("recipe", [MXFP8, BF16], ids=["mxfp8", "bf16"])
def test_autocast_changes_nothing(recipe):
    """The recipe says what a product computes in: autocast casts neither its operands nor its insides."""
    a, b, bias = randn(24, 48, seed=1), randn(48, 16, seed=2), randn(16, seed=3)

    def both():
        leaves = [x.clone().requires_grad_() for x in (a, b, bias)]
        out = scaled_mm(leaves[0], leaves[1], bias=leaves[2], recipe=recipe)
        return out, *torch.autograd.grad(out.sum(), leaves)

    want = both()
    with torch.autocast("cpu", torch.bfloat16):
        got = both()
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
