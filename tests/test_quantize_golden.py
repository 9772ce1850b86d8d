"""Blocks worked out by hand: every digit below comes from the specification, none from the code.

An E4M3 code is sign, four exponent bits (bias 7), three mantissa bits; E5M2 five (bias 15) and two.
0x38 and 0x3C are 1.0, 0x7E and 0x7B the largest values, 448 and 57344. A scale byte is E + 127.
"""

import math

import pytest
import torch
from numerics_inputs import DEVICES, E4M3, E5M2

from moefp8 import dequantize_mx, quantize_mx

NAN, INF = math.nan, math.inf

# (what, dtype, rule, block, scale byte, codes)
BLOCKS = [
    # rceil: E = ceil(log2(A / max)). 448 fits exactly, E = 0; one ulp more needs E = 1, and 448 / 2 = 224.
    ("rceil at the largest value", E4M3, "rceil", [448.0, 1.0], 127, [0x7E, 0x38]),
    ("rceil one ulp above", E4M3, "rceil", [448.0 + 2.0**-15, 1.0], 128, [0x76, 0x30]),
    ("rceil one ulp below", E4M3, "rceil", [448.0 - 2.0**-15, 1.0], 127, [0x7E, 0x38]),
    # 1.75 = 448 * 2^-8, so E = -8 and it is stored as 448; 1.75 + ulp takes E = -7, stored as 224.
    ("rceil at 1.75", E4M3, "rceil", [1.75], 119, [0x7E]),
    ("rceil above 1.75", E4M3, "rceil", [1.75 + 2.0**-23], 120, [0x76]),
    # 225 <= 448 / 2 fails, so E = 0; 225 lies between 224 and 240 and rounds to 224 = 1.75 * 2^7.
    ("225 rounds to 224", E4M3, "rceil", [225.0], 127, [0x76]),
    ("224 takes the exponent below", E4M3, "rceil", [224.0], 126, [0x7E]),
    ("rceil at the largest value", E5M2, "rceil", [57344.0, 1.0], 127, [0x7B, 0x3C]),
    ("rceil one ulp above", E5M2, "rceil", [57344.0 + 2.0**-8, 1.0], 128, [0x77, 0x38]),
    # floor: E = floor(log2 A) - 8, or - 15. 449 to 511 have E = 0 as 256 has, and saturate.
    ("floor saturates", E4M3, "floor", [511.0, -480.0, 449.0, 1.0], 127, [0x7E, 0xFE, 0x7E, 0x38]),
    ("floor takes the next exponent", E4M3, "floor", [512.0, 1.0], 128, [0x78, 0x30]),
    ("floor at a power of two", E4M3, "floor", [256.0, -1.0], 127, [0x78, 0xB8]),
    ("floor one ulp below it", E4M3, "floor", [256.0 - 2.0**-16], 126, [0x7E]),
    ("floor saturates", E5M2, "floor", [65535.0, -57345.0], 127, [0x7B, 0xFB]),
    # Ties to even under E = 0. 1.0625 lies between 1 (m = 0) and 1.125 (m = 1); 1.1875 between m = 1, 2.
    ("ties to even", E4M3, "rceil", [448.0, 1.0625, 1.1875, -1.0625], 127, [0x7E, 0x38, 0x3A, 0xB8]),
    ("above a tie", E4M3, "rceil", [448.0, 1.0625 + 2.0**-23], 127, [0x7E, 0x39]),
    ("ties to even", E5M2, "rceil", [57344.0, 1.125, 1.375], 127, [0x7B, 0x3C, 0x3E]),
    # Subnormals: code c < 8 is c * 2^-9. 2^-10 is a tie between 0 and 1, 3 * 2^-10 between 1 and 2.
    ("subnormals", E4M3, "rceil", [448.0, 2.0**-9, -7 * 2.0**-9], 127, [0x7E, 0x01, 0x87]),
    ("smallest normal", E4M3, "rceil", [448.0, 2.0**-6, 15 * 2.0**-10], 127, [0x7E, 0x08, 0x08]),
    ("subnormal ties", E4M3, "rceil", [448.0, 2.0**-10, 3 * 2.0**-10], 127, [0x7E, 0x00, 0x02]),
    ("underflow keeps the sign", E4M3, "rceil", [448.0, -(2.0**-10), -(2.0**-30)], 127, [0x7E, 0x80, 0x80]),
    ("above half the smallest", E4M3, "rceil", [448.0, 2.0**-10 + 2.0**-30], 127, [0x7E, 0x01]),
    # E5M2 code c < 4 is c * 2^-16.
    ("subnormals", E5M2, "rceil", [57344.0, 2.0**-16, 2.0**-17, 3 * 2.0**-17], 127, [0x7B, 1, 0, 2]),
    # Zeros: any scale would do, 2^-127 is what E clamps to.
    ("zeros", E4M3, "rceil", [0.0, -0.0], 0, [0x00, 0x80]),
    ("zeros", E5M2, "floor", [0.0, -0.0], 0, [0x00, 0x80]),
    # Scales stop at 2^-127. 448 * 2^-127 is the last amax whose scale fits; 2^-130 = 2^-3 * 2^-127.
    ("last scale that fits", E4M3, "rceil", [448 * 2.0**-127], 0, [0x7E]),
    ("the one above it", E4M3, "rceil", [480 * 2.0**-127], 1, [0x77]),
    ("scale underflow", E4M3, "rceil", [2.0**-130, -(2.0**-136)], 0, [0x20, 0x81]),
    ("scale underflow", E4M3, "floor", [2.0**-130, -(2.0**-136)], 0, [0x20, 0x81]),
    ("scale and element underflow", E4M3, "rceil", [2.0**-140], 0, [0x00]),
    ("float32's smallest", E5M2, "rceil", [2.0**-149, 2.0**-143], 0, [0x00, 0x01]),
    # float32's largest, (2 - 2^-23) 2^127: rceil needs E = 120 for E4M3; floor 127 - 8, saturated.
    ("float32's largest", E4M3, "rceil", [(2 - 2.0**-23) * 2.0**127], 247, [0x78]),
    ("float32's largest", E4M3, "floor", [-(2 - 2.0**-23) * 2.0**127], 246, [0xFE]),
    # A NaN or an infinity poisons its block.
    ("NaN", E4M3, "rceil", [1.0, NAN, 2.0], 255, [0x7F, 0x7F, 0x7F]),
    ("infinity", E4M3, "floor", [1.0, INF], 255, [0x7F, 0x7F]),
    ("minus infinity", E5M2, "rceil", [-INF, 0.0], 255, [0x7F, 0x7F]),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "rule", "block", "scale", "codes"), [b[1:] for b in BLOCKS])
