"""Reading rows that are described by ``Gathered``: where they lie, and what they are scaled by."""

import triton
import triton.language as tl

from moefp8.kernels._round import rounded, widened


@triton.jit
def places(copy, scores, row, end, stride, COPIES: tl.constexpr, SCORED: tl.constexpr):
    """Offsets of the rows in the data, int64, and their scores in float32 (1 if not ``SCORED``).

    For rows at or past ``end`` those of the first token, to be masked.
    """
    if COPIES:
        which = tl.load(copy + row, mask=row < end, other=0).to(tl.int64)
        at = which // COPIES * stride
        score = tl.load(scores + which).to(tl.float32) if SCORED else 1.0
    else:
        at = row.to(tl.int64) * stride
        score = 1.0
    return at, score


@triton.jit
def scored(v, score, dtype: tl.constexpr, SCORED: tl.constexpr, HARDWARE: tl.constexpr):
    """``v`` in float32, times ``score`` and rounded to ``dtype``."""
    v = v.to(tl.float32) if HARDWARE else widened(v, HARDWARE)
    return rounded(v * score, dtype, HARDWARE) if SCORED else v
