"""Second opinions on MX quantisation: one in exact rationals, two from other people's packages.

``exact_quantize`` is written from the OCP MX specification with ``fractions.Fraction`` and tables of
all codes; it shares nothing with the library, not even a constant. The two adapters import their
package when called, so that machines without them can still run every other test.
"""

import math
from bisect import bisect_left
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

import torch

BLOCK = 32


def power_of_two(e: int) -> Fraction:
    return Fraction(2**e) if e >= 0 else Fraction(1, 2**-e)


def log2_floor(x: Fraction) -> int:
    """The largest e with 2^e <= x, for x > 0."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if power_of_two(e) <= x else e - 1


class ExactFormat:
    """An FP8 format as the table of its finite non-negative values, which ascend with their codes."""

    def __init__(self, exponent_bits: int, mantissa_bits: int, last_finite_code: int, nan_codes: range):
        self.mantissa_bits = mantissa_bits
        self.bias = 2 ** (exponent_bits - 1) - 1
        self.nan_codes = nan_codes
        self.values = [self.decode(code) for code in range(last_finite_code + 1)]

    def decode(self, code: int) -> Fraction:
        """(-1)^sign 2^(e - bias) (1 + m / 2^M), or (m / 2^M) 2^(1 - bias) if e = 0."""
        field, m = (code & 0x7F) >> self.mantissa_bits, code & (2**self.mantissa_bits - 1)
        fraction = Fraction(m, 2**self.mantissa_bits)
        value = power_of_two((field or 1) - self.bias) * (fraction + (1 if field else 0))
        return -value if code & 0x80 else value

    def decode_float(self, code: int) -> float:
        """The same for any code, NaN, infinities and -0 among them."""
        if code & 0x7F in self.nan_codes:
            return math.nan
        size = math.inf if code & 0x7F >= len(self.values) else float(abs(self.decode(code)))
        return math.copysign(size, -1 if code & 0x80 else 1)

    @cached_property
    def midpoints(self) -> list[Fraction]:
        return [(low + high) / 2 for low, high in pairwise(self.values)]

    @property
    def max(self) -> Fraction:
        return self.values[-1]

    def encode(self, x: Fraction, negative: bool) -> int:
        """Nearest value, the even code of two equally near; past the largest value, that one."""
        code = bisect_left(self.midpoints, abs(x))  # the midpoints below |x|: so many codes passed
        if code < len(self.midpoints) and abs(x) == self.midpoints[code]:
            code += code & 1
        return code | (0x80 if negative else 0)

    def exponent(self, amax: Fraction, rule: str) -> int | None:
        """E of a finite block, clamped below at -127; None if it is over 127."""
        if amax == 0:
            return -127
        if rule == "rceil":  # the smallest E with amax <= max 2^E
            e = log2_floor(amax / self.max)
            e += amax > self.max * power_of_two(e)
        else:  # the largest E with 2^emax 2^E <= amax
            e = log2_floor(amax) - log2_floor(self.max)
        return max(e, -127) if e <= 127 else None


E4M3 = ExactFormat(4, 3, last_finite_code=0x7E, nan_codes=range(0x7F, 0x80))
E5M2 = ExactFormat(5, 2, last_finite_code=0x7B, nan_codes=range(0x7D, 0x80))
EXACT = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}


def exact_quantize(x: list[float], dtype: torch.dtype, rule: str, group: int = 32) -> tuple[list, list]:
    """Codes and scale bytes of one row. NaN elements have the code 0x7F."""
    fmt = EXACT[dtype]
    span = group if group > 0 else -(-len(x) // BLOCK) * BLOCK
    codes, scales = [], []
    for start in range(0, len(x), span):
        part = x[start : start + span]
        blocks = [part[i : i + BLOCK] for i in range(0, len(part), BLOCK)]
        amaxes = [max(abs(Fraction(v)) for v in b) for b in blocks if all(map(math.isfinite, b))]
        e = fmt.exponent(max(amaxes), rule) if amaxes else None
        scales.append(255 if e is None else e + 127)
        for block in blocks:
            if e is None or not all(map(math.isfinite, block)):
                codes += [0x7F] * len(block)
            else:
                inverse = power_of_two(-e)
                codes += [fmt.encode(Fraction(v) * inverse, math.copysign(1, v) < 0) for v in block]
    return codes, scales


# --- other people's ------------------------------------------------------------------------------

_ML_DTYPES = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}


def ml_dtypes_encode(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes (uint8) of float32 values cast by ml_dtypes. It does not saturate: past the largest value
    it gives NaN or an infinity."""
    import ml_dtypes
    import numpy as np

    with np.errstate(over="ignore"):
        cast = x.numpy().astype(getattr(ml_dtypes, _ML_DTYPES[dtype]))
    return torch.from_numpy(cast.view(np.uint8))


def ml_dtypes_decode(codes: torch.Tensor, name: str) -> torch.Tensor:
    """float64 values of uint8 codes of the ml_dtypes type ``name``."""
    import ml_dtypes
    import numpy as np

    return torch.from_numpy(codes.numpy().view(getattr(ml_dtypes, name)).astype(np.float64))


def gfloat_fake_quantize(block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One finite block of at most 32 values through gfloat's OCP conversion (rule "floor"), float64."""
    from gfloat import compute_scale_amax, quantize_block
    from gfloat.formats import format_info_mxfp8_e4m3, format_info_mxfp8_e5m2

    info = {torch.float8_e4m3fn: format_info_mxfp8_e4m3, torch.float8_e5m2: format_info_mxfp8_e5m2}[dtype]
    return torch.from_numpy(quantize_block(info, block.double().numpy(), compute_scale_amax))
