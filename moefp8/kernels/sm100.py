"""The implementation "triton-sm100": MX products on Blackwell, whose tensor core applies block scales.

What each quantised tensor is made from, and read by::

    a   along K (forward)               -> fwd      along M (backward) -> wgrad
    b   both ways in one pass, forward:    along K -> fwd,  along N -> dgrad
    g   both ways in one pass, backward:   along N -> dgrad, along M -> wgrad

Blocks of 32 are native here, so ``group=None`` and ``group=32`` are the same exact MX. Recipes whose
scales span the contraction (format "row", or group -1) run as on Hopper, through the portable kernel of
``gemm.py``. Nothing here has run on such a card yet: ``docs/kernels_sm100.md`` says what was verified.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moefp8._dispatch import Implementation, Request
from moefp8.formats import BLOCK
from moefp8.kernels import sm90
from moefp8.kernels.dense_form import dense_by_groups
from moefp8.kernels.ffn import compose
from moefp8.kernels.gemm_scaled import gemm_scaled_contraction, gemm_scaled_rows
from moefp8.kernels.group_sum import group_sum
from moefp8.kernels.high_precision import (
    high_precision_contraction,
    high_precision_product,
    high_precision_rows,
)
from moefp8.kernels.plan import SEGMENT, Plan, plan
from moefp8.kernels.quantize_blocks import Blocks, quantize_blocks
from moefp8.kernels.reference import high_precision
from moefp8.kernels.refusals import refuse_device, refuse_dtypes, refuse_products, refuse_sizes
from moefp8.kernels.sm90_operands import (
    as_stored,
    contract_high_precision,
    in_memory_order,
    is_transposed,
)
from moefp8.kernels.swizzle import swizzle_rows
from moefp8.mx import MXArray
from moefp8.recipe import HIGH_PRECISION, Gemm, Recipe

NAME = "triton-sm100"


# --- what can be served --------------------------------------------------------------------------


def _native(gemm: Gemm) -> bool:
    """Multiplied with a scale for every 32 of the contraction."""
    return gemm.format == "mx" and gemm.group in (None, BLOCK)


def _spans(gemm: Gemm) -> bool:
    """Multiplied with one scale for the whole contraction, in the epilogue."""
    return gemm.format == "row" or (gemm.format == "mx" and gemm.group == -1)


def _by_epilogue(recipe: Recipe) -> bool:
    """Whether the whole recipe runs as on Hopper."""
    return any(map(_spans, recipe))


def name_on(device: torch.device) -> str:
    """The implementation that serves under the name "triton" on ``device``."""
    blackwell = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10
    return NAME if blackwell else sm90.IMPLEMENTATION.name


def _refuse_gemm(name: str, gemm: Gemm, operand: torch.dtype, out: torch.dtype) -> str | None:
    if _native(gemm):
        return None
    if gemm.format == "mx":
        return f"recipe.{name}.group: on SM100 None, 32 or -1, got {gemm.group}"
    if operand != torch.bfloat16 or out != torch.bfloat16:
        both = f"got {operand} to {out}"
        return f"recipe.{name}: products that are not quantised take and give bfloat16, {both}"
    return None


def refuse(request: Request) -> str | None:
    """Why this implementation cannot serve ``request``, or None."""
    return refuse_device(request, 10, "Blackwell", "10.x") or _refuse_call(request)


def _refuse_call(request: Request) -> str | None:
    if _by_epilogue(request.recipe):
        if any(map(_native, request.recipe)):
            return "recipe: mixes products with a scale for every 32 and with one for the whole contraction"
        return sm90.refuse_call(request)
    return refuse_dtypes(request) or refuse_sizes(request) or refuse_products(request, _refuse_gemm)


# --- operands ------------------------------------------------------------------------------------


def _if_native(gemm: Gemm) -> Gemm | None:
    return gemm if _native(gemm) else None


def _weights_both_ways(b: Tensor, recipe: Recipe) -> tuple[Blocks, Blocks]:
    """``b`` (G, K, N) in blocks along K, for the forward, and along N, for dgrad, where those quantise."""
    along_k, along_n = _if_native(recipe.fwd), _if_native(recipe.dgrad)
    if along_k is None and along_n is None:
        none = Blocks(b.new_empty(0), b.new_empty(0))
        return none, none
    stored, layout = as_stored(b)
    flat = stored.flatten(0, 1)
    if is_transposed(b):
        return quantize_blocks(flat, layout, along_k, along_n)
    last, across = quantize_blocks(flat, layout, along_n, along_k)
    return across, last


def _left(a: Tensor | MXArray, layout: Plan, gemm: Gemm) -> Blocks:
    """``a`` (M, K) in blocks along K; those of an MXArray as they are, aligned scales repeated."""
    if not isinstance(a, MXArray):
        return quantize_blocks(a, layout, gemm, None)[0]
    columns = -(-a.shape[1] // BLOCK)
    each = columns if a.group == -1 else a.group // BLOCK
    scale = a.scale.repeat_interleave(each, 1)[:, :columns]
    return Blocks(a.data.contiguous(), swizzle_rows(scale, layout))


def quantize_weights(w: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
    """Codes and scales of ``w`` (G, N, K) along K and along N; empty where a product is not in FP8."""
    if _by_epilogue(recipe):
        return sm90.quantize_weights(w, recipe)
    along_k, along_n = _weights_both_ways(w.mT, recipe)
    return (*along_k, *along_n)


# --- rows ----------------------------------------------------------------------------------------


def rows_forward(
    a: Tensor | MXArray,
    b: Tensor,
    offs: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    out_dtype: torch.dtype,
    prepared: Sequence[Tensor] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The product, and what the backward will not have to work out again."""
    if _by_epilogue(recipe):
        return sm90.rows_forward(a, b, offs, bias, recipe, out_dtype, prepared)
    num_groups, _, n = b.shape
    layout = plan(offs, a.shape[0], SEGMENT)
    if prepared:
        along_k, along_n = Blocks(*prepared[:2]), Blocks(*prepared[2:])
    else:
        along_k, along_n = _weights_both_ways(b, recipe)
    if _native(recipe.fwd):
        left = _left(a, layout, recipe.fwd)
        out = gemm_scaled_rows(left, along_k, layout.tiles, bias, num_groups, n, out_dtype)
    else:
        out = high_precision_product(high_precision(a), b, offs, layout.tiles, bias)
    return out, (*layout, *along_n)


