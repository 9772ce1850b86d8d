"""How a kernel that holds whole rows in registers takes them apart."""

from typing import NamedTuple

import torch
import triton

from moefp8.formats import BLOCK


class Pieces(NamedTuple):
    """Columns ``[0, first)`` and, if ``rest`` is not 0, ``[first, first + rest)``: powers of two."""

    first: int
    rest: int
    #: Rows at a time, rows to a band, warps.
    rows: int
    band: int
    warps: int
    #: The whole row as one power of two, for kernels where speed does not matter.
    padded: int


def pieces(columns: int, inputs: int, device: torch.device) -> Pieces:
    """Pieces of rows of ``columns`` for a kernel that reads ``inputs`` tensors.

    Two pieces where they take at most three quarters of the lanes that one would take, and pay: a second
    piece means a second exchange between threads for every row. On an H100 it costs two inputs a tenth to a
    third of the speed at 768 and 1408 columns, and three inputs a fifth at 768; at 1408 it gains 5 %.
    """
    padded = max(triton.next_power_of_2(columns), BLOCK)
    first, rest = padded, 0
    if inputs == 3 and padded > 32 * BLOCK:
        other = triton.next_power_of_2(columns - padded // 2)
        if other <= padded // 4:
            first, rest = padded // 2, max(other, 4 * BLOCK)
    # One row at a time: maxima of columns then need no exchange between threads. (The interpreter pays
    # by the operation, however long.) A thread takes 8 elements, 16 bytes, of the smaller piece, and at
    # most 32 (two inputs) or 16 (three) of the larger.
    most = 32 if inputs == 2 else 16
    warps = max((rest or first) // 256, first // (32 * most))
    rows = 1 if device.type == "cuda" else 32
    return Pieces(first, rest, rows, 64, min(max(warps, 1), 4 if first <= 2048 else 16), padded)
