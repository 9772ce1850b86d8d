"""Where the rows of each group lie, worked out once on the device for all kernels of a layer.

Kernels walk over *blocks of rows of one group*: 128 rows to a GEMM tile and to a quantiser.
With the groups known only on the device, the number of blocks is known only as a bound. The plan
lists the blocks, so that a kernel finds its group with one load instead of a search over ``offs``.

One launch of a few microseconds; 12 bytes a block.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8.groups import group_ids

#: Rows to a segment block. Segments are multiples of it, so that the weight gradient's contraction
#: is whole steps of 128, the interval at which accumulators are promoted.
SEGMENT = 128


class Tile(NamedTuple):
    """What a program of a quantiser takes: rows of a segment, and columns."""

    rows: int
    columns: int
    warps: int

    def programs(self, segments: Tensor, columns: int) -> int:
        """How many programs take all tiles of a matrix of ``columns``, see :func:`tile_of`."""
        return segments.shape[0] * (SEGMENT // self.rows) * triton.cdiv(columns, self.columns)


class Plan(NamedTuple):
    """The blocks of rows that kernels walk over.

    Attributes:
        tiles: ``(ceil(M / tile) + G + 1, 3)`` int32, one ``(group, first row, end row)`` for each
            output tile of a grouped product. Rows past ``offs[-1]`` form the group G, which kernels
            fill with zeros; entries past the last block have group G + 1.
        segments: ``(ceil(M / 128) + G, 3)`` int32, the same for blocks of 128 rows of the padded
            copy that the weight gradient reads: entry s describes its rows ``[128 s, 128 s + 128)``.
            Group G + 1 where there is nothing.
        ends: ``(G,)`` int32 ends of the segments in that copy, multiples of 128.
        order: ``(G,)`` int32 groups, the longest segment first. Weight gradients are worked on in this
            order, or a long one that comes last would keep a few multiprocessors busy alone.
    """

    tiles: Tensor
    segments: Tensor
    ends: Tensor
    order: Tensor


def tile_bound(rows: int, num_groups: int, tile: int) -> int:
    """Most blocks of ``tile`` rows that ``num_groups`` groups and a tail of ``rows`` rows can have."""
    return -(-rows // tile) + num_groups + 1


def segment_bound(rows: int, num_groups: int) -> int:
    """Most segment blocks that ``num_groups`` groups of ``rows`` rows in all can have."""
    return (rows + num_groups * (SEGMENT - 1)) // SEGMENT


@triton.jit
def tile_of(program, columns, SEGMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Segment block of a program's tile, its first row there, and its first column."""
    across = tl.cdiv(columns, COLUMNS)
    band = program // across
    return band // (SEGMENT // ROWS), band % (SEGMENT // ROWS) * ROWS, program % across * COLUMNS


@triton.jit
def _extents(offs, group, rows, num_groups):
    """First and end row of each ``group``, of which the tail is one more, that ends at the last row.

    Nothing reads before the first row or past that, whatever ``offs`` holds.
    """
    end = tl.load(offs + group, mask=group < num_groups, other=rows)
    start = tl.load(offs + group - 1, mask=(group > 0) & (group <= num_groups), other=0)
    start, end = tl.maximum(tl.minimum(start, rows), 0), tl.maximum(tl.minimum(end, rows), 0)
    return tl.where(group > num_groups, rows, start), end


