"""Grouped FP8 products with one scale a row and column: the operators and their twins.

    rows         out[i] = sa[i] sb[g] (A[i] . B[g]) + bias[g]      rows i of group g
    contraction  out[g] = sa[g] sb[g] (A[:, t] . B[:, t])          t in segment g

Both operands are K-major, as Hopper's tensor core wants them. The kernel is ``gemm_hopper.py``, or
``gemm_portable.py`` where that cannot run.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moefp8._leaf import by_loop, leaf
from moefp8.groups import group_ids
from moefp8.kernels import gemm_portable
from moefp8.kernels._tiles import Shape
from moefp8.kernels.gemm_portable import COLUMNS, STEP
from moefp8.kernels.plan import Plan

try:
    from moefp8.kernels import gemm_hopper

    HOPPER_UNAVAILABLE: str | None = None
except ImportError as error:
    HOPPER_UNAVAILABLE = f"Triton {triton.__version__} has no Gluon as moefp8 knows it: {error}"


class Weights(NamedTuple):
    """Operand B of the rows form: one matrix a group, quantised along the contraction L.

    Attributes:
        data: float8, ``(G N, L)`` with the groups stacked, or ``(N, G Lp)`` with them side by side,
            each filled up with zeros to Lp, the next multiple of 128; what follows is not read.
        scale: ``(G, N)`` float32.
    """

    data: Tensor
    scale: Tensor

    @property
    def stacked(self) -> bool:
        return self.data.shape[0] == self.scale.numel()


def uses_hopper(device: torch.device) -> bool:
    """Whether products on ``device`` run on ``gemm_hopper.py`` rather than on the portable kernel."""
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return is_hopper and HOPPER_UNAVAILABLE is None


def tile_rows(device: torch.device) -> int:
    """Rows of an output tile, for the plan."""
    return gemm_hopper.TILE_ROWS if uses_hopper(device) else gemm_portable.TILE_ROWS


def _launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor,
    tiles: Tensor, ends: Tensor, shape: Shape, contraction: bool, promote: int, add: bool,
) -> None:  # fmt: skip
    """Fill ``out`` with the product that ``shape`` describes, or add it, on the kernel for its device."""
    kernel = gemm_hopper if uses_hopper(out.device) else gemm_portable
    kernel.launch(a, a_scale, b, b_scale, bias, out, tiles, ends, shape, contraction, promote, add)


# --- rows ----------------------------------------------------------------------------------------


def _fake_rows(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, tiles: Tensor, bias: Tensor | None,
    out_dtype: torch.dtype, promote: int,
) -> Tensor:  # fmt: skip
    return a.new_empty(a.shape[0], b_scale.shape[1], dtype=out_dtype)


@leaf("gemm_rows", fake=_fake_rows, vmap=by_loop)
def _gemm_rows(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, tiles: Tensor, bias: Tensor | None,
    out_dtype: torch.dtype, promote: int,
) -> Tensor:  # fmt: skip
    bias = None if bias is None else bias.contiguous()
    out = _fake_rows(a, a_scale, b, b_scale, tiles, bias, out_dtype, promote)
    _multiply_rows(a, a_scale, Weights(b, b_scale), tiles, bias, out, promote, add=False)
    return out


def _multiply_rows(
    a: Tensor, a_scale: Tensor, b: Weights, tiles: Tensor, bias: Tensor | None, out: Tensor,
    promote: int, *, add: bool,
) -> None:  # fmt: skip
    if out.numel() == 0:
        return
    num_groups, columns = b.scale.shape
    shape = Shape(
        tiles.shape[0], triton.cdiv(columns, COLUMNS), num_groups, a.shape[0], columns, a.shape[1],
        columns if b.stacked else 0, 0 if b.stacked else triton.cdiv(a.shape[1], STEP) * STEP,
    )  # fmt: skip
    _launch(a, a_scale, b.data, b.scale, bias, out, tiles, tiles, shape, False, promote, add)


def gemm_rows(
    a: Tensor, a_scale: Tensor, b: Weights, tiles: Tensor, bias: Tensor | None,
    out_dtype: torch.dtype, promote: int,
) -> Tensor:  # fmt: skip
    """``out[i] = a_scale[i] * b.scale[g] * (a[i] . b[g]) + bias[g]``; zero past the last group.

    Args:
        a, a_scale: ``(M, L)`` float8 and ``(M,)`` float32.
        b: one ``(N, L)`` matrix a group.
        tiles: of a plan for :func:`tile_rows` rows.
        bias: ``(N,)``, ``(G, N)`` or None.
        promote: contraction length between additions to the float32 accumulator, in steps of 128.

    Returns:
        ``(M, N)``, every element written.
    """
    return _gemm_rows(a, a_scale, b.data, b.scale, tiles, bias, out_dtype, promote)


def _fake_sum(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor,
    c: Tensor, c_scale: Tensor, d: Tensor, d_scale: Tensor,
    tiles: Tensor, out_dtype: torch.dtype, promote: int,
) -> Tensor:  # fmt: skip
    return _fake_rows(a, a_scale, b, b_scale, tiles, None, out_dtype, promote)


@leaf("gemm_rows_sum", fake=_fake_sum, vmap=by_loop)
def _gemm_rows_sum(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor,
    c: Tensor, c_scale: Tensor, d: Tensor, d_scale: Tensor,
    tiles: Tensor, out_dtype: torch.dtype, promote: int,
) -> Tensor:  # fmt: skip
    out = _fake_rows(a, a_scale, b, b_scale, tiles, None, out_dtype, promote)
    _multiply_rows(a, a_scale, Weights(b, b_scale), tiles, None, out, promote, add=False)
    _multiply_rows(c, c_scale, Weights(d, d_scale), tiles, None, out, promote, add=True)
    return out


def gemm_rows_sum(
    first: tuple[Tensor, Tensor, Weights], second: tuple[Tensor, Tensor, Weights], tiles: Tensor,
    out_dtype: torch.dtype, promote: int,
) -> Tensor:  # fmt: skip
    """The sum of two products :func:`gemm_rows`, each ``(a, a_scale, b)``, with the bits of just that.

    Both are rounded to ``out_dtype``, and then their sum is. But there is no second product in memory:
    it is added tile by tile where the first one lies.
    """
    (a, a_scale, b), (c, c_scale, d) = first, second
    return _gemm_rows_sum(
        a, a_scale, b.data, b.scale, c, c_scale, d.data, d.scale, tiles, out_dtype, promote
    )  # fmt: skip


# --- contraction ---------------------------------------------------------------------------------


def _fake_contraction(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    ends: Tensor,
    order: Tensor,
    out_dtype: torch.dtype,
    promote: int,
) -> Tensor:
    return a.new_empty(ends.shape[0], a.shape[0], b.shape[0], dtype=out_dtype)


@leaf("gemm_contraction", fake=_fake_contraction, vmap=by_loop)
def _gemm_contraction(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    ends: Tensor,
    order: Tensor,
    out_dtype: torch.dtype,
    promote: int,
) -> Tensor:
    out = _fake_contraction(a, a_scale, b, b_scale, ends, order, out_dtype, promote)
    num_groups, rows, columns = out.shape
    if a.shape[1] == 0:
        return out.zero_()
    row_tiles = num_groups * triton.cdiv(rows, tile_rows(a.device))
    shape = Shape(row_tiles, triton.cdiv(columns, COLUMNS), num_groups, rows, columns, 0, 0, 0)
    _launch(a, a_scale, b, b_scale, None, out, order, ends, shape, True, promote, False)
    return out


def gemm_contraction(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, plan: Plan,
    out_dtype: torch.dtype, promote: int,
) -> Tensor:  # fmt: skip
    """``out[g] = a_scale[g] * b_scale[g] * (a[:, t] . b[:, t])`` over segment g; zero for an empty one.

    Args:
        a, b: ``(R, P)`` and ``(C, P)`` float8, P the segments of a plan.
        a_scale, b_scale: ``(G, R)`` and ``(G, C)`` float32.
        plan: the segments' ends, and the order of their turns.

    Returns:
        ``(G, R, C)``, every element written.
    """
    return _gemm_contraction(a, a_scale, b, b_scale, plan.ends, plan.order, out_dtype, promote)


# --- twins ---------------------------------------------------------------------------------------


def reference_rows(
    a: Tensor, a_scale: Tensor, b: Weights, offs: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The twin of :func:`gemm_rows` in float64, and the same sum over magnitudes, for error bounds."""
    num_groups, columns = b.scale.shape
    length = a.shape[1]
    if b.stacked:
        matrix = b.data[:, :length].to(torch.float64).view(num_groups, columns, length)
    else:
        padded = triton.cdiv(length, STEP) * STEP
        side_by_side = b.data[:, : num_groups * padded].to(torch.float64)
        matrix = side_by_side.unflatten(1, (num_groups, padded)).movedim(1, 0)[:, :, :length]
    matrix = matrix * b.scale.to(torch.float64)[:, :, None]
    owner = group_ids(offs, a.shape[0])
    real = owner < num_groups
    left = torch.where(real[:, None], a.to(torch.float64) * a_scale.to(torch.float64)[:, None], 0)
    owner = owner.clamp(max=num_groups - 1)
    out = left.new_zeros(a.shape[0], columns)
    size = torch.zeros_like(out)
    for g in range(num_groups):
        mine = ((owner == g) & real)[:, None]
        out = torch.where(mine, left @ matrix[g].mT, out)
        size = torch.where(mine, left.abs() @ matrix[g].abs().mT, size)
    if bias is not None:
        added = bias.to(torch.float64).expand(num_groups, -1)[owner]
        out, size = (
            out + torch.where(real[:, None], added, 0),
            size + torch.where(real[:, None], added.abs(), 0),
        )
    return out, size


def reference_contraction(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """The twin of :func:`gemm_contraction` in float64, and the same sum over magnitudes."""
    position = torch.arange(a.shape[1], device=a.device)
    starts = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    out, size = [], []
    for g in range(ends.shape[0]):
        mine = (position >= starts[g]) & (position < ends[g])
        left = torch.where(mine, a.to(torch.float64), 0) * a_scale[g].to(torch.float64)[:, None]
        right = torch.where(mine, b.to(torch.float64), 0) * b_scale[g].to(torch.float64)[:, None]
        empty = starts[g] == ends[g]  # whose scales were never written
        left, right = torch.where(empty, 0, left), torch.where(empty, 0, right)
        out.append(left @ right.mT)
        size.append(left.abs() @ right.abs().mT)
    return torch.stack(out), torch.stack(size)
