"""Sum the rows of each group, in float32: the gradient of a bias.

Two bytes read an element of a bf16 input, and next to nothing written. One program owns 64 columns of
one group and adds its rows in order, so the result does not change from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefp8._leaf import by_loop, leaf


@triton.jit
def _group_sum_kernel(
    x, out, offs, rows, columns, stride_row, stride_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    group = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.where(group == 0, 0, tl.load(offs + tl.maximum(group - 1, 0)))
    end = tl.minimum(tl.load(offs + group), rows)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(tl.cdiv(end - start, ROWS)):
        row = start + i * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * stride_row + column[None, :] * stride_column
        here = (row < end)[:, None] & (column < columns)[None, :]
        total += tl.load(x + at, mask=here, other=0).to(tl.float32)
    tl.store(out + group * columns + column, tl.sum(total, 0), mask=column < columns)


def _fake(x: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(offs.shape[0], x.shape[1], dtype=torch.float32)


@leaf("group_sum", fake=_fake, vmap=by_loop)
def group_sum(x: Tensor, offs: Tensor) -> Tensor:
    """``out[g] = x[rows of g].sum(0)``, ``(G, N)`` float32."""
    out = _fake(x, offs)
    grid = (offs.shape[0], triton.cdiv(x.shape[1], 64))
    if out.numel():
        _group_sum_kernel[grid](
            x, out, offs.contiguous(), x.shape[0], x.shape[1], *x.stride(), ROWS=64, COLUMNS=64
        )
    return out