def rows_backward(
    kept: Sequence[Tensor],
    a: Tensor | MXArray,
    b: Tensor,
    offs: Tensor,
    g: Tensor,
    recipe: Recipe,
    needed: tuple[bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``a`` and ``b`` in ``dtypes``, those that are ``needed``."""
    if _by_epilogue(recipe):
        return sm90.rows_backward(kept, a, b, offs, g, recipe, needed, dtypes)
    _, dgrad, wgrad = recipe
    layout, along_n = Plan(*kept[:4]), Blocks(*kept[4:])
    num_groups, k, _ = b.shape
    da = db = None
    g_last, g_rows = quantize_blocks(
        g, layout, _if_native(dgrad) if needed[0] else None, _if_native(wgrad) if needed[1] else None
    )
    if needed[0] and _native(dgrad):
        da = gemm_scaled_rows(g_last, along_n, layout.tiles, None, num_groups, k, dtypes[0])
    elif needed[0]:
        da = high_precision_rows(g, b.mT, offs)
    if needed[1] and _native(wgrad):
        _, a_rows = quantize_blocks(high_precision(a), layout, None, wgrad)
        db = _contract(a_rows, g_rows, layout, dtypes[1], b)
    elif needed[1]:
        db = contract_high_precision(high_precision(a), g, offs, b)
    return da, db


def _contract(left: Blocks, right: Blocks, layout: Plan, dtype: torch.dtype, like: Tensor) -> Tensor:
    return in_memory_order(lambda a, b: gemm_scaled_contraction(a, b, layout, dtype), left, right, like)


# --- the three products --------------------------------------------------------------------------


def rows(
    a: Tensor | MXArray, b: Tensor, offs: Tensor, bias: Tensor | None, gemm: Gemm, out_dtype: torch.dtype
) -> Tensor:
    """See ``reference.rows``."""
    return rows_forward(a, b, offs, bias, Recipe(gemm, HIGH_PRECISION, HIGH_PRECISION), out_dtype)[0]


def contraction(a: Tensor, b: Tensor, offs: Tensor, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
    """See ``reference.contraction``."""
    if _spans(gemm):
        return sm90.contraction(a, b, offs, gemm, out_dtype)
    if not _native(gemm):
        return high_precision_contraction(a, b, offs)
    layout = plan(offs, b.shape[0], SEGMENT)
    _, left = quantize_blocks(a.mT, layout, None, gemm)
    _, right = quantize_blocks(b, layout, None, gemm)
    return gemm_scaled_contraction(left, right, layout, out_dtype)


_FFN = compose(rows_forward, rows_backward, group_sum)

IMPLEMENTATION = Implementation(
    name=NAME,
    refuse=refuse,
    rows=rows,
    contraction=contraction,
    dense=dense_by_groups(rows, contraction),
    group_sum=group_sum,
    rows_forward=rows_forward,
    rows_backward=rows_backward,
    ffn_forward=_FFN.forward,
    ffn_backward=_FFN.backward,
    ffn_keeps_rows=lambda recipe: True,
    quantize_weights=quantize_weights,
)
