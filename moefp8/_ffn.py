"""The expert feed-forward as one operation with one VJP, over flat tensors."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefp8._custom_vjp import custom_vjp
from moefp8._dispatch import Implementation, choose, ffn_requests
from moefp8._operands import Asked
from moefp8.kernels import REGISTRY
from moefp8.kernels.combine import combine
from moefp8.kernels.ffn import Three
from moefp8.quantized import QuantizedParams, check_quantized, unchanged
from moefp8.recipe import Recipe


class Routed(NamedTuple):
    """How tokens become sorted rows and back: ``copies`` rows each.

    Attributes:
        source: ``(M,)`` int64 token of each sorted row.
        slot: ``(M,)`` int64 sorted row of each copy, token after token: row i of the tokens lies at
            ``slot[i * copies + j]``.
    """

    source: Tensor
    slot: Tensor
    copies: int


class FFN(NamedTuple):
    """Everything about a feed-forward that is not a tensor."""

    recipe: Recipe
    implementation: str
    has_bias: tuple[bool, bool, bool]
    #: Rows to a token; 0 if x lies sorted.
    copies: int
    #: Tensors to each weight that was quantised beforehand; 0 if none was.
    prepared: int
    #: What the weights are called in errors.
    where: str

    @property
    def products(self) -> Implementation:
        return REGISTRY[self.implementation]

    def asked(self, flat: Sequence[Tensor]) -> list[Asked]:
        """The three products, in the order they run."""
        x = Operands.unflatten(self, flat)
        rows = x.x.shape[0] if x.source is None else x.source.shape[0]
        order = (x.weights[0], x.weights[2], x.weights[1])
        return [
            Asked((rows, w.shape[2]), (w.shape[0], w.shape[2], w.shape[1]), (w,), (x.x, w)) for w in order
        ]


class Operands(NamedTuple):
    """The tensors of a feed-forward, in the flat order that ``custom_vjp`` passes them in."""

    x: Tensor
    weights: Three
    biases: Three
    offs: Tensor
    source: Tensor | None
    slot: Tensor | None
    #: The copies of each weight and the sample of ``QuantizedParams``.
    prepared: tuple[tuple[Tensor, ...], ...] | None
    sample: Tensor | None

    def flat(self) -> tuple[Tensor, ...]:
        copies = [x for copy in self.prepared or () for x in copy]
        rest = (*self.biases, self.offs, self.source, self.slot, *copies, self.sample)
        return (self.x, *self.weights, *(t for t in rest if t is not None))

    @classmethod
    def unflatten(cls, static: FFN, flat: Sequence[Tensor]) -> "Operands":
        x, w1, w2, w3, *rest = flat
        b1, b2, b3 = (rest.pop(0) if has else None for has in static.has_bias)
        offs = rest.pop(0)
        source, slot = (rest.pop(0), rest.pop(0)) if static.copies else (None, None)
        prepared = sample = None
        if rest:
            *copies, sample = rest
            n = static.prepared
            prepared = tuple(tuple(copies[i * n : (i + 1) * n]) for i in range(3))
        return cls(x, (w1, w2, w3), (b1, b2, b3), offs, source, slot, prepared, sample)


def sum_copies(rows: Tensor, slot: Tensor, copies: int) -> Tensor:
    """Add up the ``copies`` rows of each token, in float32 and rounded once: a gather's transpose."""
    return combine(rows, slot, None, copies)


def _ffn_fwd(static: FFN, *flat: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    x = Operands.unflatten(static, flat)
    offs = x.offs if x.sample is None else unchanged(x.offs, *x.weights, x.sample, static.where)
    out, kept = static.products.ffn_forward(
        x.x, x.source, x.weights, x.biases, offs, static.recipe, x.prepared
    )
    return out, (*flat, *kept)


def _ffn_bwd(static: FFN, needed: tuple[bool, ...], *residuals: Tensor) -> Sequence[Tensor | None]:
    count = len(needed)
    flat, kept, g = residuals[:count], residuals[count:-1], residuals[-1]
    x = Operands.unflatten(static, flat)
    if static.prepared and any(needed[-3 * static.prepared - 1 :]):
        raise TypeError(
            "quantized: quantised weights have no gradient, and one is asked for; differentiate params"
        )
    biases = iter(needed[4:])
    wanted = (*needed[:4], *(next(biases) if has else False for has in static.has_bias))
    dx, *gradients = static.products.ffn_backward(
        kept, x.x, x.source, x.weights, x.biases, x.offs, g, static.recipe, wanted
    )
    if dx is not None and x.slot is not None:
        dx = sum_copies(dx, x.slot, static.copies)
    weights, present = gradients[:3], zip(gradients[3:], static.has_bias, strict=True)
    grads = [dx, *weights, *(db for db, has in present if has)]
    return [*grads, *(None,) * (count - len(grads))]


_ffn = custom_vjp("expert_ffn", _ffn_fwd, _ffn_bwd)


def ffn(
    params: Mapping[str, Any],
    x: Tensor,
    offs: Tensor,
    recipe: Recipe,
    implementation: str | Sequence[str] | None,
    *,
    routed: Routed | None = None,
    quantized: QuantizedParams | None = None,
    where: str = "params",
) -> Tensor:
    """The feed-forward of checked ``params`` on sorted rows, or on tokens and how they are ``routed``."""
    weights: Three = (params["w1"], params["w2"], params["w3"])
    biases: Three = (params.get("b1"), params.get("b2"), params.get("b3"))
    copies, sample = None, None
    if quantized is not None:
        check_quantized(quantized, weights, recipe, implementation, where)
        copies, sample = quantized.copies, quantized.sample
        implementation = quantized.source.implementation
    rows = x.shape[0] if routed is None else routed.source.shape[0]
    named = implementation is not None
    requests = ffn_requests(x.device, x.dtype, rows, weights, biases, recipe, named=named)
    chosen = choose(implementation, requests, REGISTRY)
    b1, b2, b3 = (bias is not None for bias in biases)
    source, slot, count = (None, None, 0) if routed is None else routed
    prepared = len(copies[0]) if copies else 0
    static = FFN(recipe, chosen.name, (b1, b2, b3), count, prepared, where)
    return _ffn(static, *Operands(x, weights, biases, offs, source, slot, copies, sample).flat())
