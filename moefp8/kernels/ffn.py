"""The SwiGLU feed-forward of the experts, composed of three grouped products of one implementation.

This is what every fused feed-forward must equal, bit for bit::

    gate = x @ w1^T + b1      d_hidden = g @ w2              dw2 = g^T hidden
    up   = x @ w3^T + b3      d_gate   = d_hidden up silu'(gate)      dw1 = d_gate^T x
    hidden = silu(gate) up    d_up     = d_hidden silu(gate)          dw3 = d_up^T x
    out  = hidden @ w2^T + b2 dx       = d_gate @ w1 + d_up @ w3

Every tensor named here is rounded once to the dtype of x (a weight's gradient to the weight's), and dx
to it once more when its two products are added. A product quantises its own operands, so x is quantised
twice and each cotangent up to twice; what a fused implementation saves is that, and never a rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefp8._leaf import leaf, over_leading
from moefp8.groups import group_ids
from moefp8.kernels.combine import HAS_KERNELS, on_gpu, swiglu_dots
from moefp8.kernels.gathered import Gathered
from moefp8.recipe import Recipe

if HAS_KERNELS:
    from moefp8.kernels import swiglu_gpu

#: ``(w1, w2, w3)`` or ``(b1, b2, b3)``, in the order of their names.
Three = tuple[Any, Any, Any]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` in float32 (float64 if they are), rounded once."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(wide)
    return (g * g.sigmoid() * up.to(wide)).to(gate.dtype)


def swiglu_backward(gate: Tensor, up: Tensor, d_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents of ``gate`` and ``up``, each in float32 and rounded once."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, u, d = gate.to(wide), up.to(wide), d_hidden.to(wide)
    s = g.sigmoid()
    return (d * u * (s * (1 + g * (1 - s)))).to(gate.dtype), (d * (g * s)).to(up.dtype)


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@leaf("swiglu", fake=_fake, vmap=over_leading)
def swiglu_in_one(gate: Tensor, up: Tensor) -> Tensor:
    """:func:`swiglu` in one pass where there is a kernel for it."""
    return (swiglu_gpu.swiglu if on_gpu(gate) else swiglu)(gate, up)


def _fake_backward(gate: Tensor, up: Tensor, d_hidden: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@leaf("swiglu_backward", fake=_fake_backward, vmap=over_leading)
def swiglu_backward_in_one(gate: Tensor, up: Tensor, d_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`swiglu_backward` in one pass where there is a kernel for it."""
    return (swiglu_gpu.swiglu_backward if on_gpu(gate) else swiglu_backward)(gate, up, d_hidden)


def score_gradient(
    gate: Tensor, up: Tensor, d_hidden: Tensor, g: Gathered, b2: Tensor | None, offs: Tensor
) -> Tensor:
    """Gradient of the scores that ``out`` is weighted with, (T, copies), for the cotangent ``g``.

    It is the product of a row of ``out`` with its token's cotangent, and the cotangent ``d_hidden`` has the
    other half of that already, times the score::

        out . g = (hidden w2^T + b2) . g = hidden . d_hidden / score + b2 . g

    so nothing of width D is kept for it. Where a score is 0 that is not known, and the first part of the
    gradient is 0: it is multiplied by the score's own derivative, which is 0 there for softmax and sigmoid.
    """
    scores, slot = g.scores, g.slot
    if scores is None or slot is None:
        raise ValueError("g: has no scores")
    dots = swiglu_dots(gate, up, d_hidden).index_select(0, slot).view(scores.shape)
    gradient = torch.where(scores == 0, 0, dots / scores)
    if b2 is not None:
        by_expert = g.data.to(gradient.dtype) @ b2.to(gradient.dtype).mT
        owner = group_ids(offs, slot.shape[0]).index_select(0, slot).view(scores.shape)
        own = by_expert.gather(1, owner.clamp(max=b2.shape[0] - 1))
        gradient = gradient + torch.where(owner < b2.shape[0], own, 0)
    return gradient.to(scores.dtype)


class Composed(NamedTuple):
    """Forward and backward of the feed-forward, see :class:`moefp8._dispatch.Implementation`."""

    forward: Callable
    backward: Callable


def compose(rows_forward: Callable, rows_backward: Callable, group_sum: Callable) -> Composed:
    """The feed-forward made of the products of one implementation.

    For the backward it keeps gate and up, and what each product keeps. Hidden is worked out again: an
    elementwise function of the two costs less than the memory of a third.
    """

    def forward(
        x: Gathered,
        weights: Three,
        biases: Three,
        offs: Tensor,
        recipe: Recipe,
        prepared: Sequence[Sequence[Tensor]] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        copies = ((), (), ()) if prepared is None else prepared

        def product(a: Tensor, i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
            return rows_forward(a, weights[i].mT, offs, biases[i], recipe, rows.dtype, copies[i])

        rows = x.rows()
        gate, kept1 = product(rows, 0)
        up, kept3 = product(rows, 2)
        out, kept2 = product(swiglu_in_one(gate, up), 1)
        return out, (gate, up, *kept1, *kept2, *kept3)

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
        gate, up, *rest = kept
        each = len(rest) // 3  # the three products keep alike
        x_needed, w_needed, b_needed, scores_needed = needed[0], needed[1:4], needed[4:7], needed[7]

        def product(a: Tensor, i: int, g: Tensor, a_needed: bool) -> tuple[Tensor | None, Tensor | None]:
            own, w = rest[i * each : (i + 1) * each], weights[i]
            wanted, dtypes = (a_needed, w_needed[i]), (x.data.dtype, w.dtype)
            da, db = rows_backward(own, a, w.mT, offs, g, recipe, wanted, dtypes)
            return da, None if db is None else db.mT

        def bias(i: int, g: Tensor) -> Tensor | None:
            return group_sum(g, offs).to(biases[i].dtype) if b_needed[i] else None

        gate_needed = x_needed or w_needed[0] or b_needed[0]
        up_needed = x_needed or w_needed[2] or b_needed[2]
        cotangent = g.rows()
        through = gate_needed or up_needed or scores_needed
        d_hidden, dw2 = product(swiglu_in_one(gate, up), 1, cotangent, through)
        d_scores = dx = dw1 = dw3 = db1 = db3 = None
        if d_hidden is not None and scores_needed:
            d_scores = score_gradient(gate, up, d_hidden, g, biases[1], offs)
        if d_hidden is not None and (gate_needed or up_needed):
            d_gate, d_up = swiglu_backward_in_one(gate, up, d_hidden)
            rows = x.rows()
            dx1, dw1 = product(rows, 0, d_gate, x_needed)
            dx3, dw3 = product(rows, 2, d_up, x_needed)
            dx = None if dx1 is None or dx3 is None else x.collect(dx1 + dx3)
            db1, db3 = bias(0, d_gate), bias(2, d_up)
        return dx, dw1, dw2, dw3, db1, bias(1, cotangent), db3, d_scores

    return Composed(forward, backward)
