"""``low_precision``: run the products of an existing function in FP8, chosen by the weights' names.

>>> from moefp8 import BF16, MXFP8
>>> def loss(params, x):
...     return (x @ params["layers"][0]["w"].T @ params["head"]).square().mean()
>>> params = {"layers": [{"w": torch.randn(32, 64)}], "head": torch.randn(32, 8)}
>>> quantised = low_precision(loss, [("layers.*", MXFP8), ("head", BF16)])
>>> sorted(torch.func.grad(quantised)(params, torch.randn(4, 64)))
['head', 'layers']
"""

import difflib
import fnmatch
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from moefp8._closure import closed_over, traced_by_dynamo, with_none, without_none
from moefp8._precision_mode import PrecisionMode
from moefp8._provenance import Registry, Weight
from moefp8._report import Explanation, Recorder, Unused, generalised, quantised_products
from moefp8.recipe import Recipe, check_recipe

Rules = Sequence[tuple[str | re.Pattern[str], Recipe]]


def low_precision(
    fn: Callable,
    rules: Rules,
    *,
    argnums: int | tuple[int, ...] = 0,
    implementation: str | Sequence[str] | None = None,
) -> Callable:
    """Run every product of ``fn`` whose weight a rule matches under that rule's recipe.

    The parameters of ``fn`` are a pytree. Where ``fn`` multiplies an activation x by a leaf w of it,
    the result computes with the recipe of the first rule whose pattern matches the path of w::

        F.linear(x, w, bias)           scaled_mm(x, w.mT, bias=bias, recipe=recipe)
        x @ w, mm, addmm, einsum       scaled_mm(x, w, recipe=recipe)
        bmm, matmul, einsum, G axes    scaled_grouped_mm(x, w, recipe=recipe)
        grouped_mm(x, w, offs)         scaled_grouped_mm(x, w, offs, recipe=recipe)

    and with their gradients. Everything else is left alone: other products, and all other operations.
    A weight is recognised through views, casts, slices, ``stack`` and ``cat``; anything else makes an
    activation of it. ``docs/low_precision.md`` lists what is followed, :func:`explain` what was found.

    Args:
        fn: a function of pytrees of tensors; an ``nn.Module`` through ``torch.func.functional_call``.
        rules: ordered (pattern, recipe) pairs. A pattern is a glob over the whole dotted path of a leaf,
            in which ``*`` also matches dots (``layers.*.experts.*``), or a compiled regular expression
            that matches all of it. ``BF16`` opts out.
        argnums: which positional arguments hold the parameters.
        implementation: passed to the products.

    Returns:
        A function with the signature of ``fn``. It may be transformed and may transform: ``grad``,
        ``vmap``, ``vjp``, ``remat``, ``torch.compile`` around it, ``torch.func`` transforms and
        ``remat`` inside it. Of nested ones the innermost that matches a weight decides.

    Raises:
        TypeError: a rule is not a pair of a pattern and a :class:`Recipe`.
        ValueError: when called, a rule that matches no path, with the closest ones, or only such as an
            earlier rule takes; one tensor, or one product, under two recipes; a float64 product under
            a recipe that quantises.
        NotImplementedError: ``torch.utils.checkpoint`` inside ``fn``; what the products refuse.

    Warns:
        UserWarning: a rule whose weights met no product in a call.

    >>> from moefp8 import MXFP8, scaled_mm
    >>> w, x = torch.randn(8, 64), torch.randn(4, 64)
    >>> out = low_precision(torch.nn.functional.linear, [("", MXFP8)], argnums=1)(x, w)
    >>> torch.equal(out, scaled_mm(x, w.mT, recipe=MXFP8))
    True
    """
    plan = _Plan.make(fn, rules, argnums, implementation)
    held = closed_over(fn)

    def run(stand_ins: list[Tensor], args: tuple, kwargs: dict) -> Any:
        args, kwargs = pytree.tree_map(with_none, (args, kwargs))
        lifted = held.lifted(stand_ins)
        if not traced_by_dynamo():
            return plan.call(args, kwargs, lifted=lifted)
        try:
            return plan.call(args, kwargs, lifted=lifted)
        except Exception as error:
            # Dynamo replaces the message by one of its own, about the type of the result.
            message = f"low_precision({plan.name}): {type(error).__name__}: {error}"
            warnings.warn(message, stacklevel=2)
            raise

    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "low_precision: call low_precision(fn, rules) outside the compiled function and use the "
            "result inside"
        )
    traced = torch._dynamo.nonstrict_trace(run)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            args, kwargs = pytree.tree_map(without_none, (args, kwargs))
            return traced(held.tensors(), args, kwargs)
        return plan.call(args, kwargs)

    return wrapped


