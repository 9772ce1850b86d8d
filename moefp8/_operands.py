"""What the two public products share: checking operands, and packing them for ``custom_vjp``."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moefp8._dispatch import Implementation, Request, choose
from moefp8.kernels import REGISTRY
from moefp8.mx import MXArray, check_float
from moefp8.recipe import Recipe, check_recipe


class Asked(NamedTuple):
    """One product that an operation was asked for by name: what ``explain`` lists."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    #: Where to look for the weight, in order.
    weights: tuple[Tensor, ...]
    #: What the product is made from.
    operands: tuple[Tensor, ...]


class Static(NamedTuple):
    """Everything about a product that is not a tensor."""

    recipe: Recipe
    out_dtype: torch.dtype
    implementation: str
    has_bias: bool
    #: Span of a pre-quantised ``a``, None for one in high precision.
    a_group: int | None

    @property
    def products(self) -> Implementation:
        return REGISTRY[self.implementation]

    def asked(self, flat: Sequence[Tensor]) -> list[Asked]:
        """The one product."""
        a, b = flat[0], flat[1 if self.a_group is None else 2]
        return [Asked(tuple(a.shape), tuple(b.shape), (b, a), (a, b))]


class Operands(NamedTuple):
    """The tensors of a product, in the flat order that ``custom_vjp`` passes them in."""

    a: Tensor | MXArray
    b: Tensor
    bias: Tensor | None
    offs: Tensor | None

    def flat(self) -> tuple[Tensor, ...]:
        leaves = (self.a.data, self.a.scale) if isinstance(self.a, MXArray) else (self.a,)
        return (*leaves, *(x for x in (self.b, self.bias, self.offs) if x is not None))

    @classmethod
    def unflatten(cls, static: Static, flat: Sequence[Tensor], *, grouped: bool) -> "Operands":
        rest = list(flat)
        data = rest.pop(0)
        a = data if static.a_group is None else MXArray(data, rest.pop(0), -1, static.a_group)
        b = rest.pop(0)
        return cls(a, b, rest.pop(0) if static.has_bias else None, rest.pop(0) if grouped else None)

    def differentiable_a(self) -> Tensor:
        """``a`` for its own gradient, refusing a quantised one.

        ``prepare`` refuses earlier, but cannot see a derivative taken outside a vmap.
        """
        if isinstance(self.a, MXArray):
            raise _no_gradient("a")
        return self.a


def prepare(
    form: str,
    a: Tensor | MXArray,
    b: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    out_dtype: torch.dtype | None,
    implementation: str | Sequence[str] | None,
) -> Static:
    """Check what every form has in common and choose the implementation."""
    check_recipe(recipe)
    check_operand(a, "a", recipe)
    if isinstance(b, MXArray):
        raise TypeError("b: expected a high-precision tensor, got an MXArray; only a may be quantised")
    check_operand(b, "b", recipe)
    if b.device != a.device:
        raise ValueError(f"b: is on {b.device}, a on {a.device}")
    if bias is not None:
        check_float(bias, "bias")
        if bias.device != a.device:
            raise ValueError(f"bias: is on {bias.device}, a on {a.device}")
    if out_dtype is None:
        out_dtype = b.dtype if isinstance(a, MXArray) else a.dtype
    elif out_dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"out_dtype: expected float64, float32, bfloat16 or float16, got {out_dtype}")
    a_group = a.group if isinstance(a, MXArray) else None
    request = Request(
        form,
        a.device,
        (a.dtype, b.dtype),
        recipe,
        out_dtype,
        tuple(a.shape),
        tuple(b.shape),
        a_group,
        named=implementation is not None,
    )
    chosen = choose(implementation, [request], REGISTRY)
    return Static(recipe, out_dtype, chosen.name, bias is not None, a_group)


def _no_gradient(name: str) -> TypeError:
    return TypeError(
        f"{name}: a quantised array has no gradient, and one is asked for. Pass {name} in high "
        f"precision, or quantise it detached, quantize_mx({name}.detach())"
    )


def check_operand(x: Tensor | MXArray, name: str, recipe: Recipe) -> None:
    if isinstance(x, MXArray):
        if x.axis != -1:
            raise ValueError(f"{name}: expected an MXArray quantised along K (axis -1), got axis {x.axis}")
        if recipe.fwd.format != "mx" or recipe.fwd.dtype != x.dtype:
            want = f"format {recipe.fwd.format!r}, dtype {recipe.fwd.dtype}"
            raise ValueError(f"{name}: is an MXArray of {x.dtype}, but recipe.fwd has {want}")
        if x.data.requires_grad:
            raise _no_gradient(name)
        return
    check_float(x, name)
    quantising = [f for f, gemm in zip(recipe._fields, recipe, strict=True) if gemm.format != "none"]
    if x.dtype == torch.float64 and quantising:
        raise TypeError(
            f"{name}: is float64, but recipe quantises {', '.join(quantising)}; pass float32 or bfloat16, "
            f"or use recipe=BF16, which multiplies operands as they come"
        )
