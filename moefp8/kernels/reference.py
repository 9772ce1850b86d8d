"""The reference products in plain torch: quantise, dequantise, multiply in float32.

This is the definition. Every kernel is compared with it, and it is fast enough to train small
models on a CPU. Three forms, closed under differentiation (``grouped.py`` and ``dense.py``)::

    rows         (M, K) x (G, K, N) -> (M, N)      rows of a grouped by offs, one matrix a group
    contraction  (M, T) x (T, N)    -> (G, M, N)   the contraction grouped, one result a group
    dense        (..., M, K) x (..., K, N) -> (..., M, N)

Cost of ``rows`` with an FP8 recipe, beside the 2 M K N operations: some ten passes over each
operand, 1.5 to 2 ns an element on two cores. The grouped multiplications read ``offs`` on the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moefp8._dispatch import Implementation
from moefp8._leaf import by_loop, leaf
from moefp8._quantize import dequantize, quantize, quantize_jagged, stored_group
from moefp8.formats import BLOCK
from moefp8.groups import group_ids, read_ends
from moefp8.kernels.ffn import compose
from moefp8.mx import MXArray
from moefp8.recipe import HIGH_PRECISION, Gemm, Recipe


def scale_rule(gemm: Gemm) -> str:
    """Scale rule of the leaf operators for a quantising ``gemm``."""
    return "fp32" if gemm.format == "row" else gemm.rule


def _rule(gemm: Gemm) -> tuple[str, int]:
    """Scale rule and span of the leaf operators for a quantising ``gemm``."""
    group = BLOCK if gemm.group is None else gemm.group
    return scale_rule(gemm), -1 if gemm.format == "row" else group


def high_precision(x: Tensor | MXArray) -> Tensor:
    """``x`` itself, or the values of an MXArray in float32: to quantise again along another axis."""
    if isinstance(x, MXArray):
        return dequantize(x.data, x.scale, x.axis, x.group, torch.float32)
    return x


def fake_quantize(x: Tensor | MXArray, axis: int, gemm: Gemm) -> Tensor:
    """The values a product sees of ``x``, quantised along its contraction ``axis`` (-1 or -2)."""
    if isinstance(x, MXArray) or gemm.format == "none":
        return high_precision(x)
    if axis == -1 and x.stride(-1) != 1 and x.mT.is_contiguous():  # follow memory
        return fake_quantize(x.mT, -2, gemm).mT
    rule, group = _rule(gemm)
    return dequantize(*quantize(x, axis, gemm.dtype, rule, group, None), axis, group, torch.float32)


def fake_quantize_jagged(x: Tensor, offs: Tensor, gemm: Gemm) -> tuple[Tensor, Tensor]:
    """The same along the rows of ``x`` (T, N), per group; rows move into segments with new ends."""
    if gemm.format == "none":
        return x, offs
    rule, group = _rule(gemm)
    data, scale, ends = quantize_jagged(x, offs, gemm.dtype, rule, group)
    return dequantize(data, scale, -2, stored_group(group), torch.float32), ends


def _common(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Operands in the dtype to multiply in: their own if it is the result's, else at least float32.

    On a CPU always at least float32: one without matrix instructions for bfloat16 multiplies it at
    1 to 3 GFLOP/s against 110 in float32 (torch 2.13, two cores).
    """
    dtype = torch.promote_types(a.dtype, b.dtype)
    if dtype != out_dtype or a.device.type == "cpu":
        dtype = torch.promote_types(torch.promote_types(dtype, out_dtype), torch.float32)
    return a.to(dtype), b.to(dtype)


# --- grouped multiplication ----------------------------------------------------------------------


def _fake_multiply_rows(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2])


@leaf("multiply_rows", fake=_fake_multiply_rows, vmap=by_loop)
def multiply_rows(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """``out[i] = a[i] @ b[g]`` for the rows i of each group g; zero for rows of none."""
    out = a.new_empty(a.shape[0], b.shape[2])
    start = 0
    for end, matrix in zip(read_ends(offs, a.shape[0]), b, strict=True):
        torch.mm(a[start:end], matrix, out=out[start:end])
        start = end
    out[start:] = 0
    return out


def _fake_multiply_contraction(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])


