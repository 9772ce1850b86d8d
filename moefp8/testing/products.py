"""Laws of a grouped product, ``product(a (M, K), b (G, K, N), offs (G,)) -> (M, N)``."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moefp8.groups import group_ids
from moefp8.testing._report import differs, fail

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def _close(law: str, got: Tensor, want: Tensor, rtol: float) -> None:
    """Within ``rtol`` of the largest entry of a row; NaN and infinities must agree."""
    bad = differs(got, want)
    if rtol:
        limit = rtol * want.abs().amax(-1, keepdim=True)
        bad &= ~((got - want).abs() <= limit)
    fail(law, bad, got=got, expected=want)


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
    fail("gradient of rows past offs[-1]", tail & (da != 0), gradient=da)
    fail("gradient of empty groups", empty & (db != 0), gradient=db)


def check_vjp_homogeneity(
    product: Product, a: Tensor, b: Tensor, offs: Tensor, cotangent: Tensor, k: int
) -> None:
    """The VJP is odd and 2^k-homogeneous: ``vjp(-2^k g) == -2^k vjp(g)``, bit for bit."""
    pullback = torch.func.vjp(lambda a, b: product(a, b, offs), a, b)[1]
    for name, got, want in zip("ab", pullback(cotangent * -(2.0**k)), pullback(cotangent), strict=True):
        _close(f"vjp of -2^{k} times the cotangent, d{name}", got, want * -(2.0**k), 0.0)
