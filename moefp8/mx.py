"""MX block quantisation: one power-of-two scale for every 32 elements of an axis.

>>> q = quantize_mx(torch.tensor([1.0, -2.0, 300.0, 0.1]))
>>> q.scale.tolist(), dequantize_mx(q).tolist()
([127], [1.0, -2.0, 288.0, 0.1015625])
"""

from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from moefp8._custom_vjp import non_differentiable
from moefp8._quantize import dequantize, quantize, quantize_jagged, stored_group
from moefp8.formats import BLOCK, element_format
from moefp8.groups import check_offs

RULES = ("rceil", "floor")


class MXArray:
    """A tensor in FP8 with a power-of-two scale for every ``group`` elements along one axis.

    It stands for ``data * 2^(scale - 127)``, each scale repeated ``group`` times along ``axis``.
    An MXArray is a pytree with the leaves ``data`` and ``scale``; the following hold:

    * ``data`` is float8 and has the shape of the array; ``scale`` is uint8 (E8M0) and has the same
      shape but for ``ceil(n / group)`` entries along the axis (one if ``group`` is -1);
    * ``axis`` is negative, so it stays right when a leading axis is added or mapped away;
    * ``group`` is 32 (an OCP MX array), a larger multiple of 32, or -1 for the whole axis. In the
      last two the scales are *aligned*: repeating each one gives an ordinary MX array;
    * a 32-element block that held a NaN or an infinity has only NaN codes; its scale is 255 if no
      other block shares it.

    Arithmetic on quantised leaves means nothing: do not differentiate or average them.
    """

    __slots__ = ("axis", "data", "group", "scale")

    def __init__(self, data: Tensor, scale: Tensor, axis: int, group: int) -> None:
        self.data, self.scale, self.axis, self.group = data, scale, axis, group

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Element dtype, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    def __repr__(self) -> str:
        shape = tuple(self.shape)
        return f"MXArray(shape={shape}, dtype={self.dtype}, axis={self.axis}, group={self.group})"


def _unflatten(leaves: Any, static: Any) -> MXArray:
    data, scale = leaves
    return MXArray(data, scale, *static)


pytree.register_pytree_node(
    MXArray,
    lambda q: ([q.data, q.scale], (q.axis, q.group)),
    _unflatten,
    serialized_type_name="moefp8.MXArray",
    flatten_with_keys_fn=lambda q: (
        [(pytree.GetAttrKey("data"), q.data), (pytree.GetAttrKey("scale"), q.scale)],
        (q.axis, q.group),
    ),
)


class _Quantize(NamedTuple):
    axis: int
    dtype: torch.dtype
    rule: str
    group: int


class _Dequantize(NamedTuple):
    axis: int
    group: int
    dtype: torch.dtype


_STRAIGHT_THROUGH = (
    "for a straight-through estimate write x + (dequantize_mx(quantize_mx(x), x.dtype) - x).detach()"
)