def explain(
    fn: Callable,
    rules: Rules,
    *args: Any,
    argnums: int | tuple[int, ...] = 0,
    implementation: str | Sequence[str] | None = None,
    **kwargs: Any,
) -> Explanation:
    """Run ``low_precision(fn, rules)`` once and report what became of every product.

    Args:
        fn, rules, argnums, implementation: as for :func:`low_precision`.
        args, kwargs: the arguments of ``fn``.

    Returns:
        An :class:`Explanation`: each product with its weight's path, shapes, recipe or the reason why it
        stayed in high precision, and FLOPs; the matched weights that no product used, and why; the
        share of FLOPs in FP8. Printing it shows a table.

    Raises:
        As ``low_precision(fn, rules)(*args, **kwargs)``.

    >>> from moefp8 import MXFP8
    >>> params = {"up": torch.randn(64, 32), "down": torch.randn(32, 64)}
    >>> def mlp(p, x):
    ...     return (x @ p["up"].T).relu() @ p["down"].T
    >>> print(explain(mlp, [("up", MXFP8)], params, torch.randn(4, 32)))
    path  product  shapes              recipe                FLOPs     %
    ----  -------  ------------------  -------------------  ------  ----
    up    matmul   (4, 32) . (32, 64)  MXFP8                16.4 k  50.0
    down  matmul   (4, 64) . (64, 32)  - (no rule matches)  16.4 k  50.0
    <BLANKLINE>
    products: 2, 32.8 kFLOP forward. In FP8: 50.0% of the forward, 50.0% of forward and backward
    """
    recorder = Recorder()
    plan = _Plan.make(fn, rules, argnums, implementation)
    plan.call(args, kwargs, recorder=recorder)
    unused = [
        Unused(path, recipe, recorder.fate.get(path, "nothing took it"))
        for path, rule in plan.matches(args)
        if path not in recorder.used and quantised_products(recipe := plan.rules[rule][1])
    ]
    return Explanation(tuple(recorder.products), tuple(unused))


# --- rules ---------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What to do with a call of ``fn``."""

    fn: Callable
    name: str
    rules: tuple[tuple[str | re.Pattern[str], Recipe], ...]
    argnums: tuple[int, ...]
    implementation: str | Sequence[str] | None
    #: For each path the index of its rule or None.
    assign: Callable[[tuple[str, ...]], tuple[int | None, ...]]

    @classmethod
    def make(
        cls, fn: Callable, rules: Rules, argnums: int | tuple[int, ...], implementation: Any
    ) -> "_Plan":
        if not callable(fn):
            raise TypeError(f"fn: expected a function, got {type(fn).__name__}")
        checked = _check_rules(rules)
        numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        # A training loop calls with the same paths every step.
        assign = functools.lru_cache(maxsize=8)(functools.partial(_assign, checked))
        return cls(fn, getattr(fn, "__name__", type(fn).__name__), checked, numbers, implementation, assign)

    def leaves(self, args: tuple) -> dict[str, Tensor]:
        """The parameters by their dotted paths."""
        missing = [i for i in self.argnums if not -len(args) <= i < len(args)]
        if missing:
            raise TypeError(
                f"low_precision({self.name}): the parameters are positional argument {missing[0]}, but the "
                f"call has {len(args)} positional arguments; pass them by position, or set argnums"
            )
        found: dict[str, Tensor] = {}
        for i in self.argnums:
            for key_path, leaf in pytree.tree_flatten_with_path(args[i])[0]:
                if isinstance(leaf, Tensor):
                    found[_dotted(key_path)] = leaf
        return found

    def matches(self, args: tuple) -> Iterator[tuple[str, int]]:
        paths = tuple(self.leaves(args))
        for path, rule in zip(paths, self.assign(paths), strict=True):
            if rule is not None:
                yield path, rule

    def call(
        self,
        args: tuple,
        kwargs: dict,
        *,
        recorder: Recorder | None = None,
        lifted: Mapping[int, Tensor] | None = None,
    ) -> Any:
        leaves = self.leaves(args)
        registry = Registry()
        for (path, leaf), rule in zip(leaves.items(), self.assign(tuple(leaves)), strict=True):
            if rule is not None or recorder is not None:
                self.register(registry, leaf, path, rule)
        with PrecisionMode(registry, self.implementation, recorder, lifted) as mode:
            out = self.fn(*args, **kwargs)
        if recorder is None:
            self.warn_unused(mode.used)
        return out

    def register(self, registry: Registry, leaf: Tensor, path: str, rule: int | None) -> None:
        weight = Weight((path,), rule, None if rule is None else self.rules[rule][1])
        tied = registry.find(leaf)
        if tied is not None:
            if tied.recipe is not None and weight.recipe not in (None, tied.recipe):
                raise ValueError(
                    f"rules: {tied.paths[0]!r} and {path!r} are one tensor (tied weights), but the rules "
                    f"give them different recipes"
                )
            weight = (weight if tied.recipe is None else tied)._replace(paths=(*tied.paths, path))
        registry.add(leaf, weight)

    def warn_unused(self, used: set[int | None]) -> None:
        for i, (pattern, recipe) in enumerate(self.rules):
            if i not in used and quantised_products(recipe):
                warnings.warn(
                    f"low_precision({self.name}): no product used a weight of rule {_quote(pattern)}; "
                    f"moefp8.explain says what became of them",
                    stacklevel=4,
                )