def test_golden_block(dtype, rule, block, scale, codes, device):
    q = quantize_mx(torch.tensor(block, dtype=torch.float32, device=device), dtype=dtype, rule=rule)
    assert q.scale.tolist() == [scale]
    assert [hex(c) for c in q.data.view(torch.uint8).tolist()] == [hex(c) for c in codes]
    # float64 sees the same numbers; the shorter types do where they hold them.
    for source in (torch.float64, torch.bfloat16, torch.float16):
        x = torch.tensor(block, dtype=torch.float64, device=device).to(source)
        if x.tolist() == block or any(map(math.isnan, block)):
            again = quantize_mx(x, dtype=dtype, rule=rule)
            assert again.scale.tolist() == [scale]
            assert again.data.view(torch.uint8).tolist() == codes


def test_golden_aligned_span():
    """Two blocks of E = 0 and E = 4 share E = 4: 17 = 1.0625 * 16 rounds to 16 as before, 0.5 = 2^-5 * 16
    is still normal, and 2^-3 = 2^-7 * 16 is the subnormal 4 * 2^-9."""
    x = torch.zeros(64)
    x[:3] = torch.tensor([448.0, 17.0, 2.0**-3])
    x[32:34] = torch.tensor([7168.0, -0.5])
    q = quantize_mx(x, group=64)
    assert q.scale.tolist() == [131]
    data = q.data.view(torch.uint8)
    assert data[:3].tolist() == [0x5E, 0x38, 0x04]
    assert data[32:34].tolist() == [0x7E, 0x90]
    value = dequantize_mx(q, torch.float32)
    assert value[:3].tolist() == [448.0, 16.0, 0.125]
    assert value[32:34].tolist() == [7168.0, -0.5]


def test_golden_scale_overflow():
    """Only float64 reaches a scale over 2^127: 448 * 2^127 is the last value, the next one is NaN."""
    x = torch.tensor([[448 * 2.0**127], [449 * 2.0**127], [1e308]], dtype=torch.float64)
    q = quantize_mx(x)
    assert q.scale.flatten().tolist() == [254, 255, 255]
    assert q.data.view(torch.uint8).flatten().tolist() == [0x7E, 0x7F, 0x7F]
    # "floor" saturates up to 2^(8 + 128), exclusive.
    edge = torch.tensor([[math.nextafter(2.0**136, 0)], [2.0**136]], dtype=torch.float64)
    assert quantize_mx(edge, rule="floor").scale.flatten().tolist() == [254, 255]


def test_golden_second_rounding():
    """1 + 2^-4 + 2^-30 is above the tie of 1 and 1.125, but through float32 would land on it, and on 1."""
    x = torch.tensor([448.0, 1 + 2.0**-4 + 2.0**-30], dtype=torch.float64)
    assert x.float()[1] == 1.0625
    assert quantize_mx(x).data.view(torch.uint8).tolist() == [0x7E, 0x39]
