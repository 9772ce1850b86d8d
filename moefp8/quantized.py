"""Expert weights quantised once and used many times: by micro-batches, and by ``remat`` again.

A training step that calls the layer several times on the same weights, quantises them every time. The
copies are an explicit pytree instead, made once after each optimizer step and handed to the layer
beside the weights, which stay the ones that are differentiated.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from moefp8._custom_vjp import non_differentiable
from moefp8._dispatch import choose, ffn_requests, wanted_names
from moefp8._leaf import by_loop, leaf
from moefp8._operands import check_operand
from moefp8.kernels import REGISTRY
from moefp8.recipe import MXFP8, Recipe, check_recipe
from moefp8.routing import check_param

WEIGHTS = ("w1", "w2", "w3")
#: Elements of each expert's matrix that are remembered along either axis.
_SAMPLED = 16


class Source(NamedTuple):
    """What a :class:`QuantizedParams` was made from and for."""

    recipe: Recipe
    implementation: str
    #: ``(E, H, D)``, ``(E, D, H)``, ``(E, H, D)`` and the dtype of each.
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    #: Shapes of the copies of one weight after another.
    copies: tuple[tuple[int, ...], ...]


class QuantizedParams:
    """The weights of the experts quantised both ways, as :func:`quantize_params` makes them.

    A pytree of tensors with static facts about them; the following hold:

    * ``copies`` are three tuples, of ``w1``, ``w2`` and ``w3``: what ``source.implementation`` reads of
      each under ``source.recipe``, in a layout of its own;
    * ``sample`` is ``(n,)`` uint8, the bytes of some elements of every expert's weights when they were
      quantised, by which a stale copy is noticed;
    * ``shared`` are those of the shared expert, or None.

    It is no parameter: it has no gradient, and an optimizer has nothing to do with it.
    """

    __slots__ = ("copies", "sample", "shared", "source")

    def __init__(
        self,
        copies: tuple[tuple[Tensor, ...], ...],
        sample: Tensor,
        shared: "QuantizedParams | None",
        source: Source,
    ) -> None:
        self.copies, self.sample, self.shared, self.source = copies, sample, shared, source

    def __repr__(self) -> str:
        size = sum(x.numel() * x.element_size() for x in pytree.tree_leaves(self))
        recipe, implementation, shapes, *_ = self.source
        return f"QuantizedParams(shapes={shapes}, bytes={size}, {implementation=}, {recipe=})"


def _children(q: QuantizedParams) -> list[tuple[str, Any]]:
    children: list[tuple[str, Any]] = [("copies", q.copies), ("sample", q.sample)]
    return children if q.shared is None else [*children, ("shared", q.shared)]


def _unflatten(children: Any, source: Any) -> QuantizedParams:
    copies, sample, *shared = children
    return QuantizedParams(copies, sample, shared[0] if shared else None, source)


pytree.register_pytree_node(
    QuantizedParams,
    lambda q: ([child for _, child in _children(q)], q.source),
    _unflatten,
    serialized_type_name="moefp8.QuantizedParams",
    flatten_with_keys_fn=lambda q: (
        [(pytree.GetAttrKey(name), child) for name, child in _children(q)],
        q.source,
    ),
)


# --- noticing a stale copy -----------------------------------------------------------------------


def _sample(weights: Sequence[Tensor]) -> Tensor:
    """The bytes of some elements of every matrix of every weight."""

    def some(w: Tensor) -> Tensor:
        rows, columns = (max(1, n // _SAMPLED) for n in w.shape[1:])
        return w[:, ::rows, ::columns].reshape(-1).contiguous().view(torch.uint8)

    return torch.cat([some(w) for w in weights])


def _fake_unchanged(offs: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, sample: Tensor, where: str) -> Tensor:
    return torch.empty_like(offs)


@leaf("unchanged", fake=_fake_unchanged, vmap=by_loop)
def unchanged(offs: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, sample: Tensor, where: str) -> Tensor:
    """A copy of ``offs``, once it is known that the weights still hold the ``sample``.

    A leaf, so that it looks under ``vmap`` and in compiled graphs. A GPU is not waited for: it asserts on
    the device, as torch does for an index out of range.
    """
    same = _sample((w1, w2, w3)) == sample
    if same.device.type == "cuda":
        torch._assert_async(same.all(), f"quantized: is stale, {where} has changed since quantize_params")
    elif not same.all():
        raise ValueError(
            f"quantized: is stale, {where} has changed since quantize_params; quantise again after every "
            f"change, such as an optimizer step"
        )
    return offs.clone()


# --- making and matching -------------------------------------------------------------------------


class _Quantize(NamedTuple):
    recipe: Recipe
    implementation: str


def _quantize_fwd(static: _Quantize, *weights: Tensor) -> tuple[Tensor, ...]:
    make = REGISTRY[static.implementation].quantize_weights
    return (*(x for w in weights for x in make(w, static.recipe)), _sample(weights))


_quantize = non_differentiable("quantize_params", _quantize_fwd, "differentiate the parameters themselves")


def quantize_params(
    params: Mapping[str, Any],
    recipe: Recipe = MXFP8,
    *,
    dtype: torch.dtype | None = None,
    implementation: str | Sequence[str] | None = None,
) -> QuantizedParams:
    """Quantise the weights of the experts both ways, for all calls of the layer until they change.

    ::

        q = quantize_params(params, recipe)
        moe_ffn(params, x, config=config, recipe=recipe, quantized=q)     for every micro-batch

    gives the same bits and the same gradients, those of ``params``, as the call without ``quantized``.
    Weights are quantised as they are passed: cast masters first, and pass the layer the same cast.

    **A stale copy.** Call it again after every change of the weights. A layer that is given a copy of
    other weights than its own raises ValueError on a CPU, and asserts on the device on a GPU (without
    waiting for it). It compares some elements of every expert, up to 31 x 31 of each matrix, so weights
    that are cast or copied once more pass, those of an optimizer step do not, and a change of single
    elements may go unnoticed.

    Args:
        params: ``w1`` ``(E, H, D)``, ``w2`` ``(E, D, H)``, ``w3`` ``(E, H, D)``, and if present
            ``shared`` with those of the shared expert. Of biases it is only noted that they are there;
            other keys are ignored.
        recipe: a :class:`Recipe`. What it leaves in high precision takes no memory.
        dtype: of the tokens, if it is not that of the weights.
        implementation: as for :func:`scaled_grouped_mm`. The layer uses the one chosen here.

    Returns:
        A :class:`QuantizedParams`, a constant: no gradient goes through it. It takes two bytes an element
        of the weights where both of their products are quantised.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`expert_ffn`.

    >>> params = {"w1": torch.ones(2, 64, 32), "w2": torch.ones(2, 32, 64), "w3": torch.ones(2, 64, 32)}
    >>> q = quantize_params(params)
    >>> from moefp8 import expert_ffn
    >>> x, offs = torch.ones(5, 32), torch.tensor([2, 5], dtype=torch.int32)
    >>> torch.equal(expert_ffn(params, x, offs, quantized=q), expert_ffn(params, x, offs))
    True
    """
    check_recipe(recipe)
    shared = None
    if "shared" in params:
        alone = {key: p.unsqueeze(0) for key, p in params["shared"].items()}
        shared = _quantize_experts(alone, recipe, dtype, implementation, "params['shared']")
    routed = _quantize_experts(params, recipe, dtype, implementation, "params")
    return QuantizedParams(routed.copies, routed.sample, shared, routed.source)


def _quantize_experts(
    params: Mapping[str, Any],
    recipe: Recipe,
    dtype: torch.dtype | None,
    implementation: str | Sequence[str] | None,
    where: str,
) -> QuantizedParams:
    if "w1" not in params or getattr(params["w1"], "ndim", 0) != 3:
        raise ValueError(f"{where}['w1']: expected a tensor of shape (E, H, D)")
    num_experts, hidden, dim = params["w1"].shape
    for key, shape in zip(WEIGHTS, ((hidden, dim), (dim, hidden), (hidden, dim)), strict=True):
        check_param(params, key, (num_experts, *shape), where)
        check_operand(params[key], f"{where}[{key!r}]", recipe)
    # Detached, or copies of parameters that require grad would require it as well.
    weights = [params[key].detach() for key in WEIGHTS]
    requests = ffn_requests(
        weights[0].device,
        dtype or weights[0].dtype,
        1,
        weights,
        recipe,
        named=implementation is not None,
    )
    chosen = choose(implementation, requests, REGISTRY)
    *flat, sample = _quantize(_Quantize(recipe, chosen.name), *weights)
    each = len(flat) // 3
    source = Source(
        recipe,
        chosen.name,
        tuple(tuple(w.shape) for w in weights),
        tuple(w.dtype for w in weights),
        tuple(tuple(x.shape) for x in flat),
    )
    return QuantizedParams(
        tuple(tuple(flat[i : i + each]) for i in range(0, 3 * each, each)), sample, None, source
    )


def check_quantized(
    quantized: QuantizedParams,
    weights: Sequence[Tensor],
    recipe: Recipe,
    implementation: str | Sequence[str] | None,
    where: str,
) -> None:
    """Reject copies that cannot be of these weights, or are for another recipe or implementation."""
    if not isinstance(quantized, QuantizedParams):
        raise TypeError(
            f"quantized: expected the result of quantize_params, got {type(quantized).__name__}"
        )
    source = quantized.source
    if source.recipe != recipe:
        raise ValueError(f"quantized: was made for {source.recipe}, but recipe is {recipe}")
    if source.implementation not in wanted_names(implementation, weights[0].device, REGISTRY):
        raise ValueError(
            f"quantized: was made by implementation {source.implementation!r}, got {implementation!r}"
        )
    for key, w, shape, dtype in zip(WEIGHTS, weights, source.shapes, source.dtypes, strict=True):
        if tuple(w.shape) != shape or w.dtype != dtype:
            raise ValueError(
                f"quantized: was made from {where}[{key!r}] of shape {shape} and {dtype}, got "
                f"{tuple(w.shape)} and {w.dtype}"
            )
    copies = [x for copy in quantized.copies for x in copy]
    if tuple(tuple(x.shape) for x in copies) != source.copies:
        raise ValueError(
            f"quantized: its tensors have shapes {[tuple(x.shape) for x in copies]}, not those of "
            f"quantize_params; were they stacked and not mapped over?"
        )
    if quantized.sample.device != weights[0].device:
        raise ValueError(f"quantized: is on {quantized.sample.device}, {where} on {weights[0].device}")


def shared_copies(quantized: QuantizedParams) -> QuantizedParams:
    """Those of the shared expert, which the parameters have."""
    if quantized.shared is None:
        raise ValueError("quantized: was made from parameters without 'shared', which params have")
    return quantized.shared
