"""TorchTitan: the grouped products of a model's experts under a recipe (extra ``torchtitan``).

An override in TorchTitan's own sense, switched on by one flag of its training command::

    --override.imports 'moefp8.integrations.torchtitan.experts={"recipe": "mxfp8"}'

It replaces the configuration of every experts module by one whose module differs in a single
method, the seam ``_grouped_mm`` that TorchTitan keeps for this purpose. Parameters, their names,
sharding, checkpoints and the token dispatcher stay as they are: groups of any size are fine, so
nothing has to be padded.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moefp8.grouped import scaled_grouped_mm
from moefp8.kernels import REGISTRY
from moefp8.recipe import PRESETS, Recipe, check_recipe

try:
    from torchtitan.config import derive, override
    from torchtitan.models.common.moe import GroupedExperts
except ImportError as error:
    raise ImportError(
        "moefp8.integrations.torchtitan needs torchtitan >= 0.3: pip install 'moefp8[torchtitan]'"
    ) from error


@override(
    target=GroupedExperts.Config, description="Grouped products of the experts under a moefp8 recipe."
)
def experts(cfg: Any, *, recipe: str = "mxfp8", implementation: str | None = None) -> Any:
    """The override; TorchTitan calls it for every experts module of a model.

    Args:
        cfg: configuration of ``GroupedExperts`` or of a subclass that uses its seam (gpt-oss).
        recipe: one of ``moefp8.recipe.PRESETS``: "mxfp8", "mxfp8_wgrad_hp", "mxfp8_exact",
            "fp8_rowwise", "bf16".
        implementation: as in :func:`moefp8.scaled_grouped_mm`.

    Returns:
        The configuration to build instead.

    Raises:
        ValueError: an unknown recipe or implementation, or experts that would not heed the recipe.

    >>> cfg = experts(GroupedExperts.Config(dim=32, hidden_dim=64, num_experts=4), recipe="fp8_rowwise")
    >>> cfg.build()
    ScaledGroupedExperts(recipe=fp8_rowwise)
    """
    if recipe not in PRESETS:
        raise ValueError(f"recipe: expected one of {', '.join(map(repr, PRESETS))}, got {recipe!r}")
    return with_recipe(cfg, PRESETS[recipe], implementation=implementation)


def with_recipe(cfg: Any, recipe: Recipe, *, implementation: str | None = None) -> Any:
    """The configuration ``cfg`` of an experts module with its products under any ``recipe``.

    For an override of your own, when a name of a preset is not enough::

        @override(target=GroupedExperts.Config, fqns=["*.layers.5.*"])
        def my_experts(cfg):
            return with_recipe(cfg, MXFP8._replace(dgrad=Gemm(dtype=torch.float8_e5m2)))

    Args:
        cfg: configuration of ``GroupedExperts`` or of a subclass that uses its seam.
        recipe: a :class:`moefp8.Recipe`.
        implementation: as in :func:`moefp8.scaled_grouped_mm`, one name.

    Returns:
        A configuration with the fields of ``cfg``, for a subclass of its module.

    Raises:
        ValueError: an unknown implementation; a module that already replaces the seam, as
            TorchTitan's own quantisation does, or that never calls it.
    """
    check_recipe(recipe)
    if implementation is not None and implementation not in REGISTRY:
        known = ", ".join(map(repr, REGISTRY))
        raise ValueError(f"implementation: expected one of {known}, got {implementation!r}")
    parent = type(cfg)._owner
    if parent._grouped_mm is not GroupedExperts._grouped_mm:
        raise ValueError(
            f"{parent.__name__}: already replaces _grouped_mm; leave out the converter or override that "
            f"did it"
        )
    if "self._grouped_mm(" not in inspect.getsource(parent.forward):
        raise ValueError(
            f"{parent.__name__}: its forward does not call _grouped_mm, so a recipe would have no effect. "
            f"moefp8.low_precision goes by parameter names and needs no seam"
        )
    name = next((name for name, preset in PRESETS.items() if preset == recipe), repr(recipe))
    return derive(cfg, _scaled(parent).Config, recipe=name, implementation=implementation, _recipe=recipe)


@functools.cache
def _scaled(parent: Any) -> Any:
    """The subclass of an experts module whose seam is ``scaled_grouped_mm``."""

    class ScaledGroupedExperts(parent):
        @dataclass(kw_only=True, slots=True)
        class Config(parent.Config):
            recipe: str  # what to_dict, and so the logs, show
            implementation: str | None
            _recipe: Recipe

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.recipe = config._recipe
            self._recipe_name = config.recipe
            self.implementation = config.implementation

        def _grouped_mm(self, **seam: Tensor) -> Tensor:
            a, b, offs = _operands(seam)
            return scaled_grouped_mm(a, b, offs, recipe=self.recipe, implementation=self.implementation)

        def extra_repr(self) -> str:
            return f"recipe={self._recipe_name}"

    name = f"Scaled{parent.__name__}"
    ScaledGroupedExperts.__name__ = ScaledGroupedExperts.__qualname__ = name
    ScaledGroupedExperts.Config.__qualname__ = f"{name}.Config"  # what TorchTitan logs
    return ScaledGroupedExperts


def _operands(seam: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights (E, in, out) and group ends from the arguments of the seam, by their names.

    0.3.0 passes a transposed bfloat16 weight. From #4344 on the weight comes as the parameter is,
    (E, out, in) in its own dtype, and the seam casts; a later change renames the other two.
    """
    match seam:
        case {"A": a, "B_t": b, "offs": offs, **rest} if not rest:
            return a, b, offs
        case {"A": a, "weight_EOI": weight, "offs": offs, **rest} if not rest:
            return a.bfloat16(), weight.bfloat16().mT, offs
        case {"input_RI": a, "weight_EOI": weight, "offsets_E": offs, **rest} if not rest:
            return a.bfloat16(), weight.bfloat16().mT, offs
    raise NotImplementedError(
        f"_grouped_mm: expected arguments (A, B_t, offs), (A, weight_EOI, offs) or (input_RI, weight_EOI, "
        f"offsets_E), got ({', '.join(seam)}); this version of TorchTitan is newer than this integration"
    )
