"""Gradients of SwiGLU and hidden, quantised along the rows of each group and written transposed.

The operands of the three weight gradients that are made of gate and up, in one pass: the fused twin of
``swiglu_backward`` and ``swiglu`` (``ffn.py``) followed by ``quantize_columns`` of all three results, bit
for bit. So the forward keeps gate and up alone, and nothing of size (M, H) is written in high precision.
Bytes an element of bf16 inputs: 6 read, 3 written; apart they are 6 + 4, 4 + 2 and 3 times 2 + 1. Lane
operations an element, about 55; the budget at copy speed on an H100 is about 85.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8.kernels import ffn, quantize_columns
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
from moefp8.kernels._round import widened
from moefp8.kernels._swiglu import (
    STEEP,
    d_gate_of,
    d_up_of,
    hidden_of,
    load_wide,
    sigmoid_at,
    sigmoid_for,
)
from moefp8.kernels.plan import SEGMENT, Plan, Tile, tile_of
from moefp8.kernels.quantize_columns import starts_group
from moefp8.kernels.quantize_rows import RowQuantized
from moefp8.recipe import Gemm

#: Of seven the fastest, or within 1 % of it, at 768, 1408 and 8192 columns.
TILE = Tile(64, 64, 8)


@triton.jit
def _store_columns(
    y, data, scale, column_amax, group, position, column, columns, padded_rows, first_of_group,
    POISONED: tl.constexpr, OUT: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Write a tile of values as columns of codes; POISONED tiles are one block, see quantize_columns.py."""
    y = widened(y, HARDWARE)
    inside = column < columns
    amax = tl.load(column_amax + group * columns + column, mask=inside, other=0)
    factor, inverse = scale_of(amax, ROWWISE, CARRY, EMAX, MAX)
    code = encode(y * inverse[None, :], OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE)
    if POISONED:
        sick = tl.max(magnitude_bits(y), 0) >= INF_BITS
        code = tl.where(sick[None, :], NAN, code).to(tl.uint8)
    at = column.to(tl.int64)[:, None] * padded_rows + position[None, :]
    tl.store(data + at, tl.trans(code), mask=inside[:, None])
    if first_of_group:
        tl.store(scale + group * columns + column, factor, mask=inside)


