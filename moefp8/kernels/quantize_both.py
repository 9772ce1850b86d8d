"""Quantise grouped tokens along both axes, with the second reading out of L2.

The columns of a group can only be quantised once all of its rows have been seen. Two kernels one after
the other read a tensor from memory twice: 2 + 1 bytes an element each. Where a group fits into L2 (64
experts of 2048 rows by 2048 columns: 8 MB of the 50) one kernel can do better. Its programs are
ordered ::

    rows of group 0 | rows of group 1 | columns of group 0 | rows of group 2 | columns of group 1 | ...

and a program that quantises columns waits until the rows of its group are done. By then its input has
been read a moment ago. Bytes an element that memory sees: 2 read and 2 written, in place of 6.

Programs start in the order of their numbers, which is what keeps the wait from being for ever: the rows
that it is for have started already, and wait for nothing. (Look-back scans rely on the same.)

A group that holds a NaN or an infinity is only marked; the kernels of ``quantize_rows.py`` and one pass
over its columns then do it again, and otherwise find nothing to do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8.kernels import quantize_columns, quantize_rows
from moefp8.kernels._fp8 import INF_BITS, TRITON_DTYPES, encoding
from moefp8.kernels.plan import SEGMENT, Plan
from moefp8.kernels.quantize_columns import quantize_tile
from moefp8.kernels.quantize_rows import RowQuantized, launch_rows, quantize_band, tiling
from moefp8.recipe import Gemm

#: Largest group, in bytes and on average, that is worth it: two are in L2 at a time, beside the results.
L2_BYTES = 12 * 2**20


@triton.jit
def _blocks_before(ends, group, num_groups, SEGMENT: tl.constexpr):
    """Segment blocks of the groups before ``group``."""
    last = tl.minimum(group, num_groups) - 1
    return tl.where(last >= 0, tl.load(ends + tl.maximum(last, 0)), 0) // SEGMENT


@triton.jit
def _quantize_both_kernel(
    x, source, rows, rows_scale, transposed, transposed_scale, column_amax, poisoned, done, segments, ends,
    num_groups, columns, stride, padded_rows, SOURCED: tl.constexpr,
    OUT: tl.constexpr, ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr,
    OUT_T: tl.constexpr, ROWWISE_T: tl.constexpr, CARRY_T: tl.constexpr, EMAX_T: tl.constexpr,
    MAX_T: tl.constexpr, MANTISSA_T: tl.constexpr, MIN_EXPONENT_T: tl.constexpr, HARDWARE: tl.constexpr,
    SEGMENT: tl.constexpr, BAND: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    bands: tl.constexpr = SEGMENT // BAND
    tiles = tl.cdiv(columns, COLUMNS)
    # Part p of the programs: the rows of group p, then the columns of group p - 1. This one's part is
    # the number of parts that end at or before it.
    part = tl.arange(0, GROUPS)
    until = tl.load(ends + tl.minimum(part, num_groups - 1)) // SEGMENT
    before = tl.load(ends + tl.maximum(tl.minimum(part, num_groups) - 1, 0)) // SEGMENT
    stops = bands * until + tiles * tl.where(part > 0, before, 0)
    p = tl.sum(((part <= num_groups) & (stops <= tl.program_id(0))).to(tl.int32), 0)
    if p <= num_groups:
        second = _blocks_before(ends, p - 1, num_groups, SEGMENT)
        first = _blocks_before(ends, p, num_groups, SEGMENT)
        after = _blocks_before(ends, p + 1, num_groups, SEGMENT)
        nth = tl.program_id(0) - (bands * first + tiles * second)
        if nth < bands * (after - first):
            segment = first + nth // bands
            start = tl.load(segments + 3 * segment + 1) + nth % bands * BAND
            end = tl.load(segments + 3 * segment + 2)
            largest, top = quantize_band(
                x, source, rows, rows_scale, start, end, columns, stride, SOURCED, OUT, True,
                ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, BAND, ROWS, LANES,
            )  # fmt: skip
            column = tl.arange(0, LANES)
            tl.atomic_max(column_amax + p * columns + column, largest, mask=column < columns, sem="relaxed")
            if top >= INF_BITS:
                tl.atomic_max(poisoned + p, 1, sem="relaxed")
            tl.debug_barrier()  # the maxima of every warp come before the count
            tl.atomic_add(done + p, 1, sem="release")
        else:
            group = p - 1
            nth -= bands * (after - first)
            count = tl.atomic_add(done + group, 0, sem="acquire")
            while count < bands * (first - second):
                count = tl.atomic_add(done + group, 0, sem="acquire")
            if tl.load(poisoned + group) == 0:
                quantize_tile(
                    x, source, transposed, transposed_scale, column_amax, poisoned, segments,
                    second + nth // tiles, nth % tiles, group, columns, stride, padded_rows, SOURCED, OUT_T,
                    ROWWISE_T, CARRY_T, EMAX_T, MAX_T, MANTISSA_T, MIN_EXPONENT_T, HARDWARE,
                    SEGMENT, COLUMNS,
                )  # fmt: skip


@triton.jit
def _redo_columns_kernel(
    x, source, data, scale, column_amax, poisoned, segments, num_groups, columns, stride, padded_rows,
    SOURCED: tl.constexpr, OUT: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    group = tl.load(segments + 3 * block)
    if group < num_groups:
        if tl.load(poisoned + group) != 0:  # not read for a group that there is not
            for tile in range(tl.cdiv(columns, COLUMNS)):
                quantize_tile(
                    x, source, data, scale, column_amax, poisoned, segments, block, tile, group,
                    columns, stride, padded_rows, SOURCED, OUT,
                    ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT, HARDWARE, ROWS, COLUMNS,
                )  # fmt: skip


Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _fake(
    x: Tensor, source: Tensor | None, segments: Tensor, ends: Tensor,
    format: str, dtype: torch.dtype, rule: str, format_t: str, dtype_t: torch.dtype, rule_t: str,
) -> Results:  # fmt: skip
    by_row = quantize_rows._fake(x, source, segments, ends, format, dtype, rule, True)
    _, _, amax, poisoned = by_row
    by_column = quantize_columns._fake(x, source, segments, amax, poisoned, format_t, dtype_t, rule_t)
    return *by_row, *by_column


@leaf("quantize_both", fake=_fake, vmap=by_loop)
def _quantize_both(
    x: Tensor, source: Tensor | None, segments: Tensor, ends: Tensor,
    format: str, dtype: torch.dtype, rule: str, format_t: str, dtype_t: torch.dtype, rule_t: str,
) -> Results:  # fmt: skip
    x = x if x.stride(1) == 1 else x.contiguous()
    results = _fake(x, source, segments, ends, format, dtype, rule, format_t, dtype_t, rule_t)
    data, scale, amax, poisoned, transposed, transposed_scale = results
    amax.zero_()
    poisoned.zero_()
    done = torch.zeros_like(poisoned)
    if data.numel() == 0:
        return results
    gemm, gemm_t = Gemm(format, dtype, rule), Gemm(format_t, dtype_t, rule_t)
    columns, num_groups, how = x.shape[1], ends.shape[0], tiling(x.shape[1])
    along, across = encoding(gemm, x.device)._asdict(), encoding(gemm_t, x.device)._asdict()
    along_t = {f"{name}_T": value for name, value in across.items() if name != "HARDWARE"}
    width = 32 if how.warps == 4 else 128
    where = x, segments if source is None else source
    shape = num_groups, columns, x.stride(0), transposed.shape[1]
    into_columns = transposed.view(torch.uint8), transposed_scale, amax, poisoned
    items = SEGMENT // how.band + triton.cdiv(columns, width)
    _quantize_both_kernel[(segments.shape[0] * items,)](
        *where, data.view(torch.uint8), scale, *into_columns, done, segments, ends, *shape,
        SOURCED=source is not None, OUT=TRITON_DTYPES[dtype], **along,
        OUT_T=TRITON_DTYPES[dtype_t], **along_t,
        SEGMENT=SEGMENT, BAND=how.band, ROWS=how.rows, LANES=how.lanes,
        COLUMNS=width, GROUPS=triton.next_power_of_2(num_groups + 1), num_warps=how.warps,
    )  # fmt: skip
    launch_rows(x, source, data, scale, segments, ends, gemm, amax, poisoned, redo=True)
    _redo_columns_kernel[(segments.shape[0],)](
        *where, *into_columns, segments, *shape,
        SOURCED=source is not None, OUT=TRITON_DTYPES[dtype_t], **across,
        ROWS=SEGMENT, COLUMNS=32, num_warps=4,
    )  # fmt: skip
    return results


def in_cache(x: Tensor, num_groups: int, rows: int | None = None) -> bool:
    """Whether groups of ``rows`` rows like those of ``x`` are small enough on average to pay."""
    rows = x.shape[0] if rows is None else rows
    return rows * x.shape[1] * x.itemsize <= L2_BYTES * num_groups


def quantize_both(
    x: Tensor, plan: Plan, along: Gemm | None, across: Gemm | None, *, source: Tensor | None = None
) -> tuple[RowQuantized, tuple[Tensor, ...]]:
    """``x`` (M, K) quantised along K under ``along`` and along the rows of each group under ``across``.

    The results of ``quantize_rows`` and ``quantize_columns``, bit for bit: in one kernel where the
    groups are small enough on average, else from those two. Either recipe may be None; the rows are
    then not to be read, or the columns ``()``.
    """
    rows = None if source is None else source.shape[0]
    if along is None or across is None or not in_cache(x, plan.ends.shape[0], rows):
        how = along or across or Gemm()
        by_row = quantize_rows.quantize_rows(x, plan, how, column_amax=across is not None, source=source)
        if across is None:
            return by_row, ()
        return by_row, quantize_columns.quantize_columns(x, plan, by_row, across, source=source)
    *both, data, scale = _quantize_both(
        x, source, plan.segments, plan.ends,
        along.format, along.dtype, along.rule, across.format, across.dtype, across.rule,
    )  # fmt: skip
    return RowQuantized(*both), (data, scale)
