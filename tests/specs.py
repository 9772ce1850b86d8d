"""Shapes, group layouts and operations that the tests share.

K and N are multiples of 16, as FP8 tensor cores want them, and rarely of 32, so that blocks are short.
Operands of :class:`Case` lie on a grid (:func:`grid`) on which float32 sums do not depend on their
order: whatever a transform does to the loop over rows, the result keeps its bits.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefp8 import Recipe, scaled_grouped_mm, scaled_mm
from moefp8.recipe import PRESETS

# --- group layouts -------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Sizes of the groups, and how many rows belong to none of them."""

    name: str
    sizes: tuple[int, ...]
    tail: int = 0

    @property
    def rows(self) -> int:
        return sum(self.sizes) + self.tail

    def offs(self, device: str = "cpu") -> Tensor:
        return torch.tensor(self.sizes).cumsum(0).to(device, torch.int32)


LAYOUTS = (
    Layout("one group", (48,)),
    Layout("aligned", (32, 64, 32)),
    Layout("unaligned", (5, 33, 31, 1)),
    Layout("single row", (1,)),
    Layout("empty groups", (0, 0, 17, 0, 40, 0)),
    Layout("all empty", (0, 0, 0)),
    Layout("no rows", (0,)),
    Layout("tail", (20, 0, 13), 9),
    Layout("only tail", (0, 0), 6),
    Layout("256 groups", tuple((7 * i) % 4 for i in range(256)), 3),
)

# --- sizes of whole problems: (M, N, K, G) -------------------------------------------------------


class Size(NamedTuple):
    """A grouped product of M rows, N outputs, K inputs and G groups."""

    name: str
    M: int
    N: int
    K: int
    G: int


#: Seconds on a CPU; the peer's quality and speed are quoted at these.
CPU_SIZES = (
    Size("quality", 1024, 1024, 1024, 8),
    Size("reference", 4096, 1024, 2048, 8),
)

# --- where the transform tests run ---------------------------------------------------------------


class Backend(NamedTuple):
    """An implementation on a device, with the dtype that its users hold operands in."""

    implementation: str
    device: str
    dtype: torch.dtype


REFERENCE = Backend("reference", "cpu", torch.float32)
TRITON = Backend("triton", "cuda", torch.bfloat16)

# --- operations that have a derivative -----------------------------------------------------------


class Op(NamedTuple):
    """One form of a product: shapes of its differentiable operands and, if grouped, its layout."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    layout: Layout | None
    #: ``call(*operands, offs, **options)``; ``offs`` is None without a layout.
    call: Callable[..., Tensor]
    out_shape: tuple[int, ...]


def _mm(a: Tensor, b: Tensor, bias: Tensor, offs: None, **options: Any) -> Tensor:
    return scaled_mm(a, b, bias=bias, **options)


def _grouped(a: Tensor, b: Tensor, bias: Tensor, offs: Tensor | None, **options: Any) -> Tensor:
    return scaled_grouped_mm(a, b, offs, bias=bias, **options)


def _contraction(a: Tensor, b: Tensor, offs: Tensor, **options: Any) -> Tensor:
    return scaled_grouped_mm(a, b, offs, **options)


_LAYOUT = Layout("transforms", (10, 0, 23), 7)

OPS = (
    Op("mm", ((40, 48), (48, 16), (16,)), None, _mm, (40, 16)),
    Op("2Dx3D", ((40, 48), (3, 48, 16), (3, 16)), _LAYOUT, _grouped, (40, 16)),
    Op("2Dx2D", ((48, 40), (40, 16)), _LAYOUT, _contraction, (3, 48, 16)),
    Op("3Dx3D", ((3, 16, 48), (3, 48, 16), (3, 16)), None, _grouped, (3, 16, 16)),
)


def grid(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values +-(1 + i/128), 0 <= i < 128, for which sums are exact in any order.

    A product is a multiple of 2^-14 below 4 in magnitude, so a sum of 64 of them is below 2^8 and
    fits the 24 bits of a float32. E4M3 with power-of-two scales keeps the property: an element of
    [1, 2] stays normal and lands on a multiple of 2^-3. A float32 row scale does not.
    """
    sign = 1 - 2 * torch.randint(2, tuple(shape), generator=generator)
    value = 1 + torch.randint(128, tuple(shape), generator=generator) / 128
    return (sign * value).to(dtype)


