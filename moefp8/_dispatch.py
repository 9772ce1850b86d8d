"""Choosing an implementation: the first that can serve the call, or every reason why none can."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from moefp8.formats import BLOCK
from moefp8.recipe import Recipe


class Request(NamedTuple):
    """What an implementation needs to know to decide whether it can serve a call."""

    form: str  # "rows", "contraction" or "dense", see kernels/reference.py
    device: torch.device
    dtypes: tuple[torch.dtype, torch.dtype]
    recipe: Recipe
    out_dtype: torch.dtype
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    #: Span of a pre-quantised ``a``, None for one in high precision.
    a_group: int | None
    #: The caller named implementations, rather than leave the choice to the library.
    named: bool


class Implementation(NamedTuple):
    """The three products and the feed-forward made of them, and whether a call can be served.

    ``rows``, ``contraction``, ``dense`` and ``group_sum`` have the signatures of
    ``kernels/reference.py``, which defines what they compute. The feed-forward is defined by
    ``kernels/ffn.py``, and an implementation without one of its own takes it from there.
    """

    name: str
    #: Why the call cannot be served, or None if it can.
    refuse: Callable[[Request], str | None]
    rows: Callable
    contraction: Callable
    dense: Callable
    #: ``group_sum(g (M, N), offs) -> (G, N)`` in at least float32: the gradient of a bias.
    group_sum: Callable
    #: ``rows_forward(a, b, offs, bias, recipe, out_dtype, prepared=()) -> (out, kept)``: ``rows``, and
    #: tensors that its backward would have to work out again, such as weights quantised both ways.
    #: ``prepared`` is what ``quantize_weights`` gave for ``b.mT``.
    rows_forward: Callable
    #: ``rows_backward(kept, a, b, offs, g, recipe, needed, dtypes) -> (da, db)``.
    rows_backward: Callable
    #: ``ffn_forward(x, weights, biases, offs, recipe, prepared) -> (out (M, D), kept)``.
    #:
    #: ``x`` are the rows, ``Gathered``. ``weights`` and ``biases`` are triples in the order of their
    #: names, ``(w1 (E, H, D), w2 (E, D, H), w3 (E, H, D))``; a bias may be None. ``prepared`` is None, or
    #: what ``quantize_weights`` gave for each weight. ``kept`` is for the backward; it may hold operands.
    ffn_forward: Callable
    #: ``ffn_backward(kept, x, weights, biases, offs, g, recipe, needed) -> gradients`` of ``x`` (what
    #: ``x.collect`` gives), w1, w2, w3, b1, b2, b3 and ``g.scores``; None where not ``needed`` (eight
    #: bools). ``g`` is the cotangent of ``out``, ``Gathered``.
    ffn_backward: Callable
    #: ``ffn_keeps_rows(recipe)``: whether ``ffn_backward`` reads ``x`` where that are the rows themselves.
    #: If not, only their width and dtype need be kept.
    ffn_keeps_rows: Callable[[Recipe], bool]
    #: ``quantize_weights(w (G, N, K), recipe) -> tensors``: both copies of a weight that products read,
    #: along K for the forward and along N for dgrad. Their number does not depend on ``w``.
    quantize_weights: Callable
    #: What a recipe's ``group=None`` means here: elements that share a scale, -1 for a whole contraction.
    native_group: int = BLOCK
    #: ``name_on(device)``: the implementation that serves under this name on ``device``; None: this one.
    name_on: Callable[[torch.device], str] | None = None


def ffn_requests(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    weights: Sequence[torch.Tensor],
    recipe: Recipe,
    *,
    named: bool,
) -> list[Request]:
    """What the products of a feed-forward on ``rows`` rows of ``dtype`` ask for, in the order they run."""
    return [
        Request(
            "rows",
            device,
            (dtype, weights[i].dtype),
            recipe,
            dtype,
            (rows, weights[i].shape[2]),
            (weights[i].shape[0], weights[i].shape[2], weights[i].shape[1]),
            None,
            named=named,
        )
        for i in (0, 2, 1)
    ]


def wanted_names(
    wanted: str | Sequence[str] | None, device: torch.device, registry: dict[str, Implementation]
) -> list[str]:
    """Names of the implementations to try on ``device``, in order; ValueError for an unknown one."""
    names = list(registry) if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [name for name in names if name not in registry]
    if unknown or not names:
        known = ", ".join(map(repr, registry))
        raise ValueError(f"implementation: expected one or more of {known}, got {wanted!r}")
    # One name may stand for several implementations, each for other hardware.
    on_device = (registry[name].name_on for name in names)
    found = (name if named is None else named(device) for name, named in zip(names, on_device, strict=True))
    return list(dict.fromkeys(found))


def choose(
    wanted: str | Sequence[str] | None, requests: Sequence[Request], registry: dict[str, Implementation]
) -> Implementation:
    """The first of ``wanted`` (all of the registry in its order, if None) that serves all ``requests``.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: a single name that refuses.
        ExceptionGroup: several, and all refuse; one NotImplementedError each.
    """
    refusals = []
    for name in wanted_names(wanted, requests[0].device, registry):
        refused = (registry[name].refuse(request) for request in requests)
        reason = next((why for why in refused if why is not None), None)
        if reason is None:
            return registry[name]
        refusals.append(NotImplementedError(f"implementation {name!r}: {reason}"))
    if len(refusals) == 1:
        raise refusals[0]
    raise ExceptionGroup("implementation: none can serve this call", refusals)
