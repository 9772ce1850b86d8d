"""The dense product on kernels for grouped rows: a batch is groups of equal sizes."""

from collections.abc import Callable

import torch
from torch import Tensor

from moefp8.kernels.sm90_operands import equal_groups, is_transposed
from moefp8.mx import MXArray
from moefp8.recipe import Gemm


def dense_by_groups(rows: Callable, contraction: Callable) -> Callable:
    """``dense`` as ``reference.dense`` defines it for two or three axes, made of the grouped products."""

    def dense(
        a: Tensor | MXArray, b: Tensor, bias: Tensor | None, gemm: Gemm, out_dtype: torch.dtype
    ) -> Tensor:
        if b.ndim == 2:
            a = MXArray(a.data[None], a.scale[None], a.axis, a.group) if isinstance(a, MXArray) else a[None]
            return dense(a, b[None], bias, gemm, out_dtype)[0]
        num_groups, m, k = a.shape
        if not isinstance(a, MXArray) and bias is None and is_transposed(a):
            # The contraction runs down the rows of a^T in memory: the other form reads it as it lies.
            tall, wide = a.mT.flatten(0, 1), b.flatten(0, 1)
            return contraction(tall.mT, wide, equal_groups(num_groups, k, b.device), gemm, out_dtype)
        flat: Tensor | MXArray
        if isinstance(a, MXArray):
            flat = MXArray(a.data.flatten(0, 1), a.scale.flatten(0, 1), -1, a.group)
        else:
            flat = a.flatten(0, 1)
        if bias is not None:  # (N,) or (G, 1, N)
            bias = bias if bias.ndim == 1 else bias.flatten(0, 1)
        offs = equal_groups(num_groups, m, b.device)
        return rows(flat, b, offs, bias, gemm, out_dtype).view(num_groups, m, b.shape[-1])

    return dense
