"""The arithmetic of block quantisation, as two leaf operators on plain tensors.

``quantize`` and ``dequantize`` are the definition that every kernel is compared with bit for bit.
They know data, scales and a (negative) axis; ``mx.py`` wraps them into arrays and checks arguments.
"""

import torch
from torch import Tensor

from moefp8._leaf import leaf, over_leading
from moefp8.formats import (
    BLOCK,
    NAN_CODE,
    SCALE_BIAS,
    SCALE_NAN,
    ElementFormat,
    decode_elements,
    decode_scale,
    element_format,
)
from moefp8.groups import Segments, checked_ends, segments


def _exponent_byte(amax: Tensor, fmt: ElementFormat, rule: str) -> Tensor:
    """E + 127 as int32, from the bits of ``amax`` (float32 or float64, finite, non-negative).

    floor: E = floor(log2 amax) - emax. rceil: E = ceil(log2(amax / max)), which is the same plus
    one where the significand of amax exceeds that of max. Adding ``carry`` to the bits carries into
    the exponent field exactly then. Results under 0 become 0 (2^-127); one of 255 or more, which
    only a float64 can reach, is NaN.
    """
    if amax.dtype == torch.float64:
        bits, mantissa, bias = amax.view(torch.int64), 52, 1023
    else:
        bits, mantissa, bias = amax.view(torch.int32), 23, 127
    if rule == "rceil":
        fraction = fmt.max / 2.0**fmt.emax - 1.0
        bits = bits + ((1 << mantissa) - 1 - int(fraction * (1 << mantissa)))
    byte = (bits >> mantissa) - bias - fmt.emax + SCALE_BIAS
    return byte.clamp(0, SCALE_NAN).to(torch.int32)


def _round_to_odd(x: Tensor) -> Tensor:
    """float64 to float32 such that a later rounding to fewer bits is as if done from float64.

    Truncates and sets the last bit if anything was lost; plain rounding would round twice.
    """
    nearest = x.to(torch.float32)
    back = nearest.to(torch.float64)
    bits = nearest.view(torch.int32) - (back.abs() > x.abs()).to(torch.int32)
    return (bits | (back != x).to(torch.int32)).view(torch.float32)


