"""What ``explain`` finds: every product, how it ran and why, as data that prints as a table."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from moefp8._ffn import FFN
from moefp8._intercept import Call
from moefp8._operands import Static
from moefp8._provenance import Registry, Weight
from moefp8.recipe import PRESETS, Recipe


def quantised_products(recipe: Recipe | None) -> int:
    """How many of the three products (fwd, dgrad, wgrad) ``recipe`` quantises."""
    return 0 if recipe is None else sum(gemm.format != "none" for gemm in recipe)


class Product(NamedTuple):
    """One product that the function computed."""

    #: Dotted path of the weight, " + " between several; "" if no operand is known to be one.
    path: str
    #: The torch function, or the function of this library if it was called by name.
    op: str
    #: Shapes of the operands; per example inside ``vmap``.
    shapes: tuple[tuple[int, ...], ...]
    #: The recipe it ran under; None if it stayed in high precision.
    recipe: Recipe | None
    #: Why it stayed in high precision; "" if it did not.
    why: str
    #: Floating-point operations of the forward product, 2 M K N.
    flops: int


class Unused(NamedTuple):
    """A weight that a rule matches and no product used."""

    path: str
    recipe: Recipe
    #: What became of it.
    why: str


class Explanation(NamedTuple):
    """The products of one call, in order, and the matched weights that none of them used.

    ``print`` shows a table in which layers that differ in a number only share a line.
    """

    products: tuple[Product, ...]
    unused: tuple[Unused, ...]

    @property
    def flops(self) -> int:
        """Floating-point operations of all forward products."""
        return sum(p.flops for p in self.products)

    @property
    def fp8_share(self) -> float:
        """Share of ``flops`` whose forward product has quantised operands."""
        quantised = [p.flops for p in self.products if p.recipe and p.recipe.fwd.format != "none"]
        return sum(quantised) / max(self.flops, 1)

    @property
    def fp8_training_share(self) -> float:
        """The same over forward and backward, counting three products of equal cost each."""
        return sum(p.flops * quantised_products(p.recipe) for p in self.products) / max(3 * self.flops, 1)

    def __str__(self) -> str:
        rows = [("path", "product", "shapes", "recipe", "FLOPs", "%")]
        for (path, op, shapes, recipe, why), same in _grouped(self.products).items():
            name = f"{path or '-'} ({len(same)}x)" if len(same) > 1 else same[0].path or "-"
            flops = sum(p.flops for p in same)
            what = recipe_name(recipe) if recipe else f"- ({why})"
            share = 100 * flops / max(self.flops, 1)
            rows.append((name, op, _shapes(shapes), what, _engineering(flops), f"{share:.1f}"))
        lines = [*_table(rows), ""]
        lines.append(
            f"products: {len(self.products)}, {_engineering(self.flops)}FLOP forward. In FP8: "
            f"{self.fp8_share:.1%} of the forward, {self.fp8_training_share:.1%} of forward and backward"
        )
        if self.unused:
            lines += ["", f"matched, but used by no product ({len(self.unused)}):"]
            kinds: dict[tuple[str, str], list[str]] = {}
            for unused in self.unused:
                kinds.setdefault((generalised(unused.path), unused.why), []).append(unused.path)
            lines += [
                f"  {f'{path} ({len(paths)}x)' if len(paths) > 1 else paths[0]}: {why}"
                for (path, why), paths in kinds.items()
            ]
        return "\n".join(lines)


def generalised(path: str) -> str:
    """``path`` as a glob over its numbered components: layers.3.w1 gives layers.*.w1."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def recipe_name(recipe: Recipe) -> str:
    """The name of a preset, or the formats of the three products."""
    for name, preset in PRESETS.items():
        if preset == recipe:
            return name.upper()
    return "/".join(gemm.format for gemm in recipe)


def _grouped(products: Iterable[Product]) -> dict[tuple, list[Product]]:
    """Lines of the table, and the products that each stands for."""
    lines: dict[tuple, list[Product]] = {}
    for p in products:
        lines.setdefault((generalised(p.path), p.op, p.shapes, p.recipe, p.why), []).append(p)
    return lines


def _shapes(shapes: Iterable[tuple[int, ...]]) -> str:
    return " . ".join("(" + ", ".join(map(str, shape)) + ")" for shape in shapes)


def _engineering(value: float) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000 or prefix == "P":
            break
        value /= 1000
    return f"{value:.3g} {prefix}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    text, numbers = widths[:-2], widths[-2:]

    def line(row: tuple[str, ...]) -> str:
        cells = [c.ljust(w) for c, w in zip(row[:-2], text, strict=True)]
        return "  ".join([*cells, *(c.rjust(w) for c, w in zip(row[-2:], numbers, strict=True))]).rstrip()

    return [line(rows[0]), "  ".join("-" * w for w in widths), *map(line, rows[1:])]


# --- recording -----------------------------------------------------------------------------------


def function_name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # the getter of an attribute such as T
        return str(func.__self__.__name__)
    return name.removeprefix("linalg_")


#: The report is about the forward products.
_BACKWARD = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}


def _count(func: Callable, args: Any, kwargs: Any) -> tuple[Any, int]:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        out = func(*args, **kwargs)
    return out, int(counter.get_total_flops())


