"""The grouped product in plain Triton: for the interpreter, and for a Triton whose Gluon has moved on.

    rows         out[i] = sa[i] sb[g] (A[i] . B[g]) + bias[g]      rows i of group g; A, B along L
    contraction  out[g] = sa[g] sb[g] (A[:, t] . B[:, t])          t in segment g

FP8 operands with their scales, as ``gemm_hopper.py`` multiplies them, or bfloat16 ones without
(``high_precision.py``). A thread block works on one tile of 128 x 128 after the other.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moefp8.kernels._round import narrowed, rounded, widened
from moefp8.kernels._tiles import Shape, bias_stride, locate, multiprocessors

TILE_ROWS, COLUMNS, STEP, _BAND = 128, 128, 128, 8
#: For bfloat16: as many bytes as a step of FP8, and more steps than there are, for nothing is promoted.
_WIDE_STEP, _NEVER = STEP // 2, 2**30


@triton.jit
def _portable_kernel(
    a_desc, b_desc, c, a_scale, b_scale, bias, bias_stride, tiles, ends,
    row_tiles, column_tiles, num_groups, rows, columns, length, b_rows, b_length,
    CONTRACTION: tl.constexpr, PROMOTE: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
    ADD: tl.constexpr, HARDWARE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    shape = (row_tiles, column_tiles, num_groups, rows, columns, length, b_rows, b_length)
    for t in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        group, column, a_row, b_row, a_at, b_at, steps, c_row, c_end = locate(
            t, shape, tiles, ends, CONTRACTION, ROWS, COLUMNS, STEP, BAND
        )
        if c_row < c_end:
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
            part = tl.zeros((ROWS, COLUMNS), tl.float32)
            for k in range(steps):
                a = a_desc.load([a_row, a_at + k * STEP])
                b = b_desc.load([b_row, b_at + k * STEP])
                if not (SCALED | HARDWARE):  # the interpreter would multiply the bits of a bfloat16
                    a, b = widened(a, HARDWARE), widened(b, HARDWARE)
                part = tl.dot(a, b.T, part)
                # One flat loop: a nested one would drain the pipeline at every promotion.
                if (k + 1) % PROMOTE == 0:
                    acc += part
                    part = tl.zeros((ROWS, COLUMNS), tl.float32)
            acc += part

            row = c_row + tl.arange(0, ROWS)
            n = column + tl.arange(0, COLUMNS)
            if SCALED:
                # Nothing was multiplied for a tile without steps: its scales may never have been written.
                scaled = tl.where(steps > 0, c_end, 0)
                sa = tl.load(a_scale + row, mask=row < scaled, other=0.0)
                within = n < tl.where(steps > 0, columns, 0)
                sb = tl.load(b_scale + group * columns + n, mask=within, other=0.0)
                acc = acc * sa[:, None] * sb[None, :]
            if BIAS:
                biased = tl.where(group < num_groups, columns, 0)
                acc += tl.load(bias + group * bias_stride + n, mask=n < biased, other=0.0).to(tl.float32)[
                    None, :
                ]
            at = row.to(tl.int64)[:, None] * columns + n[None, :]
            keep = (row < c_end)[:, None] & (n < columns)[None, :]
            out = narrowed(acc, c.dtype.element_ty, HARDWARE)
            if ADD:  # two roundings, as if the product had been written and then added
                both = out.to(tl.float32) + tl.load(c + at, mask=keep, other=0).to(tl.float32)
                out = rounded(both, c.dtype.element_ty, HARDWARE).to(c.dtype.element_ty)
            tl.store(c + at, out, mask=keep)


def launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor,
    tiles: Tensor, ends: Tensor, shape: Shape, contraction: bool, promote: int, add: bool,
) -> None:  # fmt: skip
    """Fill ``out``, or add to it; the arguments are those of ``gemm._launch``."""
    grid = min(shape.row_tiles * shape.column_tiles, multiprocessors(out.device))
    _portable_kernel[(grid,)](
        TensorDescriptor.from_tensor(a, [TILE_ROWS, STEP]),
        TensorDescriptor.from_tensor(b, [COLUMNS, STEP]),
        out, a_scale, b_scale, out if bias is None else bias, bias_stride(bias), tiles, ends, *shape,
        CONTRACTION=contraction, PROMOTE=max(promote // STEP, 1), SCALED=True, BIAS=bias is not None,
        ADD=add, HARDWARE=out.device.type == "cuda",
        ROWS=TILE_ROWS, COLUMNS=COLUMNS, STEP=STEP, BAND=_BAND, num_warps=8, num_stages=3,
        enable_fp_fusion=not add,  # a float32 product would be scaled and added in one rounding
    )  # fmt: skip


def launch_bfloat16(
    a: Tensor, b: Tensor, bias: Tensor, out: Tensor, tiles: Tensor, num_groups: int
) -> None:
    """Fill ``out`` (M, N) with the rows form of bfloat16 ``a`` (M, L) and ``b`` (G N, L), and a bias."""
    (rows, columns), length = out.shape, a.shape[1]
    row_tiles, column_tiles = tiles.shape[0], triton.cdiv(columns, COLUMNS)
    grid = min(row_tiles * column_tiles, multiprocessors(out.device))
    _portable_kernel[(grid,)](
        TensorDescriptor.from_tensor(a, [TILE_ROWS, _WIDE_STEP]),
        TensorDescriptor.from_tensor(b, [COLUMNS, _WIDE_STEP]),
        out, out, out, bias, bias_stride(bias), tiles, tiles,
        row_tiles, column_tiles, num_groups, rows, columns, length, columns, 0,
        CONTRACTION=False, PROMOTE=_NEVER, SCALED=False, BIAS=True, ADD=False,
        HARDWARE=out.device.type == "cuda",
        ROWS=TILE_ROWS, COLUMNS=COLUMNS, STEP=_WIDE_STEP, BAND=_BAND, num_warps=8, num_stages=4,
    )  # fmt: skip