def _quantize_fwd(static: _Quantize, x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize(x, *static, None)


def _quantize_jagged_fwd(static: _Quantize, x: Tensor, offs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_jagged(x, offs, static.dtype, static.rule, static.group)


def _dequantize_fwd(static: _Dequantize, data: Tensor, scale: Tensor) -> Tensor:
    return dequantize(data, scale, *static)


_quantize = non_differentiable("quantize_mx", _quantize_fwd, _STRAIGHT_THROUGH)
_quantize_jagged = non_differentiable("quantize_mx_jagged", _quantize_jagged_fwd, _STRAIGHT_THROUGH)
_dequantize = non_differentiable("dequantize_mx", _dequantize_fwd, _STRAIGHT_THROUGH)


def check_group(group: int) -> None:
    """A span is -1 (the whole axis) or a positive multiple of 32."""
    if not isinstance(group, int) or not (group == -1 or (group > 0 and group % BLOCK == 0)):
        raise ValueError(f"group: expected a multiple of {BLOCK}, or -1 for the whole axis, got {group}")


def check_rule(rule: str) -> None:
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(map(repr, RULES))}, got {rule!r}")


def check_float(x: Tensor, name: str) -> None:
    allowed = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if not isinstance(x, Tensor) or x.dtype not in allowed:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a float64, float32, bfloat16 or float16 tensor, got {got}")


def quantize_mx(
    x: Tensor,
    axis: int = -1,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    rule: str = "rceil",
    group: int = 32,
) -> MXArray:
    """Quantise ``x`` to FP8 with one power-of-two scale for every ``group`` elements of ``axis``.

    For a block of 32 elements with ``A = max |x|`` and the element format's largest value ``max`` =
    1.75 * 2^emax::

        E    = ceil(log2(A / max))          rule "rceil": nothing saturates
        E    = floor(log2(A)) - emax        rule "floor" (OCP): elements over max * 2^E saturate
        data = round_to_nearest_even(clamp(x / 2^E, -max, max))

    computed from the bits of A, exactly. Scales below 2^-127 become 2^-127, so a block of zeros stays
    exact; a block whose scale would pass 2^127, which takes float64, becomes NaN. If ``group`` is
    larger than 32, all blocks of a span take the largest E among them. A NaN or an infinity turns its
    own block of 32 into NaN and no other.

    Args:
        x: float64, float32, bfloat16 or float16, at least one axis, any strides.
        axis: the axis that blocks run along: the contraction of the product ``x`` goes into. Its
            length need not be a multiple of 32; the last block is then short.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        rule: "rceil" (NVIDIA's) or "floor" (OCP's).
        group: elements that share a scale: 32, a larger multiple of 32, or -1 for the whole axis.

    Returns:
        An :class:`MXArray` of the shape of ``x``.

    Raises:
        TypeError: ``x`` is not one of those dtypes, ``dtype`` not FP8, or ``axis`` not an int.
        ValueError: unknown ``rule``, ``group`` not a multiple of 32, ``axis`` out of range.
        NotImplementedError: when a derivative is taken through it.

    Source: OCP Microscaling Formats (MX) v1.0, sections 5 and 6.3; "rceil" from the cuBLAS and
    Transformer Engine conversion for MXFP8. Error: :func:`mx_error_bound`.

    >>> quantize_mx(torch.tensor([[448.0, 1.0], [449.0, 1.0]])).scale.tolist()
    [[127], [128]]
    """
    check_float(x, "x")
    element_format(dtype)
    check_rule(rule)
    check_group(group)
    if not isinstance(axis, int):
        raise TypeError(f"axis: expected an int, got {axis!r}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis: {axis} is out of range for x of shape {tuple(x.shape)}")
    axis = axis - x.ndim if axis >= 0 else axis
    data, scale = _quantize(_Quantize(axis, dtype, rule, group), x)
    return MXArray(data, scale, axis, group)


def dequantize_mx(q: MXArray, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The values an :class:`MXArray` stands for: ``data * 2^(scale - 127)``, scales repeated.

    Exact in float64, and in float32 but for arrays of float64 values past its range, which become
    infinite. Exact in bfloat16 unless the value is below 2^-126, where bfloat16 is coarser than an MX
    element can be.

    Args:
        q: from :func:`quantize_mx`.
        dtype: float64, float32, bfloat16 or float16.

    Returns:
        Tensor of the shape of ``q``.

    Raises:
        TypeError: ``q`` is not an MXArray, or ``dtype`` not one of the four above.
        NotImplementedError: when a derivative is taken through it.

    >>> dequantize_mx(quantize_mx(torch.tensor([3.0, 0.3])))
    tensor([3.0000, 0.3125], dtype=torch.bfloat16)
    """
    if not isinstance(q, MXArray):
        raise TypeError(f"q: expected an MXArray, got {type(q).__name__}")
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype: expected float64, float32, bfloat16 or float16, got {dtype}")
    return _dequantize(_Dequantize(q.axis, q.group, dtype), q.data, q.scale)


def mx_error_bound(x: Tensor, q: MXArray) -> Tensor:
    """Elementwise bound on ``|x - dequantize_mx(q)|``, dequantised exactly, for ``q = quantize_mx(x)``.

    With the element's scale s = 2^E, mantissa bits m, smallest exponent e and largest value max::

        bound = maximum(|x| / (2^(m+1) + 1),  2^(e-m-1) s,  |x| - max s)

    that is ``|x|/17`` and 2^-10 s for E4M3, ``|x|/9`` and 2^-17 s for E5M2. The terms are the worst
    rounding of a normal element, of a subnormal one, and saturation, which only rule "floor" can
    show (then it is below amax/8). Each is attained. Proof: ``docs/numerics.md``.

    Args:
        x: the tensor that was quantised.
        q: its quantisation, any element dtype, rule, axis and group.

    Returns:
        Bound of the shape of ``x``, float64 if ``x`` is, else float32; NaN in poisoned blocks.

    Raises:
        TypeError: ``x`` is not a float tensor or ``q`` not an MXArray.
        ValueError: their shapes differ.

    >>> x = torch.tensor([1.0625, 448.0])
    >>> (x - dequantize_mx(quantize_mx(x), torch.float32)).abs(), mx_error_bound(x, quantize_mx(x))
    (tensor([0.0625, 0.0000]), tensor([ 0.0625, 26.3529]))
    """
    check_float(x, "x")
    if not isinstance(q, MXArray):
        raise TypeError(f"q: expected an MXArray, got {type(q).__name__}")
    if x.shape != q.shape:
        raise ValueError(f"q: expected the shape of x, {tuple(x.shape)}, got {tuple(q.shape)}")
    fmt = element_format(q.dtype)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # The scale of each element: an array of ones with the same scales.
    one = torch.ones_like(x, dtype=torch.float32).to(q.dtype)
    s = dequantize_mx(MXArray(one, q.scale, q.axis, q.group), wide)
    # Under an aligned scale a poisoned block is told by its elements alone.
    s = torch.where(dequantize_mx(q, wide).isnan(), torch.nan, s)
    a = x.detach().to(wide).abs()
    # By a tensor: to divide by a number CUDA multiplies by its inverse, which is rounded twice.
    relative = a / a.new_full((), round(1 / fmt.half_ulp))
    rounding = torch.maximum(relative, s * fmt.half_min_subnormal)
    return torch.maximum(rounding, a - fmt.max * s)


def quantize_mx_jagged(
    x: Tensor,
    offs: Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    rule: str = "rceil",
    group: int = 32,
) -> tuple[MXArray, Tensor]:
    """Quantise along the rows of grouped tokens, blocks restarting at every group.

    The weight gradient contracts over the rows of one group at a time, so its operands want blocks
    along axis 0 that do not straddle two groups. The result is a copy of ``x`` in which every group
    starts at a multiple of 32 rows (or of ``group``) and is filled up with zeros, quantised along
    that axis::

        for g in range(G):
            rows = x[offs[g-1]:offs[g]]
            q[ends[g-1]:ends[g]] = quantize_mx(pad(rows), axis=0, ...)

    Args:
        x: ``(M, K)`` float64, float32, bfloat16 or float16. Rows at and past ``offs[-1]`` are left out.
        offs: ``(G,)`` int32, end row of each group, any sizes.
        dtype, rule: as in :func:`quantize_mx`.
        group: rows that share a scale: 32, a larger multiple of 32, or -1 for the whole group. With
            -1 the aligned scales are stored for every 32 rows.

    Returns:
        ``(q, ends)``: an MXArray of shape ``(P, K)`` with ``axis=-2``, where
        ``P = m * ((M + G * (m - 1)) // m)`` for segments of multiples of m = ``max(group, 32)``
        rows; and the ``(G,)`` int32 ends of the segments in it.

    Raises:
        TypeError, ValueError: as :func:`quantize_mx`; ``x`` not 2D; ``offs`` of the wrong dtype,
            shape or device.

    >>> q, ends = quantize_mx_jagged(torch.ones(5, 2), torch.tensor([3, 5], dtype=torch.int32))
    >>> q, ends.tolist()
    (MXArray(shape=(64, 2), dtype=torch.float8_e4m3fn, axis=-2, group=32), [32, 64])
    """
    check_float(x, "x")
    element_format(dtype)
    check_rule(rule)
    check_group(group)
    if x.ndim != 2:
        raise ValueError(f"x: expected shape (M, K), got {tuple(x.shape)}")
    check_offs(offs, None, x)
    data, scale, ends = _quantize_jagged(_Quantize(-2, dtype, rule, group), x, offs)
    return MXArray(data, scale, -2, stored_group(group)), ends
