"""Inputs that find quantisation bugs, and the laws to hold against them (extra ``testing``).

The strategies draw tensors from the values at which block quantisers go wrong; the checks take the
functions under test as arguments and raise AssertionError with the offending element.

>>> from functools import partial
>>> from hypothesis import given
>>> from moefp8 import dequantize_mx, quantize_mx
>>> from moefp8.testing import check_error_bound, check_projection, mx_arrays
>>> @given(x=mx_arrays(dtype=torch.bfloat16))
... def test_my_quantizer(x):
...     quantize = partial(quantize_mx, rule="floor")
...     dequantize = partial(dequantize_mx, dtype=torch.float32)
...     check_error_bound(quantize, dequantize, x)
...     check_projection(quantize, dequantize, x)
>>> test_my_quantizer()

Quantiser checks look at blocks of 32 along the last axis. ``quantize`` may return anything that
``dequantize`` turns into float32 or float64 values; bfloat16 would round a second time. Products
have the signature ``product(a (M, K), b (G, K, N), offs (G,)) -> (M, N)``.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moefp8.formats import BLOCK
from moefp8.groups import group_ids
from moefp8.mx import mx_error_bound

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("moefp8.testing needs hypothesis: pip install 'moefp8[testing]'") from error

Quantize = Callable[[Tensor], Any]
Dequantize = Callable[[Any], Tensor]
Product = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Exponents that a dtype can scale the elements below by without losing any of them.
_EXPONENTS = {torch.float16: (-4, 5)}


# --- strategies ----------------------------------------------------------------------------------


def _edges(dtype: torch.dtype) -> Tensor:
    """Values at which a decision of the quantiser flips, and their neighbours in ``dtype``."""
    eps = torch.finfo(dtype).eps
    # 448 and 1.75 are E4M3's largest value and the significand of both largest values, where rceil
    # takes the next exponent; 464 rounds past it. 1.0625 and 1.1875 are ties of a normal E4M3
    # element, 1.125 and 1.375 of E5M2; 2^-10 and 3 * 2^-10 of a subnormal one under a scale of 1;
    # 2^-6 is the smallest normal number.
    ties = [1.75, 448.0, 1.0625, 1.1875, 1.125, 1.375, 2.0**-10, 3 * 2.0**-10, 464.0, 2.0**-6]
    around = [t * f for t in ties for f in (1.0, 1.0 + eps, 1.0 - eps / 2)]
    return torch.tensor([0.0, 1.0, 1.0 + eps, 2.0 - eps, 2.0**-9, 225.0, *around], dtype=torch.float64)


def _elements(raw: bytes, dtype: torch.dtype) -> Tensor:
    """Two bytes an element: a sign, and an edge or else a mantissa of ten bits. Zeros give +0."""
    bits = torch.frombuffer(bytearray(raw), dtype=torch.int16).to(torch.int32) & 0xFFFF
    sign = 1.0 - 2.0 * (bits & 1)
    edges = _edges(dtype)
    edge = edges[(bits >> 2) % len(edges)]
    exponent = ((bits >> 2) & 15).to(torch.float64) - 8.0
    ordinary = (1.0 + (bits >> 6).to(torch.float64) / 1024.0) * torch.exp2(exponent)
    return torch.where((bits & 2) == 0, edge, ordinary) * sign


@st.composite
def mx_arrays(
    draw: st.DrawFn,
    shape: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    specials: bool = False,
    exponents: tuple[int, int] | None = None,
    spread: int = 24,
) -> Tensor:
    """Draw float arrays whose blocks of 32 along the last axis hold edge values times powers of two.

    Element i of block j is ``e * 2^(k - d[j])``: e one of +-0, the values at which a rounding or a
    scale changes and their neighbours, or an ordinary number; k shared, d apart for each block.

    Args:
        shape: shape of the result; drawn if left out: up to 3 rows of up to 100, rarely a multiple
            of 32.
        dtype: float64, float32, bfloat16 or float16.
        specials: put NaN and infinities in up to three places.
        exponents: range of k, [-100, 100] if left out ([-4, 5] for float16).
        spread: largest d, so that aligned scales have something to align. 0 for float16.

    >>> mx_arrays((2, 40), dtype=torch.bfloat16)
    mx_arrays(shape=(2, 40), dtype=torch.bfloat16)
    """
    if shape is None:
        shape = (
            draw(st.integers(1, 3)),
            draw(st.one_of(st.integers(1, 100), st.sampled_from([32, 64, 96]))),
        )
    *rows, n = shape
    count, blocks = torch.Size(shape).numel(), -(-n // BLOCK)
    x = _elements(draw(st.binary(min_size=2 * count, max_size=2 * count)), dtype).view(*shape)
    k = draw(st.integers(*(exponents or _EXPONENTS.get(dtype, (-100, 100)))))
    d = torch.zeros(*rows, blocks, dtype=torch.float64)
    if spread and dtype != torch.float16:
        raw = draw(st.binary(min_size=d.numel(), max_size=d.numel()))
        d = torch.tensor(list(raw), dtype=torch.float64).view_as(d) % (spread + 1)
    scale = torch.exp2(k - d).repeat_interleave(BLOCK, -1)[..., :n]
    x = (x * scale).to(dtype)
    if specials and count:
        value = st.sampled_from([float("nan"), float("inf"), float("-inf")])
        for index, special in draw(st.lists(st.tuples(st.integers(0, count - 1), value), max_size=3)):
            x.view(-1)[index] = special
    return x


def mx_blocks(
    length: int = BLOCK,
    *,
    dtype: torch.dtype = torch.float32,
    specials: bool = False,
    exponents: tuple[int, int] | None = None,
) -> st.SearchStrategy[Tensor]:
    """Draw 1D tensors of ``length`` elements that share one power of two, as :func:`mx_arrays` does.

    >>> mx_blocks(4)
    mx_arrays((4,), dtype=torch.float32, exponents=None, specials=False, spread=0)
    """
    return mx_arrays((length,), dtype=dtype, specials=specials, exponents=exponents, spread=0)


class GroupLayout(NamedTuple):
    """Where the groups of ``rows`` rows end; rows at and past ``offs[-1]`` belong to none."""

    offs: Tensor
    rows: int


@st.composite
def group_layouts(
    draw: st.DrawFn, *, max_groups: int = 8, max_size: int = 70, max_tail: int = 5
) -> GroupLayout:
    """Draw int32 group ends: empty groups, single rows, sizes aligned or not, rows past the last end.

    Args:
        max_groups: largest G; the smallest is 1.
        max_size: largest number of rows in a group.
        max_tail: most rows past ``offs[-1]``.
    """
    usual = [n for n in (0, 1, 31, 32, 33, 64, 128) if n <= max_size]
    size = st.one_of(st.sampled_from(usual), st.integers(0, max_size))
    ends = torch.tensor(draw(st.lists(size, min_size=1, max_size=max_groups))).cumsum(0)
    return GroupLayout(ends.to(torch.int32), int(ends[-1]) + draw(st.integers(0, max_tail)))


# --- laws of a quantiser -------------------------------------------------------------------------


def _fail(law: str, bad: Tensor, **values: Tensor) -> None:
    """Raise for the first True of ``bad``, quoting every named tensor there."""
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        quoted = ", ".join(f"{name} = {v.expand(bad.shape)[at].item()!r}" for name, v in values.items())
        raise AssertionError(f"{law}: {int(bad.sum())} of {bad.numel()} differ, first at {at}: {quoted}")


def _differs(got: Tensor, want: Tensor) -> Tensor:
    if got.shape != want.shape:
        raise AssertionError(f"shape: got {tuple(got.shape)}, expected {tuple(want.shape)}")
    return (got != want) & ~(got.isnan() & want.isnan())


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
    _fail("error bound", ~(error <= limit) & ~limit.isnan(), x=x, value=value, error=error, bound=limit)


def check_projection(quantize: Quantize, dequantize: Dequantize, x: Tensor) -> None:
    """Quantising a quantised value again changes nothing: fake quantisation is idempotent in value."""
    once = dequantize(quantize(x))
    twice = dequantize(quantize(once))
    _fail("projection", _differs(twice, once), x=x, once=once, twice=twice)


def check_power_of_two_equivariance(quantize: Quantize, dequantize: Dequantize, x: Tensor, k: int) -> None:
    """``fake(x 2^k) == 2^k fake(x)``, for a k that over- and underflows neither x nor its scales."""
    got, want = dequantize(quantize(x * 2.0**k)), dequantize(quantize(x)) * 2.0**k
    _fail(f"power-of-two equivariance, k = {k}", _differs(got, want), x=x, got=got, expected=want)


def check_sign_symmetry(quantize: Quantize, dequantize: Dequantize, x: Tensor) -> None:
    """``fake(-x) == -fake(x)``."""
    got, want = dequantize(quantize(-x)), -dequantize(quantize(x))
    _fail("sign symmetry", _differs(got, want), x=x, got=got, expected=want)


def check_permutation_within_block(
    quantize: Quantize, dequantize: Dequantize, x: Tensor, order: Sequence[int]
) -> None:
    """Permuting the elements of each block permutes their values; ``order`` permutes range(32).

    The last axis of ``x`` must be a multiple of 32.
    """

    def permute(v: Tensor) -> Tensor:
        return v.unflatten(-1, (-1, BLOCK))[..., list(order)].flatten(-2)

    got, want = dequantize(quantize(permute(x))), permute(dequantize(quantize(x)))
    _fail("permutation within a block", _differs(got, want), x=permute(x), got=got, expected=want)


def check_monotone_within_block(quantize: Quantize, dequantize: Dequantize, x: Tensor) -> None:
    """Within a block ``x[i] <= x[j]`` implies ``fake(x)[i] <= fake(x)[j]``; NaN compares with nothing."""
    value = _blocks(dequantize(quantize(x)), fill=torch.inf)
    ordered, index = _blocks(x, fill=torch.inf).sort(-1)
    value = value.gather(-1, index)
    lower, upper = value[..., :-1], value[..., 1:]
    _fail("monotone within a block", lower > upper, x=ordered[..., :-1], value=lower, next_value=upper)


def check_rceil_minus_floor(rceil: Quantize, floor: Quantize, x: Tensor) -> None:
    """The scale bytes of rule "rceil" are those of rule "floor" or one more, NaN (255) included.

    ``rceil`` and ``floor`` map ``x`` to uint8 scales.
    """
    high, low = rceil(x).int(), floor(x).int()
    _fail("rceil minus floor", ((high - low) != 0) & ((high - low) != 1), rceil=high, floor=low)


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
    _fail(f"poison {poison} at {index} fills its block", block & ~value.isnan(), value=value)
    _fail(f"poison {poison} at {index} stays in its block", ~block & ~value.isfinite(), value=value)
    changed = ~shared & _differs(value, clean)
    _fail(f"poison {poison} at {index} stays in its span", changed, value=value, expected=clean)


# --- laws of a grouped product -------------------------------------------------------------------


def _close(law: str, got: Tensor, want: Tensor, rtol: float) -> None:
    """Within ``rtol`` of the largest entry of a row; NaN and infinities must agree."""
    bad = _differs(got, want)
    if rtol:
        limit = rtol * want.abs().amax(-1, keepdim=True)
        bad &= ~((got - want).abs() <= limit)
    _fail(law, bad, got=got, expected=want)


def check_row_locality(product: Product, a: Tensor, b: Tensor, offs: Tensor, row: int) -> None:
    """Row ``row`` depends on that row of ``a`` and on its own expert only, bit for bit.

    Every other row and every other expert is replaced by NaN.
    """
    owner = int(group_ids(offs, a.shape[0])[row])
    own_row = torch.arange(a.shape[0], device=a.device) == row
    own_expert = torch.arange(b.shape[0], device=b.device) == owner
    alone = product(
        torch.where(own_row[:, None], a, torch.nan),
        torch.where(own_expert[:, None, None], b, torch.nan),
        offs,
    )
    _close(f"row {row} depends on expert {owner} only", alone[row], product(a, b, offs)[row], 0.0)


def check_expert_permutation(
    product: Product, a: Tensor, b: Tensor, offs: Tensor, order: Sequence[int], rtol: float = 0.0
) -> None:
    """Permuting the experts together with their rows permutes the rows of the result.

    ``order`` permutes range(G). A product whose order of summation depends on where a row lies needs
    an ``rtol``: of the largest entry of each row.
    """
    ends: list[int] = offs.tolist()
    starts = [0, *ends[:-1]]
    rows = [i for g in order for i in range(starts[g], ends[g])] + list(range(ends[-1], a.shape[0]))
    sizes = torch.tensor([ends[g] - starts[g] for g in order], device=offs.device)
    got = product(a[rows], b[list(order)], sizes.cumsum(0).to(offs.dtype))
    _close(f"experts permuted by {list(order)}", got, product(a, b, offs)[rows], rtol)


def check_one_group_is_dense(
    product: Product, dense: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, rtol: float = 0.0
) -> None:
    """One group of all rows is the dense product: ``product(a, b[None], [M]) == dense(a, b)``."""
    offs = torch.tensor([a.shape[0]], dtype=torch.int32, device=a.device)
    _close("one group is the dense product", product(a, b[None], offs), dense(a, b), rtol)


def check_empty_groups(product: Product, a: Tensor, b: Tensor, offs: Tensor, rtol: float = 0.0) -> None:
    """An empty group, full of NaN, before every group and at the end changes nothing."""
    nan = torch.full_like(b, torch.nan)
    padded = torch.cat([torch.stack([nan, b], 1).flatten(0, 1), nan[:1]])
    starts = torch.cat([torch.zeros_like(offs[:1]), offs[:-1]])
    ends = torch.cat([torch.stack([starts, offs], 1).flatten(), offs[-1:]])
    _close("empty groups change nothing", product(a, padded, ends), product(a, b, offs), rtol)


def check_tail_rows_are_zero(product: Product, a: Tensor, b: Tensor, offs: Tensor) -> None:
    """Rows at and past ``offs[-1]`` give zeros, whatever they hold, and leave the others alone."""
    tail = (torch.arange(a.shape[0], device=a.device) >= offs[-1])[:, None]
    poisoned = product(torch.where(tail, torch.nan, a), b, offs)
    _close("rows past offs[-1] are zero", poisoned, torch.where(tail, 0, product(a, b, offs)), 0.0)


def check_unused_gradients_are_zero(
    product: Product, a: Tensor, b: Tensor, offs: Tensor, cotangent: Tensor
) -> None:
    """Rows past ``offs[-1]`` and empty groups get zero gradients, even from a NaN cotangent."""
    owner = group_ids(offs, a.shape[0])
    tail = (owner == b.shape[0])[:, None]
    empty = ~(owner == torch.arange(b.shape[0], device=b.device)[:, None]).any(1)[:, None, None]
    pullback = torch.func.vjp(lambda a, b: product(a, b, offs), a, b)[1]
    da, db = pullback(torch.where(tail, torch.nan, cotangent))
    _fail("gradient of rows past offs[-1]", tail & (da != 0), gradient=da)
    _fail("gradient of empty groups", empty & (db != 0), gradient=db)


def check_vjp_homogeneity(
    product: Product, a: Tensor, b: Tensor, offs: Tensor, cotangent: Tensor, k: int
) -> None:
    """The VJP is odd and 2^k-homogeneous: ``vjp(-2^k g) == -2^k vjp(g)``, bit for bit."""
    pullback = torch.func.vjp(lambda a, b: product(a, b, offs), a, b)[1]
    for name, got, want in zip("ab", pullback(cotangent * -(2.0**k)), pullback(cotangent), strict=True):
        _close(f"vjp of -2^{k} times the cotangent, d{name}", got, want * -(2.0**k), 0.0)
