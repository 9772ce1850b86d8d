"""Which tensors are weights: leaves of the parameter pytree, and what views and casts make of them.

A tensor is recognised by its innermost value: ``grad`` and ``vmap`` wrap a tensor in one object a
level, and the same weight shows as another wrapper inside and outside a transform. What every
wrapper has in common is the plain tensor at the bottom.
"""

import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefp8.recipe import Recipe

_functorch = torch._C._functorch


class Weight(NamedTuple):
    """Where a tensor comes from and what the rules say about it."""

    #: Dotted paths of the leaves it is made of; several if tied or stacked.
    paths: tuple[str, ...]
    #: Index of the rule that matches, and its recipe; None if none does.
    rule: int | None
    recipe: Recipe | None


def innermost(x: Tensor) -> Tensor:
    """The plain tensor under the wrappers of ``torch.func``."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


class Registry:
    """Tensors known to be weights. Holds no tensor alive, so a cast is freed as it would be."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], Weight]] = {}

    def find(self, x: Any) -> Weight | None:
        if not isinstance(x, Tensor):
            return None
        x = innermost(x)
        entry = self._entries.get(id(x))
        # The id of a tensor that died may be in use again.
        return entry[1] if entry is not None and entry[0]() is x else None

    def add(self, x: Tensor, weight: Weight) -> None:
        x = innermost(x)
        self._entries[id(x)] = weakref.ref(x), weight

    def drop(self, x: Tensor) -> None:
        self._entries.pop(id(innermost(x)), None)


# --- what is followed ----------------------------------------------------------------------------

_FOLLOWED_NAMES = re.findall(
    r"\w+",
    """
    T mT H mH data
    adjoint alias bfloat16 broadcast_to chunk clone contiguous cpu cuda detach double
    dsplit expand expand_as flatten float half hsplit moveaxis movedim narrow permute requires_grad_
    reshape reshape_as select split split_with_sizes squeeze swapaxes swapdims t tensor_split to
    transpose type type_as unbind unflatten unsafe_chunk unsafe_split unsafe_split_with_sizes
    unsqueeze view view_as vsplit __deepcopy__
""",
)


def _functions(names: Iterable[str]) -> set[Callable]:
    """Those functions and methods; an attribute such as ``T`` is seen as its getter."""
    of_tensor = [getattr(Tensor, name) for name in names if hasattr(Tensor, name)]
    of_torch = [getattr(torch, name) for name in names if callable(getattr(torch, name, None))]
    return {f if callable(f) else f.__get__ for f in (*of_tensor, *of_torch)}


#: Views and casts of their first argument, and of nothing else.
FOLLOWED = _functions(_FOLLOWED_NAMES)
#: Indexing is a view or a lookup, depending on the index.
INDEXING = {Tensor.__getitem__}
#: A weight if every part is one.
JOINING = _functions(["cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"])

LOOKUP = "indexed with a tensor: a lookup gives activations"


def picks_whole_matrices(x: Tensor, index: Any) -> bool:
    """Whether ``x[index]`` still holds matrices of ``x``: a view, or a gather along leading axes.

    ``table[tokens]`` of a 2D table looks rows up and gives activations; ``w[ids]`` of a stacked
    (G, N, K) weight picks experts.
    """
    parts = index if isinstance(index, tuple) else (index,)

    def is_gather(i: Any) -> bool:
        if isinstance(i, Tensor):
            return i.ndim > 0 or i.dtype == torch.bool
        return isinstance(i, Sequence) and not isinstance(i, str)

    gathers = [n for n, i in enumerate(parts) if is_gather(i)]
    if not gathers:
        return True
    plain = all(isinstance(i, int | slice | Tensor | Sequence) for i in parts)
    # A boolean mask consumes as many axes as it has.
    consumed = sum(i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else 1 for i in parts)
    return plain and consumed <= x.ndim - 2


def is_in_place(func: Callable) -> bool:
    """Whether the name says that ``func`` overwrites its first argument."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name[3:-2] in _IN_PLACE_OPERATORS)
    return name.endswith("_") and not name.startswith("_") and func not in FOLLOWED


_IN_PLACE_OPERATORS = {
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "matmul",
}


def join(parts: Sequence[Weight | None]) -> Weight | str:
    """The weight that a concatenation of ``parts`` is, or why it is none."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return "joined with a tensor that is no weight"
    if len({part.recipe for part in known}) > 1:
        return "joined with weights under other recipes"
    paths = dict.fromkeys(path for part in known for path in part.paths)
    return known[0]._replace(paths=tuple(paths))