def _check_rules(rules: Rules) -> tuple[tuple[str | re.Pattern[str], Recipe], ...]:
    checked = []
    for i, rule in enumerate(rules):
        if not isinstance(rule, tuple | list) or len(rule) != 2:
            raise TypeError(f"rules[{i}]: expected a (pattern, recipe) pair, got {rule!r}")
        pattern, recipe = rule
        if not isinstance(pattern, str | re.Pattern):
            raise TypeError(
                f"rules[{i}]: expected a glob or a compiled regular expression, got {pattern!r}"
            )
        check_recipe(recipe)
        checked.append((pattern, recipe))
    if not checked:
        raise ValueError("rules: expected at least one (pattern, recipe) pair, got none")
    return tuple(checked)


def _quote(pattern: str | re.Pattern[str]) -> str:
    return repr(pattern if isinstance(pattern, str) else pattern.pattern)


def _assign(
    rules: tuple[tuple[str | re.Pattern[str], Recipe], ...], paths: tuple[str, ...]
) -> tuple[int | None, ...]:
    """The first rule that matches each path. Every rule has to get a path."""
    compiled = [re.compile(fnmatch.translate(p)) if isinstance(p, str) else p for p, _ in rules]
    matches = [[i for i, p in enumerate(compiled) if p.fullmatch(path)] for path in paths]
    for i, (pattern, _) in enumerate(rules):
        taken = next((found for found in matches if i in found), None)
        if taken is None:
            names = list(dict.fromkeys(generalised(path) for path in paths))
            text = pattern if isinstance(pattern, str) else pattern.pattern
            close = difflib.get_close_matches(text, names, n=3, cutoff=0.0)
            hint = f"the closest are {', '.join(map(repr, close))}" if close else "there are no parameters"
            raise ValueError(
                f"rules[{i}]: {_quote(pattern)} matches none of {len(paths)} parameters; {hint}"
            )
        if not any(found and found[0] == i for found in matches):
            raise ValueError(
                f"rules[{i}]: {_quote(pattern)} matches only parameters that rules[{taken[0]}], "
                f"{_quote(rules[taken[0]][0])}, takes first; put the narrower rule in front"
            )
    return tuple(found[0] if found else None for found in matches)


def _dotted(key_path: Sequence[Any]) -> str:
    """``(MappingKey("layers"), SequenceKey(0), GetAttrKey("w"))`` as ``layers.0.w``."""
    parts = []
    for key in key_path:
        part = next((getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a)), key)
        parts.append(str(part))
    return ".".join(parts)