@leaf("multiply_contraction", fake=_fake_multiply_contraction, vmap=by_loop)
def multiply_contraction(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """``out[g] = a[:, rows of g] @ b[rows of g]``; zero for an empty group."""
    out = a.new_empty(offs.shape[0], a.shape[0], b.shape[1])
    start = 0
    for end, matrix in zip(read_ends(offs, b.shape[0]), out, strict=True):
        torch.mm(a[:, start:end], b[start:end], out=matrix)
        start = end
    return out


# --- the three products --------------------------------------------------------------------------


def rows(
    a: Tensor | MXArray,
    b: Tensor | MXArray,
    offs: Tensor,
    bias: Tensor | None,
    gemm: Gemm,
    out_dtype: torch.dtype,
) -> Tensor:
    """``out[i] = a[i] @ b[g] + bias[g]`` for the rows i of group g, rounded once to ``out_dtype``.

    Args:
        a: (M, K), or an MXArray quantised along K.
        b: (G, K, N), or an MXArray quantised along K.
        offs: (G,).
        bias: (N,), (G, N) or None.
    """
    left, right = fake_quantize(a, -1, gemm), fake_quantize(b, -2, gemm)
    left, right = _common(left, right, torch.float32 if bias is not None else out_dtype)
    out = multiply_rows(left, right, offs)
    if bias is not None:
        per_group = bias.to(out.dtype).expand(offs.shape[0], -1)
        with_tail = torch.cat([per_group, torch.zeros_like(per_group[:1])])  # rows past offs[-1] stay zero
        out = out + with_tail.index_select(0, group_ids(offs, out.shape[0]))
    return out.to(out_dtype)


def contraction(a: Tensor, b: Tensor, offs: Tensor, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
    """``out[g] = a[:, rows of g] @ b[rows of g]``, rounded once to ``out_dtype``.

    Args:
        a: (M, T).
        b: (T, N).
        offs: (G,) ends along T.
    """
    left, ends = fake_quantize_jagged(a.mT, offs, gemm)
    right, _ = fake_quantize_jagged(b, offs, gemm)
    left, right = _common(left, right, out_dtype)
    return multiply_contraction(left.mT, right, ends).to(out_dtype)


def dense(
    a: Tensor | MXArray, b: Tensor, bias: Tensor | None, gemm: Gemm, out_dtype: torch.dtype
) -> Tensor:
    """``out = a @ b + bias``, batched over leading axes, rounded once to ``out_dtype``.

    Args:
        a: (..., M, K), or an MXArray quantised along K.
        b: (..., K, N).
        bias: broadcastable to (..., M, N), or None.
    """
    a, b = fake_quantize(a, -1, gemm), fake_quantize(b, -2, gemm)
    a, b = _common(a, b, torch.float32 if bias is not None else out_dtype)
    out = a @ b
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.to(out_dtype)


def group_sum(g: Tensor, offs: Tensor) -> Tensor:
    """``out[g] = g[rows of g].sum(0)``, (G, N) in at least float32: a product with a row of ones."""
    wide = torch.promote_types(g.dtype, torch.float32)
    return contraction(g.new_ones(1, g.shape[0]), g, offs, HIGH_PRECISION, wide).squeeze(1)


# --- weights quantised beforehand ----------------------------------------------------------------


def quantize_weights(w: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
    """Codes and scales of ``w`` (G, N, K) along K and along N; empty if a product does not quantise."""
    copies: list[Tensor] = []
    for axis, gemm in ((-1, recipe.fwd), (-2, recipe.dgrad)):
        if gemm.format == "none":
            copies += [w.new_empty(0), w.new_empty(0)]
        else:
            rule, group = _rule(gemm)
            copies += quantize(w, axis, gemm.dtype, rule, group, None)
    return tuple(copies)


def _prepared(b: Tensor, copy: Sequence[Tensor], axis: int, gemm: Gemm) -> Tensor | MXArray:
    """``b`` as its quantised ``copy``, if there is one and the product quantises."""
    if not copy or gemm.format == "none":
        return b
    data, scale = copy
    return MXArray(data, scale, axis, _rule(gemm)[1])


# --- forward and backward of the rows form -------------------------------------------------------


def rows_forward(
    a: Tensor | MXArray,
    b: Tensor,
    offs: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    out_dtype: torch.dtype,
    prepared: Sequence[Tensor] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """:func:`rows`; nothing is kept, each product quantises afresh what was not quantised beforehand."""
    along_k = tuple(x.mT for x in prepared[:2]) if recipe.fwd.format != "none" else ()
    right = _prepared(b, along_k, -2, recipe.fwd)
    return rows(a, right, offs, bias, recipe.fwd, out_dtype), tuple(prepared[2:])


def rows_backward(
    kept: Sequence[Tensor],
    a: Tensor | MXArray,
    b: Tensor,
    offs: Tensor,
    g: Tensor,
    recipe: Recipe,
    needed: tuple[bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor | None, Tensor | None]:
    """``da[i] = g[i] @ b[g]^T`` and ``db[g] = a[rows of g]^T @ g[rows of g]``, those ``needed``."""
    da = db = None
    if needed[0]:
        da = rows(g, _prepared(b.mT, kept, -2, recipe.dgrad), offs, None, recipe.dgrad, dtypes[0])
    if needed[1]:
        db = contraction(high_precision(a).mT, g, offs, recipe.wgrad, dtypes[1])
    return da, db


_FFN = compose(rows_forward, rows_backward, group_sum)

IMPLEMENTATION = Implementation(
    name="reference",
    refuse=lambda request: None,
    rows=rows,
    contraction=contraction,
    dense=dense,
    group_sum=group_sum,
    rows_forward=rows_forward,
    rows_backward=rows_backward,
    ffn_forward=_FFN.forward,
    ffn_backward=_FFN.backward,
    ffn_keeps_rows=lambda recipe: True,
    quantize_weights=quantize_weights,
)
