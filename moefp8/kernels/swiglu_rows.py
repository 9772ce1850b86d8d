"""SwiGLU of gate and up, written as FP8 rows only: what the product with w2 reads.

The fused twin of ``swiglu`` (``ffn.py``) followed by ``quantize_rows``: the same scales, codes and column
maxima, bit for bit. Hidden itself is never written. Bytes an element of bf16 inputs: 4 read, 1 written,
1/8 for column maxima; apart they are 4 + 2 + 2 + 1. Instructions an element as compiled for Hopper, 25 to
27, half of them for the sigmoid; the budget at copy speed on an H100 is about 48.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8.kernels import ffn, quantize_rows
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
    larger,
    narrow_bits,
    no_maxima,
    row_maxima,
    store_maxima,
    store_rows,
)
from moefp8.kernels._round import widened
from moefp8.kernels._swiglu import (
    any_steep,
    hidden_of,
    load_wide,
    sigmoid_at,
    sigmoid_for,
    steepness,
)
from moefp8.kernels.plan import SEGMENT, Plan
from moefp8.kernels.quantize_rows import RowQuantized
from moefp8.recipe import Gemm


@triton.jit
def _hidden(gate, up, sigmoid, at, mask, EXACT: tl.constexpr, HARDWARE: tl.constexpr):
    """Hidden at offsets ``at``, and the gate."""
    gates = tl.load(gate + at, mask=mask, other=0)
    g = widened(gates, HARDWARE)
    s = sigmoid_at(g, sigmoid, at, mask, EXACT, HARDWARE)
    u = load_wide(up, at, mask, HARDWARE)
    return hidden_of(g, u, s, gates.dtype, HARDWARE), gates


@triton.jit
def _swiglu_rows_kernel(
    gate, up, sigmoid, data, scale, band_amax, band_poisoned, segments, num_groups, columns,
    OUT: tl.constexpr, COLUMN_AMAX: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    SEGMENT: tl.constexpr, BAND: tl.constexpr, ROWS: tl.constexpr,
    PIECES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # One program: a band of rows of one group, ROWS at a time.
    band = tl.program_id(0)
    group, start, end = band_rows(segments, band, SEGMENT, BAND)
    if group < num_groups:
        dtype: tl.constexpr = gate.dtype.element_ty
        largest = no_maxima(PIECES, ROWS, LANES, dtype)
        top = tl.zeros((ROWS,), tl.int32)
        steepest = steepness(tl.zeros((ROWS, LANES), dtype))
        for first in range(0, BAND, ROWS):
            row = start + first + tl.arange(0, ROWS)
            real = (row < end)[:, None]
            at = row.to(tl.int64)[:, None] * columns
            values, bits = (), ()
            for p in tl.static_range(PIECES):
                column = columns_of(p, LANES)
                here = real & (column < columns)
                h, gates = _hidden(gate, up, sigmoid, at + column, here, False, HARDWARE)
                steepest = larger(steepest, steepness(gates), HARDWARE)
                values = appended(values, h)
                bits = appended(bits, narrow_bits(h))
            if COLUMN_AMAX:
                largest = column_maxima(largest, bits, HARDWARE)
            amax = row_maxima(bits, dtype, HARDWARE)
            top = tl.maximum(top, amax)
            store_rows(
                values, amax, data, scale, row, real, columns,
                OUT, ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, LANES,
            )  # fmt: skip
        sick = (tl.max(top, 0) >= INF_BITS) | any_steep(steepest, dtype)
        tl.store(band_poisoned + band, sick.to(tl.int32))
        if COLUMN_AMAX:
            store_maxima(band_amax, band, largest, columns, dtype, LANES)


@triton.jit
def _repair_kernel(
    gate, up, sigmoid, data, scale, band_amax, band_poisoned, segments, num_groups, columns,
    OUT: tl.constexpr, COLUMN_AMAX: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    SEGMENT: tl.constexpr, BAND: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Bands that hold a NaN, an infinity, or a gate too steep for the kernel above, once more and row by
    # row, see quantize_rows.py.
    band = tl.program_id(0)
    group, start, end = band_rows(segments, band, SEGMENT, BAND)
    if (group < num_groups) & (tl.load(band_poisoned + band) != 0):
        column = tl.arange(0, COLUMNS)
        top = tl.full((), 0, tl.int32)
        largest = tl.zeros((COLUMNS,), tl.int32)
        for first in range(0, BAND, MX_BLOCK):
            inner = tl.zeros((COLUMNS,), tl.int32)
            for i in range(MX_BLOCK):
                row = start.to(tl.int64) + first + i
                here = column < tl.where(row < end, columns, 0)
                h, _ = _hidden(gate, up, sigmoid, row * columns + column, here, True, HARDWARE)
                h = h.to(tl.float32)
                inner = tl.maximum(inner, magnitude_bits(h))
                healthy_row(
                    h, data, scale, row, end, columns, here,
                    OUT, ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, COLUMNS,
                )  # fmt: skip
            largest = tl.maximum(largest, tl.where(inner < INF_BITS, inner, 0))
            top = tl.maximum(top, tl.max(inner, 0))
        tl.store(band_poisoned + band, (top >= INF_BITS).to(tl.int32))
        if COLUMN_AMAX:
            tl.store(band_amax + band.to(tl.int64) * columns + column, largest, mask=column < columns)


def _fake(
    gate: Tensor,
    up: Tensor,
    segments: Tensor,
    ends: Tensor,
    format: str,
    dtype: torch.dtype,
    rule: str,
    column_amax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return quantize_rows._fake(gate, None, None, 0, segments, ends, format, dtype, rule, column_amax)


@leaf("swiglu_rows", fake=_fake, vmap=by_loop)
def _swiglu_rows(
    gate: Tensor,
    up: Tensor,
    segments: Tensor,
    ends: Tensor,
    format: str,
    dtype: torch.dtype,
    rule: str,
    column_amax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    data, scale, amax, poisoned = _fake(gate, up, segments, ends, format, dtype, rule, column_amax)
    if gate.numel() == 0:
        return data, scale, amax.zero_(), poisoned.zero_()
    how = equal_pieces(gate, 2 * segments.shape[0] if column_amax else 0, inputs=2)
    band_amax, band_poisoned = empty_bands(gate, segments, how.band, column_amax)
    common = dict(
        OUT=TRITON_DTYPES[dtype], COLUMN_AMAX=column_amax,
        **encoding(Gemm(format, dtype, rule), gate.device)._asdict(),
        SEGMENT=SEGMENT, BAND=how.band, enable_fp_fusion=False,
    )  # fmt: skip
    arguments = (
        gate, up, sigmoid_for(gate), data.view(torch.uint8), scale, band_amax, band_poisoned, segments,
        ends.shape[0], gate.shape[1],
    )  # fmt: skip
    grid = (band_poisoned.shape[0],)
    _swiglu_rows_kernel[grid](
        *arguments, ROWS=how.rows, PIECES=how.pieces, LANES=how.lanes, num_warps=how.warps, **common
    )
    _repair_kernel[grid](*arguments, COLUMNS=how.padded, num_warps=how.padded_warps, **common)
    if column_amax:
        amax, poisoned = reduce_bands(band_amax, band_poisoned, ends, how.band)
    return data, scale, amax, poisoned


def swiglu_rows(gate: Tensor, up: Tensor, plan: Plan, gemm: Gemm, *, column_amax: bool) -> RowQuantized:
    """Quantise ``silu(gate) * up`` (M, H), grouped by ``plan``, with one scale a row."""
    return RowQuantized(
        *_swiglu_rows(gate, up, plan.segments, plan.ends, gemm.format, gemm.dtype, gemm.rule, column_amax)
    )


def reference(gate: Tensor, up: Tensor, offs: Tensor, gemm: Gemm) -> RowQuantized:
    """The twin of :func:`swiglu_rows`, in torch; it also quantises the rows past ``offs[-1]``."""
    return quantize_rows.reference(ffn.swiglu(gate, up), offs, gemm)