@triton.jit
def _list_blocks(
    table, offs, rows, num_groups, total, SIZE: tl.constexpr, TAIL: tl.constexpr,
    GROUPS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    group = tl.arange(0, GROUPS)
    start, end = _extents(offs, group, rows, num_groups)
    size = tl.where((group < num_groups) | TAIL, tl.maximum(end - start, 0), 0)
    last = tl.cumsum((size + SIZE - 1) // SIZE, 0)  # past the last block of each group
    owner = tl.sum((entry[:, None] >= last[None, :]).to(tl.int32), 1)

    mine = owner[:, None] == group[None, :]
    nth = entry - tl.sum(tl.where(mine, (last - (size + SIZE - 1) // SIZE)[None, :], 0), 1)
    first = tl.sum(tl.where(mine, start[None, :], 0), 1) + nth * SIZE
    stop = tl.minimum(tl.sum(tl.where(mine, end[None, :], 0), 1), first + SIZE)
    none = owner > num_groups
    keep = entry < total
    tl.store(table + 3 * entry, tl.minimum(owner, num_groups + 1), mask=keep)
    tl.store(table + 3 * entry + 1, tl.where(none, rows, first), mask=keep)
    tl.store(table + 3 * entry + 2, tl.where(none, rows, stop), mask=keep)


@triton.jit
def _blocks(offs, group, rows, num_groups, SEGMENT: tl.constexpr):
    """Segment blocks of each ``group``, none of the tail."""
    start, end = _extents(offs, group, rows, num_groups)
    size = tl.where(group < num_groups, tl.maximum(end - start, 0), 0)
    return (size + SEGMENT - 1) // SEGMENT


@triton.jit
def _plan_kernel(
    tiles, segments, ends, order, offs, rows, num_groups, num_tiles, num_segments,
    TILE: tl.constexpr, SEGMENT: tl.constexpr, GROUPS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    _list_blocks(tiles, offs, rows, num_groups, num_tiles, TILE, True, GROUPS, ENTRIES)
    _list_blocks(segments, offs, rows, num_groups, num_segments, SEGMENT, False, GROUPS, ENTRIES)
    group = tl.arange(0, GROUPS)
    blocks = _blocks(offs, group, rows, num_groups, SEGMENT)
    if tl.program_id(0) == 0:
        tl.store(ends + group, tl.cumsum(blocks, 0) * SEGMENT, mask=group < num_groups)
    # Each program ranks some groups; there are more table entries, and so programs, than that takes.
    mine = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    size = _blocks(offs, mine, rows, num_groups, SEGMENT)[:, None]
    longer = (blocks[None, :] > size) | ((blocks[None, :] == size) & (group[None, :] < mine[:, None]))
    rank = tl.sum((longer & (group < num_groups)[None, :]).to(tl.int32), 1)
    tl.store(order + rank, mine, mask=mine < num_groups)


def _empty(offs: Tensor, rows: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_groups = offs.shape[0]
    return (
        offs.new_empty(tile_bound(rows, num_groups, tile), 3),
        offs.new_empty(segment_bound(rows, num_groups), 3),
        offs.new_empty(num_groups),
        offs.new_empty(num_groups),
    )


@leaf("plan", fake=_empty, vmap=by_loop)
def _plan(offs: Tensor, rows: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tiles, segments, ends, order = _empty(offs, rows, tile)
    num_groups, entries = offs.shape[0], 16
    longest = max(tiles.shape[0], segments.shape[0])
    _plan_kernel[(triton.cdiv(longest, entries),)](
        tiles, segments, ends, order, offs.contiguous(),
        rows, num_groups, tiles.shape[0], segments.shape[0],
        TILE=tile, SEGMENT=SEGMENT, GROUPS=triton.next_power_of_2(num_groups + 1), ENTRIES=entries,
    )  # fmt: skip
    return tiles, segments, ends, order


def plan(offs: Tensor, rows: int, tile: int) -> Plan:
    """The :class:`Plan` of ``rows`` rows in groups that end at ``offs``, on the device of ``offs``."""
    return Plan(*_plan(offs, rows, tile))


def reference(offs: Tensor, rows: int, tile: int) -> Plan:
    """The twin of :func:`plan`, in torch."""

    def blocks(ends: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
        starts = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
        last = ((ends - starts + size - 1) // size).cumsum(0)
        owner = group_ids(last, count)
        nth = torch.arange(count, device=ends.device) - torch.cat([torch.zeros_like(last[:1]), last])[owner]
        first = torch.cat([starts, ends[-1:]])[owner] + nth * size
        stop = torch.minimum(torch.cat([ends, ends[-1:]])[owner], first + size)
        none = owner == ends.shape[0]
        first, stop = torch.where(none, rows, first), torch.where(none, rows, stop)
        owner = torch.where(none, offs.shape[0] + 1, owner)
        return torch.stack([owner, first, stop], 1).to(torch.int32), last

    num_groups, ends = offs.shape[0], offs.to(torch.int64)
    with_tail = torch.cat([ends, ends.new_tensor([rows])])
    tiles, _ = blocks(with_tail, tile, tile_bound(rows, num_groups, tile))
    segments, last = blocks(ends, SEGMENT, segment_bound(rows, num_groups))
    order = torch.diff(last, prepend=last.new_zeros(1)).sort(descending=True, stable=True).indices
    return Plan(tiles, segments, (last * SEGMENT).to(torch.int32), order.to(torch.int32))
