"""The order in which SM100's tensor core reads the scales of 32-element blocks.

A matrix of scales, one row a matrix row and one column for every 32 of the contraction, is cut into
tiles of 128 x 4 bytes. Tiles follow one another along a row of tiles, and inside one the 128 rows are
dealt out in four packs of 32, so that each 16-byte line holds rows r, r + 32, r + 64 and r + 96::

    offset(r, c) = ((r // 128) * nc + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4

with ``nc = ceil(C / 4)``. This is the layout "128x4" of the PTX instruction ``tcgen05.mma`` and of
cuBLAS. The tensor core copies a tile into its own memory as it lies, so nothing is shuffled on the way.

Here the tiles are the last axis of a ``(row tiles, nc, 512)`` uint8 tensor. Of grouped rows every group
starts a tile; what fills a tile up is 0, the scale of a block of zeros. Quantisers write the layout
themselves; the kernel below is for an operand that was quantised elsewhere.

Bytes a scale: 1 read, 1 written, a thirty-second of the traffic of the codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8.groups import segments as segments_of
from moefp8.kernels.plan import SEGMENT, Plan

#: Rows and columns to a tile, and its bytes.
TILE_ROWS, TILE_COLUMNS, TILE_BYTES = SEGMENT, 4, 512


@triton.jit
def place(row, column):
    """Offset in its tile of the scale at ``row`` below 128 and ``column`` below 4."""
    return row % 32 * 16 + row // 32 * 4 + column


@triton.jit
def from_tiles(tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Scales (ROWS, COLUMNS) of tiles loaded as (1, ROWS / 128, COLUMNS / 4, 2, 256).

    Written so that Triton sees the tensor core's own layout and copies tiles from shared memory.
    """
    packs = tl.reshape(tiles, (ROWS // 128, COLUMNS // 4, 32, 4, 4))
    return tl.reshape(tl.trans(packs, 0, 3, 2, 1, 4), (ROWS, COLUMNS))


@triton.jit
def _swizzle_kernel(scale, out, segments, num_groups, columns, across, ROWS: tl.constexpr):
    block = tl.program_id(0) // across
    if tl.load(segments + 3 * block) < num_groups:
        row = tl.load(segments + 3 * block + 1) + tl.arange(0, ROWS)
        end = tl.load(segments + 3 * block + 2)
        column = tl.program_id(0) % across * 4 + tl.arange(0, 4)
        byte = tl.load(
            scale + row.to(tl.int64)[:, None] * columns + column[None, :],
            mask=(row < end)[:, None] & (column < columns)[None, :], other=0,
        )  # fmt: skip
        inner = place(tl.arange(0, ROWS)[:, None], tl.arange(0, 4)[None, :])
        tl.store(out + tl.program_id(0).to(tl.int64) * 512 + inner, byte)


def _fake(scale: Tensor, segments: Tensor, num_groups: int) -> Tensor:
    return scale.new_empty(segments.shape[0], triton.cdiv(scale.shape[1], TILE_COLUMNS), TILE_BYTES)


@leaf("swizzle_rows", fake=_fake, vmap=by_loop)
def _swizzle_rows(scale: Tensor, segments: Tensor, num_groups: int) -> Tensor:
    scale, out = scale.contiguous(), _fake(scale, segments, num_groups)
    if out.numel():
        _swizzle_kernel[(out.shape[0] * out.shape[1],)](
            scale, out, segments, num_groups, scale.shape[1], out.shape[1], ROWS=TILE_ROWS
        )
    return out


def swizzle_rows(scale: Tensor, plan: Plan) -> Tensor:
    """Scales (M, C) of grouped rows in tiles, ``(S, ceil(C / 4), 512)`` for the S segments of ``plan``.

    Tiles of segments that hold no rows are not written.
    """
    return _swizzle_rows(scale, plan.segments, plan.ends.shape[0])


def reference(scale: Tensor) -> Tensor:
    """Scales (R, C) in tiles, from the formula: ``(ceil(R / 128), ceil(C / 4), 512)``."""
    rows, columns = scale.shape
    down, across = triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS)
    r = torch.arange(rows, device=scale.device)[:, None]
    c = torch.arange(columns, device=scale.device)[None, :]
    offset = ((r // 128) * across + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
    out = scale.new_zeros(down * across * TILE_BYTES)
    return out.index_put((offset.flatten(),), scale.flatten()).view(down, across, TILE_BYTES)


def reference_rows(scale: Tensor, offs: Tensor) -> Tensor:
    """The twin of :func:`swizzle_rows`, in torch; tiles that that leaves unwritten are zero."""
    return reference(segments_of(offs, scale.shape[0], SEGMENT).pad(scale))


def unswizzle(tiles: Tensor) -> Tensor:
    """Scales in rows and columns again, the padding included: ``(128 row tiles, 4 nc)``."""
    down, across, _ = tiles.shape
    packs = tiles.view(down, across, 32, 4, 4)
    return packs.permute(0, 3, 2, 1, 4).reshape(down * TILE_ROWS, across * TILE_COLUMNS)