@triton.jit
def _quantize_piece(
    gate, up, cotangent, sigmoid, gate_data, gate_scale, up_data, up_scale, hidden_data, hidden_scale,
    gate_amax, up_amax, hidden_amax, segments, block, nth, column, group, columns, padded_rows,
    POISONED: tl.constexpr, OUT: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Quantise some columns of the rows ``nth`` of a segment block: any, or if POISONED one block of 32."""
    row = tl.load(segments + 3 * block + 1) + nth
    end = tl.load(segments + 3 * block + 2)
    position = block.to(tl.int64) * SEGMENT + nth
    here = (row < end)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    dtype: tl.constexpr = gate.dtype.element_ty
    g = load_wide(gate, at, here, HARDWARE)
    u = load_wide(up, at, here, HARDWARE)
    c = load_wide(cotangent, at, here, HARDWARE)
    s = sigmoid_at(g, sigmoid, at, here, False, HARDWARE)
    if tl.min(tl.min(g, 1), 0) < STEEP:
        s = sigmoid_at(g, sigmoid, at, here, True, HARDWARE)
    first = starts_group(segments, block, group)
    _store_columns(
        d_gate_of(g, u, c, s, dtype, HARDWARE), gate_data, gate_scale, gate_amax,
        group, position, column, columns, padded_rows, first,
        POISONED, OUT, ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE,
    )  # fmt: skip
    _store_columns(
        d_up_of(g, c, s, dtype, HARDWARE), up_data, up_scale, up_amax,
        group, position, column, columns, padded_rows, first,
        POISONED, OUT, ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE,
    )  # fmt: skip
    _store_columns(
        hidden_of(g, u, s, dtype, HARDWARE), hidden_data, hidden_scale, hidden_amax,
        group, position, column, columns, padded_rows, first,
        POISONED, OUT, ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE,
    )  # fmt: skip


@triton.jit
def _swiglu_backward_columns_kernel(
    gate, up, cotangent, sigmoid, gate_data, gate_scale, up_data, up_scale, hidden_data, hidden_scale,
    gate_amax, gate_poisoned, up_amax, up_poisoned, hidden_amax, hidden_poisoned,
    segments, num_groups, columns, padded_rows,
    OUT: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # One program: a tile of a segment block.
    block, first, left = tile_of(tl.program_id(0), columns, SEGMENT, ROWS, COLUMNS)
    group = tl.load(segments + 3 * block)
    if group < num_groups:
        column = left + tl.arange(0, COLUMNS)
        poison = tl.load(gate_poisoned + group) | tl.load(up_poisoned + group)
        # Poisoned groups are rare and go by blocks of 32, which need fewer registers than a tile does.
        if (poison | tl.load(hidden_poisoned + group)) == 0:
            _quantize_piece(
                gate, up, cotangent, sigmoid, gate_data, gate_scale, up_data, up_scale, hidden_data,
                hidden_scale, gate_amax, up_amax, hidden_amax, segments, block, first + tl.arange(0, ROWS),
                column, group, columns, padded_rows, False, OUT,
                ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, SEGMENT,
            )  # fmt: skip
        else:
            for i in range(first, first + ROWS, MX_BLOCK):
                _quantize_piece(
                    gate, up, cotangent, sigmoid, gate_data, gate_scale, up_data, up_scale, hidden_data,
                    hidden_scale, gate_amax, up_amax, hidden_amax, segments, block,
                    i + tl.arange(0, MX_BLOCK), column, group, columns, padded_rows, True, OUT,
                    ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, SEGMENT,
                )  # fmt: skip


def _fake(
    gate: Tensor, up: Tensor, cotangent: Tensor, segments: Tensor,
    gate_amax: Tensor, gate_poisoned: Tensor, up_amax: Tensor, up_poisoned: Tensor,
    hidden_amax: Tensor, hidden_poisoned: Tensor, format: str, dtype: torch.dtype, rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def one() -> tuple[Tensor, Tensor]:
        found = segments, gate_amax, gate_poisoned
        return quantize_columns._fake(gate, None, None, 0, *found, format, dtype, rule)

    return (*one(), *one(), *one())


@leaf("swiglu_backward_columns", fake=_fake, vmap=by_loop)
def _swiglu_backward_columns(
    gate: Tensor, up: Tensor, cotangent: Tensor, segments: Tensor,
    gate_amax: Tensor, gate_poisoned: Tensor, up_amax: Tensor, up_poisoned: Tensor,
    hidden_amax: Tensor, hidden_poisoned: Tensor, format: str, dtype: torch.dtype, rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gate, up, cotangent = gate.contiguous(), up.contiguous(), cotangent.contiguous()
    maxima = (gate_amax, gate_poisoned, up_amax, up_poisoned, hidden_amax, hidden_poisoned)
    outs = _fake(gate, up, cotangent, segments, *maxima, format, dtype, rule)
    num_groups, columns = gate_amax.shape
    if outs[0].numel():
        _swiglu_backward_columns_kernel[(TILE.programs(segments, columns),)](
            gate, up, cotangent, sigmoid_for(gate),
            *(x.view(torch.uint8) if x.itemsize == 1 else x for x in outs), *maxima,
            segments, num_groups, columns, outs[0].shape[1],
            OUT=TRITON_DTYPES[dtype], **encoding(Gemm(format, dtype, rule), gate.device)._asdict(),
            SEGMENT=SEGMENT, ROWS=TILE.rows, COLUMNS=TILE.columns, num_warps=TILE.warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    return outs


def swiglu_backward_columns(
    gate: Tensor,
    up: Tensor,
    cotangent: Tensor,
    plan: Plan,
    d_gate: RowQuantized,
    d_up: RowQuantized,
    hidden: RowQuantized,
    gemm: Gemm,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The gradients of gate and up, and hidden, as :func:`quantize_columns` would give each.

    ``d_gate`` and ``d_up`` are the results of :func:`swiglu_backward_rows`, ``hidden`` that of
    :func:`swiglu_rows`; only their column maxima are read.
    """
    outs = _swiglu_backward_columns(
        gate, up, cotangent, plan.segments,
        d_gate.column_amax, d_gate.poisoned, d_up.column_amax, d_up.poisoned,
        hidden.column_amax, hidden.poisoned, gemm.format, gemm.dtype, gemm.rule,
    )  # fmt: skip
    return outs[:2], outs[2:4], outs[4:]


def reference(
    gate: Tensor, up: Tensor, cotangent: Tensor, offs: Tensor,
    d_gate: RowQuantized, d_up: RowQuantized, hidden: RowQuantized, gemm: Gemm,
) -> tuple[tuple[Tensor, Tensor], ...]:  # fmt: skip
    """The twin of :func:`swiglu_backward_columns`; it also fills what that leaves unwritten."""
    values = (*ffn.swiglu_backward(gate, up, cotangent), ffn.swiglu(gate, up))
    pairs = zip(values, (d_gate, d_up, hidden), strict=True)
    return tuple(quantize_columns.reference(x, offs, rows, gemm) for x, rows in pairs)
