"""Bands of rows: what the quantisers of rows share besides their arithmetic.

A program quantises a band of rows of one group and leaves the maxima of its columns, and whether it met
a NaN or an infinity. Bands that did are done again, row by row (:func:`healthy_row`), and the maxima of
a group's bands are reduced to those of the group (:func:`reduce_bands`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8.kernels._fp8 import INF_BITS, MX_BLOCK, NAN, NAN_BITS, encode, magnitude_bits, scale_of
from moefp8.kernels.plan import SEGMENT


@triton.jit
def band_rows(segments, band, SEGMENT: tl.constexpr, BAND: tl.constexpr):
    """Group of a band, its first row, and the row that its segment block ends at."""
    segment = band // (SEGMENT // BAND)
    group = tl.load(segments + 3 * segment)
    start = tl.load(segments + 3 * segment + 1) + band % (SEGMENT // BAND) * BAND
    return group, start, tl.load(segments + 3 * segment + 2)


@triton.jit
def healthy_row(
    v, data, scale, row, end, columns, here,
    OUT: tl.constexpr, ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write one row ``v`` (COLUMNS,): poisoned blocks of 32 as NaN, the rest as if those were zero.

    ``here`` are the columns there are, none for a row at or past ``end``.
    """
    column = tl.arange(0, COLUMNS)
    blocks: tl.constexpr = COLUMNS // MX_BLOCK
    present = tl.arange(0, blocks) < tl.cdiv(columns, MX_BLOCK)
    block = tl.max(tl.reshape(magnitude_bits(v), (blocks, MX_BLOCK)), 1)
    healthy = block < INF_BITS
    factor, inverse = scale_of(
        tl.max(tl.where(healthy, block, 0), 0, keep_dims=True), ROWWISE, CARRY, EMAX, MAX
    )
    code = encode(v * inverse, OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE)
    sick = tl.broadcast_to((block >= INF_BITS)[:, None], (blocks, MX_BLOCK))
    code = tl.where(tl.reshape(sick, (COLUMNS,)), NAN, code).to(tl.uint8)
    tl.store(data + row * columns + column, code, mask=here)
    some = tl.max((healthy & present).to(tl.int32), 0, keep_dims=True)
    factor = tl.where(some == 0, NAN_BITS, factor.to(tl.int32, bitcast=True))
    first = tl.arange(0, 1)
    tl.store(scale + row + first, factor.to(tl.float32, bitcast=True), mask=first < end - row)


@triton.jit
def _reduce_bands_kernel(
    column_amax, poisoned, band_amax, band_poisoned, ends, columns,
    BAND: tl.constexpr, BANDS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    # One program: some columns of one group, over every SPLIT-th 32 bands of its segment.
    group = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    start = tl.where(group == 0, 0, tl.load(ends + tl.maximum(group - 1, 0))) // BAND
    count = tl.load(ends + group) // BAND - start
    largest = tl.zeros((COLUMNS,), tl.int32)
    sick = tl.zeros((BANDS,), tl.int32)
    for i in range(tl.program_id(2), tl.cdiv(count, BANDS), SPLIT):
        nth = i * BANDS + tl.arange(0, BANDS)
        band = (start + nth).to(tl.int64)
        here = (nth < count)[:, None] & inside[None, :]
        part = tl.load(band_amax + band[:, None] * columns + column[None, :], mask=here, other=0)
        largest = tl.maximum(largest, tl.max(part, 0))
        sick = tl.maximum(sick, tl.load(band_poisoned + band, mask=nth < count, other=0))
    if SPLIT == 1:
        tl.store(column_amax + group * columns + column, largest, mask=inside)
        tl.store(poisoned + group, tl.max(sick, 0))
    else:
        tl.atomic_max(column_amax + group * columns + column, largest, mask=inside, sem="relaxed")
        tl.atomic_max(poisoned + group, tl.max(sick, 0), sem="relaxed")


def reduce_bands(
    band_amax: Tensor, band_poisoned: Tensor, ends: Tensor, band: int
) -> tuple[Tensor, Tensor]:
    """Column maxima ``(G, K)`` of each group from those of its bands, and whether any band is poisoned."""
    num_groups, (bands, columns) = ends.shape[0], band_amax.shape
    across = triton.cdiv(columns, 64)
    # Some 2000 programs, however few the groups; no more than there are pieces of 32 bands. A power of
    # two, so that few variants are compiled.
    split = max(1, min(2048 // (num_groups * across), triton.cdiv(bands, 32)))
    split = 1 << split.bit_length() - 1
    # With many groups each has one program for its columns, and filling with zeros, two launches of some
    # microseconds, would be a twentieth of the time of small tensors.
    empty = ends.new_empty if split == 1 else ends.new_zeros
    amax, poisoned = empty(num_groups, columns), empty(num_groups)
    _reduce_bands_kernel[(num_groups, across, split)](
        amax, poisoned, band_amax, band_poisoned, ends, columns,
        BAND=band, BANDS=32, COLUMNS=64, SPLIT=split,
    )  # fmt: skip
    return amax, poisoned


def empty_bands(x: Tensor, segments: Tensor, band: int, wanted: bool = True) -> tuple[Tensor, Tensor]:
    """Room for the column maxima of each band of ``x`` (M, K), if wanted, and for its poison."""
    bands = segments.shape[0] * (SEGMENT // band)
    return (
        x.new_empty(bands if wanted else 0, x.shape[1], dtype=torch.int32),
        x.new_empty(bands, dtype=torch.int32),
    )
