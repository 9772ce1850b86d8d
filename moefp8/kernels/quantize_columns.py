"""Quantise grouped tokens along their rows, one scale a column and group, and write them transposed.

The operands of the weight gradient contract over the rows of one group at a time, and the tensor
core wants the contraction contiguous. So a tile of, say, 128 rows and 64 columns is read and written as 64
columns of 128 codes, into segments that begin at multiples of 128 and are filled up with zeros: no
group needs aligning by the caller, and no block of 32 straddles two groups.

Bytes an element of a bf16 input: 2 read, 1 written, with the scales already known from the pass over
the rows. Lane operations an element, about 8. The roofline is the copy speed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8._quantize import quantize
from moefp8.formats import BLOCK, decode_scale
from moefp8.groups import segments as segments_of
from moefp8.kernels._fp8 import (
    INF_BITS,
    MX_BLOCK,
    NAN,
    TRITON_DTYPES,
    encode,
    encoding,
    magnitude_bits,
    scale_of,
)
from moefp8.kernels._rows import places, scored
from moefp8.kernels.gathered import Gathered
from moefp8.kernels.plan import SEGMENT, Plan, Tile, tile_of
from moefp8.kernels.quantize_rows import RowQuantized
from moefp8.kernels.reference import scale_rule
from moefp8.recipe import Gemm


def _tile(format: str) -> Tile:
    """The fastest of nine, or within 2 % of it, at 768, 1408 and 8192 columns on an H100."""
    return Tile(128, 64, 4) if format == "mx" else Tile(64, 128, 4)


@triton.jit
def starts_group(segments, block, group):
    """Whether a segment block is the first of its group, the one that writes the scales of all."""
    return (block == 0) | (tl.load(segments + 3 * tl.maximum(block - 1, 0)) != group)


@triton.jit
def _quantize_piece(
    x, copy, scores, data, scale, column_amax, segments, block, nth, column, group, columns, stride,
    padded_rows, COPIES: tl.constexpr, SCORED: tl.constexpr, POISONED: tl.constexpr, OUT: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Quantise some columns of the rows ``nth`` of a segment block: any, or if POISONED one block of 32."""
    row = tl.load(segments + 3 * block + 1) + nth
    end = tl.load(segments + 3 * block + 2)
    inside = column < columns
    at, score = places(copy, scores, row, end, stride, COPIES, SCORED)
    here = (row < end)[:, None] & inside[None, :]
    v = tl.load(x + at[:, None] + column[None, :], mask=here, other=0)
    v = scored(v, score[:, None] if SCORED else score, x.dtype.element_ty, SCORED, HARDWARE)
    amax = tl.load(column_amax + group * columns + column, mask=inside, other=0)
    factor, inverse = scale_of(amax, ROWWISE, CARRY, EMAX, MAX)
    code = encode(v * inverse[None, :], OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE)
    if POISONED:
        sick = tl.max(magnitude_bits(v), 0) >= INF_BITS
        code = tl.where(sick[None, :], NAN, code).to(tl.uint8)
    position = block.to(tl.int64) * SEGMENT + nth
    tl.store(
        data + column.to(tl.int64)[:, None] * padded_rows + position[None, :],
        tl.trans(code), mask=inside[:, None],
    )  # fmt: skip
    if starts_group(segments, block, group):
        tl.store(scale + group * columns + column, factor, mask=inside)


