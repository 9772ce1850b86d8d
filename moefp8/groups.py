"""Row groups: how the tokens of G experts lie behind one another in one matrix.

``offs`` is a ``(G,)`` int32 tensor holding the *end* row of each group, so group g owns the rows
``offs[g-1] <= i < offs[g]`` and rows at and past ``offs[-1]`` belong to nobody. Everything here is
computed on the device of ``offs``, and only ``read_ends`` reads it on the host.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moefp8._leaf import leaf, over_leading


def generate_jagged_offs(
    num_groups: int,
    total: int,
    *,
    multiple_of: int = 1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw random group ends: ``num_groups`` sizes that sum to ``total``.

    Every size is a multiple of ``multiple_of`` and may be zero; every way of placing the
    ``num_groups - 1`` inner boundaries is equally likely.

    Args:
        num_groups: G, at least 1.
        total: rows to share out, a multiple of ``multiple_of``.
        multiple_of: granularity of a group's size, in rows.
        generator: source of randomness, on the CPU; the global one if left out.
        device: where the result lives.

    Returns:
        ``(G,)`` int32, non-decreasing, last entry ``total``.

    Raises:
        ValueError: if ``num_groups < 1``, ``multiple_of < 1``, ``total < 0``, or ``total`` is not a
            multiple of ``multiple_of``.

    >>> generate_jagged_offs(4, 96, multiple_of=32, generator=torch.Generator().manual_seed(0))
    tensor([ 0, 32, 96, 96], dtype=torch.int32)
    """
    if num_groups < 1:
        raise ValueError(f"num_groups: expected at least 1, got {num_groups}")
    if multiple_of < 1:
        raise ValueError(f"multiple_of: expected at least 1, got {multiple_of}")
    if total < 0 or total % multiple_of:
        raise ValueError(f"total: expected a non-negative multiple of {multiple_of}, got {total}")
    inner = torch.randint(total // multiple_of + 1, (num_groups - 1,), generator=generator)
    ends = torch.cat([inner.sort().values * multiple_of, torch.tensor([total])])
    return ends.to(device=device, dtype=torch.int32)


def check_offs(offs: Tensor, num_groups: int | None, like: Tensor) -> None:
    """Reject what can be seen of ``offs`` without reading it: type, shape, device."""
    if not isinstance(offs, Tensor) or offs.dtype != torch.int32:
        got = offs.dtype if isinstance(offs, Tensor) else type(offs).__name__
        raise TypeError(f"offs: expected an int32 tensor of group ends, got {got}")
    if offs.ndim != 1 or offs.numel() == 0:
        raise ValueError(f"offs: expected shape (G,) with G >= 1, got {tuple(offs.shape)}")
    if num_groups is not None and offs.shape[0] != num_groups:
        raise ValueError(f"offs: expected one end for each of {num_groups} groups, got {offs.shape[0]}")
    if offs.device != like.device:
        raise ValueError(f"offs: is on {offs.device}, the operands on {like.device}")


def read_ends(offs: Tensor, rows: int) -> list[int]:
    """The group ends as Python integers, checked. Reads ``offs``: on a GPU this synchronises."""
    ends: list[int] = offs.tolist()
    if any(lo > hi for lo, hi in zip([0, *ends], [*ends, rows], strict=True)):
        raise ValueError(f"offs: expected non-decreasing group ends in [0, {rows}], got {ends}")
    return ends


def _fake_checked_ends(offs: Tensor, rows: int) -> Tensor:
    return torch.empty_like(offs)


@leaf("checked_ends", fake=_fake_checked_ends, vmap=over_leading)
def checked_ends(offs: Tensor, rows: int) -> Tensor:
    """A copy of ``offs``; on a CPU, where looking costs nothing, ends that decrease or pass ``rows`` raise.

    A leaf, so that it still looks under ``vmap`` and in compiled graphs. On a GPU it looks at nothing.
    """
    if offs.device.type == "cpu":
        steps = torch.diff(offs, prepend=offs.new_zeros(()).expand(*offs.shape[:-1], 1))
        if (steps < 0).any() or (offs > rows).any():
            raise ValueError(
                f"offs: expected non-decreasing group ends in [0, {rows}], got {offs.tolist()}"
            )
    return offs.clone()


def group_ids(offs: Tensor, rows: int) -> Tensor:
    """Owner of each row: ``(rows,)`` int64 in [0, G], where G marks the rows past ``offs[-1]``."""
    # A comparison table rather than searchsorted: under vmap over offs that one has no batching rule.
    row = torch.arange(rows, device=offs.device)
    return (row[:, None] >= offs).sum(-1)


class Segments(NamedTuple):
    """A copy of the rows in which every group starts at a multiple of some number of rows.

    Attributes:
        source: ``(P,)`` row that each padded row is copied from (0 where there is none).
        valid: ``(P,)`` bool, False where the padded row is padding.
        group: ``(P,)`` group of each padded row, G past the last segment.
        ends: ``(G,)`` int32 ends of the segments, multiples of ``multiple``.
    """

    source: Tensor
    valid: Tensor
    group: Tensor
    ends: Tensor

    def pad(self, x: Tensor) -> Tensor:
        """Lay the rows of ``x`` (M, ...) out in segments (P, ...); padding rows are zero."""
        if x.shape[0] == 0:  # no row to point the padding at
            return x.new_zeros(self.source.shape[0], *x.shape[1:])
        shape = (-1,) + (1,) * (x.ndim - 1)
        return torch.where(self.valid.view(shape), x.index_select(0, self.source), 0)


def segments(offs: Tensor, rows: int, multiple: int) -> Segments:
    """Plan a segmented copy of ``rows`` rows; P = multiple * ((rows + G (multiple - 1)) // multiple).

    P bounds the sum of the groups' sizes, each rounded up to ``multiple``, so it is known without
    reading ``offs``.
    """
    num_groups = offs.shape[0]
    padded_rows = multiple * ((rows + num_groups * (multiple - 1)) // multiple)
    ends = offs.to(torch.int64)
    zero = torch.zeros_like(ends[:1])
    starts = torch.cat([zero, ends[:-1]])
    padded_ends = ((ends - starts + multiple - 1) // multiple * multiple).cumsum(0)
    padded_starts = torch.cat([zero, padded_ends[:-1]])

    group = group_ids(padded_ends, padded_rows)
    owner = group.clamp(max=num_groups - 1)
    source = torch.arange(padded_rows, device=offs.device) - (padded_starts - starts)[owner]
    valid = (group < num_groups) & (source < ends[owner])
    return Segments(torch.where(valid, source, 0), valid, group, padded_ends.to(torch.int32))
