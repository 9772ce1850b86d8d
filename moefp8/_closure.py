"""Tensors that a function uses without taking them as arguments, for ``low_precision`` under compile.

The traced function is opaque to Dynamo, so a tensor it closes over would be baked into the graph as a
constant. Those found here become inputs of the graph instead; any other is refused when it is met.
"""

import enum
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from moefp8._provenance import innermost


class Leaf(enum.Enum):
    """Stands for None in the arguments of a traced function, which may not be None."""

    NONE = enum.auto()


def without_none(x: Any) -> Any:
    return Leaf.NONE if x is None else x


def with_none(x: Any) -> Any:
    return None if x is Leaf.NONE else x


class ClosedOver(NamedTuple):
    modules: list[nn.Module]
    loose: list[Tensor]

    def tensors(self) -> list[Tensor]:
        """All of them, the parameters and buffers of the modules as they are now."""
        held = list(self.loose)
        for module in self.modules:
            held.extend(module.parameters())
            held.extend(module.buffers())
        return held

    def lifted(self, stand_ins: Sequence[Tensor]) -> Mapping[int, Tensor]:
        """What stands in the graph for each tensor, by id."""
        return {id(real): x for real, x in zip(self.tensors(), stand_ins, strict=True)}


def traced_by_dynamo() -> bool:
    """Whether this is Dynamo's dry run of a traced function, which comes before the compiler's."""
    functional = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)
    return functional is None and detect_fake_mode() is not None


def is_plain(x: Any) -> bool:
    """Whether ``x`` holds data rather than being traced."""
    return type(innermost(x)) in (Tensor, nn.Parameter, nn.Buffer)


def closed_over(fn: Any) -> ClosedOver:
    """Modules and tensors in the closure, bound object, defaults and globals that ``fn`` names.

    Looks through partials, bound methods and functions called by ``fn``, not into containers.
    """
    found = ClosedOver([], [])
    seen: set[int] = set()

    def visit(x: Any) -> None:
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, nn.Module):
            found.modules.append(x)
        elif isinstance(x, Tensor):
            found.loose.append(x)
        elif isinstance(x, functools.partial):
            for part in (x.func, *x.args, *x.keywords.values()):
                visit(part)
        elif isinstance(x, types.MethodType):
            visit(x.__func__)
            owner = x.__self__
            for part in (owner, *getattr(owner, "__dict__", {}).values()):
                visit(part)
        elif isinstance(x, types.FunctionType) and not (x.__module__ or "").startswith("torch"):
            for cell in x.__closure__ or ():
                if cell != types.CellType():  # one that is not filled yet has nothing to visit
                    visit(cell.cell_contents)
            names = {name for code in _codes(x.__code__) for name in code.co_names}
            for part in (*(x.__defaults__ or ()), *(x.__globals__.get(name) for name in sorted(names))):
                visit(part)

    visit(fn)
    return found


def _codes(code: types.CodeType) -> list[types.CodeType]:
    """A function's code and that of the functions defined in it."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return [code, *(nested for c in inner for nested in _codes(c))]
