"""How the operands of the three products fare when they are quantised: what to watch over a training run.

Forward operands are known in the forward, so their statistics are an auxiliary output. Cotangents are
known in the backward alone, and a pure function hands nothing out of there but gradients: so theirs are
the *gradient of a probe*, a tree of zeros that the layer takes and that changes nothing else.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8._quantize import block_amax, dequantize, quantize, quantize_jagged, stored_group
from moefp8.formats import BLOCK, element_format
from moefp8.groups import segments
from moefp8.recipe import MXFP8, Gemm, Recipe, check_recipe


class OperandStats(NamedTuple):
    """One operand of one product, as quantised along its contraction. All float32 scalars.

    Attributes:
        saturated: share of the elements that round to more than the largest value of the format, and are
            clamped to it. Rule "floor" does that, "rceil" and rowwise scales do not.
        flushed: share of the elements that are not zero and become zero.
        subnormal: share of the elements that become subnormal numbers, with fewer bits.
        spread: binades from the smallest to the largest exponent that the 32-element blocks of one
            contraction have, zero blocks left out: mean over all contractions. Beyond some 12 binades
            scales that span the contraction lose bits that 32-element blocks keep.
        max_spread: the largest of them.
        amax: largest finite magnitude.
    """

    saturated: Tensor
    flushed: Tensor
    subnormal: Tensor
    spread: Tensor
    max_spread: Tensor
    amax: Tensor


#: The operands of a feed-forward, and the products that read each.
FORWARD = {
    "x": ("fwd", "wgrad"),
    "hidden": ("fwd", "wgrad"),
    "w1": ("fwd", "dgrad"),
    "w2": ("fwd", "dgrad"),
    "w3": ("fwd", "dgrad"),
}
COTANGENTS = {"out": ("dgrad", "wgrad"), "gate": ("dgrad", "wgrad"), "up": ("dgrad", "wgrad")}

Statistics = dict[str, dict[str, OperandStats]]


def entries(operands: Mapping[str, Sequence[str]], recipe: Recipe) -> list[tuple[str, str]]:
    """(operand, product) for each that ``recipe`` quantises, in the order they are packed."""
    return [
        (operand, product)
        for operand, products in operands.items()
        for product in products
        if getattr(recipe, product).format != "none"
    ]


def unpack(packed: Tensor, operands: Mapping[str, Sequence[str]], recipe: Recipe) -> Statistics:
    """Rows of ``(n, 6)`` by operand and product."""
    out: Statistics = {}
    for (operand, product), row in zip(entries(operands, recipe), packed.unbind(0), strict=True):
        out.setdefault(operand, {})[product] = OperandStats(*row.unbind(0))
    return out


def cotangent_probe(recipe: Recipe = MXFP8, *, device: torch.device | str | None = None) -> Statistics:
    """Zeros whose gradient is the statistics of the cotangents of one call of the layer.

    ::

        probe = cotangent_probe(recipe)
        loss  = lambda params, probe: f(moe_ffn(params, x, config=config, recipe=recipe, probe=probe))
        grads, statistics = grad(loss, (0, 1))(params, probe)

    The probe takes no part in any result, and without it nothing is measured. One that goes into several
    calls gets the sum of their statistics, as gradients do: give each layer its own.

    Args:
        recipe: that of the call.
        device: that of the tokens.

    Returns:
        A dict of dicts of :class:`OperandStats`: of ``"out"``, ``"gate"`` and ``"up"``, the cotangents of
        the experts' output and of both inner products, under ``"dgrad"`` (along their columns) and
        ``"wgrad"`` (along the rows of each expert), where ``recipe`` quantises those.

    >>> {name: list(products) for name, products in cotangent_probe().items()}
    {'out': ['dgrad', 'wgrad'], 'gate': ['dgrad', 'wgrad'], 'up': ['dgrad', 'wgrad']}
    """
    check_recipe(recipe)
    count = len(entries(COTANGENTS, recipe))
    return unpack(torch.zeros(count, len(OperandStats._fields), device=device), COTANGENTS, recipe)


def _leaves_wanted(recipe: Recipe) -> list[str]:
    return [
        f"{operand}.{product}.{field}"
        for operand, product in entries(COTANGENTS, recipe)
        for field in OperandStats._fields
    ]


def _leaves_of(probe: Any) -> list[str]:
    return [
        ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        for path, _ in pytree.tree_leaves_with_path(probe)
    ]


def is_probe(probe: Any, recipe: Recipe) -> bool:
    """Whether ``probe`` has the leaves of ``cotangent_probe(recipe)``."""
    return _leaves_of(probe) == _leaves_wanted(recipe)


def pack_probe(probe: Any, recipe: Recipe) -> Tensor | None:
    """The leaves of a probe as one ``(n, 6)`` tensor; None for one without any."""
    if not is_probe(probe, recipe):
        got = _leaves_of(probe)
        raise ValueError(f"probe: expected cotangent_probe(recipe) of this recipe, got leaves {got}")
    leaves = pytree.tree_leaves(probe)
    return torch.stack(leaves).unflatten(0, (-1, len(OperandStats._fields))) if leaves else None


# --- measuring -----------------------------------------------------------------------------------


def _fake_measure(
    x: Tensor, offs: Tensor | None, axis: int, dtype: torch.dtype, rule: str, group: int
) -> Tensor:
    return x.new_empty(len(OperandStats._fields), dtype=torch.float32)


@leaf("operand_stats", fake=_fake_measure, vmap=by_loop)
def _measure(
    x: Tensor, offs: Tensor | None, axis: int, dtype: torch.dtype, rule: str, group: int
) -> Tensor:
    fmt = element_format(dtype)
    if x.numel() == 0:
        return _fake_measure(x, offs, axis, dtype, rule, group).zero_()
    x = x.to(torch.float32)
    count: Tensor | int = x.numel()
    owner = None
    if offs is None:
        data, scale = quantize(x, axis, dtype, rule, group, None)
    elif axis == -1:
        count = offs[-1] * x.shape[1]
        x = torch.where(torch.arange(x.shape[0], device=x.device)[:, None] < offs[-1], x, 0)
        data, scale = quantize(x, axis, dtype, rule, group, None)
    else:
        count = offs[-1] * x.shape[1]
        data, scale, _ = quantize_jagged(x, offs, dtype, rule, group)
        plan = segments(offs, x.shape[0], max(group, BLOCK))
        x, owner, group = plan.pad(x), plan.group[::BLOCK], stored_group(group)
    value = dequantize(data, scale, axis, group, torch.float32)
    code = data.view(torch.uint8) & 0x7F

    # Beyond halfway from the largest value to what would come next.
    beyond = 1 + 2.0 ** (fmt.emax - fmt.mantissa_bits - 1) / fmt.max
    top_code = int(torch.tensor(fmt.max).to(dtype).view(torch.uint8))
    saturated = x.isfinite() & (code == top_code) & (x.abs() > beyond * value.abs())
    flushed = (code == 0) & (x != 0)
    subnormal = (code > 0) & (code < 1 << fmt.mantissa_bits)
    mean, largest = _spread(block_amax(x, axis)[0], axis, owner, 0 if offs is None else offs.shape[0])
    shares = [hit.sum() / count for hit in (saturated, flushed, subnormal)]
    shares = [torch.where(share.isfinite(), share, 0) for share in shares]  # of no rows
    amax = torch.where(x.isfinite(), x.abs(), 0).amax()
    return torch.stack([*shares, mean, largest, amax]).to(torch.float32)


def _spread(amax: Tensor, axis: int, owner: Tensor | None, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and maximum, over contractions, of the binades that their blocks' ``amax`` spread over."""
    exponent, zero = torch.frexp(amax).exponent.to(torch.float32), amax == 0
    high, low = torch.where(zero, -torch.inf, exponent), torch.where(zero, torch.inf, exponent)
    if owner is None:
        high, low = high.amax(axis), low.amin(axis)
    else:  # one contraction for each group and column; blocks past the last group are zero
        index = owner[:, None].expand_as(high)
        none = high.new_full((num_groups + 1, high.shape[1]), torch.inf)
        high = (-none).scatter_reduce(0, index, high, "amax")
        low = none.scatter_reduce(0, index, low, "amin")
    some = high.isfinite()
    spread = torch.where(some, high - low, 0)
    return spread.sum() / some.sum().clamp(min=1), spread.amax()


def measure(x: Tensor, offs: Tensor | None, axis: int, gemm: Gemm, native_group: int) -> Tensor:
    """The fields of :class:`OperandStats` as ``(6,)``: ``x`` (M, K) with its groups' ends, or a weight
    (G, N, K), quantised along ``axis`` (-1 or -2, then within each group of rows)."""
    if gemm.format == "row":
        return _measure(x, offs, axis, gemm.dtype, "fp32", -1)
    group = native_group if gemm.group is None else gemm.group
    return _measure(x, offs, axis, gemm.dtype, gemm.rule, group)
