"""Which output tile a thread block works on: shared by the portable and the Hopper GEMM."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Shape(NamedTuple):
    """Extents of a grouped product, as kernel arguments in this order."""

    #: Number of output tiles, down and across.
    row_tiles: int
    column_tiles: int
    num_groups: int
    #: Of the result; in the contraction form ``rows`` are those of one group.
    rows: int
    columns: int
    #: Of the contraction, in the rows form.
    length: int
    #: Where the next group's operand B begins: rows further down, or elements along the contraction.
    b_rows: int
    b_length: int


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Thread blocks that run side by side when each fills a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def bias_stride(bias: Tensor | None) -> int:
    """Elements from one group's bias to the next: 0 for one ``(N,)`` shared by all."""
    return 0 if bias is None or bias.ndim == 1 else bias.stride(0)


@triton.jit
def locate(
    t, shape, tiles, ends, CONTRACTION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Group and place of output tile ``t``, and where its operands start.

    Tiles run down a band of row tiles before they go one across, so that what runs at the same time
    shares operands in L2. In the contraction form ``tiles`` lists the groups in the order of their turns.

    Returns:
        group, column; first row of A and of B; first element along the contraction of A and of B;
        steps to contract over; first row of the tile in the result, and the row it must not reach.
    """
    row_tiles, column_tiles, num_groups, rows, _, length, b_rows, b_length = shape
    width = BAND * column_tiles
    first = t // width * BAND
    height = tl.minimum(row_tiles - first, BAND)
    row_tile = first + t % width % height
    column = t % width // height * COLUMNS
    if CONTRACTION:
        per_group = tl.cdiv(rows, ROWS)
        group = tl.load(tiles + row_tile // per_group)
        a_row = row_tile % per_group * ROWS
        b_row = column
        start = tl.where(group == 0, 0, tl.load(ends + tl.maximum(group - 1, 0)))
        a_at = start
        b_at = start
        steps = (tl.load(ends + group) - start) // STEP
        c_row = group * rows + a_row
        c_end = group * rows + rows
    else:
        group = tl.load(tiles + 3 * row_tile)
        a_row = tl.load(tiles + 3 * row_tile + 1)
        b_row = group * b_rows + column
        a_at = 0
        b_at = group * b_length
        steps = tl.where(group < num_groups, tl.cdiv(length, STEP), 0)
        c_row = a_row
        c_end = tl.load(tiles + 3 * row_tile + 2)
    return group, column, a_row, b_row, a_at, b_at, steps, c_row, c_end
