"""The feed-forward of the experts on Hopper: every tensor quantised once a direction.

Where a recipe multiplies all three products in FP8::

    forward    x        quantize_rows            -> w1 and w3
               gate, up swiglu_rows              -> w2               hidden is never written
    backward   g        quantize_rows            -> w2^T             and its columns -> dw2
               d_hidden swiglu_backward_rows     -> w1^T and w3^T    nor are the gradients of gate and up
                        swiglu_backward_columns  -> dw1, dw3, dw2
               x        quantize_columns         -> dw1 and dw3

Kept for the backward are gate and up, and maxima. The copies of the weights for dgrad are made in the
backward: they cost the same there, and the forward keeps neither them nor, without a backward, pays for
them. So is the copy of x for dw1 and dw3 where x are tokens, which a layer keeps for its router anyway.
Where x are the rows themselves, their codes are kept in their place, half the size. Other recipes run the
three products one by one (``ffn.compose``), whose bits these are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moefp8.kernels import ffn
from moefp8.kernels.ffn import Composed, Three
from moefp8.kernels.gathered import Gathered
from moefp8.kernels.gemm import Weights, gemm_rows, gemm_rows_sum, tile_rows
from moefp8.kernels.group_sum import group_sum
from moefp8.kernels.plan import Plan, plan
from moefp8.kernels.quantize_columns import quantize_columns
from moefp8.kernels.quantize_rows import RowQuantized, quantize_rows
from moefp8.kernels.sm90_operands import (
    Plans,
    as_stored,
    contract,
    in_fp8,
    is_transposed,
)
from moefp8.kernels.swiglu_backward_columns import swiglu_backward_columns
from moefp8.kernels.swiglu_backward_rows import swiglu_backward_rows
from moefp8.kernels.swiglu_rows import swiglu_rows
from moefp8.recipe import Recipe

#: Names for the shapes of w1, w2 and w3: those of gate and up are the same.
_SHAPES = "in", "out", "in"


def _for_forward(
    w: Tensor, recipe: Recipe, prepared: Sequence[Tensor], plans: Plans, shape: str
) -> tuple[Weights, tuple[Tensor, ...]]:
    """``w`` (G, N, K) quantised along K, and what :func:`_for_backward` makes the copy along N of."""
    if prepared:
        return Weights(*prepared[:2]), (prepared[2], prepared[3])
    stored, layout = as_stored(w.mT, plans, shape)
    rows = stored.flatten(0, 1)
    if is_transposed(w.mT):
        by_row = quantize_rows(rows, layout, recipe.fwd, column_amax=True)
        along_k = Weights(by_row.data, by_row.scale.view(stored.shape[:2]))
        return along_k, (by_row.column_amax, by_row.poisoned)
    # Rows in memory run along N: that copy comes first, and is there already.
    by_row = quantize_rows(rows, layout, recipe.dgrad, column_amax=True)
    along_k = Weights(*quantize_columns(rows, layout, by_row, recipe.fwd))
    return along_k, (by_row.data, by_row.scale.view(stored.shape[:2]))


def _for_backward(w: Tensor, kept: Sequence[Tensor], recipe: Recipe, plans: Plans, shape: str) -> Weights:
    """``w`` (G, N, K) quantised along N."""
    if kept[0].dtype != torch.int32:
        return Weights(*kept)
    stored, layout = as_stored(w.mT, plans, shape)
    maxima = _maxima(kept)
    return Weights(*quantize_columns(stored.flatten(0, 1), layout, maxima, recipe.dgrad))


def _maxima(kept: Sequence[Tensor]) -> RowQuantized:
    """Column maxima and poison, the two fields that column quantisers read."""
    return RowQuantized(kept[0], kept[0], *kept)


def _keeps_codes(x: Gathered) -> bool:
    return x.copy is None


def _served(recipe: Recipe) -> bool:
    return all(in_fp8(gemm) for gemm in recipe)


def keeps_rows(recipe: Recipe) -> bool:
    """Whether the backward reads rows that are no copies of tokens, rather than their codes."""
    return not _served(recipe)


def fuse(composed: Composed) -> Composed:
    """The fused feed-forward, and ``composed`` for recipes that it does not serve."""

    def forward(
        x: Gathered,
        weights: Three,
        biases: Three,
        offs: Tensor,
        recipe: Recipe,
        prepared: Sequence[Sequence[Tensor]] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not _served(recipe):
            return composed.forward(x, weights, biases, offs, recipe, prepared)
        layout, dtype = plan(offs, x.shape[0], tile_rows(offs.device)), x.data.dtype
        copies = prepared or ((), (), ())
        plans: Plans = {}
        (w1, kept1), (w2, kept2), (w3, kept3) = (
            _for_forward(w, recipe, copy, plans, shape)
            for w, copy, shape in zip(weights, copies, _SHAPES, strict=True)
        )

        def product(a: RowQuantized, w: Weights, bias: Tensor | None) -> Tensor:
            return gemm_rows(a.data, a.scale, w, layout.tiles, bias, dtype, recipe.fwd.promote)

        by_row = quantize_rows(x, layout, recipe.fwd, column_amax=True)
        if _keeps_codes(x):
            for_wgrad = quantize_columns(x, layout, by_row, recipe.wgrad)
        else:
            for_wgrad = by_row.column_amax, by_row.poisoned
        gate, up = product(by_row, w1, biases[0]), product(by_row, w3, biases[2])
        del by_row
        hidden = swiglu_rows(gate, up, layout, recipe.fwd, column_amax=True)
        out = product(hidden, w2, biases[1])
        maxima = hidden.column_amax, hidden.poisoned
        return out, (gate, up, *layout, *for_wgrad, *maxima, *kept1, *kept2, *kept3)

    def backward(
        kept: Sequence[Tensor],
        x: Gathered,
        weights: Three,
        biases: Three,
        offs: Tensor,
        g: Gathered,
        recipe: Recipe,
        needed: Sequence[bool],
    ) -> tuple[Tensor | tuple[Tensor, Tensor | None] | None, ...]:
        if not _served(recipe):
            return composed.backward(kept, x, weights, biases, offs, g, recipe, needed)
        (_, dgrad, wgrad), dtype = recipe, x.data.dtype
        plans: Plans = {}
        gate, up = kept[:2]
        layout, x_kept, hidden_maxima = Plan(*kept[2:6]), kept[6:8], _maxima(kept[8:10])
        x_needed, w1_needed, w2_needed, w3_needed, b1_needed, b2_needed, b3_needed, scores_needed = needed

        def factors(rows: RowQuantized, i: int) -> tuple[Tensor, Tensor, Weights]:
            own = kept[10 + 2 * i : 12 + 2 * i]
            return rows.data, rows.scale, _for_backward(weights[i], own, recipe, plans, _SHAPES[i])

        def input_gradient(d_gate: RowQuantized, d_up: RowQuantized) -> tuple[Tensor, Tensor | None]:
            products = factors(d_gate, 0), factors(d_up, 2)
            return x.collect(gemm_rows_sum(*products, layout.tiles, dtype, dgrad.promote))

        def weight_gradient(i: int, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
            w = weights[i]
            return contract(left, right, layout, w.dtype, wgrad, w.mT).mT

        def bias_gradient(i: int, cotangent: Tensor) -> Tensor:
            return group_sum(cotangent, offs).to(biases[i].dtype)

        dx = dw1 = dw2 = dw3 = db1 = db3 = d_scores = None
        db2 = bias_gradient(1, g.rows()) if b2_needed else None
        any_weight = w1_needed or w2_needed or w3_needed
        through = x_needed or w1_needed or w3_needed or b1_needed or b3_needed or scores_needed
        if not (through or w2_needed):
            return dx, dw1, dw2, dw3, db1, db2, db3, d_scores
        # What is large lives as short as it can. So the gradient of x comes as soon as it can be worked
        # out, for that sets the codes of two (M, H) free, or last where it is larger than those.
        early = g.data.numel() < g.shape[0] * weights[0].shape[1]
        by_row = quantize_rows(g, layout, dgrad, column_amax=w2_needed)
        g_maxima = _maxima((by_row.column_amax, by_row.poisoned))
        if through:
            d_hidden = gemm_rows(*factors(by_row, 1), layout.tiles, None, dtype, dgrad.promote)
            del by_row
            if scores_needed:
                d_scores = ffn.score_gradient(gate, up, d_hidden, g, biases[1], offs)
            if x_needed or any_weight:
                d_gate, d_up = swiglu_backward_rows(
                    gate, up, d_hidden, layout, dgrad, column_amax=any_weight
                )
                if x_needed and early:
                    dx = input_gradient(d_gate, d_up)
                if early or not x_needed:  # only maxima are read from here on
                    d_gate, d_up = (_maxima((rows.column_amax, rows.poisoned)) for rows in (d_gate, d_up))
            if any_weight:
                gate_columns, up_columns, hidden_columns = swiglu_backward_columns(
                    gate, up, d_hidden, layout, d_gate, d_up, hidden_maxima, wgrad
                )
            if b1_needed or b3_needed:  # sums of what is nowhere written
                for_gate, for_up = ffn.swiglu_backward_in_one(gate, up, d_hidden)
                db1 = bias_gradient(0, for_gate) if b1_needed else None
                db3 = bias_gradient(2, for_up) if b3_needed else None
                del for_gate, for_up
            del d_hidden
        else:
            hidden_columns = quantize_columns(ffn.swiglu_in_one(gate, up), layout, hidden_maxima, wgrad)
        if w2_needed:
            dw2 = weight_gradient(1, hidden_columns, quantize_columns(g, layout, g_maxima, wgrad))
        if any_weight:
            del hidden_columns
        if w1_needed or w3_needed:
            x_columns = x_kept if _keeps_codes(x) else quantize_columns(x, layout, _maxima(x_kept), wgrad)
            dw1 = weight_gradient(0, x_columns, gate_columns) if w1_needed else None
            del gate_columns
            dw3 = weight_gradient(2, x_columns, up_columns) if w3_needed else None
            del x_columns, up_columns
        elif through and any_weight:
            del gate_columns, up_columns
        if x_needed and not early:
            dx = input_gradient(d_gate, d_up)
        return dx, dw1, dw2, dw3, db1, db2, db3, d_scores

    return Composed(forward, backward)
