"""The function mode behind ``low_precision``: follow the weights, replace the products they enter."""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.overrides import _get_current_function_mode_stack

from moefp8._closure import is_plain
from moefp8._custom_vjp import ReplayedMode
from moefp8._ffn import FFN
from moefp8._intercept import PRODUCTS, Call, How, Keep
from moefp8._operands import Static
from moefp8._provenance import (
    FOLLOWED,
    INDEXING,
    JOINING,
    LOOKUP,
    Registry,
    Weight,
    is_in_place,
    join,
    picks_whole_matrices,
)
from moefp8._report import Recorder, function_name, quantised_products
from moefp8.recipe import Recipe

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _kind(func: Callable) -> str:
    """What ``func`` does to the provenance of its first argument."""
    kinds = {"followed": FOLLOWED, "index": INDEXING, "join": JOINING}
    known = next((kind for kind, functions in kinds.items() if func in functions), None)
    return known or ("in_place" if is_in_place(func) else "other")


def _saved_tensor_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _in_reentrant_checkpoint() -> bool:
    """Whether a caller is the forward of torch.utils.checkpoint(use_reentrant=True)."""
    checkpoint = sys.modules.get("torch.utils.checkpoint")
    code = checkpoint.CheckpointFunction.forward.__code__ if checkpoint else None
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def decide(left: Weight | None, right: Weight | None) -> tuple[Weight | None, bool]:
    """The weight of a product and whether it is the right operand; None if neither is matched."""
    matched = [w for w in (left, right) if w is not None and w.recipe is not None]
    if len(matched) == 2:
        quantising = [w for w in matched if quantised_products(w.recipe)]
        if len({w.recipe for w in quantising}) > 1:
            raise ValueError(
                f"rules: a product of two weights, {matched[0].paths[0]!r} and {matched[1].paths[0]!r}, "
                f"which rules give different recipes; give both the same, or one of them BF16"
            )
        # One that opts out keeps the product as it is.
        return next((w for w in matched if w not in quantising), matched[1]), True
    weight = matched[0] if matched else None
    return weight, weight is right


