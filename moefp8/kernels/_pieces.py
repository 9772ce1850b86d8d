"""How a kernel that holds whole rows in registers takes them apart.

In equal pieces. A row of 5120 would fill 8192 lanes, the next power of two, for 60 % more registers and
instructions. So rows lie in a tuple of tensors ``(ROWS, LANES)``. All have the same layout: the maximum
over pieces needs no exchange between threads, and the exchange for a row's maximum comes once, after it.
Maxima of columns stay apart for each of the ROWS until the band is done, in as many bits as the input
has: 16 bits lie in pairs, which halves their registers and instructions.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moefp8.formats import BLOCK
from moefp8.kernels._fp8 import encode, scale_of
from moefp8.kernels._round import widened


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
def paired(x):
    """Bits of ``x``, 16 each, (ROWS, LANES): two neighbours to an uint32, (ROWS, LANES // 2).

    Left as 16 bits, what a loop carries takes a register each, and is taken apart and paired every time.
    """
    even, odd = tl.split(tl.reshape(x.to(tl.uint16, bitcast=True), (x.shape[0], x.shape[1] // 2, 2)))
    return even.to(tl.uint32) | (odd.to(tl.uint32) << 16)


@triton.jit
def narrow_bits(x):
    """Bits of |x| in as many bits as ``x`` has: they order as magnitudes do, like those of float32.

    int32, or :func:`paired`.
    """
    if x.dtype.primitive_bitwidth == 32:
        out = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        out = paired(x) & 0x7FFF7FFF
    return out


@triton.jit
def larger(a, b, HARDWARE: tl.constexpr):
    """The larger of int32, or of each half of pairs, whose bits are unsigned."""
    if a.dtype == tl.int32:
        out = tl.maximum(a, b)
    elif HARDWARE:
        out = tl.inline_asm_elementwise(
            "max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        out = (tl.maximum(a >> 16, b >> 16) << 16) | tl.maximum(a & 0xFFFF, b & 0xFFFF)
    return out


@triton.jit
def largest_of_row(bits):
    """The largest of each row, (ROWS,) int32, in as many bits as elements have."""
    if bits.dtype != tl.int32:
        bits = tl.maximum(bits >> 16, bits & 0xFFFF).to(tl.int32)
    return tl.max(bits, 1)


@triton.jit
def wide_bits(bits, dtype: tl.constexpr):
    """Bits of magnitudes in ``dtype``, held as int32, as those of float32."""
    if dtype.primitive_bitwidth == 16:
        bits = bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    return bits


@triton.jit
def no_maxima(PIECES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, dtype: tl.constexpr):
    """Column maxima (bits) of no rows."""
    out = ()
    for _ in tl.static_range(PIECES):
        out = appended(out, narrow_bits(tl.zeros((ROWS, LANES), dtype)))
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
    """Bits of the largest of each row as float32, (ROWS,)."""
    out = bits[0]
    for p in tl.static_range(1, len(bits)):
        out = larger(out, bits[p], HARDWARE)
    return wide_bits(largest_of_row(out), dtype)


@triton.jit
def store_scales(scale, row, factor, real):
    """Write a factor for each row.

    32 columns, of which one is written, keep each row in the warps that hold it. A store of one column
    goes by rows, and the exchange for that costs two barriers.
    """
    lane = tl.arange(0, 32)[None, :]
    value = tl.broadcast_to(factor[:, None], (factor.shape[0], 32))
    tl.store(scale + row[:, None] + lane, value, mask=real & (lane == 0))


@triton.jit
def store_rows(
    values, amax, data, scale, row, real, columns,
    OUT: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write rows ``values``, pieces of (ROWS, LANES) with maxima ``amax`` (bits), and their scales."""
    factor, inverse = scale_of(amax, ROWWISE, CARRY, EMAX, MAX)
    store_scales(scale, row, factor, real)
    to = data + row.to(tl.int64)[:, None] * columns
    for p in tl.static_range(len(values)):
        column = code_columns_of(p, LANES)
        scaled = widened(values[p], HARDWARE) * inverse[:, None]
        code = encode(scaled, OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE)
        tl.store(to + column, code, mask=real & (column < columns))


@triton.jit
def store_maxima(band_amax, band, largest, columns, dtype: tl.constexpr, LANES: tl.constexpr):
    """Write the column maxima of a band."""
    for p in tl.static_range(len(largest)):
        bits = largest[p]
        if dtype.primitive_bitwidth == 16:
            even, odd = tl.max((bits & 0xFFFF).to(tl.int32), 0), tl.max((bits >> 16).to(tl.int32), 0)
            found = tl.reshape(tl.join(even, odd), (LANES,))
        else:
            found = tl.max(bits, 0)
        column = p * LANES + tl.arange(0, LANES)
        at = band_amax + band.to(tl.int64) * columns + column
        tl.store(at, wide_bits(found, dtype), mask=column < columns)


class EqualPieces(NamedTuple):
    """How a program holds rows of some length."""

    #: Pieces of a row, lanes of each.
    pieces: int
    lanes: int
    #: Rows at a time, rows to a band, warps.
    rows: int
    band: int
    warps: int
    #: The whole row as one power of two, for kernels where speed does not matter.
    padded: int

    @property
    def padded_warps(self) -> int:
        """Warps that hold the whole row as one, up to 8192 columns with 16 elements to a thread."""
        return min(max(self.padded // 512, 4), 16)


def equal_pieces(x: torch.Tensor, bands_of_64: int = 0, *, inputs: int = 1) -> EqualPieces:
    """For rows like those of ``x``, in a kernel that reads ``inputs`` of them: 1, or 2 and 3 around SwiGLU.

    The fastest on an H100 among four to ten at each of 768, 1408, 2048, 5120, 7168 and 8192 columns (the
    first two, 2048 and 8192 for SwiGLU; docs/benchmarks.md). Large inputs take bands of 128, which halve
    what maxima cost to write, where that leaves the card warps enough.
    """
    columns = x.shape[1]
    padded = max(triton.next_power_of_2(columns), BLOCK)
    if columns <= 1024:
        lanes, rows, warps = 256, 2, 2
    elif columns <= 1536:
        lanes, rows, warps = (512, 2, 4) if inputs == 1 else (512, 1, 2)
    elif inputs == 1:
        lanes, rows, warps = (1024, 1, 4) if columns <= 4096 else (2048, 1, 8)
        # Three pieces of 2048 would waste a sixth of the lanes. Two rows of float32 do not fit.
        if 4096 < columns <= 5120 and x.itemsize == 2:
            lanes, rows, warps = 512, 2, 4
        elif columns > 16384:
            lanes, warps = 4096, 16
    else:
        # A whole row as one piece where that wastes less than a quarter of the lanes.
        lanes = padded // 4 if 4 * columns <= 3 * padded else padded
        lanes = min(lanes, 8192 if inputs == 2 else 4096)
        rows, warps = 1, min(lanes // 256, 16)
    lanes = min(padded, lanes)
    band = 128 if bands_of_64 >= 1024 and (inputs != 2 or columns > 4096) else 64
    if x.device.type != "cuda":  # the interpreter pays by the operation, however long
        rows = 32
    return EqualPieces(triton.cdiv(columns, lanes), lanes, rows, band, warps, padded)
