"""Quantise the rows of grouped tokens along their last axis, one scale a row.

The first quantisation of every tensor: activations along K and cotangents along N, and weights along
their memory order. It also gathers what the second one (``quantize_columns.py``) needs, the largest
magnitude of each column within each group, so that that one need not read the tensor twice.

Bytes an element of a bf16 input: 2 read, 1 written. A program holds whole rows in registers, so the
scale of a row costs no second read. Lane operations an element, about 14: widen 1, magnitude 1, row
and column maximum 2, multiply 1, convert 0.5, addresses and masks. The roofline is the copy speed.
Measured (``docs/benchmarks.md``): reading rows twice reaches 60 % of it, this form over 90 %.
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
from moefp8.kernels._fp8 import (
    INF_BITS,
    MX_BLOCK,
    NAN,
    NAN_BITS,
    TRITON_DTYPES,
    encode,
    encoding,
    magnitude_bits,
    scale_of,
    scale_rule,
)
from moefp8.kernels.plan import SEGMENT
from moefp8.recipe import Gemm

#: Longest row that is held in registers.
MAX_COLUMNS = 32768


@triton.jit
def _quantize_rows_kernel(
    x, data, scale, column_amax, poisoned, segments, num_groups, columns, stride,
    OUT: tl.constexpr, COLUMN_AMAX: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    SEGMENT: tl.constexpr, BAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # One program: a band of rows of one group, ROWS at a time.
    block = tl.program_id(0) // (SEGMENT // BAND)
    group = tl.load(segments + 3 * block)
    if group < num_groups:
        start = tl.load(segments + 3 * block + 1) + tl.program_id(0) % (SEGMENT // BAND) * BAND
        end = tl.minimum(tl.load(segments + 3 * block + 2), start + BAND)
        column = tl.arange(0, COLUMNS)
        inside = column < columns
        largest = tl.zeros((ROWS, COLUMNS), tl.int32)
        for first in range(0, BAND, ROWS):
            row = start + first + tl.arange(0, ROWS)
            here = (row < end)[:, None] & inside[None, :]
            at = row.to(tl.int64)[:, None]
            v = tl.load(x + at * stride + column[None, :], mask=here, other=0).to(tl.float32)
            bits = magnitude_bits(v)
            amax = tl.max(bits, 1)
            finite = tl.max(amax, 0) < INF_BITS
            hopeless = row < 0
            if not finite:  # a poisoned block of 32 keeps out of the row's scale
                blocks = tl.max(tl.reshape(bits, (ROWS, COLUMNS // MX_BLOCK, MX_BLOCK)), 2)
                healthy = blocks < INF_BITS
                amax = tl.max(tl.where(healthy, blocks, 0), 1)
                present = tl.arange(0, COLUMNS // MX_BLOCK) < tl.cdiv(columns, MX_BLOCK)
                hopeless = tl.max((healthy & present[None, :]).to(tl.int32), 1) == 0
            factor, inverse = scale_of(amax, ROWWISE, CARRY, EMAX, MAX)
            code = encode(v * inverse[:, None], OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE)
            if not finite:
                blocks = tl.max(tl.reshape(bits, (ROWS, COLUMNS // MX_BLOCK, MX_BLOCK)), 2)
                poison = tl.broadcast_to(
                    (blocks >= INF_BITS)[:, :, None], (ROWS, COLUMNS // MX_BLOCK, MX_BLOCK)
                )
                code = tl.where(tl.reshape(poison, (ROWS, COLUMNS)), NAN, code).to(tl.uint8)
                nan = tl.full((ROWS,), NAN_BITS, tl.int32).to(tl.float32, bitcast=True)
                factor = tl.where(hopeless, nan, factor)
            tl.store(data + at * columns + column[None, :], code, mask=here)
            tl.store(scale + row, factor, mask=row < end)
            if COLUMN_AMAX:
                largest = tl.maximum(largest, bits)
        if COLUMN_AMAX:
            amax = tl.max(largest, 0)
            if tl.max(amax, 0) >= INF_BITS:  # once more, by blocks of 32 rows of the group
                tl.store(poisoned + group, 1)
                amax = tl.zeros((COLUMNS,), tl.int32)
                for first in tl.static_range(0, BAND, MX_BLOCK):
                    inner = tl.zeros((COLUMNS,), tl.int32)
                    for i in range(first, first + MX_BLOCK):
                        at = start.to(tl.int64) + i
                        v = tl.load(
                            x + at * stride + column, mask=column < tl.where(at < end, columns, 0), other=0
                        )
                        inner = tl.maximum(inner, magnitude_bits(v.to(tl.float32)))
                    amax = tl.maximum(amax, tl.where(inner < INF_BITS, inner, 0))
            tl.atomic_max(column_amax + group * columns + column, amax, mask=inside, sem="relaxed")


class RowQuantized(NamedTuple):
    """A matrix quantised along its rows, and what its columns will need.

    Attributes:
        data: ``(M, K)`` float8, K contiguous. Rows past ``offs[-1]`` are not written.
        scale: ``(M,)`` float32: a power of two for format "mx".
        column_amax: ``(G, K)`` int32, the bits of the largest magnitude of each column in each group,
            poisoned blocks of 32 rows left out; ``(G, 0)`` if not asked for.
        poisoned: ``(G,)`` int32, not zero where a group holds a NaN or an infinity.
    """

    data: Tensor
    scale: Tensor
    column_amax: Tensor
    poisoned: Tensor


def _fake(
    x: Tensor,
    segments: Tensor,
    num_groups: int,
    format: str,
    dtype: torch.dtype,
    rule: str,
    column_amax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(num_groups, x.shape[1] if column_amax else 0, dtype=torch.int32),
        x.new_empty(num_groups, dtype=torch.int32),
    )


def _tiling(columns: int) -> tuple[int, int, int]:
    """(rows at a time, rows to a program, warps) for rows of ``columns``, a power of two."""
    if columns <= 1024:
        return 4, 64, 4
    if columns <= 2048:
        return 1, 64, 8
    if columns <= 8192:
        return 2, 64, 8
    return 1, 64, columns // 2048


@leaf("quantize_rows", fake=_fake, vmap=by_loop)
def _quantize_rows(
    x: Tensor,
    segments: Tensor,
    num_groups: int,
    format: str,
    dtype: torch.dtype,
    rule: str,
    column_amax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    data, scale, amax, poisoned = _fake(x, segments, num_groups, format, dtype, rule, column_amax)
    amax.zero_()
    poisoned.zero_()
    columns = x.shape[1]
    padded = max(triton.next_power_of_2(columns), BLOCK)
    rows, band, warps = _tiling(padded)
    launch = (segments.shape[0] * (SEGMENT // band),)
    if x.numel() and launch[0]:
        _quantize_rows_kernel[launch](
            x, data.view(torch.uint8), scale, amax, poisoned, segments, num_groups, columns, x.stride(0),
            OUT=TRITON_DTYPES[dtype], COLUMN_AMAX=column_amax,
            **encoding(Gemm(format, dtype, rule), x.device)._asdict(),
            SEGMENT=SEGMENT, BAND=band, ROWS=rows, COLUMNS=padded, num_warps=warps,
        )  # fmt: skip
    return data, scale, amax, poisoned


def quantize_rows(
    x: Tensor, segments: Tensor, num_groups: int, gemm: Gemm, *, column_amax: bool
) -> RowQuantized:
    """Quantise ``x`` (M, K), grouped by the ``segments`` of a plan, with one scale a row."""
    return RowQuantized(
        *_quantize_rows(x, segments, num_groups, gemm.format, gemm.dtype, gemm.rule, column_amax)
    )


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
