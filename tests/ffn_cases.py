"""``expert_ffn`` under a recipe, on a backend: what tests of its laws and transforms run over."""

from typing import Any, NamedTuple

import pytest
from specs import REFERENCE, TRITON, Backend, Layout, randn
from torch import Tensor

from moefp8 import expert_ffn
from moefp8.recipe import PRESETS, Recipe

#: Multiples of 16, as the kernels want them, and not of 32 where it can be.
DIM, HIDDEN = 32, 48


class FFNCase(NamedTuple):
    recipe: Recipe
    backend: Backend

    @property
    def options(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "implementation": self.backend.implementation}

    def _draw(self, *shape: int, seed: int) -> Tensor:
        return randn(*shape, seed=seed, dtype=self.backend.dtype).to(self.backend.device)

    def params(self, num_experts: int, seed: int = 0) -> dict[str, Tensor]:
        """Weights and biases."""
        shapes: dict[str, tuple[int, ...]] = {
            "w1": (HIDDEN, DIM), "w2": (DIM, HIDDEN), "w3": (HIDDEN, DIM),
            "b1": (HIDDEN,), "b2": (DIM,), "b3": (HIDDEN,),
        }  # fmt: skip
        return {
            name: self._draw(num_experts, *shape, seed=100 * seed + i) / 4
            for i, (name, shape) in enumerate(shapes.items())
        }

    def rows(self, count: int, seed: int = 7) -> Tensor:
        """Tokens, or a cotangent."""
        return self._draw(count, DIM, seed=seed)

    def offs(self, layout: Layout) -> Tensor:
        return layout.offs(self.backend.device)

    def ffn(self, params: dict[str, Tensor], x: Tensor, offs: Tensor, **more: Any) -> Tensor:
        return expert_ffn(params, x, offs, **self.options, **more)


def cases(*names: str) -> list[Any]:
    """Those recipes (all presets if none is named) on every backend."""
    return [
        pytest.param(
            FFNCase(PRESETS[name], backend),
            id=f"{name}-{backend.implementation}",
            marks=[pytest.mark.gpu] if backend is TRITON else [],
        )
        for backend in (REFERENCE, TRITON)
        for name in names or PRESETS
    ]
