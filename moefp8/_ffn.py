"""The expert feed-forward as one operation with one VJP, over flat tensors."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefp8._custom_vjp import custom_vjp, non_differentiable
from moefp8._dispatch import Implementation, choose, ffn_requests
from moefp8._operands import Asked
from moefp8.kernels import REGISTRY
from moefp8.kernels.combine import combine
from moefp8.kernels.ffn import Three, swiglu, swiglu_backward
from moefp8.kernels.gathered import Gathered
from moefp8.quantized import QuantizedParams, check_quantized, unchanged
from moefp8.recipe import Recipe
from moefp8.statistics import COTANGENTS, FORWARD, Statistics, entries, measure, pack_probe, unpack


class Routed(NamedTuple):
    """How tokens become sorted rows, and those tokens again: ``copies`` rows each.

    Attributes:
        copy: ``(M,)`` int64: which ``t * copies + j`` (copy j of token t) each sorted row is.
        slot: ``(M,)`` int64, the inverse.
        scores: ``(T, copies)``, what copies count for.
        side: where they are multiplied with, "input" or "output".
    """

    copy: Tensor
    slot: Tensor
    scores: Tensor
    side: str


class FFN(NamedTuple):
    """Everything about a feed-forward that is not a tensor."""

    recipe: Recipe
    implementation: str
    has_bias: tuple[bool, bool, bool]
    #: Rows to a token; 0 if x lies sorted.
    copies: int
    #: Side of the scores.
    side: str
    #: Tensors to each weight that was quantised beforehand; 0 if none was.
    prepared: int
    #: Whether the cotangents are measured.
    probed: bool
    #: What the weights are called in errors.
    where: str

    @property
    def products(self) -> Implementation:
        return REGISTRY[self.implementation]

    def asked(self, flat: Sequence[Tensor]) -> list[Asked]:
        """The three products, in the order they run."""
        x = Operands.unflatten(self, flat)
        rows, _ = x.into(self).shape
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
    copy: Tensor | None
    slot: Tensor | None
    scores: Tensor | None
    #: Zeros, see ``statistics.py``.
    probe: Tensor | None
    #: The copies of each weight and the sample of ``QuantizedParams``.
    prepared: tuple[tuple[Tensor, ...], ...] | None
    sample: Tensor | None

    def flat(self) -> tuple[Tensor, ...]:
        copies = [x for copy in self.prepared or () for x in copy]
        routed = (self.copy, self.slot, self.scores)
        rest = (*self.biases, self.offs, *routed, self.probe, *copies, self.sample)
        return (self.x, *self.weights, *(t for t in rest if t is not None))

    @classmethod
    def unflatten(cls, static: FFN, flat: Sequence[Tensor]) -> "Operands":
        x, w1, w2, w3, *rest = flat
        b1, b2, b3 = (rest.pop(0) if has else None for has in static.has_bias)
        offs = rest.pop(0)
        copy, slot, scores = (rest.pop(0) if static.copies else None for _ in range(3))
        probe = rest.pop(0) if static.probed else None
        prepared = sample = None
        if rest:
            *copies, sample = rest
            n = static.prepared
            prepared = tuple(tuple(copies[i * n : (i + 1) * n]) for i in range(3))
        return cls(x, (w1, w2, w3), (b1, b2, b3), offs, copy, slot, scores, probe, prepared, sample)

    def into(self, static: FFN) -> Gathered:
        """The rows that the experts get."""
        scores = self.scores if static.side == "input" else None
        return Gathered(self.x, self.copy, self.slot, static.copies, scores)

    def back(self, static: FFN, g: Tensor) -> Gathered:
        """The cotangent of what they give."""
        scores = self.scores if static.side == "output" else None
        return Gathered(g, self.copy, self.slot, static.copies, scores)


def _ffn_fwd(static: FFN, *flat: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    x = Operands.unflatten(static, flat)
    offs = x.offs if x.sample is None else unchanged(x.offs, *x.weights, x.sample, static.where)
    out, kept = static.products.ffn_forward(
        x.into(static), x.weights, x.biases, offs, static.recipe, x.prepared
    )
    if not static.copies:
        if not (static.probed or static.products.ffn_keeps_rows(static.recipe)):
            flat = (x.x.new_empty(0, x.x.shape[1]), *flat[1:])
        return out, (*flat, *kept)
    return combine(out, x.slot, x.back(static, out).scores, static.copies), (*flat, *kept)


def _ffn_bwd(static: FFN, needed: tuple[bool, ...], *residuals: Tensor) -> Sequence[Tensor | None]:
    count = len(needed)
    flat, kept, g = residuals[:count], residuals[count:-1], residuals[-1]
    x = Operands.unflatten(static, flat)
    if static.prepared and any(needed[-3 * static.prepared - 1 :]):
        raise TypeError(
            "quantized: quantised weights have no gradient, and one is asked for; differentiate params"
        )
    wants = iter(needed)
    x_needed, *weights_needed = (next(wants) for _ in range(4))
    biases_needed = [next(wants) if has else False for has in static.has_bias]
    scores_needed = bool(static.copies) and list(wants)[3]  # after offs, copy and slot
    on_output = scores_needed and static.side == "output"
    into_needed = x_needed or (scores_needed and static.side == "input")
    into, *gradients, d_scores = static.products.ffn_backward(
        kept, x.into(static), x.weights, x.biases, x.offs, x.back(static, g), static.recipe,
        (into_needed, *weights_needed, *biases_needed, on_output),
    )  # fmt: skip
    dx = None
    if into is not None:
        dx, from_input = into
        d_scores = from_input if static.side == "input" else d_scores
    weights, present = gradients[:3], zip(gradients[3:], static.has_bias, strict=True)
    grads = [dx, *weights, *(db for db, has in present if has), None]  # the last of offs
    if static.copies:
        grads += [None, None, d_scores]
    if static.probed:
        grads.append(_cotangent_statistics(static, x, g) if needed[len(grads)] else None)
    return [*grads, *(None,) * (count - len(grads))]


def _inner(static: FFN, x: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """The sorted rows, gate and up, which a fused feed-forward does not hand out."""
    rows, product, fwd = x.into(static).rows(), static.products.rows, static.recipe.fwd
    gate = product(rows, x.weights[0].mT, x.offs, x.biases[0], fwd, rows.dtype)
    return rows, gate, product(rows, x.weights[2].mT, x.offs, x.biases[2], fwd, rows.dtype)


def _measure(
    static: FFN, operands: dict[str, Tensor], products: Mapping[str, Sequence[str]], offs: Tensor
) -> Tensor:
    """``(n, 6)``: the statistics of each operand in each product that quantises it."""
    measured = []
    for name, product in entries(products, static.recipe):
        along_rows = product == "wgrad" or (product == "dgrad" and name[1:].isdigit())
        gemm, groups = getattr(static.recipe, product), None if name[1:].isdigit() else offs
        native = static.products.native_group
        measured.append(measure(operands[name], groups, -2 if along_rows else -1, gemm, native))
    return torch.stack(measured)


def _cotangent_statistics(static: FFN, x: Operands, g: Tensor) -> Tensor:
    g = x.back(static, g).rows()
    _, gate, up = _inner(static, x)
    d_hidden = static.products.rows(g, x.weights[1], x.offs, None, static.recipe.dgrad, g.dtype)
    d_gate, d_up = swiglu_backward(gate, up, d_hidden)
    return _measure(static, {"out": g, "gate": d_gate, "up": d_up}, COTANGENTS, x.offs)


def _forward_statistics(static: FFN, *flat: Tensor) -> Tensor:
    x = Operands.unflatten(static, flat)
    rows, gate, up = _inner(static, x)
    names = dict(zip(("w1", "w2", "w3"), x.weights, strict=True))
    return _measure(static, {"x": rows, "hidden": swiglu(gate, up), **names}, FORWARD, x.offs)


_statistics = non_differentiable("expert_statistics", _forward_statistics, "it only describes")

_ffn = custom_vjp("expert_ffn", _ffn_fwd, _ffn_bwd)


def _prepare(
    params: Mapping[str, Any],
    x: Tensor,
    offs: Tensor,
    recipe: Recipe,
    implementation: str | Sequence[str] | None,
    routed: Routed | None,
    quantized: QuantizedParams | None,
    probe: Tensor | None,
    where: str,
) -> tuple[FFN, Operands]:
    weights: Three = (params["w1"], params["w2"], params["w3"])
    biases: Three = (params.get("b1"), params.get("b2"), params.get("b3"))
    copies, sample = None, None
    if quantized is not None:
        check_quantized(quantized, weights, recipe, implementation, where)
        copies, sample = quantized.copies, quantized.sample
        implementation = quantized.source.implementation
    rows = x.shape[0] if routed is None else routed.copy.shape[0]
    named = implementation is not None
    requests = ffn_requests(x.device, x.dtype, rows, weights, recipe, named=named)
    chosen = choose(implementation, requests, REGISTRY)
    b1, b2, b3 = (bias is not None for bias in biases)
    copy, slot, scores, side = (None, None, None, "") if routed is None else routed
    count = 0 if scores is None else scores.shape[1]
    prepared = len(copies[0]) if copies else 0
    static = FFN(recipe, chosen.name, (b1, b2, b3), count, side, prepared, probe is not None, where)
    return static, Operands(x, weights, biases, offs, copy, slot, scores, probe, copies, sample)


def ffn(
    params: Mapping[str, Any],
    x: Tensor,
    offs: Tensor,
    recipe: Recipe,
    implementation: str | Sequence[str] | None,
    *,
    routed: Routed | None = None,
    quantized: QuantizedParams | None = None,
    probe: Any = None,
    where: str = "params",
) -> Tensor:
    """The feed-forward of checked ``params`` on sorted rows, or of tokens as they are ``routed``."""
    zeros = None if probe is None else pack_probe(probe, recipe)
    static, operands = _prepare(params, x, offs, recipe, implementation, routed, quantized, zeros, where)
    return _ffn(static, *operands.flat())


def ffn_statistics(
    params: Mapping[str, Any],
    x: Tensor,
    offs: Tensor,
    recipe: Recipe,
    implementation: str | Sequence[str] | None,
    *,
    routed: Routed | None = None,
    quantized: QuantizedParams | None = None,
) -> Statistics:
    """The statistics of its forward operands."""
    if not entries(FORWARD, recipe):
        return {}
    if quantized is not None:  # measured are the weights themselves, as that implementation quantises
        implementation = quantized.source.implementation
    static, operands = _prepare(params, x, offs, recipe, implementation, routed, None, None, "params")
    return unpack(_statistics(static, *(t.detach() for t in operands.flat())), FORWARD, recipe)
