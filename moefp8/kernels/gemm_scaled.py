"""Grouped products of 32-element blocks for SM100, whose tensor core applies block scales itself.

    rows         out[i] = sum_t A[i, t] sa[i, t // 32] B[g, t] sb[g, t // 32] + bias[g]     i of group g
    contraction  out[g] = the same sum over t in segment g

Both operands are K-major, their scales in the tensor core's layout (``swizzle.py``). Per step of 128 and
tile of 128 x 256: 48 KB of codes, 1.5 KB of scales and 2 * 128 * 256 * 128 operations, 170 a byte.
Products are persistent: a thread block takes one tile after another, the contraction runs in one loop
that Triton pipelines. The accumulator lives in tensor memory, 256 of its 512 columns. Shared memory at
four stages: 4 * (128 + 256) * 128 + 4 * 3 * 512 bytes = 198 KB of 227.

SM100 accumulates in float32, by NVIDIA's description; so nothing is promoted. It has not been measured
here: no such card was at hand. See ``docs/kernels_sm100.md`` for what has been verified, and how.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moefp8._leaf import by_loop, leaf
from moefp8.formats import decode_scale
from moefp8.groups import segments as segments_of
from moefp8.kernels import gemm
from moefp8.kernels._tiles import Shape, bias_stride, locate, multiprocessors
from moefp8.kernels.plan import SEGMENT, Plan
from moefp8.kernels.quantize_blocks import Blocks
from moefp8.kernels.swizzle import TILE_ROWS, from_tiles, unswizzle

#: Rows, columns and contraction of a tile; row tiles to a band.
_ROWS, _COLUMNS, _STEP, _BAND = 128, 256, 128, 8
_WARPS, _STAGES = 8, 4

_FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


@triton.jit
def _scaled_kernel(
    a_desc, b_desc, a_scale_desc, b_scale_desc, c, bias, bias_stride, tiles, ends,
    row_tiles, column_tiles, num_groups, rows, columns, length, b_rows, b_length,
    CONTRACTION: tl.constexpr, STACKED: tl.constexpr, BIAS: tl.constexpr,
    A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    shape = (row_tiles, column_tiles, num_groups, rows, columns, length, b_rows, b_length)
    for t in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        group, column, a_row, b_row, a_at, b_at, steps, c_row, c_end = locate(
            t, shape, tiles, ends, CONTRACTION, ROWS, COLUMNS, STEP, BAND
        )
        # Where scales are: tiles of them are numbered from each group's first row, not from the matrix's.
        b_tile = column // ROWS
        if STACKED:
            b_tile += group * tl.cdiv(columns, ROWS)
        if CONTRACTION:
            a_tile = a_row // ROWS
        else:  # the plan lists tiles and segments of 128 rows in the same order, its tail last
            first = t // (BAND * column_tiles) * BAND
            a_tile = first + t % (BAND * column_tiles) % tl.minimum(row_tiles - first, BAND)
        if c_row < c_end:
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
            for k in range(steps):
                a = a_desc.load([a_row, a_at + k * STEP])
                b = b_desc.load([b_row, b_at + k * STEP])
                a_scale = a_scale_desc.load([0, a_tile, a_at // STEP + k, 0, 0])
                b_scale = b_scale_desc.load([0, b_tile, b_at // STEP + k, 0, 0])
                acc = tl.dot_scaled(
                    a, from_tiles(a_scale, ROWS, STEP // 32), A_FORMAT,
                    b.T, from_tiles(b_scale, COLUMNS, STEP // 32), B_FORMAT, acc,
                )  # fmt: skip

            if BIAS:
                n = column + tl.arange(0, COLUMNS)
                biased = tl.where(group < num_groups, columns, 0)
                added = tl.load(bias + group * bias_stride + n, mask=n < biased, other=0.0)
                acc += added.to(tl.float32)[None, :]
            # In two halves: the addresses of a whole tile of 128 x 256 do not fit into registers.
            halves = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
            row = c_row + tl.arange(0, ROWS)
            for half in tl.static_range(2):
                n = column + half * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
                at = row.to(tl.int64)[:, None] * columns + n[None, :]
                keep = (row < c_end)[:, None] & (n < columns)[None, :]
                tl.store(c + at, halves[half].to(c.dtype.element_ty), mask=keep)


def _scale_descriptor(scale: Tensor, rows: int) -> TensorDescriptor:
    """Tiles as TMA fetches them: 512 bytes in two lines, since a box holds at most 256 along an axis."""
    down, across, _ = scale.shape
    box = [1, rows // TILE_ROWS, _STEP // SEGMENT, 2, 256]
    return TensorDescriptor.from_tensor(scale.view(1, down, across, 2, 256), box)


def _launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor,
    tiles: Tensor, ends: Tensor, shape: Shape, contraction: bool,
) -> None:  # fmt: skip
    grid = min(shape.row_tiles * shape.column_tiles, multiprocessors(out.device))
    _scaled_kernel[(grid,)](
        TensorDescriptor.from_tensor(a, [_ROWS, _STEP]), TensorDescriptor.from_tensor(b, [_COLUMNS, _STEP]),
        _scale_descriptor(a_scale, _ROWS), _scale_descriptor(b_scale, _COLUMNS),
        out, out if bias is None else bias, bias_stride(bias), tiles, ends, *shape,
        CONTRACTION=contraction, STACKED=shape.b_rows > 0, BIAS=bias is not None,
        A_FORMAT=_FORMATS[a.dtype], B_FORMAT=_FORMATS[b.dtype],
        ROWS=_ROWS, COLUMNS=_COLUMNS, STEP=_STEP, BAND=_BAND, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip


# --- rows ----------------------------------------------------------------------------------------


def _stacked(b: Blocks, num_groups: int, columns: int) -> bool:
    return b.data.shape[0] == num_groups * columns


def _fake_rows(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, tiles: Tensor, bias: Tensor | None,
    num_groups: int, columns: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return a.new_empty(a.shape[0], columns, dtype=out_dtype)


@leaf("gemm_scaled_rows", fake=_fake_rows, vmap=by_loop)
def _gemm_scaled_rows(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, tiles: Tensor, bias: Tensor | None,
    num_groups: int, columns: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    bias = None if bias is None else bias.contiguous()
    out = _fake_rows(a, a_scale, b, b_scale, tiles, bias, num_groups, columns, out_dtype)
    if out.numel() == 0:
        return out
    if a_scale.numel() == 0:  # rows, but no group that could own one
        return out.zero_()
    stacked = _stacked(Blocks(b, b_scale), num_groups, columns)
    shape = Shape(
        tiles.shape[0], triton.cdiv(columns, _COLUMNS), num_groups, a.shape[0], columns, a.shape[1],
        columns if stacked else 0, 0 if stacked else triton.cdiv(a.shape[1], _STEP) * _STEP,
    )  # fmt: skip
    _launch(a, a_scale, b, b_scale, bias, out, tiles, tiles, shape, False)
    return out


def gemm_scaled_rows(
    a: Blocks, b: Blocks, tiles: Tensor, bias: Tensor | None, num_groups: int, columns: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``out[i] = a[i] . b[g] + bias[g]`` for the rows i of group g; zero past the last group.

    Args:
        a: ``(M, L)``, of :func:`quantize_blocks` along the columns.
        b: one ``(N, L)`` matrix a group: ``(G N, L)`` with the groups stacked, quantised along the
            columns, or ``(N, G Lp)`` side by side, quantised along the rows of ``(G L, N)``.
        tiles: of a plan for 128 rows.
        bias: ``(N,)``, ``(G, N)`` or None.

    Returns:
        ``(M, N)``, every element written.
    """
    return _gemm_scaled_rows(*a, *b, tiles, bias, num_groups, columns, out_dtype)


