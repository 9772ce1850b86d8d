"""The bits of quantisation, pinned: they may not change with the version of torch, the device or the code.

The inputs do not involve torch's random numbers: all 65536 bfloat16 values, in an order that puts every
exponent in a block, and two kinds of arrays made of the bytes of SHAKE-256, which Python defines. A digest
is the SHA-256 of the codes followed by the scales of all of them. The constants were printed by this file,

    PYTHONPATH=tests python tests/test_quantize_digest.py

on torch 2.13.0 (x86-64 CPU), after test_quantize_exhaustive and test_quantize_oracles had found no
difference from exact rationals. Another value here means that quantisation changed: find out why.
"""

import hashlib
import itertools

import pytest
import torch
from numerics_inputs import DEVICES, DTYPES, FLOATS, RULES, every_value

from moefp8 import quantize_mx

GROUPS = [32, 96, -1]
SIGNIFICAND = {torch.float64: 52, torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}


def shake(seed, count):
    """``count`` int64 numbers of 63 bits."""
    raw = hashlib.shake_256(seed.encode()).digest(8 * count)
    return torch.frombuffer(bytearray(raw), dtype=torch.int64) & (2**63 - 1)


def inputs(source):
    yield every_value(torch.bfloat16).view(32, 2048).mT.to(source)
    # Bits as they come, a NaN in nearly every block of float16: rows of 1000, the last block short.
    size = torch.empty(0, dtype=source).element_size()
    raw = hashlib.shake_256(b"bits").digest(64 * 1000 * size)
    yield torch.frombuffer(bytearray(raw), dtype=source).view(64, 1000)
    # Finite ones that every type holds exactly: significands cut to its own, exponents in [-14, 8], up to 7
    # below that of the block, blocks up to 15 apart.
    keep = ~(2 ** (52 - SIGNIFICAND[source]) - 1)
    bits = shake("significands", 64 * 1000).view(64, 1000)
    blocks = (shake("exponents", 64 * 32) % 16).view(64, 32).repeat_interleave(32, 1)[:, :1000]
    exponent = 1023 + 8 - (bits >> 52) % 8 - blocks
    value = ((bits & (2**52 - 1) & keep) | (exponent << 52)).view(torch.float64)
    yield torch.where((bits >> 60) % 2 == 0, value, -value).to(source)


def digest(source, dtype, rule, group, device):
    sha = hashlib.sha256()
    for x in inputs(source):
        q = quantize_mx(x.to(device), dtype=dtype, rule=rule, group=group)
        for part in (q.data.view(torch.uint8), q.scale):
            sha.update(bytes(part.cpu().flatten().tolist()))
    return sha.hexdigest()[:16]


CASES = list(itertools.product(FLOATS, DTYPES, RULES, GROUPS))

# One line for each input and element dtype: rceil with groups 32, 96, -1, then floor.
DIGESTS = """
f1ba560991435b81 40b4fa55c212dca6 b22e35344c297d34 3ec8d9a7e31751d1 7c25306f2c59e63a ee706af8adadb558
2e7c894d476228d7 e9ed5e41521aa54e 91bbe20e0c7261f4 9786cd507492ba72 2d8081c65200ec45 5838636468af406b
8b57fe5cb2b14233 aa62c142a0744f72 d90bc38e0b0b7804 a918a57795c75979 00c5677920aca6f5 a56f340d54f1abda
4d699c38a754fbbb bc438106295bb48f 69986d97c5c070df 1d2f4c9ef639e100 0021c5a80d04d990 3ea6204c50e0c113
241b558bfd2bc839 704d8249060bcae5 a3bbf3db44a70512 f1645f509bc8b86b 9c136833371a314b 7b0989c90a5d6392
06b3d584843d7c71 a81c6172530f2d5b c1f41cb44b69747a 80413b9659719865 dbf03ba95cf91eab c12e88ca0f470e1a
72b350a6dd3b4fd2 aeaf38a19b450ce5 bda882892d491a3f 88f4956a69307a68 1f650ca2b98fbe20 e4c32d2be8b4d304
dfb342734775ca29 bf47646c9bc79bd7 18e928fbec1398b7 8286b9f3aaceb7cf f9d397d0f1e89a4e 30336bf10a8a30c8
"""


@pytest.mark.parametrize("device", DEVICES)
def test_the_bits_are_those_recorded(device):
    got = {case: digest(*case, device) for case in CASES}
    want = dict(zip(CASES, DIGESTS.split(), strict=True))
    assert got == want


if __name__ == "__main__":
    digests = [digest(*case, "cpu") for case in CASES]
    for line in zip(*[iter(digests)] * 6, strict=True):
        print(" ".join(line))
