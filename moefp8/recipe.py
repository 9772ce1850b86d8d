"""Recipes: which number format each of the three products of a layer uses. Recipes are data.

A linear map has three products, and each contracts over another axis, so each quantises its own
operands (``docs/recipes.md`` has the table)::

    fwd    out = a @ b        contracts over K
    dgrad  da  = g @ b^T      contracts over N
    wgrad  db  = a^T @ g      contracts over M

>>> MXFP8._replace(wgrad=HIGH_PRECISION) == MXFP8_WGRAD_HP
True
"""

from typing import NamedTuple

import torch

from moefp8.formats import element_format
from moefp8.mx import check_group, check_rule

FORMATS = ("mx", "row", "none")


class Gemm(NamedTuple):
    """How the operands of one product are quantised, both alike, along the contraction."""

    #: "mx": power-of-two scales; "row": one float32 scale over the whole contraction, amax / max;
    #: "none": operands as they come.
    format: str = "mx"
    #: Element dtype, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
    dtype: torch.dtype = torch.float8_e4m3fn
    #: Scale rule of format "mx", see :func:`moefp8.quantize_mx`.
    rule: str = "rceil"
    #: Elements that share a scale (format "mx"): a multiple of 32, -1 for the whole contraction, or
    #: None for what the implementation does natively (32 where blocks are exact).
    group: int | None = None
    #: Contraction length after which a kernel adds its short tensor-core accumulator into a float32
    #: one. An implementation that accumulates in float32 throughout, as the reference does, meets
    #: any interval.
    promote: int = 128


HIGH_PRECISION = Gemm(format="none")


class Recipe(NamedTuple):
    """One :class:`Gemm` for each product of a layer. Hashable, comparable, edited with ``_replace``.

    >>> MXFP8._replace(dgrad=Gemm(dtype=torch.float8_e5m2)).dgrad.dtype
    torch.float8_e5m2
    """

    fwd: Gemm = Gemm()
    dgrad: Gemm = Gemm()
    wgrad: Gemm = Gemm()


#: MXFP8 in all three products; the alignment span is the implementation's own.
MXFP8 = Recipe()
#: MXFP8 but for the weight gradient, which stays in high precision.
MXFP8_WGRAD_HP = Recipe(wgrad=HIGH_PRECISION)
#: True 32-element blocks in every implementation.
MXFP8_EXACT = Recipe(*(Gemm(group=32),) * 3)
#: FP8 with one float32 scale for each row of the left and column of the right operand.
FP8_ROWWISE = Recipe(*(Gemm(format="row"),) * 3)
#: No quantisation: operands are multiplied in the dtype they come in.
BF16 = Recipe(*(HIGH_PRECISION,) * 3)

PRESETS = {
    "mxfp8": MXFP8,
    "mxfp8_wgrad_hp": MXFP8_WGRAD_HP,
    "mxfp8_exact": MXFP8_EXACT,
    "fp8_rowwise": FP8_ROWWISE,
    "bf16": BF16,
}


def check_recipe(recipe: Recipe, *, auto: bool = False) -> None:
    """Reject a recipe with a field out of range; the error names product and field.

    ``auto``: whether the caller takes "auto" as well, which the error then says.
    """
    if not isinstance(recipe, Recipe):
        expected = "a Recipe such as moefp8.MXFP8" + (", or 'auto'" if auto else "")
        raise TypeError(f"recipe: expected {expected}, got {recipe!r}")
    for product, gemm in zip(recipe._fields, recipe, strict=True):
        try:
            _check_gemm(gemm)
        except (TypeError, ValueError) as error:
            raise type(error)(f"recipe.{product}: {error}") from error


def _check_gemm(gemm: Gemm) -> None:
    if not isinstance(gemm, Gemm):
        raise TypeError(f"expected a Gemm, got {gemm!r}")
    if gemm.format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(map(repr, FORMATS))}, got {gemm.format!r}")
    element_format(gemm.dtype)
    check_rule(gemm.rule)
    if gemm.group is not None:
        check_group(gemm.group)
    if gemm.promote < 32 or gemm.promote % 32:
        raise ValueError(f"promote: expected a positive multiple of 32, got {gemm.promote}")