#: Drawn beforehand: within vmap drawing is an error, within make_fx it would be traced.
_COTANGENTS = {op.name: grid(op.out_shape, torch.Generator().manual_seed(99)) for op in OPS}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian, rows scaled by powers of two apart so that block exponents differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return (x * torch.exp2(torch.randint(-6, 7, (*shape[:-1], 1), generator=generator))).to(dtype)


def grads(out: Tensor, cotangent: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, cotangent)


class Case(NamedTuple):
    """A product under a recipe, on a backend: what every transform test is parametrised with."""

    op: Op
    recipe: Recipe
    backend: Backend

    @property
    def offs(self) -> Tensor | None:
        return None if self.op.layout is None else self.op.layout.offs(self.backend.device)

    def _grid(self, shape: Sequence[int], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return grid(shape, generator, self.backend.dtype).to(self.backend.device)

    def operands(self, seed: int = 0, batch: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
        """``a``, ``b`` (stored transposed, as weights are), and ``bias`` where the form has one."""
        a, b, *bias = (self._grid(batch + s, 10 * seed + i) for i, s in enumerate(self.op.shapes))
        return (a, b.mT.contiguous().mT, *bias)

    def cotangent(self) -> Tensor:
        return _COTANGENTS[self.op.name].to(self.backend.device, self.backend.dtype)

    def call(self, *operands: Tensor, offs: Tensor | None = None) -> Tensor:
        offs = self.offs if offs is None else offs
        options = {"recipe": self.recipe, "implementation": self.backend.implementation}
        return self.op.call(*operands, offs, **options)

    def loss(self, *operands: Tensor, offs: Tensor | None = None) -> Tensor:
        """A scalar whose gradients are the VJP of the product at a fixed cotangent."""
        return (self.call(*operands, offs=offs) * self.cotangent()).sum()

    @property
    def argnums(self) -> tuple[int, ...]:
        return tuple(range(len(self.op.shapes)))

    def eager(self, *operands: Tensor) -> tuple[Tensor, ...]:
        """The gradients of ``loss`` by plain ``.backward()``: what every transform must return."""
        leaves = [x.detach().clone().requires_grad_() for x in operands]
        self.loss(*leaves).backward()
        return tuple(x.grad for x in leaves)

    def agree(self, got: Any, want: Any) -> None:
        """Equal bits; with float32 row scales, equal up to the order of a sum of n <= 64 products.

        Two orders differ by at most 2 n u sum|a b|, u = 2^-24, |a b| <= 4, and a result rounded to
        bfloat16 (u = 2^-8) by one rounding more in each.
        """
        got_leaves, want_leaves = (
            torch.utils._pytree.tree_leaves(got),
            torch.utils._pytree.tree_leaves(want),
        )
        assert len(got_leaves) == len(want_leaves)
        atol = 2 * 64 * 2.0**-24 * 4 * 64 if self.has_row_scales else 0.0
        rtol = 2 * 2.0**-8 if self.has_row_scales and self.backend.dtype == torch.bfloat16 else 0.0
        for x, y in zip(got_leaves, want_leaves, strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y, atol=atol, rtol=rtol)

    @property
    def has_row_scales(self) -> bool:
        return any(gemm.format == "row" for gemm in self.recipe)


def cases(backend: Backend) -> list[tuple[str, Case]]:
    """Every form under every preset."""
    return [
        (f"{op.name}-{name}-{backend.implementation}", Case(op, recipe, backend))
        for op in OPS
        for name, recipe in PRESETS.items()
    ]
