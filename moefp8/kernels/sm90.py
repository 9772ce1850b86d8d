"""The implementation "triton": FP8 products on Hopper, forward and backward of the grouped form.

What each quantised tensor is made from, and read by::

    a   quantize_rows, along K  -> fwd          its column amax -> quantize_columns, along M -> wgrad
    b   quantize_rows and quantize_columns, both ways in the forward: along K -> fwd, along N -> dgrad
    g   quantize_rows, along N  -> dgrad        its column amax -> quantize_columns, along M -> wgrad

Scales span the whole contraction. For format "mx" they are powers of two, so what stays a normal FP8
number under them has the value that 32-element blocks would give it (``docs/numerics.md``). Shorter spans,
exact blocks or superblocks, are rounded by ``fake_quantize`` (``fake_quantize_blocks``) and multiplied in
bfloat16.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moefp8._dispatch import Implementation, Request
from moefp8.formats import decode_scale
from moefp8.kernels.dense_form import dense_by_groups
from moefp8.kernels.ffn import compose
from moefp8.kernels.gemm import Weights, gemm_contraction, gemm_rows, tile_rows
from moefp8.kernels.group_sum import group_sum
from moefp8.kernels.high_precision import (
    high_precision_contraction,
    high_precision_product,
    high_precision_rows,
)
from moefp8.kernels.plan import Plan, plan
from moefp8.kernels.quantize_columns import quantize_columns
from moefp8.kernels.quantize_rows import MAX_COLUMNS, RowQuantized, quantize_rows
from moefp8.kernels.reference import high_precision
from moefp8.kernels.refusals import refuse_device, refuse_dtypes, refuse_products, refuse_sizes
from moefp8.kernels.sm90_ffn import fuse, keeps_rows
from moefp8.kernels.sm90_operands import (
    both_ways,
    contract,
    contract_high_precision,
    exact_both_ways,
    exact_operand,
    exact_weights,
    in_fp8,
    weights_both_ways,
)
from moefp8.mx import MXArray
from moefp8.recipe import Gemm, Recipe

# --- what can be served --------------------------------------------------------------------------


def _refuse_gemm(name: str, gemm: Gemm, operand: torch.dtype, out: torch.dtype) -> str | None:
    if in_fp8(gemm):
        if gemm.promote % 128:
            return f"recipe.{name}.promote: accumulators are promoted in steps of 128, got {gemm.promote}"
        return None
    if gemm.format == "none" and operand != torch.bfloat16:
        return f"recipe.{name}: products that are not quantised take bfloat16 operands, got {operand}"
    if out != torch.bfloat16:
        return f"recipe.{name}: products that are exact or not quantised give bfloat16, not {out}"
    return None


def refuse(request: Request) -> str | None:
    """Why this implementation cannot serve ``request``, or None."""
    return refuse_device(request, 9, "Hopper", "9.0") or refuse_call(request)


def refuse_call(request: Request) -> str | None:
    """Why these kernels cannot serve ``request`` on any device; ``sm100.py`` runs them on Blackwell."""
    return (
        refuse_dtypes(request)
        or _refuse_quantized(request)
        or refuse_sizes(request, MAX_COLUMNS)
        or refuse_products(request, _refuse_gemm)
    )


def _refuse_quantized(request: Request) -> str | None:
    if request.a_group not in (None, -1):
        return f"a: its scales must span K (group=-1), got group={request.a_group}"
    if request.a_group is not None and not in_fp8(request.recipe.fwd):
        return "a: is quantised, but recipe.fwd does not multiply in FP8 with scales that span K"
    return None


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
    fwd, dgrad, wgrad = recipe
    layout = plan(offs, a.shape[0], tile_rows(a.device))
    none = offs.new_empty(0)
    in_products = fwd if in_fp8(fwd) else None, dgrad if in_fp8(dgrad) else None
    along_k: Weights | None
    along_n: Weights | None
    if prepared:
        copies = Weights(*prepared[:2]), Weights(*prepared[2:])
        along_k, along_n = (copy if gemm else None for copy, gemm in zip(copies, in_products, strict=True))
    else:
        along_k, along_n = weights_both_ways(b, *in_products)
    by_row = RowQuantized(none, none, none, none)
    if isinstance(a, MXArray):
        by_row = RowQuantized(a.data, decode_scale(a.scale).squeeze(-1), none, none)
    elif in_fp8(fwd) or in_fp8(wgrad):
        by_row = quantize_rows(a, layout, fwd if in_fp8(fwd) else wgrad, column_amax=in_fp8(wgrad))
    if along_k is not None:
        out = gemm_rows(by_row.data, by_row.scale, along_k, layout.tiles, bias, out_dtype, fwd.promote)
    else:
        exact = exact_operand(high_precision(a), offs, layout, -1, fwd), exact_weights(b, fwd, -2)
        out = high_precision_product(*exact, offs, layout.tiles, bias)
    kept = along_n or Weights(none, none)
    return out, (*layout, by_row.column_amax, by_row.poisoned, *kept)


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
    _, dgrad, wgrad = recipe
    layout, amax, poisoned, along_n = Plan(*kept[:4]), kept[4], kept[5], Weights(*kept[6:])
    da = db = None
    along = dgrad if needed[0] and in_fp8(dgrad) else None
    across = wgrad if needed[1] and in_fp8(wgrad) else None
    if along or across:
        by_row, columns = both_ways(g, layout, along, across)
    # The copies of g that products in bfloat16 read, in one pass where there are two.
    g_along, g_across = exact_both_ways(
        g,
        offs,
        layout,
        dgrad if needed[0] and not along else None,
        wgrad if needed[1] and not across else None,
    )
    if needed[0]:
        if along:
            da = gemm_rows(by_row.data, by_row.scale, along_n, layout.tiles, None, dtypes[0], dgrad.promote)
        else:
            da = high_precision_rows(g_along, exact_weights(b, dgrad, -1).mT, offs)
    del g_along
    if needed[1]:
        by_row_a = RowQuantized(amax, amax, amax, poisoned)  # only the last two are read
        x = high_precision(a)
        if isinstance(a, MXArray) and in_fp8(wgrad):  # quantised along K only: once more, along M
            by_row_a = quantize_rows(x, layout, wgrad, column_amax=True)
        if across:
            left = quantize_columns(x, layout, by_row_a, wgrad)
            db = contract(left, columns, layout, dtypes[1], wgrad, b)
        else:
            db = contract_high_precision(exact_operand(x, offs, layout, -2, wgrad), g_across, offs, b)
    return da, db


def quantize_weights(w: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
    """Codes and scales of ``w`` (G, N, K) along K and along N; empty where a product is not in FP8."""
    fwd, dgrad, _ = recipe
    none = w.new_empty(0)
    copies = weights_both_ways(w.mT, fwd if in_fp8(fwd) else None, dgrad if in_fp8(dgrad) else None)
    return tuple(x for copy in copies for x in copy or (none, none))


# --- the three products --------------------------------------------------------------------------


def rows(
    a: Tensor | MXArray, b: Tensor, offs: Tensor, bias: Tensor | None, gemm: Gemm, out_dtype: torch.dtype
) -> Tensor:
    """See ``reference.rows``."""
    only = Recipe(gemm, Gemm("none"), Gemm("none"))
    return rows_forward(a, b, offs, bias, only, out_dtype)[0]


def contraction(a: Tensor, b: Tensor, offs: Tensor, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
    """See ``reference.contraction``."""
    left, right = a.mT, b  # (T, M) and (T, N), rows grouped
    layout = plan(offs, b.shape[0], tile_rows(b.device))
    if in_fp8(gemm):
        copies = (both_ways(x, layout, None, gemm)[1] for x in (left, right))
        (a_data, a_scale), (b_data, b_scale) = copies
        return gemm_contraction(a_data, a_scale, b_data, b_scale, layout, out_dtype, gemm.promote)
    exact = exact_operand(left, offs, layout, -2, gemm), exact_operand(right, offs, layout, -2, gemm)
    return high_precision_contraction(exact[0].mT, exact[1], offs)


_FFN = fuse(compose(rows_forward, rows_backward, group_sum))

IMPLEMENTATION = Implementation(
    name="triton",
    refuse=refuse,
    rows=rows,
    contraction=contraction,
    dense=dense_by_groups(rows, contraction),
    group_sum=group_sum,
    rows_forward=rows_forward,
    rows_backward=rows_backward,
    ffn_forward=_FFN.forward,
    ffn_backward=_FFN.backward,
    ffn_keeps_rows=keeps_rows,
    quantize_weights=quantize_weights,
    native_group=-1,
)
