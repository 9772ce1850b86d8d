"""Quantise the rows of grouped tokens along their last axis, one scale a row.

The first quantisation of every tensor: activations along K and cotangents along N, and weights along
their memory order. It also gathers what the second one (``quantize_columns.py``) needs, the largest
magnitude of each column within each group, so that that one need not read the tensor twice.

Bytes an element of a bf16 input: 2 read, 1 written, and 1/16 written and read again for the column
maxima of each band of 64 rows. A program holds whole rows in registers (``_pieces.py``), so the scale of a
row costs no second read. Lane operations an element of 16 bits, about 8: magnitude, row and column maximum
two at a time, widen, multiply, half a conversion, and its share of addresses. The roofline is the copy
speed. What lost, with numbers, is in ``docs/benchmarks.md``: reading rows twice, column maxima by atomics,
poisoned blocks handled in the same kernel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8._quantize import group_amax, quantize
from moefp8.formats import BLOCK, decode_scale
from moefp8.groups import group_ids
from moefp8.groups import segments as segments_of
from moefp8.kernels._bands import band_rows, empty_bands, healthy_row, reduce_bands
from moefp8.kernels._fp8 import (
    INF_BITS,
    MX_BLOCK,
    TRITON_DTYPES,
    encoding,
    magnitude_bits,
)
from moefp8.kernels._pieces import (
    appended,
    column_maxima,
    columns_of,
    equal_pieces,
    narrow_bits,
    no_maxima,
    row_maxima,
    store_maxima,
    store_rows,
)
from moefp8.kernels._rows import places, scored
from moefp8.kernels.gathered import Gathered
from moefp8.kernels.plan import SEGMENT, Plan
from moefp8.kernels.reference import scale_rule
from moefp8.recipe import Gemm

#: Longest row that is held in registers.
MAX_COLUMNS = 32768


@triton.jit
def _quantize_rows_kernel(
    x, copy, scores, data, scale, band_amax, band_poisoned, segments, num_groups, columns, stride,
    COPIES: tl.constexpr, SCORED: tl.constexpr, OUT: tl.constexpr, COLUMN_AMAX: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    SEGMENT: tl.constexpr, BAND: tl.constexpr, ROWS: tl.constexpr,
    PIECES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # One program: a band of rows of one group, ROWS at a time.
    band = tl.program_id(0)
    group, start, end = band_rows(segments, band, SEGMENT, BAND)
    if group < num_groups:
        dtype: tl.constexpr = x.dtype.element_ty
        largest = no_maxima(PIECES, ROWS, LANES, dtype)
        top = tl.zeros((ROWS,), tl.int32)
        for first in range(0, BAND, ROWS):
            row = start + first + tl.arange(0, ROWS)
            real = (row < end)[:, None]
            at, score = places(copy, scores, row, end, stride, COPIES, SCORED)
            values, bits = (), ()
            for p in tl.static_range(PIECES):
                column = columns_of(p, LANES)
                v = tl.load(x + at[:, None] + column, mask=real & (column < columns), other=0)
                if SCORED:
                    v = scored(v, score[:, None], dtype, True, HARDWARE).to(dtype)
                values = appended(values, v)
                bits = appended(bits, narrow_bits(v))
            if COLUMN_AMAX:
                largest = column_maxima(largest, bits, HARDWARE)
            amax = row_maxima(bits, dtype, HARDWARE)
            top = tl.maximum(top, amax)
            store_rows(
                values, amax, data, scale, row, real, columns,
                OUT, ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, LANES,
            )  # fmt: skip
        tl.store(band_poisoned + band, (tl.max(top, 0) >= INF_BITS).to(tl.int32))
        if COLUMN_AMAX:
            store_maxima(band_amax, band, largest, columns, dtype, LANES)


@triton.jit
def _repair_poisoned_kernel(
    x, copy, scores, data, scale, band_amax, band_poisoned, segments, num_groups, columns, stride,
    COPIES: tl.constexpr, SCORED: tl.constexpr, OUT: tl.constexpr, COLUMN_AMAX: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    SEGMENT: tl.constexpr, BAND: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Bands that hold a NaN or an infinity, once more and row by row: a poisoned block of 32 stays out
    # of the scale of its row and of the maxima of its columns. In the kernel above this would cost
    # registers that every row pays for.
    band = tl.program_id(0)
    group, start, end = band_rows(segments, band, SEGMENT, BAND)
    if (group < num_groups) & (tl.load(band_poisoned + band) != 0):
        column = tl.arange(0, COLUMNS)
        largest = tl.zeros((COLUMNS,), tl.int32)
        for first in range(0, BAND, MX_BLOCK):
            inner = tl.zeros((COLUMNS,), tl.int32)
            for i in range(MX_BLOCK):
                row = start.to(tl.int64) + first + i
                here = column < tl.where(row < end, columns, 0)
                at, score = places(copy, scores, row, end, stride, COPIES, SCORED)
                v = tl.load(x + at + column, mask=here, other=0)
                v = scored(v, score, x.dtype.element_ty, SCORED, HARDWARE)
                inner = tl.maximum(inner, magnitude_bits(v))
                healthy_row(
                    v, data, scale, row, end, columns, here,
                    OUT, ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, COLUMNS,
                )  # fmt: skip
            largest = tl.maximum(largest, tl.where(inner < INF_BITS, inner, 0))
        if COLUMN_AMAX:
            tl.store(band_amax + band.to(tl.int64) * columns + column, largest, mask=column < columns)


class RowQuantized(NamedTuple):
    """A matrix quantised along its rows, and what its columns will need.

    Attributes:
        data: ``(M, K)`` float8, K contiguous. Rows past ``offs[-1]`` are not written.
        scale: ``(M,)`` float32: a power of two for format "mx".
        column_amax: ``(G, K)`` int32, the bits of the largest magnitude of each column in each group,
            poisoned blocks of 32 rows left out; ``(G, 0)`` if not asked for.
        poisoned: ``(G,)`` int32, not zero where a group holds a NaN or an infinity; ``(0,)`` without
            ``column_amax``.
    """

    data: Tensor
    scale: Tensor
    column_amax: Tensor
    poisoned: Tensor


def _fake(
    x: Tensor,
    copy: Tensor | None,
    scores: Tensor | None,
    copies: int,
    segments: Tensor,
    ends: Tensor,
    format: str,
    dtype: torch.dtype,
    rule: str,
    column_amax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = (x if copy is None else copy).shape[0], x.shape[1]
    return (
        x.new_empty(rows, columns, dtype=dtype),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(ends.shape[0], columns if column_amax else 0, dtype=torch.int32),
        x.new_empty(ends.shape[0] if column_amax else 0, dtype=torch.int32),
    )


@leaf("quantize_rows", fake=_fake, vmap=by_loop)
def _quantize_rows(
    x: Tensor,
    copy: Tensor | None,
    scores: Tensor | None,
    copies: int,
    segments: Tensor,
    ends: Tensor,
    format: str,
    dtype: torch.dtype,
    rule: str,
    column_amax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    data, scale, amax, poisoned = _fake(
        x, copy, scores, copies, segments, ends, format, dtype, rule, column_amax
    )
    if data.numel() == 0:
        return data, scale, amax.zero_(), poisoned.zero_()
    columns, num_groups = x.shape[1], ends.shape[0]
    how = equal_pieces(x, 2 * segments.shape[0] if column_amax else 0)
    bands = segments.shape[0] * (SEGMENT // how.band)
    band_amax, band_poisoned = empty_bands(x, segments, how.band, column_amax)
    arguments = (
        x, segments if copy is None else copy, x if scores is None else scores.contiguous(),
        data.view(torch.uint8), scale, band_amax, band_poisoned, segments, num_groups, columns, x.stride(0),
    )  # fmt: skip
    common = dict(
        COPIES=copies, SCORED=scores is not None, OUT=TRITON_DTYPES[dtype], COLUMN_AMAX=column_amax,
        **encoding(Gemm(format, dtype, rule), x.device)._asdict(),
        SEGMENT=SEGMENT, BAND=how.band,
    )  # fmt: skip
    _quantize_rows_kernel[(bands,)](
        *arguments, ROWS=how.rows, PIECES=how.pieces, LANES=how.lanes, num_warps=how.warps, **common
    )
    _repair_poisoned_kernel[(bands,)](*arguments, COLUMNS=how.padded, num_warps=how.padded_warps, **common)
    if column_amax:
        amax, poisoned = reduce_bands(band_amax, band_poisoned, ends, how.band)
    return data, scale, amax, poisoned


def quantize_rows(x: Tensor | Gathered, plan: Plan, gemm: Gemm, *, column_amax: bool) -> RowQuantized:
    """Quantise ``x`` (M, K), grouped by ``plan``, with one scale a row."""
    how = gemm.format, gemm.dtype, gemm.rule, column_amax
    return RowQuantized(*_quantize_rows(*Gathered.of(x).operands(), plan.segments, plan.ends, *how))


def reference(x: Tensor, offs: Tensor, gemm: Gemm) -> RowQuantized:
    """The twin of :func:`quantize_rows`, in torch; it also quantises the rows past ``offs[-1]``."""
    num_groups = offs.shape[0]
    data, scale = quantize(x, -1, gemm.dtype, scale_rule(gemm), -1, None)
    if scale.dtype == torch.uint8:
        scale = decode_scale(scale)
    layout = segments_of(offs, x.shape[0], BLOCK)
    padded = layout.pad(x)
    column_amax = group_amax(padded, layout, num_groups)[:num_groups].to(torch.float32).view(torch.int32)
    owner = group_ids(offs, x.shape[0])
    bad = ~x.to(torch.float32).isfinite().all(1)
    poisoned = ((owner == torch.arange(num_groups, device=x.device)[:, None]) & bad).any(1).to(torch.int32)
    return RowQuantized(data, scale[:, 0], column_amax, poisoned)
