"""The expert feed-forward as one operation with one VJP, over flat tensors."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefp8._custom_vjp import custom_vjp, non_differentiable
from moefp8._dispatch import Implementation, choose, ffn_requests
from moefp8._operands import Asked
from moefp8.kernels import REGISTRY
from moefp8.kernels.combine import combine, combine_pair
from moefp8.kernels.ffn import Three, gather, swiglu, swiglu_backward
from moefp8.quantized import QuantizedParams, check_quantized, unchanged
from moefp8.recipe import Recipe
from moefp8.statistics import COTANGENTS, FORWARD, Statistics, entries, measure, pack_probe, unpack


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
    #: Zeros, see ``statistics.py``.
    probe: Tensor | None
    #: The copies of each weight and the sample of ``QuantizedParams``.
    prepared: tuple[tuple[Tensor, ...], ...] | None
    sample: Tensor | None

    def flat(self) -> tuple[Tensor, ...]:
        copies = [x for copy in self.prepared or () for x in copy]
        rest = (*self.biases, self.offs, self.source, self.slot, self.probe, *copies, self.sample)
        return (self.x, *self.weights, *(t for t in rest if t is not None))

    @classmethod
    def unflatten(cls, static: FFN, flat: Sequence[Tensor]) -> "Operands":
        x, w1, w2, w3, *rest = flat
        b1, b2, b3 = (rest.pop(0) if has else None for has in static.has_bias)
        offs = rest.pop(0)
        source, slot = (rest.pop(0), rest.pop(0)) if static.copies else (None, None)
        probe = rest.pop(0) if static.probed else None
        prepared = sample = None
        if rest:
            *copies, sample = rest
            n = static.prepared
            prepared = tuple(tuple(copies[i * n : (i + 1) * n]) for i in range(3))
        return cls(x, (w1, w2, w3), (b1, b2, b3), offs, source, slot, probe, prepared, sample)


def sum_copies(rows: Tensor | tuple[Tensor, Tensor], slot: Tensor, copies: int) -> Tensor:
    """Add up the ``copies`` rows of each token, in float32 and rounded once: a gather's transpose.

    Of a pair the rows are the sum, as the products for gate and up give them.
    """
    return (
        combine_pair(*rows, slot, copies) if isinstance(rows, tuple) else combine(rows, slot, None, copies)
    )


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
    elif isinstance(dx, tuple):
        dx = dx[0] + dx[1]
    weights, present = gradients[:3], zip(gradients[3:], static.has_bias, strict=True)
    grads = [dx, *weights, *(db for db, has in present if has)]
    grads += [None] * (3 if static.copies else 1)  # offs, source, slot
    if static.probed:
        grads.append(_cotangent_statistics(static, x, g) if needed[len(grads)] else None)
    return [*grads, *(None,) * (count - len(grads))]


def _inner(static: FFN, x: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """The sorted rows, gate and up, which a fused feed-forward does not hand out."""
    rows, product, fwd = gather(x.x, x.source), static.products.rows, static.recipe.fwd
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
    rows = x.shape[0] if routed is None else routed.source.shape[0]
    named = implementation is not None
    requests = ffn_requests(x.device, x.dtype, rows, weights, biases, recipe, named=named)
    chosen = choose(implementation, requests, REGISTRY)
    b1, b2, b3 = (bias is not None for bias in biases)
    source, slot, count = (None, None, 0) if routed is None else routed
    prepared = len(copies[0]) if copies else 0
    static = FFN(recipe, chosen.name, (b1, b2, b3), count, prepared, probe is not None, where)
    return static, Operands(x, weights, biases, offs, source, slot, probe, copies, sample)


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
    """The feed-forward of checked ``params`` on sorted rows, or on tokens and how they are ``routed``."""
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
