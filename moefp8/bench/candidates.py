"""What is measured: this library under each recipe and, in ``peers.py``, everything beside it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moefp8 import scaled_grouped_mm
from moefp8._operands import prepare
from moefp8.bench.problem import NEVER, Operands, Problem, common_multiple
from moefp8.bench.refusals import REFUSALS, explain
from moefp8.recipe import PRESETS, Recipe

#: The tensors a step returns: out, or out, da and db (in the shape of b).
Results = tuple[Tensor, ...]
#: ``product(a, b, offs) -> out``, differentiable by autograd.
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """A problem with its operands in place."""

    problem: Problem
    operands: Operands
    #: Largest number that divides every group size.
    multiple_of: int
    #: Forward and both gradients, or the forward alone.
    backward: bool

    @property
    def device(self) -> torch.device:
        return self.operands.a.device


def make_case(problem: Problem, operands: Operands, backward: bool) -> Case:
    return Case(problem, operands, common_multiple(operands.offs), backward)


class Candidate(NamedTuple):
    """Something to time.

    Attributes:
        name: as it stands in tables.
        build: makes the step to time from a case; what it does itself is not timed.
        refuse: why it cannot run a case, or None.
        fp8: whether it quantises, for the count of bytes.
        whole: False if the step leaves out work that training needs, such as quantising.
        tunes: whether its first call at a shape may take minutes, so that it is made apart first.
        served_by: of this library: the implementation that serves a case.
    """

    name: str
    build: Callable[[Case], Callable[[], Results]]
    refuse: Callable[[Case], str | None] = lambda case: None
    fp8: bool = True
    whole: bool = True
    tunes: bool = False
    served_by: Callable[[Case], str] | None = None


def differentiable(
    product: Callable[[Tensor, Tensor, Tensor], Tensor], case: Case
) -> Callable[[], Results]:
    """A step that calls ``product(a, b, offs)`` and, if the case says so, autograd's backward."""
    a, b, offs, cotangent = case.operands

    def forward() -> Results:
        with torch.no_grad():
            return (product(a, b, offs),)

    def both() -> Results:
        out = product(a, b, offs)
        return out.detach(), *torch.autograd.grad(out, (a, b), cotangent)

    return both if case.backward else forward


def named_recipes(names: Sequence[str], promote: Sequence[int]) -> dict[str, Recipe]:
    """The presets of these names, each with every promotion interval asked for."""
    chosen = {}
    for name in names:
        recipe = PRESETS[name]
        chosen[name] = recipe
        for interval in promote if recipe != PRESETS["bf16"] else ():
            gemms = (gemm._replace(promote=interval) for gemm in recipe)
            chosen[f"{name}, promote={'never' if interval >= NEVER else interval}"] = Recipe(*gemms)
    return chosen


def chosen(recipes: dict[str, Recipe], wanted: str | None, device: torch.device) -> dict[str, str]:
    """Which implementation serves each recipe on bfloat16 operands, or why none does."""
    a = torch.zeros(64, 64, dtype=torch.bfloat16, device=device)
    names = {}
    for name, recipe in recipes.items():
        try:
            names[name] = prepare("rows", a, a[None], None, recipe, None, wanted).implementation
        except REFUSALS as error:
            names[name] = explain(error)
    return names


def ours(recipes: dict[str, Recipe], implementation: str | None) -> list[Candidate]:
    """One candidate for each recipe, named ``moefp8 <recipe>``."""

    def candidate(name: str, recipe: Recipe) -> Candidate:
        product = partial(scaled_grouped_mm, recipe=recipe, implementation=implementation)
        return Candidate(
            f"moefp8 {name}",
            build=lambda case: differentiable(lambda a, b, offs: product(a, b, offs), case),
            fp8=recipe != PRESETS["bf16"],
            served_by=lambda case: (
                prepare(
                    "rows", case.operands.a, case.operands.b, None, recipe, None, implementation
                ).implementation
            ),
        )

    return [candidate(name, recipe) for name, recipe in recipes.items()]
