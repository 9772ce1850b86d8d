"""Quantise grouped tokens along their rows, as ``quantize_columns.py`` does, but out of the codes of rows.

Where both copies of a tensor are MX, scales are powers of two, and an element that is a normal FP8 number
under two scales has the same significand under both: rounding does not depend on the exponent. So the
second copy reads codes, one byte an element, and moves their exponents::

    y = code * row scale / column scale          exact, and what x / column scale rounds to

Where that does not hold, x itself is read: for codes that are subnormal, zero or saturated, or may have
been rounded to a normal number from there, and for results that are subnormal. Of Gaussian numbers these
are some 4 in 10,000, so the loads cost hardly any memory traffic. A tensor of many zeros costs the traffic
of ``quantize_columns.py`` and one byte more. The codes are bit for bit the same.

Bytes an element of a bf16 input: 1 read, 1 written, where ``quantize_columns.py`` reads 2. Lane operations
an element, about 15. The roofline is the copy speed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8.formats import element_format
from moefp8.kernels._fp8 import TRITON_DTYPES, encode, encoding, magnitude_bits, scale_of
from moefp8.kernels.plan import SEGMENT, Plan
from moefp8.kernels.quantize_columns import TILE_COLUMNS, quantize_tile, starts_group
from moefp8.kernels.quantize_rows import RowQuantized
from moefp8.recipe import Gemm


@triton.jit
def _requantize_columns_kernel(
    x, codes, row_scale, data, scale, column_amax, poisoned, segments, num_groups, columns, stride,
    padded_rows, OUT: tl.constexpr, LEAST: tl.constexpr, SPAN: tl.constexpr,
    ROWWISE: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr, MAX: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, COLUMNS)
    block, tile = tl.program_id(0) // across, tl.program_id(0) % across
    group = tl.load(segments + 3 * block)
    if group < num_groups:
        if tl.load(poisoned + group) != 0:
            quantize_tile(
                x, segments, x, data, scale, column_amax, poisoned, segments, block, tile, group, columns,
                stride, padded_rows, 0, False, OUT, ROWWISE, CARRY, EMAX, MAX, MANTISSA, MIN_EXPONENT,
                HARDWARE, ROWS, COLUMNS,
            )  # fmt: skip
        else:
            row = tl.load(segments + 3 * block + 1) + tl.arange(0, ROWS)
            end = tl.load(segments + 3 * block + 2)
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            inside = column < columns
            here = (row < end)[:, None] & inside[None, :]
            at = row.to(tl.int64)[:, None]
            code = tl.load(codes + at * columns + column[None, :], mask=here, other=0)
            own = tl.load(row_scale + row, mask=row < end, other=1.0)
            amax = tl.load(column_amax + group * columns + column, mask=inside, other=0)
            factor, inverse = scale_of(amax, ROWWISE, CARRY, EMAX, MAX)
            y = code.to(OUT, bitcast=True).to(tl.float32) * own[:, None] * inverse[None, :]
            # SPAN codes from LEAST on are of numbers that were normal: not the smallest one, which larger
            # subnormals are rounded up to, nor the largest. And y must be normal, which next to the end
            # of float32 it is not, where code * own overflows.
            least: tl.constexpr = (127 + MIN_EXPONENT) << 23
            beyond = (magnitude_bits(y) - least).to(tl.uint32, bitcast=True) >= (
                (EMAX - MIN_EXPONENT) << 23
            )
            elsewhere = (((code & 0x7F) - LEAST).to(tl.uint8) >= SPAN) | beyond
            v = tl.load(x + at * stride + column[None, :], mask=here & elsewhere, other=0).to(tl.float32)
            y = tl.where(elsewhere, v * inverse[None, :], y)
            code = encode(y, OUT, MAX, MANTISSA, MIN_EXPONENT, HARDWARE)
            position = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
            tl.store(
                data + column.to(tl.int64)[:, None] * padded_rows + position[None, :],
                tl.trans(code), mask=inside[:, None],
            )  # fmt: skip
            if starts_group(segments, block, group):
                tl.store(scale + group * columns + column, factor, mask=inside)


def _fake(
    x: Tensor, codes: Tensor, row_scale: Tensor, segments: Tensor, column_amax: Tensor, poisoned: Tensor,
    rule: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    data = x.new_empty(x.shape[1], segments.shape[0] * SEGMENT, dtype=codes.dtype)
    return data, x.new_empty(column_amax.shape, dtype=torch.float32)


@leaf("requantize_columns", fake=_fake, vmap=by_loop)
def _requantize_columns(
    x: Tensor, codes: Tensor, row_scale: Tensor, segments: Tensor, column_amax: Tensor, poisoned: Tensor,
    rule: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = x if x.stride(1) == 1 else x.contiguous()
    data, scale = _fake(x, codes, row_scale, segments, column_amax, poisoned, rule)
    num_groups, columns = column_amax.shape
    smallest, largest = _normal_codes(codes.dtype)
    if data.numel():
        _requantize_columns_kernel[(segments.shape[0] * triton.cdiv(columns, TILE_COLUMNS),)](
            x, codes.view(torch.uint8), row_scale, data.view(torch.uint8), scale, column_amax, poisoned,
            segments, num_groups, columns, x.stride(0), data.shape[1],
            OUT=TRITON_DTYPES[codes.dtype], LEAST=smallest + 1, SPAN=largest - smallest - 1,
            **encoding(Gemm("mx", codes.dtype, rule), x.device)._asdict(),
            ROWS=SEGMENT, COLUMNS=TILE_COLUMNS, num_warps=8,
        )  # fmt: skip
    return data, scale


def _normal_codes(dtype: torch.dtype) -> tuple[int, int]:
    """Codes of the smallest normal number and of the largest one."""
    fmt = element_format(dtype)
    fraction = int((fmt.max / 2.0**fmt.emax - 1) * 2**fmt.mantissa_bits)
    return 1 << fmt.mantissa_bits, (fmt.emax - fmt.min_exponent + 1 << fmt.mantissa_bits) | fraction


def from_codes(along: Gemm, across: Gemm) -> bool:
    """Whether the columns under ``across`` can be made of rows under ``along``."""
    return along.format == across.format == "mx" and along.dtype == across.dtype


def requantize_columns(x: Tensor, plan: Plan, rows: RowQuantized, gemm: Gemm) -> tuple[Tensor, Tensor]:
    """``quantize_columns(x, plan, rows, gemm)``, bit for bit, if ``rows`` have codes of the same format."""
    how = plan.segments, rows.column_amax, rows.poisoned, gemm.rule
    return _requantize_columns(x, rows.data, rows.scale, *how)