def _copies(*operands: Tensor) -> int:
    """How many times ``vmap`` runs a product of these operands."""
    functorch = torch._C._functorch
    sizes: dict[int, int] = {}
    for x in operands:
        while functorch.is_functorch_wrapped_tensor(x):
            inner = functorch.get_unwrapped(x)
            if functorch.is_batchedtensor(x):
                sizes[functorch.maybe_get_level(x)] = inner.shape[functorch.maybe_get_bdim(x)]
            x = inner
    return math.prod(sizes.values())


class Recorder:
    """Collects the products of one call, and where weights were last seen."""

    def __init__(self) -> None:
        self.products: list[Product] = []
        #: For each path what last took the weight and gave something that is no weight.
        self.fate: dict[str, str] = {}
        #: Paths that a product took as operand or bias.
        self.used: set[str] = set()
        self._lost = Registry()

    def run(self, func: Any, args: Any, kwargs: Any, registry: Registry) -> Any:
        """Call a function that is no product by name, and note the products it hides."""
        if (args and isinstance(args[0], Static | FFN)) or func in _BACKWARD:
            return func(*args, **kwargs)
        out, flops = _count(func, args, kwargs)
        if flops:
            why = "not one of the products that are replaced"
            self._hidden(func, args, kwargs, why, flops, registry)
        return out

    def follow(self, registry: Registry, func: Any, kind: str, arguments: Any, out: Any) -> None:
        """Note weights that ``func`` took, and results that look like weights of their own."""
        tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
        results = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        for x in tensors:
            weight = registry.find(x)
            if weight is None or not results:
                continue
            self._note(weight, f"taken by {function_name(func)}")
            for y in results:
                # w * scale has the shape of w; a norm's weight times activations has theirs.
                if x.ndim >= 2 and y.shape == x.shape and registry.find(y) is None:
                    self.lose(y, [weight], func, "")
        lost = self._lost.find(tensors[0]) if tensors and kind == "followed" else None
        if lost is not None:
            for y in results:
                self._lost.add(y, lost)

    def lose(self, x: Tensor, parts: Sequence[Weight | None], func: Any, why: str) -> None:
        """``x`` comes from weights but is none: ``func`` made it, for the reason ``why``."""
        reason = f"lost at {function_name(func)}{f' ({why})' if why else ''}"
        for weight in parts:
            if weight is not None:
                self._lost.add(x, weight._replace(paths=(*weight.paths, reason)))
                self._note(weight, reason)

    def _note(self, weight: Weight, reason: str) -> None:
        for path in weight.paths:
            self.fate[path] = reason

    def lost_operand(self, call: Call) -> str | None:
        """Which weight an operand was made from, and where it stopped being one."""
        for x in (call.right, call.left):
            lost = self._lost.find(x)
            if lost is not None:
                return f"{lost.paths[0]} {lost.paths[-1]}"
        return None

    def product(self, op: Any, call: Call, recipe: Recipe | None, why: str, registry: Registry) -> None:
        """A product that was understood; ``why`` says why it stayed in high precision."""
        found = [registry.find(call.left), registry.find(call.right)]
        known = [weight for weight in found if weight is not None]
        path = " @ ".join(" + ".join(weight.paths) for weight in known)
        shapes = tuple(call.left.shape), tuple(call.right.shape)
        flops = call.flops * _copies(call.left, call.right)
        self.products.append(Product(path, function_name(op), shapes, recipe, why, flops))
        self._took(registry, call.left, call.right, call.bias)

    def kept(
        self, func: Any, args: Any, kwargs: Any, call: Call | None, why: str, registry: Registry
    ) -> Any:
        """Run a product that stays in high precision, and note why."""
        if call is not None:
            self.product(func, call, None, why, registry)
            return func(*args, **kwargs)
        out, flops = _count(func, args, kwargs)
        self._hidden(func, args, kwargs, why, flops, registry)
        return out

    def _hidden(self, func: Any, args: Any, kwargs: Any, why: str, flops: int, registry: Registry) -> None:
        """Note a call of which no more is known than its arguments."""
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        matrices = [weight for x in tensors if x.ndim > 1 and (weight := registry.find(x)) is not None]
        path = " @ ".join(dict.fromkeys(" + ".join(weight.paths) for weight in matrices))
        shapes = tuple(tuple(x.shape) for x in tensors)
        self.products.append(Product(path, function_name(func), shapes, None, why, flops))
        self._took(registry, *tensors)

    def explicit(
        self, op: str, static: Static | FFN, operands: Sequence[Tensor], registry: Registry
    ) -> None:
        """Products that the function asked of this library itself, under a recipe of its own."""
        quantises = quantised_products(static.recipe) > 0
        recipe, why = (static.recipe, "") if quantises else (None, "asked for by the function")
        for asked in static.asked(operands):
            weight = next((w for x in asked.weights if (w := registry.find(x)) is not None), None)
            path = " + ".join(weight.paths) if weight is not None else ""
            # Each entry of the left operand meets N of the right one, in every form.
            flops = 2 * math.prod(asked.left) * asked.right[-1] * _copies(*asked.operands)
            self.products.append(Product(path, op, (asked.left, asked.right), recipe, why, flops))
        self._took(registry, *operands)

    def _took(self, registry: Registry, *operands: Tensor | None) -> None:
        """A product used these, its bias included."""
        for x in operands:
            if (weight := registry.find(x)) is not None:
                self.used.update(weight.paths)
