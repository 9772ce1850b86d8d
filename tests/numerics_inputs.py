"""Inputs that the tests of quantisation share: every value of a 16-bit type, and devices to run on."""

import pytest
import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = [E4M3, E5M2]
RULES = ["rceil", "floor"]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def every_value(dtype):
    """All 65536 values of bfloat16 or float16, NaN and infinities among them, by code from 0x8000 up."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def under_a_leader(x, leader):
    """(n,) to (ceil(n / 31), 32): blocks whose first element, ``leader``, decides the scale."""
    x = torch.nn.functional.pad(x, (0, -len(x) % 31)).view(-1, 31)
    return torch.cat([x.new_full((len(x), 1), leader), x], 1)


def same_bits(got, want):
    """Two MXArrays with equal codes, scales, axis and group."""
    assert got.shape == want.shape
    assert (got.dtype, got.axis, got.group) == (want.dtype, want.axis, want.group)
    assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(got.scale, want.scale)
