"""Add up the rows that belong to each token, in one pass, the transpose of that, and its weights' gradient.

    combine   out[t]          = sum over j of  weights[t, j] * y[slot[t k + j]]
    spread    out[i]          = weights[t, j] * x[t]               where copy[i] = t k + j
    row_dots  out[t, j]       = y[slot[t k + j]] . x[t]            gradient of weights
    swiglu_dots  out[i]       = (silu(gate[i]) up[i]) . x[i]       the same behind a feed-forward

Weights may be left out. Computed in float32, combine one addition after the other in the order of j, and
rounded once: the result depends neither on the device nor on how a library sums. Here are the
definitions, in torch; on a GPU ``combine_gpu.py`` runs instead, with the same bits but for the dots,
whose long sums it takes in another order.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from moefp8._leaf import by_loop, leaf

HAS_KERNELS = find_spec("triton") is not None
if HAS_KERNELS:
    from moefp8.kernels import combine_gpu


def on_gpu(y: Tensor) -> bool:
    """Whether the kernels for what is not a product run on ``y``, rather than torch."""
    return HAS_KERNELS and y.device.type == "cuda" and y.dtype != torch.float64


def reference(y: Tensor, slot: Tensor, weights: Tensor | None, copies: int) -> Tensor:
    """The twin of ``combine_gpu.combine``."""
    wide = torch.promote_types(y.dtype, torch.float32)
    total = None
    for j in range(copies):
        row = y.index_select(0, slot[j::copies]).to(wide)
        if weights is not None:
            row = row * weights[:, j, None].to(wide)
        total = row if total is None else total + row
    return y.new_zeros(0, y.shape[1]) if total is None else total.to(y.dtype)


def reference_spread(x: Tensor, copy: Tensor, weights: Tensor | None, copies: int) -> Tensor:
    """The twin of ``combine_gpu.spread``."""
    rows = x.index_select(0, copy // copies)
    if weights is None:
        return rows
    wide = torch.promote_types(x.dtype, torch.float32)
    return (rows.to(wide) * weights.reshape(-1, 1).index_select(0, copy).to(wide)).to(x.dtype)


def reference_dots(y: Tensor, slot: Tensor, x: Tensor, copies: int) -> Tensor:
    """The twin of ``combine_gpu.row_dots``."""
    wide = torch.promote_types(y.dtype, torch.float32)
    rows = y.index_select(0, slot).to(wide).view(-1, copies, y.shape[1])
    return (rows * x.to(wide).unsqueeze(1)).sum(-1)


def _fake(y: Tensor, slot: Tensor, weights: Tensor | None, copies: int) -> Tensor:
    return y.new_empty(slot.shape[0] // copies, y.shape[1])


@leaf("combine", fake=_fake, vmap=by_loop)
def combine(y: Tensor, slot: Tensor, weights: Tensor | None, copies: int) -> Tensor:
    """``out[t] = sum over j of weights[t, j] * y[slot[t * copies + j]]``, (T, D) of the dtype of ``y``.

    Args:
        y: ``(M, D)``, M = T copies.
        slot: ``(M,)`` int64, a permutation of the rows.
        weights: ``(T, copies)``, or None for ones.
        copies: rows to a token, at least 1.
    """
    return (combine_gpu.combine if on_gpu(y) else reference)(y, slot, weights, copies)


def _fake_spread(x: Tensor, copy: Tensor, weights: Tensor | None, copies: int) -> Tensor:
    return x.new_empty(copy.shape[0], x.shape[1])


@leaf("spread", fake=_fake_spread, vmap=by_loop)
def spread(x: Tensor, copy: Tensor, weights: Tensor | None, copies: int) -> Tensor:
    """``out[i] = weights.flatten()[copy[i]] * x[copy[i] // copies]``, (M, D) of the dtype of ``x``."""
    return (combine_gpu.spread if on_gpu(x) else reference_spread)(x, copy, weights, copies)


def _fake_dots(y: Tensor, slot: Tensor, x: Tensor, copies: int) -> Tensor:
    dtype = torch.promote_types(y.dtype, torch.float32)
    return y.new_empty(slot.shape[0] // copies, copies, dtype=dtype)


@leaf("row_dots", fake=_fake_dots, vmap=by_loop)
def row_dots(y: Tensor, slot: Tensor, x: Tensor, copies: int) -> Tensor:
    """``out[t, j] = y[slot[t * copies + j]] . x[t]``, (T, copies) in float32 (float64 if ``y`` is)."""
    return (combine_gpu.row_dots if on_gpu(y) else reference_dots)(y, slot, x, copies)


def reference_swiglu_dots(gate: Tensor, up: Tensor, x: Tensor) -> Tensor:
    """The twin of ``combine_gpu.swiglu_dots``."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(wide)
    return (g * g.sigmoid() * up.to(wide) * x.to(wide)).sum(-1)


def _fake_swiglu_dots(gate: Tensor, up: Tensor, x: Tensor) -> Tensor:
    return gate.new_empty(gate.shape[0], dtype=torch.promote_types(gate.dtype, torch.float32))


@leaf("swiglu_dots", fake=_fake_swiglu_dots, vmap=by_loop)
def swiglu_dots(gate: Tensor, up: Tensor, x: Tensor) -> Tensor:
    """``out[i] = sum over h of silu(gate[i, h]) * up[i, h] * x[i, h]``, (M,), at least float32."""
    return (combine_gpu.swiglu_dots if on_gpu(gate) else reference_swiglu_dots)(gate, up, x)
