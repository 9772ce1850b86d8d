"""Gradients of SwiGLU, written as FP8 rows only: what the products with w1 and w3 read in dgrad.

The fused twin of ``swiglu_backward`` (``ffn.py``) followed by ``quantize_rows`` of both gradients, bit
for bit. Neither is ever written in high precision; ``swiglu_backward_columns.py`` works them out again.
Bytes an element of bf16 inputs: 6 read, 2 written, 1/4 for column maxima; apart they are 6 + 4 + 4 + 2.
Instructions an element as compiled for Hopper, 39 to 44; the budget at copy speed on an H100 is about 75.
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
    d_gate_of,
    d_up_of,
    load_wide,
    sigmoid_at,
    sigmoid_for,
    steepness,
)
from moefp8.kernels.plan import SEGMENT, Plan
from moefp8.kernels.quantize_rows import RowQuantized
from moefp8.recipe import Gemm


@triton.jit
def _gradients(gate, up, cotangent, sigmoid, at, mask, EXACT: tl.constexpr, HARDWARE: tl.constexpr):
    """Both gradients at offsets ``at``, and the gate."""
    gates = tl.load(gate + at, mask=mask, other=0)
    g = widened(gates, HARDWARE)
    u, c = load_wide(up, at, mask, HARDWARE), load_wide(cotangent, at, mask, HARDWARE)
    s = sigmoid_at(g, sigmoid, at, mask, EXACT, HARDWARE)
    d_gate = d_gate_of(g, u, c, s, gates.dtype, HARDWARE)
    return d_gate, d_up_of(g, c, s, gates.dtype, HARDWARE), gates


@triton.jit
def _swiglu_backward_rows_kernel(
    gate, up, cotangent, sigmoid, gate_data, gate_scale, up_data, up_scale,
    gate_band_amax, gate_band_poisoned, up_band_amax, up_band_poisoned, segments, num_groups, columns,
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
        gate_largest = no_maxima(PIECES, ROWS, LANES, dtype)
        up_largest = no_maxima(PIECES, ROWS, LANES, dtype)
        top = tl.zeros((ROWS,), tl.int32)
        steepest = steepness(tl.zeros((ROWS, LANES), dtype))
        for first in range(0, BAND, ROWS):
            row = start + first + tl.arange(0, ROWS)
            real = (row < end)[:, None]
            at = row.to(tl.int64)[:, None] * columns
            gate_values, gate_bits, up_values, up_bits = (), (), (), ()
            for p in tl.static_range(PIECES):
                column = columns_of(p, LANES)
                here = real & (column < columns)
                d_gate, d_up, gates = _gradients(
                    gate, up, cotangent, sigmoid, at + column, here, False, HARDWARE
                )
                steepest = larger(steepest, steepness(gates), HARDWARE)
                gate_values = appended(gate_values, d_gate)
                gate_bits = appended(gate_bits, narrow_bits(d_gate))
                up_values = appended(up_values, d_up)
                up_bits = appended(up_bits, narrow_bits(d_up))
            if COLUMN_AMAX:
                gate_largest = column_maxima(gate_largest, gate_bits, HARDWARE)
                up_largest = column_maxima(up_largest, up_bits, HARDWARE)
            gate_amax = row_maxima(gate_bits, dtype, HARDWARE)
            up_amax = row_maxima(up_bits, dtype, HARDWARE)
            top = tl.maximum(top, tl.maximum(gate_amax, up_amax))
            store_rows(
                gate_values, gate_amax, gate_data, gate_scale, row, real, columns,
                OUT, ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, LANES,
            )  # fmt: skip
            store_rows(
                up_values, up_amax, up_data, up_scale, row, real, columns,
                OUT, ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, LANES,
            )  # fmt: skip
        sick = ((tl.max(top, 0) >= INF_BITS) | any_steep(steepest, dtype)).to(tl.int32)
        tl.store(gate_band_poisoned + band, sick)
        tl.store(up_band_poisoned + band, sick)
        if COLUMN_AMAX:
            store_maxima(gate_band_amax, band, gate_largest, columns, dtype, LANES)
            store_maxima(up_band_amax, band, up_largest, columns, dtype, LANES)


@triton.jit
def _repair_kernel(
    gate, up, cotangent, sigmoid, gate_data, gate_scale, up_data, up_scale,
    gate_band_amax, gate_band_poisoned, up_band_amax, up_band_poisoned, segments, num_groups, columns,
    OUT: tl.constexpr, COLUMN_AMAX: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    SEGMENT: tl.constexpr, BAND: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Bands that hold a NaN, an infinity, or a gate too steep for the kernel above, once more and row by
    # row, see quantize_rows.py.
    band = tl.program_id(0)
    group, start, end = band_rows(segments, band, SEGMENT, BAND)
    if (group < num_groups) & (tl.load(gate_band_poisoned + band) != 0):
        column = tl.arange(0, COLUMNS)
        gate_largest = tl.zeros((COLUMNS,), tl.int32)
        up_largest = tl.zeros((COLUMNS,), tl.int32)
        gate_top = tl.full((), 0, tl.int32)
        up_top = tl.full((), 0, tl.int32)
        for first in range(0, BAND, MX_BLOCK):
            gate_inner = tl.zeros((COLUMNS,), tl.int32)
            up_inner = tl.zeros((COLUMNS,), tl.int32)
            for i in range(MX_BLOCK):
                row = start.to(tl.int64) + first + i
                here = column < tl.where(row < end, columns, 0)
                d_gate, d_up, _ = _gradients(
                    gate, up, cotangent, sigmoid, row * columns + column, here, True, HARDWARE
                )
                d_gate, d_up = d_gate.to(tl.float32), d_up.to(tl.float32)
                gate_inner = tl.maximum(gate_inner, magnitude_bits(d_gate))
                up_inner = tl.maximum(up_inner, magnitude_bits(d_up))
                healthy_row(
                    d_gate, gate_data, gate_scale, row, end, columns, here,
                    OUT, ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, COLUMNS,
                )  # fmt: skip
                healthy_row(
                    d_up, up_data, up_scale, row, end, columns, here,
                    OUT, ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, COLUMNS,
                )  # fmt: skip
            gate_top = tl.maximum(gate_top, tl.max(gate_inner, 0))
            up_top = tl.maximum(up_top, tl.max(up_inner, 0))
            gate_largest = tl.maximum(gate_largest, tl.where(gate_inner < INF_BITS, gate_inner, 0))
            up_largest = tl.maximum(up_largest, tl.where(up_inner < INF_BITS, up_inner, 0))
        tl.store(gate_band_poisoned + band, (gate_top >= INF_BITS).to(tl.int32))
        tl.store(up_band_poisoned + band, (up_top >= INF_BITS).to(tl.int32))
        if COLUMN_AMAX:
            at = band.to(tl.int64) * columns + column
            tl.store(gate_band_amax + at, gate_largest, mask=column < columns)
            tl.store(up_band_amax + at, up_largest, mask=column < columns)


def _fake(
    gate: Tensor, up: Tensor, cotangent: Tensor, segments: Tensor, ends: Tensor,
    format: str, dtype: torch.dtype, rule: str, column_amax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def one() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return quantize_rows._fake(gate, None, None, 0, segments, ends, format, dtype, rule, column_amax)

    return (*one(), *one())


@leaf("swiglu_backward_rows", fake=_fake, vmap=by_loop)
def _swiglu_backward_rows(
    gate: Tensor, up: Tensor, cotangent: Tensor, segments: Tensor, ends: Tensor,
    format: str, dtype: torch.dtype, rule: str, column_amax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gate, up, cotangent = gate.contiguous(), up.contiguous(), cotangent.contiguous()
    outs = _fake(gate, up, cotangent, segments, ends, format, dtype, rule, column_amax)
    gate_data, gate_scale, gate_amax, gate_poisoned, up_data, up_scale, up_amax, up_poisoned = outs
    if gate.numel() == 0:
        for x in (gate_amax, gate_poisoned, up_amax, up_poisoned):
            x.zero_()
        return outs
    how = equal_pieces(gate, 2 * segments.shape[0] if column_amax else 0, inputs=3)
    gate_bands = empty_bands(gate, segments, how.band, column_amax)
    up_bands = empty_bands(gate, segments, how.band, column_amax)
    common = dict(
        OUT=TRITON_DTYPES[dtype], COLUMN_AMAX=column_amax,
        **encoding(Gemm(format, dtype, rule), gate.device)._asdict(),
        SEGMENT=SEGMENT, BAND=how.band, enable_fp_fusion=False,
    )  # fmt: skip
    arguments = (
        gate, up, cotangent, sigmoid_for(gate),
        gate_data.view(torch.uint8), gate_scale, up_data.view(torch.uint8), up_scale,
        *gate_bands, *up_bands, segments, ends.shape[0], gate.shape[1],
    )  # fmt: skip
    grid = (gate_bands[1].shape[0],)
    _swiglu_backward_rows_kernel[grid](
        *arguments, ROWS=how.rows, PIECES=how.pieces, LANES=how.lanes, num_warps=how.warps, **common
    )
    _repair_kernel[grid](*arguments, COLUMNS=how.padded, num_warps=how.padded_warps, **common)
    if column_amax:
        gate_amax, gate_poisoned = reduce_bands(*gate_bands, ends, how.band)
        up_amax, up_poisoned = reduce_bands(*up_bands, ends, how.band)
    return gate_data, gate_scale, gate_amax, gate_poisoned, up_data, up_scale, up_amax, up_poisoned


def swiglu_backward_rows(
    gate: Tensor, up: Tensor, cotangent: Tensor, plan: Plan, gemm: Gemm, *, column_amax: bool
) -> tuple[RowQuantized, RowQuantized]:
    """Quantise the gradients of gate and up (M, H), grouped by ``plan``, with one scale a row."""
    outs = _swiglu_backward_rows(
        gate, up, cotangent, plan.segments, plan.ends, gemm.format, gemm.dtype, gemm.rule, column_amax
    )
    return RowQuantized(*outs[:4]), RowQuantized(*outs[4:])


def reference(
    gate: Tensor, up: Tensor, cotangent: Tensor, offs: Tensor, gemm: Gemm
) -> tuple[RowQuantized, RowQuantized]:
    """The twin of :func:`swiglu_backward_rows`; it also quantises the rows past ``offs[-1]``."""
    d_gate, d_up = ffn.swiglu_backward(gate, up, cotangent)
    return quantize_rows.reference(d_gate, offs, gemm), quantize_rows.reference(d_up, offs, gemm)
