"""Hypothesis strategies: arrays whose blocks find quantisation bugs, and group layouts."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moefp8.formats import BLOCK

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("moefp8.testing needs hypothesis: pip install 'moefp8[testing]'") from error

#: Exponents that a dtype can scale the elements below by without losing any of them.
_EXPONENTS = {torch.float16: (-3, 7)}


def _with_neighbours(x: float, eps: float) -> tuple[float, float, float]:
    """``x`` > 0 and the numbers next to it in a type of machine epsilon ``eps``."""
    mantissa, exponent = math.frexp(x)
    step = math.ldexp(eps, exponent - 1)
    return x - (step / 2 if mantissa == 0.5 else step), x, x + step


def _edges(dtype: torch.dtype) -> Tensor:
    """Values at which a decision of the quantiser flips, and their neighbours in ``dtype``."""
    eps = torch.finfo(dtype).eps
    # 448 and 1.75 are E4M3's largest value and the significand of both largest values, where rceil
    # takes the next exponent; 464 rounds past it. 1.0625 and 1.1875 are ties of a normal E4M3
    # element, 1.125 and 1.375 of E5M2; 2^-10 and 3 * 2^-10 of a subnormal one under a scale of 1;
    # 2^-6 is the smallest normal number.
    ties = [1.75, 448.0, 1.0625, 1.1875, 1.125, 1.375, 2.0**-10, 3 * 2.0**-10, 464.0, 2.0**-6]
    around = [e for t in ties for e in _with_neighbours(t, eps)]
    return torch.tensor([0.0, 1.0, 1.0 + eps, 2.0 - eps, 2.0**-9, 225.0, *around], dtype=torch.float64)


def _elements(raw: bytes, dtype: torch.dtype) -> Tensor:
    """Two bytes an element: a sign, and an edge or else a mantissa of ten bits. Zeros give +0."""
    if not raw:  # frombuffer refuses an empty buffer
        return torch.empty(0, dtype=torch.float64)
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
        exponents: range of k, [-100, 100] if left out ([-3, 7] for float16).
        spread: largest d, so that aligned scales have something to align. 0 for float16.

    >>> from hypothesis import find, settings
    >>> x = find(mx_arrays((2, 40)), lambda x: bool((x > 1).any()), settings=settings(database=None))
    >>> x.shape
    torch.Size([2, 40])
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

    >>> from hypothesis import find, settings
    >>> x = find(mx_blocks(40, dtype=torch.bfloat16), lambda x: True, settings=settings(database=None))
    >>> x.shape, x.dtype
    (torch.Size([40]), torch.bfloat16)
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
