"""Pure functions for training Mixture-of-Experts models in FP8 and MXFP8."""

from moefp8._custom_vjp import remat
from moefp8.auto import Card, Choice, Rates, choose_recipe
from moefp8.dense import scaled_mm
from moefp8.experts import expert_ffn, expert_statistics
from moefp8.grouped import scaled_grouped_mm
from moefp8.groups import generate_jagged_offs
from moefp8.moe import init_moe_ffn, moe_ffn
from moefp8.mx import MXArray, dequantize_mx, mx_error_bound, quantize_mx, quantize_mx_jagged
from moefp8.precision import Explanation, explain, low_precision
from moefp8.quantized import QuantizedParams, quantize_params
from moefp8.recipe import (
    BF16,
    FP8_ROWWISE,
    MXFP8,
    MXFP8_EXACT,
    MXFP8_WGRAD_HP,
    Gemm,
    Recipe,
)
from moefp8.routing import MoEConfig, MoEStats, Routing, route, routing_stats, update_expert_bias
from moefp8.statistics import OperandStats, cotangent_probe

__all__ = [
    "BF16",
    "FP8_ROWWISE",
    "MXFP8",
    "MXFP8_EXACT",
    "MXFP8_WGRAD_HP",
    "Card",
    "Choice",
    "Explanation",
    "Gemm",
    "MXArray",
    "MoEConfig",
    "MoEStats",
    "OperandStats",
    "QuantizedParams",
    "Rates",
    "Recipe",
    "Routing",
    "choose_recipe",
    "cotangent_probe",
    "dequantize_mx",
    "expert_ffn",
    "expert_statistics",
    "explain",
    "generate_jagged_offs",
    "init_moe_ffn",
    "low_precision",
    "moe_ffn",
    "mx_error_bound",
    "quantize_mx",
    "quantize_mx_jagged",
    "quantize_params",
    "remat",
    "route",
    "routing_stats",
    "scaled_grouped_mm",
    "scaled_mm",
    "update_expert_bias",
]