# --- contraction ---------------------------------------------------------------------------------


def _fake_contraction(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor, order: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return a.new_empty(ends.shape[0], a.shape[0], b.shape[0], dtype=out_dtype)


@leaf("gemm_scaled_contraction", fake=_fake_contraction, vmap=by_loop)
def _gemm_scaled_contraction(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor, order: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = _fake_contraction(a, a_scale, b, b_scale, ends, order, out_dtype)
    num_groups, rows, columns = out.shape
    if a.shape[1] == 0:
        return out.zero_()
    row_tiles = num_groups * triton.cdiv(rows, _ROWS)
    shape = Shape(row_tiles, triton.cdiv(columns, _COLUMNS), num_groups, rows, columns, 0, 0, 0)
    _launch(a, a_scale, b, b_scale, None, out, order, ends, shape, True)
    return out


def gemm_scaled_contraction(a: Blocks, b: Blocks, plan: Plan, out_dtype: torch.dtype) -> Tensor:
    """``out[g] = a[:, t] . b[:, t]`` over segment g; zero for an empty one.

    Args:
        a, b: ``(R, P)`` and ``(C, P)``, of :func:`quantize_blocks` along the rows.
        plan: the segments' ends, and the order of their turns.

    Returns:
        ``(G, R, C)``, every element written.
    """
    return _gemm_scaled_contraction(*a, *b, plan.ends, plan.order, out_dtype)


# --- twins ---------------------------------------------------------------------------------------


def values(x: Blocks) -> Tensor:
    """What a copy stands for, in float64, if its rows of scales are its rows of data."""
    scale = decode_scale(unswizzle(x.scale)).to(torch.float64).repeat_interleave(32, 1)
    return x.data.to(torch.float64) * scale[: x.data.shape[0], : x.data.shape[1]]


def grouped_values(x: Blocks, offs: Tensor) -> Tensor:
    """The same for grouped rows, each group of which starts a tile; rows past ``offs[-1]`` are zero."""
    layout = segments_of(offs, x.data.shape[0], SEGMENT)
    scale = decode_scale(unswizzle(x.scale)).to(torch.float64).repeat_interleave(32, 1)
    here = layout.source[layout.valid]
    own = x.data.to(torch.float64)[here] * scale[layout.valid, : x.data.shape[1]]
    return own.new_zeros(x.data.shape).index_put((here,), own)


def reference_rows(
    a: Blocks, b: Blocks, offs: Tensor, bias: Tensor | None, num_groups: int, columns: int
) -> tuple[Tensor, Tensor]:
    """The twin of :func:`gemm_scaled_rows` in float64, and the same sum over magnitudes, for bounds."""
    if _stacked(b, num_groups, columns):
        each = torch.arange(1, num_groups + 1, device=offs.device, dtype=torch.int32) * columns
        matrices = grouped_values(b, each)
    else:
        matrices = values(b)
    one = matrices.new_ones(num_groups, columns)
    left = grouped_values(a, offs)
    return gemm.reference_rows(left, left.new_ones(left.shape[0]), gemm.Weights(matrices, one), offs, bias)


def reference_contraction(a: Blocks, b: Blocks, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The twin of :func:`gemm_scaled_contraction` in float64, and the same sum over magnitudes."""
    left, right = values(a), values(b)
    one = left.new_ones(ends.shape[0], 1)
    return gemm.reference_contraction(
        left, one.expand(-1, len(left)), right, one.expand(-1, len(right)), ends
    )
