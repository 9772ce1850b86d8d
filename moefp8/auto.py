"""``recipe="auto"``: FP8 for a feed-forward where it is faster than bfloat16, by a model fitted on a card.

FP8 halves the time of the products and pays for quantising their operands, so it loses where products
are small: narrow experts, or few rows to each. The time of a forward and backward of the feed-forward of
M rows, D x H matrices and E experts is modelled, for either recipe, as a sum of what it has to do::

    seconds = fixed                                    launches
            + per_expert * E                           tiles cut off at group ends, tables
            + per_flop * 18 P D H                      nine products; P: M, each share rounded up to 128
            + per_activation * M (D + H)               quantising, SwiGLU, gathers
            + per_weight * 3 E D H                     quantising weights, writing their gradients

with coefficients fitted to measured times (``python -m moefp8.bench.fit_auto``), all of them at least 0.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moefp8.quantized import QuantizedParams
from moefp8.recipe import BF16, MXFP8, Recipe
from moefp8.statistics import is_probe

#: What a layer takes for a recipe of its own choice.
Auto = Literal["auto"]
#: Rows of a tile of the grouped products on a group's last rows.
_TILE = 128
#: How much slower than bfloat16 a choice may turn out.
ALLOWED = 1.03


class Shape(NamedTuple):
    """A feed-forward: M rows (copies of a token count), width D, hidden width H, E experts."""

    rows: int
    dim: int
    hidden: int
    experts: int

    def work(self) -> tuple[float, float, float, float, float]:
        """How much there is of each thing that :class:`Rates` has a rate for."""
        m, d, h, e = self
        padded = e * -(-m // (e * _TILE)) * _TILE
        return 1.0, float(e), 18.0 * padded * d * h, float(m * (d + h)), 3.0 * e * d * h


class Rates(NamedTuple):
    """Seconds for each unit of work."""

    fixed: float
    per_expert: float
    per_flop: float
    per_activation: float
    per_weight: float

    def seconds(self, shape: Shape) -> float:
        return sum(rate * work for rate, work in zip(self, shape.work(), strict=True))


class Card(NamedTuple):
    """What was measured on one kind of GPU.

    Attributes:
        bf16, mxfp8: rates under ``BF16`` and under ``MXFP8``.
        error: largest factor by which the time of MXFP8 over that of bfloat16 was underestimated where
            MXFP8 was predicted to win, less one; each measured shape predicted from the others.
        source: date, versions and the command.
    """

    bf16: Rates
    mxfp8: Rates
    error: float
    source: str


#: By the name that torch gives the device, as ``python -m moefp8.bench.fit_auto`` prints it.
CARDS: dict[str, Card] = {
    "NVIDIA H100 80GB HBM3": Card(
        bf16=Rates(
            fixed=1.583e-4,
            per_expert=0.0,
            per_flop=1.2429e-15,
            per_activation=7.104e-12,
            per_weight=1.5628e-12,
        ),
        mxfp8=Rates(
            fixed=4.071e-4,
            per_expert=0.0,
            per_flop=6.627e-16,
            per_activation=7.806e-12,
            per_weight=3.7254e-12,
        ),
        error=0.0926,
        source="2026-11-24, torch 2.11.0+cu130, Triton 3.6.0: python -m moefp8.bench.fit_auto",
    ),
}


class Choice(NamedTuple):
    """What :func:`choose_recipe` chose, and why.

    Attributes:
        recipe: ``BF16`` or ``MXFP8``.
        reason: a sentence.
        bf16_seconds, mxfp8_seconds: predicted times of one forward and backward; None without a GPU.
    """

    recipe: Recipe
    reason: str
    bf16_seconds: float | None = None
    mxfp8_seconds: float | None = None

    def __str__(self) -> str:
        return f"{'BF16' if self.recipe == BF16 else 'MXFP8'}: {self.reason}"


@torch.compiler.assume_constant_result
def _card_name(device: str) -> str | None:
    """Asked while tracing, and a constant of the graph; None for a GPU that is not there."""
    return _ask_card_name(device)


@torch.compiler.disable  # Dynamo enters what it called for a constant once the caller has raised
def _ask_card_name(device: str) -> str | None:
    try:
        return torch.cuda.get_device_name(device)
    except (AssertionError, RuntimeError):  # torch without CUDA, no driver, no such number
        return None


def choose_recipe(
    rows: int,
    dim: int,
    hidden: int,
    num_experts: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    card: Card | None = None,
) -> Choice:
    """The recipe that ``recipe="auto"`` stands for in a layer of these sizes, and the reason.

    MXFP8 where the model of the card predicts that it is not slower than bfloat16, and that it is at most
    3 % slower even if the model is off by as much as it was off on any shape it was fitted to; bfloat16
    elsewhere. On a CPU the answer is bfloat16: FP8 is emulated there.

    Args:
        rows: M, rows that the experts get: tokens times ``top_k``. They are taken to spread evenly.
        dim: D.
        hidden: H.
        num_experts: E.
        dtype: of tokens and weights. The kernels' unquantised products take bfloat16, so for float32 and
            float16 it is MXFP8; for float64 it is ``BF16``, which quantises nothing.
        device: where the layer runs. Not asked if ``card`` is given.
        card: measurements of your own; those that come with the library if left out.

    Returns:
        A :class:`Choice`; ``print`` says what and why.

    Raises:
        TypeError: ``card`` is no :class:`Card`.
        ValueError: a size that is not positive (``rows`` may be 0); a GPU that torch does not find.
        NotImplementedError: a GPU of which there are no measurements.

    >>> print(choose_recipe(4096, 2048, 768, 128, device="cpu"))
    BF16: FP8 is emulated on a CPU, and slower
    >>> card = Card(Rates(0, 0, 1.5e-15, 0, 0), Rates(1e-4, 0, 0.8e-15, 1e-12, 1e-12), 0.0, "made up")
    >>> print(choose_recipe(131072, 5120, 8192, 8, card=card))
    MXFP8: predicted to take 0.55 of the time of bfloat16, 82.0 ms instead of 148.4 ms
    >>> print(choose_recipe(256, 2048, 768, 128, card=card))
    BF16: MXFP8 is predicted to take 1.55 times as long, 1.1 ms instead of 0.7 ms
    """
    for name, size, least in (
        ("rows", rows, 0),
        ("dim", dim, 1),
        ("hidden", hidden, 1),
        ("num_experts", num_experts, 1),
    ):
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}")
    if card is not None and not isinstance(card, Card):
        raise TypeError(f"card: expected a Card, got {card!r}")
    device = torch.device(device)
    card = card or _card_of(device)
    recipe = _faster(rows, dim, hidden, num_experts, dtype, card)
    if card is None:
        return Choice(recipe, f"FP8 is emulated on a {device.type.upper()}, and slower")
    if dtype == torch.float64:
        return Choice(recipe, "float64 is not quantised")
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        return Choice(recipe, f"no kernel multiplies {name} operands unquantised")
    shape = Shape(rows, dim, hidden, num_experts)
    low, high = card.mxfp8.seconds(shape), card.bf16.seconds(shape)
    ratio, milliseconds = low / high, f"{1e3 * low:.1f} ms instead of {1e3 * high:.1f} ms"
    if recipe == MXFP8:
        reason = f"predicted to take {ratio:.2f} of the time of bfloat16, {milliseconds}"
    elif ratio > 1.0:
        reason = f"MXFP8 is predicted to take {ratio:.2f} times as long, {milliseconds}"
    else:
        reason = (
            f"MXFP8 is predicted to take {ratio:.2f} of the time, {milliseconds}, but predictions are off "
            f"by up to {100 * card.error:.0f} %, which could make it slower"
        )
    return Choice(recipe, reason, high, low)


def _faster(
    rows: int, dim: int, hidden: int, num_experts: int, dtype: torch.dtype, card: Card | None
) -> Recipe:
    """The choice without the words for it: sizes may be symbols of a compiler, which have no digits."""
    if card is None or dtype == torch.float64:
        return BF16
    if dtype != torch.bfloat16:
        return MXFP8
    shape = Shape(rows, dim, hidden, num_experts)
    low, high = card.mxfp8.seconds(shape), card.bf16.seconds(shape)
    return MXFP8 if low <= high and low * (1 + card.error) <= ALLOWED * high else BF16


def _card_of(device: torch.device) -> Card | None:
    """None but for a GPU."""
    if device.type != "cuda":
        return None
    name = _card_name(str(device))
    if name is None:
        raise ValueError(
            f"device: expected a GPU that torch finds, got '{device}'; pass device='cpu', or for a GPU "
            f"elsewhere its measurements, card=..."
        )
    if name not in CARDS:
        known = ", ".join(map(repr, CARDS)) or "none yet"
        raise NotImplementedError(
            f"recipe 'auto': there are no measurements of {name!r} (of: {known}). Name a recipe, or "
            f"measure with python -m moefp8.bench.fit_auto and pass choose_recipe(..., card=...).recipe"
        )
    return CARDS[name]


def resolve(params: Mapping[str, Any], x: Tensor, rows: int, quantized: Any, probe: Any) -> Recipe:
    """What "auto" stands for in a layer of checked parameters, on tokens ``x`` that make ``rows`` rows.

    Rejects ``quantized`` and ``probe`` of another recipe: which one is not for the caller to see.
    """
    recipe = _resolve(params, x, rows)
    if isinstance(quantized, QuantizedParams) and quantized.source.recipe != recipe:
        raise _clash("quantized", recipe)
    if probe is not None and not is_probe(probe, recipe):
        raise _clash("probe", recipe)
    return recipe


def _clash(name: str, recipe: Recipe) -> ValueError:
    chosen, too = ("BF16", " and which quantises nothing") if recipe == BF16 else ("MXFP8", "")
    return ValueError(
        f"{name}: expected one made for {chosen}, which recipe 'auto' stands for here{too}; name the "
        f"recipe that it was made for instead of 'auto', or make it for choose_recipe(...).recipe"
    )


def _resolve(params: Mapping[str, Any], x: Tensor, rows: int) -> Recipe:
    num_experts, hidden, dim = params["w1"].shape
    dtype = functools.reduce(
        torch.promote_types, (params[key].dtype for key in ("w1", "w2", "w3")), x.dtype
    )
    if dtype == torch.float64:  # on a card that was never measured as well
        return BF16
    return _faster(rows, dim, hidden, num_experts, dtype, _card_of(x.device))