class PrecisionMode(ReplayedMode):
    """Run every product of a registered weight under its recipe.

    Args:
        registry: the weights.
        implementation: passed on to the products.
        recorder: told about every product, if given.
        lifted: under ``torch.compile``, what stands in the graph for a tensor that the function
            closes over; None when nothing is being compiled.
    """

    def __init__(
        self,
        registry: Registry,
        implementation: str | Sequence[str] | None = None,
        recorder: Recorder | None = None,
        lifted: Mapping[int, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.registry, self.implementation = registry, implementation
        self.recorder, self.lifted = recorder, lifted
        #: Rules whose weights met a product.
        self.used: set[int | None] = set()

    def __enter__(self) -> "PrecisionMode":
        self.outer = [m for m in _get_current_function_mode_stack() if isinstance(m, PrecisionMode)]
        self.node = torch._C._current_autograd_node()
        self.hooks = _saved_tensor_hooks()
        return super().__enter__()

    def replay(self, leaves: Sequence[Any]) -> Callable[[Sequence[Any]], "PrecisionMode"]:
        """For ``remat``: the same mode for a later run on other copies of ``leaves``."""
        weights = [self.registry.find(x) for x in leaves]

        def again(leaves: Sequence[Any]) -> PrecisionMode:
            registry = Registry()
            for x, weight in zip(leaves, weights, strict=True):
                if weight is not None:
                    registry.add(x, weight)
            return PrecisionMode(registry, self.implementation)

        return again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            if func in PRODUCTS:
                raise RuntimeError(
                    "low_precision: the function calls a compiled function, which hides where its weights "
                    "come from; compile outside instead, torch.compile(low_precision(fn, rules))"
                )
            return func(*args, **kwargs)
        if self.lifted is not None:
            args, kwargs = pytree.tree_map_only(Tensor, self.lift, (args, kwargs))
        if torch._C._current_autograd_node() is not self.node:
            return func(*args, **kwargs)  # the backward pass of a transform inside the function
        if func in PRODUCTS:
            return self.product(func, args, kwargs)
        if self.recorder is None:
            out = func(*args, **kwargs)
        else:
            out = self.recorder.run(func, args, kwargs, self.registry)
        source = args[0] if args else kwargs.get("input")
        if isinstance(source, Static | FFN):
            self.explicit(func, source, args[1:])
        else:
            self.follow(func, source, args, kwargs, out)
        return out

    # --- following -------------------------------------------------------------------------------

    def follow(self, func: Any, source: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Register what ``out`` is, given what the arguments were."""
        kind = _kind(func)
        if kind == "join":
            parts = [self.registry.find(x) for x in source]
            if any(part is not None for part in parts):
                self.became(func, parts, join(parts), out)
            return
        weight = self.registry.find(source)
        if weight is None:
            if self.recorder is not None:
                self.recorder.follow(self.registry, func, kind, (args, kwargs), out)
            return
        if kind == "followed":
            self.became(func, [weight], weight, out)
        elif kind == "index":
            follows = picks_whole_matrices(source, args[1])
            self.became(func, [weight], weight if follows else LOOKUP, out)
        elif kind == "in_place":
            self.registry.drop(source)
            self.became(func, [weight], "overwritten", source)
        elif self.recorder is not None:
            self.recorder.follow(self.registry, func, kind, (args, kwargs), out)

    def became(self, func: Any, parts: Sequence[Weight | None], result: Weight | str, out: Any) -> None:
        for x in pytree.tree_leaves(out):
            if not isinstance(x, Tensor):
                continue
            if isinstance(result, Weight):
                self.registry.add(x, result)
            elif self.recorder is not None:
                self.recorder.lose(x, parts, func, result)

    def lift(self, x: Tensor) -> Tensor:
        """The graph's stand-in for a tensor that the function closes over, under torch.compile."""
        lifted = self.lifted or {}
        if id(x) in lifted:
            return lifted[id(x)]
        if is_plain(x) and detect_fake_mode() is not None:
            raise ValueError(
                f"low_precision: under torch.compile the function uses a tensor of shape {tuple(x.shape)} "
                f"that is neither an argument nor held by a module or tensor it closes over, so it would "
                f"become a constant of the graph. Pass it as an argument."
            )
        return x

    # --- products --------------------------------------------------------------------------------

    def explicit(self, func: Any, static: Static | FFN, operands: Sequence[Tensor]) -> None:
        """Note products that the function itself asked of this library."""
        weights = [weight for x in operands if (weight := self.registry.find(x)) is not None]
        self.used.update(weight.rule for weight in weights)
        if self.recorder is not None:
            self.recorder.explicit(function_name(func), static, operands, self.registry)

    def product(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.recorder is None and not self.knows((*args, *kwargs.values())):
            return func(*args, **kwargs)
        try:
            call = PRODUCTS[func](*args, **kwargs)
        except Keep as keep:
            return self.keep(func, args, kwargs, None, str(keep))
        except (TypeError, ValueError, IndexError):
            func(*args, **kwargs)  # raises its own, better error if the call is wrong
            raise
        left, right = self.registry.find(call.left), self.registry.find(call.right)
        weight, on_right = decide(left, right)
        if weight is None:
            # A matched bias is no reason to quantise the product it is added to.
            return self.keep(func, args, kwargs, call, self.no_weight(call, left or right))
        if weight.recipe is None or not quantised_products(weight.recipe):
            self.used.add(weight.rule)
            for mode in self.outer:
                mode.claimed(call)
            with torch._C.DisableTorchFunction():
                return self.keep(func, args, kwargs, call, "opted out by its rule")
        try:
            out = self.scaled(call, weight.recipe, on_right)
        except Keep as keep:
            return self.keep(func, args, kwargs, call, str(keep))
        except Exception as error:
            if isinstance(error, ValueError):
                func(*args, **kwargs)  # if the call is wrong anyway, the original says so in its own words
            where = f"low_precision: in {function_name(func)} with weight {weight.paths[0]!r}"
            if isinstance(error, TypeError):
                # `@` takes a TypeError for "operands not supported" and drops the message.
                raise ValueError(f"{where}: {error}") from error
            error.add_note(where)
            raise
        if out is None:  # the original refuses operands of different dtypes in its own words
            return self.keep(func, args, kwargs, call, "operands of different dtypes")
        self.used.add(weight.rule)
        if self.recorder is not None:
            self.recorder.product(func, call, weight.recipe, "", self.registry)
        return out

    def knows(self, operands: Sequence[Any]) -> bool:
        """Whether a weight is among them, or in a list among them, as einsum may have it."""
        return any(
            self.knows(x) if isinstance(x, list | tuple) else self.registry.find(x) is not None
            for x in operands
        )

    def scaled(self, call: Call, recipe: Recipe, on_right: bool) -> Tensor | None:
        """The product under ``recipe``, in the dtypes of the original."""
        left, right, bias = call.left, call.right, call.bias
        device = left.device.type
        if call.autocast and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)

            def cast(x: Tensor) -> Tensor:
                eligible = x.is_floating_point() and x.dtype != torch.float64
                return x.to(dtype) if eligible else x

            left, right, bias = cast(left), cast(right), None if bias is None else cast(bias)
        if left.dtype not in _FLOATS:
            raise Keep(f"operands are {str(left.dtype).removeprefix('torch.')}")
        if left.dtype != right.dtype or (bias is not None and bias.dtype != left.dtype):
            return None
        self.check_recomputation(call)
        return call.run(left, right, bias, on_right, How(recipe, self.implementation))

    def keep(self, func: Any, args: Any, kwargs: Any, call: Call | None, why: str) -> Any:
        if self.recorder is None:
            return func(*args, **kwargs)
        return self.recorder.kept(func, args, kwargs, call, why, self.registry)

    def no_weight(self, call: Call, unmatched: Weight | None) -> str:
        if unmatched is not None:
            return "no rule matches"
        lost = self.recorder.lost_operand(call) if self.recorder is not None else None
        return lost or "two activations"

    def claimed(self, call: Call) -> None:
        """A mode further in has settled this product."""
        for x in (call.left, call.right):
            if (weight := self.registry.find(x)) is not None:
                self.used.add(weight.rule)

    def check_recomputation(self, call: Call) -> None:
        """Refuse torch.utils.checkpoint: it would run the block again after this mode has ended."""
        hooks = _saved_tensor_hooks()
        inside = hooks is not None and hooks != self.hooks and "_checkpoint_hook" in hooks[0].__qualname__
        if (
            not inside
            and not torch.is_grad_enabled()
            and (call.left.requires_grad or call.right.requires_grad)
        ):
            inside = self.node is None and _in_reentrant_checkpoint()
        if inside:
            raise NotImplementedError(
                "low_precision: torch.utils.checkpoint inside the function would recompute its products in "
                "high precision; use moefp8.remat, or put low_precision inside, "
                "checkpoint(low_precision(block, rules), ...)"
            )
