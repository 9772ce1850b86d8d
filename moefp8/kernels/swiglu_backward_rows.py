"""Gradients of SwiGLU, written as FP8 rows only: what the products with w1 and w3 read in dgrad.

The fused twin of ``swiglu_backward`` (``ffn.py``) followed by ``quantize_rows`` of both gradients, bit
for bit. Neither is ever written in high precision; ``swiglu_backward_columns.py`` works them out again.
Bytes an element of bf16 inputs: 6 read, 2 written, 1/4 for column maxima; apart they are 6 + 4 + 4 + 2.
Lane operations an element, about 45; the budget at copy speed on an H100 is about 75.
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
    encode,
    encoding,
    magnitude_bits,
    scale_of,
)
from moefp8.kernels._pieces import pieces
from moefp8.kernels._swiglu import (
    d_gate_of,
    d_up_of,
    flagged_bits,
    load_wide,
    sigmoid_at,
    sigmoid_for,
)
from moefp8.kernels.plan import SEGMENT, Plan
from moefp8.kernels.quantize_rows import RowQuantized
from moefp8.recipe import Gemm


@triton.jit
def _gradients(gate, up, cotangent, sigmoid, at, mask, EXACT: tl.constexpr, HARDWARE: tl.constexpr):
    """Both gradients at offsets ``at``, and the bits of their magnitudes."""
    g = load_wide(gate, at, mask)
    c = load_wide(cotangent, at, mask)
    s = sigmoid_at(g, sigmoid, at, mask, EXACT, HARDWARE)
    dtype: tl.constexpr = gate.dtype.element_ty
    d_gate = d_gate_of(g, load_wide(up, at, mask), c, s, dtype, HARDWARE)
    d_up = d_up_of(g, c, s, dtype, HARDWARE)
    return d_gate, flagged_bits(d_gate, g, EXACT), d_up, magnitude_bits(d_up)


@triton.jit
def _store_codes(
    data, at, y, inverse, mask,
    OUT: tl.constexpr, MAX: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    code = encode(y * inverse[:, None], OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE)
    tl.store(data + at, code, mask=mask)


@triton.jit
def _swiglu_backward_rows_kernel(
    gate, up, cotangent, sigmoid, gate_data, gate_scale, up_data, up_scale,
    gate_band_amax, gate_band_poisoned, up_band_amax, up_band_poisoned, segments, num_groups, columns,
    OUT: tl.constexpr, COLUMN_AMAX: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    SEGMENT: tl.constexpr, BAND: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    # One program: a band of rows of one group, ROWS at a time, in columns [0, FIRST) and REST more.
    band = tl.program_id(0)
    group, start, end = band_rows(segments, band, SEGMENT, BAND)
    if group < num_groups:
        column = tl.arange(0, FIRST)
        inside = column < columns
        # Codes leave in the layout that values came in, see quantize_rows.py.
        code_column = tl.max_contiguous(tl.arange(0, FIRST), 8)
        gate_largest = tl.zeros((FIRST,), tl.int32)
        up_largest = tl.zeros((FIRST,), tl.int32)
        if REST:
            rest_column = FIRST + tl.arange(0, REST)
            rest_inside = rest_column < columns
            rest_code_column = tl.max_contiguous(FIRST + tl.arange(0, REST), 8)
            rest_gate_largest = tl.zeros((REST,), tl.int32)
            rest_up_largest = tl.zeros((REST,), tl.int32)
        top = tl.full((), 0, tl.int32)
        for first in range(0, BAND, ROWS):
            row = start + first + tl.arange(0, ROWS)
            at = row.to(tl.int64)[:, None] * columns
            real = (row < end)[:, None]
            here = real & inside[None, :]
            d_gate, gate_bits, d_up, up_bits = _gradients(
                gate, up, cotangent, sigmoid, at + column[None, :], here, False, HARDWARE
            )
            gate_amax = tl.max(gate_bits, 1)
            up_amax = tl.max(up_bits, 1)
            if REST:
                rest_here = real & rest_inside[None, :]
                rest_d_gate, rest_gate_bits, rest_d_up, rest_up_bits = _gradients(
                    gate, up, cotangent, sigmoid, at + rest_column[None, :], rest_here, False, HARDWARE
                )
                gate_amax = tl.maximum(gate_amax, tl.max(rest_gate_bits, 1))
                up_amax = tl.maximum(up_amax, tl.max(rest_up_bits, 1))
            top = tl.maximum(top, tl.max(tl.maximum(gate_amax, up_amax), 0))
            factor, gate_inverse = scale_of(gate_amax, ROWWISE, CARRY, EMAX, MAX)
            tl.store(gate_scale + row, factor, mask=row < end)
            factor, up_inverse = scale_of(up_amax, ROWWISE, CARRY, EMAX, MAX)
            tl.store(up_scale + row, factor, mask=row < end)
            to = at + code_column[None, :]
            _store_codes(
                gate_data, to, d_gate, gate_inverse, here, OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE
            )
            _store_codes(up_data, to, d_up, up_inverse, here, OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE)
            if COLUMN_AMAX:
                gate_largest = tl.maximum(gate_largest, tl.max(gate_bits, 0))
                up_largest = tl.maximum(up_largest, tl.max(up_bits, 0))
            if REST:
                to = at + rest_code_column[None, :]
                _store_codes(
                    gate_data, to, rest_d_gate, gate_inverse, rest_here,
                    OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE,
                )  # fmt: skip
                _store_codes(
                    up_data, to, rest_d_up, up_inverse, rest_here,
                    OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE,
                )  # fmt: skip
                if COLUMN_AMAX:
                    rest_gate_largest = tl.maximum(rest_gate_largest, tl.max(rest_gate_bits, 0))
                    rest_up_largest = tl.maximum(rest_up_largest, tl.max(rest_up_bits, 0))
        poison = (top >= INF_BITS).to(tl.int32)
        tl.store(gate_band_poisoned + band, poison)
        tl.store(up_band_poisoned + band, poison)
        if COLUMN_AMAX:
            at = band.to(tl.int64) * columns
            tl.store(gate_band_amax + at + column, gate_largest, mask=inside)
            tl.store(up_band_amax + at + column, up_largest, mask=inside)
            if REST:
                tl.store(gate_band_amax + at + rest_column, rest_gate_largest, mask=rest_inside)
                tl.store(up_band_amax + at + rest_column, rest_up_largest, mask=rest_inside)


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
                d_gate, gate_bits, d_up, up_bits = _gradients(
                    gate, up, cotangent, sigmoid, row * columns + column, here, True, HARDWARE
                )
                gate_inner = tl.maximum(gate_inner, gate_bits)
                up_inner = tl.maximum(up_inner, up_bits)
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
    shape = pieces(gate.shape[1], 3, gate.device)
    gate_bands = empty_bands(gate, segments, shape.band, column_amax)
    up_bands = empty_bands(gate, segments, shape.band, column_amax)
    common = dict(
        OUT=TRITON_DTYPES[dtype], COLUMN_AMAX=column_amax,
        **encoding(Gemm(format, dtype, rule), gate.device)._asdict(),
        SEGMENT=SEGMENT, BAND=shape.band, num_warps=shape.warps, enable_fp_fusion=False,
    )  # fmt: skip
    arguments = (
        gate, up, cotangent, sigmoid_for(gate),
        gate_data.view(torch.uint8), gate_scale, up_data.view(torch.uint8), up_scale,
        *gate_bands, *up_bands, segments, ends.shape[0], gate.shape[1],
    )  # fmt: skip
    grid = (gate_bands[1].shape[0],)
    _swiglu_backward_rows_kernel[grid](
        *arguments, ROWS=shape.rows, FIRST=shape.first, REST=shape.rest, **common
    )
    _repair_kernel[grid](*arguments, COLUMNS=shape.padded, **common)
    if column_amax:
        gate_amax, gate_poisoned = reduce_bands(*gate_bands, ends, shape.band)
        up_amax, up_poisoned = reduce_bands(*up_bands, ends, shape.band)
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
