"""Laws of block quantisation. Each check takes the quantiser under test and names what broke."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from moefp8.formats import BLOCK
from moefp8.mx import mx_error_bound
from moefp8.testing._report import differs, fail

Quantize = Callable[[Tensor], Any]
Dequantize = Callable[[Any], Tensor]


def _blocks(x: Tensor, fill: float = 0.0) -> Tensor:
    """(..., n) to (..., blocks, 32), a short last block filled up."""
    return F.pad(x, (0, -x.shape[-1] % BLOCK), value=fill).unflatten(-1, (-1, BLOCK))


def check_error_bound(
    quantize: Quantize,
    dequantize: Dequantize,
    x: Tensor,
    bound: Callable[[Tensor, Any], Tensor] = mx_error_bound,
) -> None:
    """``|x - dequantize(q)| <= bound(x, q)`` for q = quantize(x), compared in float64.

    Where ``bound`` is NaN anything is allowed; it is so in poisoned blocks.
    """
    q = quantize(x)
    value, limit = dequantize(q).double(), bound(x, q).double()
    error = (x.double() - value).abs()
    fail("error bound", ~(error <= limit) & ~limit.isnan(), x=x, value=value, error=error, bound=limit)


def check_projection(quantize: Quantize, dequantize: Dequantize, x: Tensor) -> None:
    """Quantising a quantised value again changes nothing: fake quantisation is idempotent in value."""
    once = dequantize(quantize(x))
    twice = dequantize(quantize(once))
    fail("projection", differs(twice, once), x=x, once=once, twice=twice)


def check_canonical_encoding(quantize: Quantize, dequantize: Dequantize, x: Tensor) -> None:
    """Quantising a quantised value again gives the same codes and scales, not only the same value.

    It holds for rule "floor" alone: under "rceil" a block whose amax rounds down to the largest value
    of the exponent below, as 225 does to 224, is encoded one exponent lower the second time.
    ``quantize`` must return a pytree of tensors, float8 or integer.
    """
    once = quantize(x)
    again = pytree.tree_leaves(quantize(dequantize(once)))
    for i, (got, want) in enumerate(zip(again, pytree.tree_leaves(once), strict=True)):
        got, want = got.view(torch.uint8), want.view(torch.uint8)
        fail(f"canonical encoding, leaf {i}", got != want, got=got, expected=want)


def check_power_of_two_equivariance(quantize: Quantize, dequantize: Dequantize, x: Tensor, k: int) -> None:
    """``fake(x 2^k) == 2^k fake(x)``, for a k that over- and underflows neither x nor its scales."""
    got, want = dequantize(quantize(x * 2.0**k)), dequantize(quantize(x)) * 2.0**k
    fail(f"power-of-two equivariance, k = {k}", differs(got, want), x=x, got=got, expected=want)


def check_sign_symmetry(quantize: Quantize, dequantize: Dequantize, x: Tensor) -> None:
    """``fake(-x) == -fake(x)``."""
    got, want = dequantize(quantize(-x)), -dequantize(quantize(x))
    fail("sign symmetry", differs(got, want), x=x, got=got, expected=want)


def check_permutation_within_block(
    quantize: Quantize, dequantize: Dequantize, x: Tensor, order: Sequence[int]
) -> None:
    """Permuting the elements of each block permutes their values; ``order`` permutes range(32).

    The last axis of ``x`` must be a multiple of 32.
    """

    def permute(v: Tensor) -> Tensor:
        return v.unflatten(-1, (-1, BLOCK))[..., list(order)].flatten(-2)

    got, want = dequantize(quantize(permute(x))), permute(dequantize(quantize(x)))
    fail("permutation within a block", differs(got, want), x=permute(x), got=got, expected=want)


def check_monotone_within_block(quantize: Quantize, dequantize: Dequantize, x: Tensor) -> None:
    """Within a block ``x[i] <= x[j]`` implies ``fake(x)[i] <= fake(x)[j]``; NaN compares with nothing."""
    value = _blocks(dequantize(quantize(x)), fill=torch.inf)
    ordered, index = _blocks(x, fill=torch.inf).sort(-1)
    value = value.gather(-1, index)
    lower, upper = value[..., :-1], value[..., 1:]
    fail("monotone within a block", lower > upper, x=ordered[..., :-1], value=lower, next_value=upper)


def check_rceil_minus_floor(rceil: Quantize, floor: Quantize, x: Tensor) -> None:
    """The scale bytes of rule "rceil" are those of rule "floor" or one more, NaN (255) included.

    ``rceil`` and ``floor`` map ``x`` to uint8 scales.
    """
    high, low = rceil(x).int(), floor(x).int()
    fail("rceil minus floor", ((high - low) != 0) & ((high - low) != 1), rceil=high, floor=low)


def check_poison_is_local(
    quantize: Quantize,
    dequantize: Dequantize,
    x: Tensor,
    index: tuple[int, ...],
    poison: float = float("nan"),
    span: int = BLOCK,
) -> None:
    """A NaN or an infinity at ``x[index]`` turns its block into NaN and changes nothing else.

    With a ``span`` of aligned scales longer than 32, the other blocks of the span may change (their
    scale may have been the poisoned block's) but stay finite. ``x`` must be finite.
    """
    *row, column = index
    clean, dirty = dequantize(quantize(x)), x.clone()
    dirty[index] = poison
    value = dequantize(quantize(dirty))

    def around(size: int) -> Tensor:
        mask = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        start = column // size * size
        mask[tuple(row)][start : start + size] = True
        return mask

    block, shared = around(BLOCK), around(span)
    fail(f"poison {poison} at {index} fills its block", block & ~value.isnan(), value=value)
    fail(f"poison {poison} at {index} stays in its block", ~block & ~value.isfinite(), value=value)
    changed = ~shared & differs(value, clean)
    fail(f"poison {poison} at {index} stays in its span", changed, value=value, expected=clean)
