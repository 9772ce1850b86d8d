"""How far the quantised products are from the exact ones: the bound that the element bounds imply, and
the peer's error on the same inputs."""

import warnings

import pytest
import torch
from product_oracle import Product, ends_to_slices
from specs import CPU_SIZES, Size
from torch import Tensor

from moefp8 import (
    MXFP8,
    MXFP8_EXACT,
    Gemm,
    Recipe,
    generate_jagged_offs,
    mx_error_bound,
    quantize_mx,
    scaled_grouped_mm,
)


def problem(size: Size, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gaussian activations, weights and cotangent in bfloat16, groups of multiples of 32 rows."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(size.M, size.K, generator=generator).bfloat16()
    w = torch.randn(size.G, size.N, size.K, generator=generator).bfloat16()
    g = torch.randn(size.M, size.N, generator=generator).bfloat16()
    return a, w, generate_jagged_offs(size.G, size.M, multiple_of=32, generator=generator), g


def outputs(product, a: Tensor, w: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Output and gradients of ``product(a, w.mT)``."""
    a, w = a.clone().requires_grad_(), w.clone().requires_grad_()
    out = product(a, w.mT)
    da, dw = torch.autograd.grad(out, (a, w), g.to(out.dtype))
    return {"out": out.detach(), "dgrad": da, "wgrad": dw}


# --- the bound -----------------------------------------------------------------------------------


def dot_bound(left: Tensor, right: Tensor, gemm: Gemm) -> tuple[Tensor, Tensor]:
    """``left @ right`` and a bound on the error of its quantised form before rounding the result.

    With |x - Q(x)| <= e(x) elementwise, |xy - Q(x)Q(y)| <= e(x)|y| + |x|e(y) + e(x)e(y), summed over
    the contraction; the quantised terms, at most (|x| + e(x))(|y| + e(y)), are then added in float32.
    """
    options = {"dtype": gemm.dtype, "rule": gemm.rule, "group": gemm.group or 32}
    el = mx_error_bound(left, quantize_mx(left, -1, **options)).double()
    er = mx_error_bound(right, quantize_mx(right, -2, **options)).double()
    x, y = left.double(), right.double()
    quantised = (x.abs() + el) @ (y.abs() + er)
    rounding = quantised - x.abs() @ y.abs()
    return x @ y, rounding + Product(x @ y, quantised, x.shape[-1]).bound(torch.float64)


RECIPES = {
    "mxfp8": MXFP8,
    "floor": Recipe(*(Gemm(rule="floor"),) * 3),
    "e5m2 gradients": Recipe(Gemm(), Gemm(dtype=torch.float8_e5m2), Gemm(dtype=torch.float8_e5m2)),
    "aligned": Recipe(*(Gemm(group=-1),) * 3),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("spread", [0, 8], ids=["gaussian", "lognormal"])
def test_within_the_dot_product_bound(recipe, spread):
    """Every element of output, dgrad and wgrad, groups of any sizes, scales 2^16 apart."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        x = torch.randn(shape, generator=generator)
        return x * torch.exp2((spread * torch.randn(shape, generator=generator)).clamp(-16, 16))

    a, w, g = draw(96, 80), draw(3, 48, 80), draw(96, 48)
    offs = torch.tensor([17, 17, 90], dtype=torch.int32)
    got = outputs(lambda a, b: scaled_grouped_mm(a, b, offs, recipe=recipe), a, w, g)
    for i, rows in enumerate(ends_to_slices(offs)):
        if rows.start == rows.stop:
            continue
        for name, actual, left, right, gemm in (
            ("out", got["out"][rows], a[rows], w[i].mT, recipe.fwd),
            ("dgrad", got["dgrad"][rows], g[rows], w[i], recipe.dgrad),
            ("wgrad", got["wgrad"][i].mT, a[rows].mT, g[rows], recipe.wgrad),
        ):
            exact, bound = dot_bound(left, right, gemm)
            bound = bound + 2.0**-24 * (exact.abs() + bound)  # the result is a float32
            error = (actual.double() - exact).abs()
            assert (error <= bound).all(), name
            assert error.max() > 0, name  # the bound is not met by not quantising


# --- the peer ------------------------------------------------------------------------------------


def torchao_product(offs: Tensor):
    """torchao's own product, emulated: to_mx with RCEIL scales, dequantised, torch's grouped_mm."""
    with warnings.catch_warnings():  # its import warns of kernels that this machine lacks
        warnings.simplefilter("ignore")
        from torchao.prototype.moe_training.mxfp8_grouped_mm import _to_mxfp8_then_scaled_grouped_mm
        from torchao.quantization.quantize_.common import KernelPreference
    emulated = {"kernel_preference": KernelPreference.EMULATED, "out_dtype": torch.bfloat16}
    return lambda a, b: _to_mxfp8_then_scaled_grouped_mm(a, b, offs, **emulated)


def exact_products(a: Tensor, w: Tensor, offs: Tensor, g: Tensor) -> dict[str, Tensor]:
    """In float32: 2^-24 an operation, beside quantisation noise of about 2^-5."""
    a, w, g = a.float(), w.float(), g.float()
    groups = zip(ends_to_slices(offs), w, strict=True)
    parts = [(a[s] @ matrix.mT, g[s] @ matrix, g[s].mT @ a[s]) for s, matrix in groups]
    out, da, dw = zip(*parts, strict=True)
    return {"out": torch.cat(out), "dgrad": torch.cat(da), "wgrad": torch.stack(dw)}


@pytest.mark.parametrize("size", CPU_SIZES, ids=lambda size: size.name)
def test_sqnr_is_at_least_torchaos(size):
    """Noise power of output, dgrad and wgrad beside the peer's, on the same inputs.

    Both quantise to nearest, so their values e differ from exact alike but for float32 summation order
    and the boundary blocks that the peer rounds to a smaller scale; what is left, d = ours - theirs,
    falls either way. The noise changes by sum(2 e d) + sum(d^2): allow six standard deviations of it.
    """
    a, w, offs, g = problem(size)
    ours = outputs(lambda a, b: scaled_grouped_mm(a, b, offs, recipe=MXFP8_EXACT), a, w, g)
    theirs = outputs(torchao_product(offs), a, w, g)
    exact = exact_products(a, w, offs, g)
    for name, want in exact.items():
        e, d = theirs[name].double() - want, ours[name].double() - theirs[name].double()
        noise, peer = (e + d).square().sum(), e.square().sum()
        assert noise <= peer + 6 * (2 * e * d).square().sum().sqrt(), name