@triton.jit
def _quantize_columns_kernel(
    x, copy, scores, data, scale, column_amax, poisoned, segments, num_groups, columns, stride, padded_rows,
    COPIES: tl.constexpr, SCORED: tl.constexpr, OUT: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # One program: a tile of a segment block.
    block, first, left = tile_of(tl.program_id(0), columns, SEGMENT, ROWS, COLUMNS)
    group = tl.load(segments + 3 * block)
    if group < num_groups:
        column = left + tl.arange(0, COLUMNS)
        # Poisoned groups are rare and go by blocks of 32, which need fewer registers than a tile does.
        if tl.load(poisoned + group) == 0:
            _quantize_piece(
                x, copy, scores, data, scale, column_amax, segments, block, first + tl.arange(0, ROWS),
                column, group, columns, stride, padded_rows, COPIES, SCORED, False, OUT, ROWWISE, CARRY,
                EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, SEGMENT,
            )  # fmt: skip
        else:
            for i in range(first, first + ROWS, MX_BLOCK):
                _quantize_piece(
                    x, copy, scores, data, scale, column_amax, segments, block, i + tl.arange(0, MX_BLOCK),
                    column, group, columns, stride, padded_rows, COPIES, SCORED, True, OUT, ROWWISE, CARRY,
                    EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, SEGMENT,
                )  # fmt: skip


def _fake(
    x: Tensor,
    copy: Tensor | None,
    scores: Tensor | None,
    copies: int,
    segments: Tensor,
    column_amax: Tensor,
    poisoned: Tensor,
    format: str,
    dtype: torch.dtype,
    rule: str,
) -> tuple[Tensor, Tensor]:
    data = x.new_empty(x.shape[1], segments.shape[0] * SEGMENT, dtype=dtype)
    return data, x.new_empty(column_amax.shape, dtype=torch.float32)


@leaf("quantize_columns", fake=_fake, vmap=by_loop)
def _quantize_columns(
    x: Tensor,
    copy: Tensor | None,
    scores: Tensor | None,
    copies: int,
    segments: Tensor,
    column_amax: Tensor,
    poisoned: Tensor,
    format: str,
    dtype: torch.dtype,
    rule: str,
) -> tuple[Tensor, Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    data, scale = _fake(x, copy, scores, copies, segments, column_amax, poisoned, format, dtype, rule)
    num_groups, columns = column_amax.shape
    tile = _tile(format)
    if data.numel():
        _quantize_columns_kernel[(tile.programs(segments, columns),)](
            x, segments if copy is None else copy, x if scores is None else scores.contiguous(),
            data.view(torch.uint8), scale, column_amax, poisoned, segments,
            num_groups, columns, x.stride(0), data.shape[1],
            COPIES=copies, SCORED=scores is not None, OUT=TRITON_DTYPES[dtype],
            **encoding(Gemm(format, dtype, rule), x.device)._asdict(),
            SEGMENT=SEGMENT, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
        )  # fmt: skip
    return data, scale


def quantize_columns(
    x: Tensor | Gathered, plan: Plan, rows: RowQuantized, gemm: Gemm
) -> tuple[Tensor, Tensor]:
    """Quantise ``x`` (M, K) along the rows of each group; ``rows`` is :func:`quantize_rows` of it.

    Returns:
        data: ``(K, P)`` float8, P = 128 times the segment blocks; group g has its columns
            ``[ends[g-1], ends[g])``, past its rows zeros. Past ``ends[-1]`` nothing is written.
        scale: ``(G, K)`` float32; rows of empty groups are not written.
    """
    return _quantize_columns(
        *Gathered.of(x).operands(),
        plan.segments,
        rows.column_amax,
        rows.poisoned,
        gemm.format,
        gemm.dtype,
        gemm.rule,
    )


def reference(x: Tensor, offs: Tensor, rows: RowQuantized, gemm: Gemm) -> tuple[Tensor, Tensor]:
    """The twin of :func:`quantize_columns`, in torch; it also fills what that leaves unwritten."""
    num_groups = offs.shape[0]
    layout = segments_of(offs, x.shape[0], SEGMENT)
    amax = rows.column_amax.view(torch.float32)
    amax = torch.cat([amax, torch.zeros_like(amax[:1])])
    per_block = amax[layout.group[::BLOCK]]
    rule = scale_rule(gemm)
    data, _ = quantize(layout.pad(x), -2, gemm.dtype, rule, BLOCK, per_block)
    # The scale of each group: that of a block of zeros of the same amax.
    _, scale = quantize(
        torch.zeros_like(amax[:num_groups])[None], -3, gemm.dtype, rule, BLOCK, amax[None, :num_groups]
    )
    scale = decode_scale(scale) if scale.dtype == torch.uint8 else scale
    return data.view(torch.uint8).mT.contiguous().view(gemm.dtype), scale[0]
