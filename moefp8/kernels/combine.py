"""Add up the rows that belong to each token, in one pass, and the transpose of that.

    combine           out[t] = sum over j of  weights[t, j] * y[slot[t k + j]]
    combine_pair      out[t] = sum over j of  (y + other)[slot[t k + j]]
    combine_backward  dy[slot[t k + j]] = weights[t, j] * g[t],   dweights[t, j] = y[slot[t k + j]] . g[t]

Weights may be left out. Computed in float32, one addition after the other in the order of j, and rounded
once: the result depends neither on the device nor on how a library sums. Here are the definitions, in
torch; on a GPU ``combine_gpu.py`` runs instead, with the same bits but for dweights, whose long sum it
takes in another order.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from moefp8._leaf import by_loop, leaf

_HAS_KERNELS = find_spec("triton") is not None
if _HAS_KERNELS:
    from moefp8.kernels import combine_gpu


def _on_gpu(y: Tensor) -> bool:
    return _HAS_KERNELS and y.device.type == "cuda" and y.dtype != torch.float64


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


def reference_backward(y: Tensor, slot: Tensor, weights: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The twin of ``combine_gpu.combine_backward``."""
    wide = torch.promote_types(y.dtype, torch.float32)
    rows, g = y.index_select(0, slot).to(wide).view(*weights.shape, y.shape[1]), g.to(wide).unsqueeze(1)
    dy = torch.empty_like(y).index_copy(
        0, slot, (g * weights.to(wide).unsqueeze(-1)).flatten(0, 1).to(y.dtype)
    )
    return dy, (rows * g).sum(-1).to(weights.dtype)


def _fake(y: Tensor, slot: Tensor, weights: Tensor | None, copies: int) -> Tensor:
    return y.new_empty(slot.shape[0] // copies, y.shape[1])


def reference_pair(y: Tensor, other: Tensor, slot: Tensor, copies: int) -> Tensor:
    """The twin of ``combine_gpu.combine_pair``."""
    return reference(y + other, slot, None, copies)


@leaf("combine", fake=_fake, vmap=by_loop)
def combine(y: Tensor, slot: Tensor, weights: Tensor | None, copies: int) -> Tensor:
    """``out[t] = sum over j of weights[t, j] * y[slot[t * copies + j]]``, (T, D) of the dtype of ``y``.

    Args:
        y: ``(M, D)``, M = T copies.
        slot: ``(M,)`` int64, a permutation of the rows.
        weights: ``(T, copies)``, or None for ones.
        copies: rows to a token, at least 1.
    """
    return (combine_gpu.combine if _on_gpu(y) else reference)(y, slot, weights, copies)


def _fake_pair(y: Tensor, other: Tensor, slot: Tensor, copies: int) -> Tensor:
    return _fake(y, slot, None, copies)


@leaf("combine_pair", fake=_fake_pair, vmap=by_loop)
def combine_pair(y: Tensor, other: Tensor, slot: Tensor, copies: int) -> Tensor:
    """:func:`combine` of ``y + other``, that sum rounded to their dtype, without weights."""
    return (combine_gpu.combine_pair if _on_gpu(y) else reference_pair)(y, other, slot, copies)


def _fake_backward(y: Tensor, slot: Tensor, weights: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


@leaf("combine_backward", fake=_fake_backward, vmap=by_loop)
def combine_backward(y: Tensor, slot: Tensor, weights: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``y`` and ``weights`` for the cotangent ``g`` (T, D) of :func:`combine`."""
    return (combine_gpu.combine_backward if _on_gpu(y) else reference_backward)(y, slot, weights, g)
