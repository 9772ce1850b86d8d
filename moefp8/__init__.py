"""Pure functions for training Mixture-of-Experts models in FP8 and MXFP8."""

from moefp8._custom_vjp import remat
from moefp8.dense import scaled_mm
from moefp8.grouped import scaled_grouped_mm
from moefp8.groups import generate_jagged_offs
from moefp8.mx import MXArray, dequantize_mx, mx_error_bound, quantize_mx, quantize_mx_jagged
from moefp8.recipe import (
    BF16,
    FP8_ROWWISE,
    MXFP8,
    MXFP8_EXACT,
    MXFP8_WGRAD_HP,
    Gemm,
    Recipe,
)

__all__ = [
    "BF16",
    "FP8_ROWWISE",
    "MXFP8",
    "MXFP8_EXACT",
    "MXFP8_WGRAD_HP",
    "Gemm",
    "MXArray",
    "Recipe",
    "dequantize_mx",
    "generate_jagged_offs",
    "mx_error_bound",
    "quantize_mx",
    "quantize_mx_jagged",
    "remat",
    "scaled_grouped_mm",
    "scaled_mm",
]
