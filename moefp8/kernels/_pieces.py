"""How a kernel that holds whole rows in registers takes them apart.

``quantize_rows.py`` does so in equal pieces. A row of 5120 would fill 8192 lanes, the next power of two,
for 60 % more registers and instructions. So rows lie in a tuple of tensors ``(ROWS, LANES)``. All have the
same layout: the maximum over pieces needs no exchange between threads, and the exchange for a row's
maximum comes once, after it. Maxima of columns stay apart for each of the ROWS until the band is done, in
as many bits as the input has: for 16 bits that halves their registers, and a maximum takes two at a time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moefp8.formats import BLOCK


@triton.jit
def appended(pieces, piece):
    """A tuple with one more piece."""
    one = (piece,)
    return pieces + one


@triton.jit
def columns_of(piece: tl.constexpr, LANES: tl.constexpr):
    """Columns of a piece, (1, LANES)."""
    return (piece * LANES + tl.arange(0, LANES))[None, :]


@triton.jit
def code_columns_of(piece: tl.constexpr, LANES: tl.constexpr):
    """The same, for stores of codes.

    They leave in the layout that values came in, 8 to a thread. Left alone, the compiler stores 16 to a
    thread and shuffles every row through shared memory to do so.
    """
    return tl.max_contiguous(piece * LANES + tl.arange(0, LANES), 8)[None, :]


@triton.jit
def narrow_bits(x, HARDWARE: tl.constexpr):
    """Bits of |x| in as many bits as ``x`` has: they order as magnitudes do, like those of float32."""
    if x.dtype.primitive_bitwidth == 32:
        out = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    elif HARDWARE:
        out = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x7fff7fff;", "=r,r", [x.to(tl.int16, bitcast=True)], dtype=tl.int16,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        out = x.to(tl.int16, bitcast=True) & 0x7FFF
    return out


@triton.jit
def larger(a, b, HARDWARE: tl.constexpr):
    """The larger of non-negative integers; of 16 bits, two an instruction."""
    if (a.dtype.primitive_bitwidth == 16) & HARDWARE:
        out = tl.inline_asm_elementwise(
            "max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        out = tl.maximum(a, b)
    return out


@triton.jit
def wide_bits(bits, dtype: tl.constexpr):
    """Bits of magnitudes in ``dtype`` as those of float32."""
    return bits.to(dtype, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def no_maxima(PIECES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, dtype: tl.constexpr):
    """Column maxima (bits) of no rows."""
    out = ()
    for _ in tl.static_range(PIECES):
        out = appended(
            out, tl.zeros((ROWS, LANES), tl.int32 if dtype.primitive_bitwidth == 32 else tl.int16)
        )
    return out


@triton.jit
def column_maxima(a, b, HARDWARE: tl.constexpr):
    """Piece by piece, the larger."""
    out = ()
    for p in tl.static_range(len(a)):
        out = appended(out, larger(a[p], b[p], HARDWARE))
    return out


@triton.jit
def row_maxima(bits, dtype: tl.constexpr, HARDWARE: tl.constexpr):
    """The largest of each row, (ROWS,)."""
    out = bits[0]
    for p in tl.static_range(1, len(bits)):
        out = larger(out, bits[p], HARDWARE)
    return tl.max(wide_bits(out, dtype), 1)


@triton.jit
def store_maxima(band_amax, band, largest, columns, dtype: tl.constexpr, LANES: tl.constexpr):
    """Write the column maxima of a band."""
    for p in tl.static_range(len(largest)):
        column = p * LANES + tl.arange(0, LANES)
        at = band_amax + band.to(tl.int64) * columns + column
        tl.store(at, tl.max(wide_bits(largest[p], dtype), 0), mask=column < columns)


class EqualPieces(NamedTuple):
    """How a program of ``quantize_rows.py`` holds rows of some length."""

    #: Pieces of a row, lanes of each.
    pieces: int
    lanes: int
    #: Rows at a time, rows to a band, warps.
    rows: int
    band: int
    warps: int
    #: The whole row as one power of two, for kernels where speed does not matter.
    padded: int


def equal_pieces(columns: int, device: torch.device, bands_of_64: int = 0) -> EqualPieces:
    """For rows of ``columns``. Large inputs take bands of 128, which halve what maxima cost to write.

    A thread takes 8 elements, 16 bytes, of every piece. Up to 1536 columns each of four warps has a row
    to itself; beyond, all warps share one, whose pieces are 1024 lanes while that many registers last.
    """
    padded = max(triton.next_power_of_2(columns), BLOCK)
    band = 128 if bands_of_64 >= 1024 else 64
    if columns <= 1536:
        lanes, rows, warps = min(padded, 256), 4, 4
    else:
        lanes, rows, warps = (1024, 1, 4) if columns <= 7168 else (2048, 1, 8)
        if columns > 16384:
            lanes, warps = 4096, 16
    if device.type != "cuda":  # the interpreter pays by the operation, however long
        rows = 32
    return EqualPieces(triton.cdiv(columns, lanes), lanes, rows, band, warps, padded)


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
