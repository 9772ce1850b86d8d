"""Inputs that find quantisation bugs, and the laws to hold against them (extra ``testing``).

The strategies draw tensors from the values at which block quantisers go wrong; the checks take the
functions under test as arguments and raise AssertionError with the offending element.

>>> from functools import partial
>>> import torch
>>> from hypothesis import given
>>> from moefp8 import dequantize_mx, quantize_mx
>>> from moefp8.testing import check_error_bound, check_projection, mx_arrays
>>> @given(x=mx_arrays(dtype=torch.bfloat16))
... def test_my_quantizer(x):
...     quantize = partial(quantize_mx, rule="floor")
...     dequantize = partial(dequantize_mx, dtype=torch.float32)
...     check_error_bound(quantize, dequantize, x)
...     check_projection(quantize, dequantize, x)
>>> test_my_quantizer()

Quantiser checks look at blocks of 32 along the last axis. ``quantize`` may return anything that
``dequantize`` turns into float32 or float64 values; bfloat16 would round a second time. Products
have the signature ``product(a (M, K), b (G, K, N), offs (G,)) -> (M, N)``.
"""

from moefp8.testing.products import (
    check_empty_groups,
    check_expert_permutation,
    check_one_group_is_dense,
    check_row_locality,
    check_tail_rows_are_zero,
    check_unused_gradients_are_zero,
    check_vjp_homogeneity,
)
from moefp8.testing.quantizers import (
    check_canonical_encoding,
    check_error_bound,
    check_monotone_within_block,
    check_permutation_within_block,
    check_poison_is_local,
    check_power_of_two_equivariance,
    check_projection,
    check_rceil_minus_floor,
    check_sign_symmetry,
)
from moefp8.testing.strategies import GroupLayout, group_layouts, mx_arrays, mx_blocks

__all__ = [
    "GroupLayout",
    "check_canonical_encoding",
    "check_empty_groups",
    "check_error_bound",
    "check_expert_permutation",
    "check_monotone_within_block",
    "check_one_group_is_dense",
    "check_permutation_within_block",
    "check_poison_is_local",
    "check_power_of_two_equivariance",
    "check_projection",
    "check_rceil_minus_floor",
    "check_row_locality",
    "check_sign_symmetry",
    "check_tail_rows_are_zero",
    "check_unused_gradients_are_zero",
    "check_vjp_homogeneity",
    "group_layouts",
    "mx_arrays",
    "mx_blocks",
]