def _blocks(x: Tensor, axis: int, size: int) -> Tensor:
    """Split ``axis`` into (ceil(n / size), size), filling the last block with zeros."""
    short = -x.shape[axis] % size
    if short:
        shape = list(x.shape)
        shape[axis] = short
        x = torch.cat([x, x.new_zeros(shape)], axis)
    return x.unflatten(axis, (x.shape[axis] // size, size))


def block_amax(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Largest magnitude of each 32-element block along ``axis`` (0 for a poisoned one), and which
    blocks are poisoned by a NaN or an infinity."""
    amax = _blocks(x, axis, BLOCK).abs().amax(axis)
    poisoned = ~amax.isfinite()
    return torch.where(poisoned, 0, amax), poisoned


def _fake_quantize(
    x: Tensor, axis: int, dtype: torch.dtype, rule: str, group: int, amax: Tensor | None
) -> tuple[Tensor, Tensor]:
    n = x.shape[axis]
    shape = list(x.shape)
    shape[axis] = -(-n // span(group, n)) if n else 0
    scale = torch.float32 if rule == "fp32" else torch.uint8
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(shape, dtype=scale)


def span(group: int, n: int) -> int:
    """Elements that share a scale on an axis of ``n``: ``group``, or all of it, in whole blocks."""
    return group if group > 0 else max(-(-n // BLOCK), 1) * BLOCK


@leaf("quantize", fake=_fake_quantize, vmap=over_leading)
def quantize(
    x: Tensor, axis: int, dtype: torch.dtype, rule: str, group: int, amax: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Data and scales of ``x``; ``axis`` is negative, ``amax`` (one a span) replaces the measured.

    ``rule`` "rceil" and "floor" give uint8 E8M0 scales, "fp32" float32 ones, amax / max.
    """
    fmt, n = element_format(dtype), x.shape[axis]
    if x.numel() == 0:
        data, scale = _fake_quantize(x, axis, dtype, rule, group, amax)
        return data, scale.zero_()
    x = x.to(torch.float64 if x.dtype == torch.float64 and rule != "fp32" else torch.float32)
    measured, poisoned = block_amax(x, axis)
    per_span = span(group, n) // BLOCK
    hopeless = _blocks(~poisoned, axis, per_span).any(axis).logical_not()
    if amax is None:
        amax = _blocks(measured, axis, per_span).amax(axis)

    if rule == "fp32":
        # The smallest normal number keeps both the scale and its inverse finite. Multiplied by the
        # constant, not divided: CUDA divides by a Python scalar that way, a CPU does not.
        scale = (amax * (1.0 / fmt.max)).clamp(min=2.0**-126)
        inverse = scale.reciprocal()
        scale = torch.where(hopeless, torch.nan, scale)
    else:
        byte = torch.where(hopeless, SCALE_NAN, _exponent_byte(amax, fmt, rule))
        scale, inverse = byte.to(torch.uint8), decode_scale(2 * SCALE_BIAS - byte).to(x.dtype)
        hopeless = byte == SCALE_NAN

    def per_block(s: Tensor) -> Tensor:
        s = s.repeat_interleave(per_span, axis).narrow(axis, 0, poisoned.shape[axis])
        return s.unsqueeze(axis)

    y = _blocks(x, axis, BLOCK) * per_block(inverse)
    if y.dtype == torch.float64:
        y = _round_to_odd(y)
    codes = y.clamp(-fmt.max, fmt.max).to(dtype).view(torch.uint8)
    nan = per_block(hopeless) | poisoned.unsqueeze(axis)
    codes = torch.where(nan, NAN_CODE, codes)
    data = codes.flatten(axis - 1, axis).narrow(axis, 0, n)
    return data.contiguous().view(dtype), scale.contiguous()


def _fake_dequantize(data: Tensor, scale: Tensor, axis: int, group: int, dtype: torch.dtype) -> Tensor:
    return data.new_empty(data.shape, dtype=dtype)


@leaf("dequantize", fake=_fake_dequantize, vmap=over_leading)
def dequantize(data: Tensor, scale: Tensor, axis: int, group: int, dtype: torch.dtype) -> Tensor:
    """``data`` times its scales, rounded once to ``dtype``; scales are E8M0 bytes or float32."""
    n = data.shape[axis]
    if data.numel() == 0:
        return data.new_empty(data.shape, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = (decode_scale(scale) if scale.dtype == torch.uint8 else scale).to(wide)
    value = _blocks(decode_elements(data).to(wide), axis, span(group, n)) * factor.unsqueeze(axis)
    return value.flatten(axis - 1, axis).narrow(axis, 0, n).to(dtype).contiguous()


def quantize_jagged(
    x: Tensor, offs: Tensor, dtype: torch.dtype, rule: str, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Segmented copy of the rows of ``x``, quantised along them: (data, scale, segment ends).

    Scales are one a ``group`` rows; for ``group`` -1 they agree over each whole segment and are
    stored for every 32 rows (:func:`stored_group`).
    """
    plan = segments(checked_ends(offs, x.shape[0]), x.shape[0], max(group, BLOCK))
    padded = plan.pad(x)
    if group > 0:
        return *quantize(padded, -2, dtype, rule, group, None), plan.ends

    owner = plan.group[::BLOCK, None].expand(-1, x.shape[1])
    amax = group_amax(padded, plan, offs.shape[0]).gather(0, owner)
    return *quantize(padded, -2, dtype, rule, BLOCK, amax), plan.ends


def group_amax(padded: Tensor, plan: Segments, num_groups: int) -> Tensor:
    """Largest magnitude of each column within each group, poisoned blocks left out: ``(G + 1, K)``.

    Row G, of the rows past the last segment, is zero.
    """
    amax, _ = block_amax(padded.to(torch.promote_types(padded.dtype, torch.float32)), -2)
    owner = plan.group[::BLOCK, None].expand(amax.shape)
    return amax.new_zeros(num_groups + 1, padded.shape[1]).scatter_reduce(0, owner, amax, "amax")


def stored_group(group: int) -> int:
    """Rows to a stored scale in the result of :func:`quantize_jagged`."""
    return group if group > 0 else BLOCK
