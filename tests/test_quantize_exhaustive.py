"""Every value of bfloat16 and float16, every code and every scale, against exact rationals."""

import math
from fractions import Fraction

import pytest
import torch
from numerics_inputs import DEVICES, DTYPES, E4M3, LARGEST, RULES, every_value, same_bits, under_a_leader
from oracles import EXACT, exact_quantize

from moefp8 import MXArray, dequantize_mx, quantize_mx


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_every_value_alone_in_its_block(source, dtype, rule, device):
    """Its scale, and its code under that scale."""
    x = every_value(source)[:, None]
    q = quantize_mx(x.to(device), dtype=dtype, rule=rule)
    want = [exact_quantize([v], dtype, rule) for v in x[:, 0].tolist()]
    assert q.scale.flatten().tolist() == [scale for _, (scale,) in want]
    assert q.data.view(torch.uint8).flatten().tolist() == [code for (code,), _ in want]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_every_value_under_a_scale_of_one(source, dtype, rule, device):
    """All roundings: normal, subnormal and to zero; the largest value of the format leads each block."""
    x = every_value(source)
    x = x[x.abs() <= LARGEST[dtype]]
    blocks = under_a_leader(x, LARGEST[dtype])
    q = quantize_mx(blocks.to(device), dtype=dtype, rule=rule)
    assert (q.scale == 127).all()
    got = q.data.view(torch.uint8)[:, 1:].flatten()[: len(x)]
    fmt = EXACT[dtype]
    assert got.tolist() == [fmt.encode(Fraction(v), math.copysign(1, v) < 0) for v in x.tolist()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bfloat16_values_of_every_exponent_together(dtype, rule, device):
    """Blocks of 32 values 2^16 apart: underflow beside amax, poisoned blocks beside whole ones."""
    x = every_value(torch.bfloat16).view(32, 2048).mT[::8]
    q = quantize_mx(x.to(device), dtype=dtype, rule=rule)
    want = [exact_quantize(row, dtype, rule) for row in x.tolist()]
    assert q.data.view(torch.uint8).tolist() == [row for row, _ in want]
    assert q.scale.tolist() == [scale for _, scale in want]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_under_every_scale_is_a_fixed_point(dtype, rule, device):
    """The value of each finite code, times each of the 255 scales, comes back as that code and scale."""
    finite = torch.tensor([c for c in range(256) if c & 0x7F < len(EXACT[dtype].values)])
    data = under_a_leader(finite.to(torch.uint8), len(EXACT[dtype].values) - 1).view(dtype)
    data = data.expand(255, *data.shape).contiguous()
    scale = torch.arange(255, dtype=torch.uint8)[:, None, None].expand(*data.shape[:-1], 1).contiguous()
    q = MXArray(data.to(device), scale.to(device), axis=-1, group=32)
    same_bits(quantize_mx(dequantize_mx(q, torch.float64), dtype=dtype, rule=rule), q)


@pytest.mark.parametrize("rule", RULES)
def test_float64_breaks_ties_that_float32_cannot_see(rule):
    """float64 is rounded once: 2^-40 above a tie goes up, 2^-40 below goes down, wherever the tie lies."""
    fmt = EXACT[E4M3]
    ties = torch.tensor([float(m) for m in fmt.midpoints], dtype=torch.float64)
    low = torch.arange(len(ties))
    for factor, code in ((1 + 2.0**-40, low + 1), (1 - 2.0**-40, low), (1.0, low + (low & 1))):
        blocks = under_a_leader(ties * factor, 448.0)
        got = quantize_mx(blocks, rule=rule).data.view(torch.uint8)[:, 1:].flatten()[: len(ties)]
        assert got.tolist() == code.tolist()
