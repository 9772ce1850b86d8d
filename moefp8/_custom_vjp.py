"""The only ``autograd.Function``s of the library: ``custom_vjp``, ``non_differentiable``, ``remat``.

On torch 2.11 to 2.15 one construct alone keeps a custom backward under ``grad``, ``vmap(grad)``,
``make_fx`` and ``torch.compile(grad)``: a Function with ``setup_context`` and
``generate_vmap_rule = True`` over leaf operators, put into the graph as one opaque call
(``allow_in_graph``, or ``nonstrict_trace`` where arguments are pytrees). Left bare, Dynamo
differentiates the *forward* of a Function under ``torch.compile(torch.func.grad(f))`` and says
nothing (pytorch #193279). ``docs/transforms.md`` has the table.

What follows from it, for whoever adds an operation:

* kernels are called inside ``fwd`` and ``bwd`` only, never in a Function's ``backward``;
* ``fwd`` and ``bwd`` write nothing in place (pytorch #180642);
* static arguments travel in one hashable NamedTuple, tensors as flat operands without None. To the
  Function itself they are an ``_Opaque``: functorch flattens its arguments some twenty times a call, and
  the fields of a recipe would be most of what it finds.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd import Function
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    handle_torch_function,
    has_torch_function,
)

_functorch = torch._C._functorch


def _function(
    name: str, forward: Callable, backward: Callable, jvp: Callable, setup_context: Callable | None = None
) -> Any:
    """A Function class: its vmap rule is made from its parts, and by default it saves nothing."""
    return type(
        name,
        (Function,),
        {
            "generate_vmap_rule": True,
            "forward": staticmethod(forward),
            "setup_context": staticmethod(setup_context or (lambda ctx, inputs, output: None)),
            "backward": staticmethod(backward),
            "jvp": staticmethod(jvp),
        },
    )


def _as_written(fn: Callable) -> Callable:
    """``fn`` with autocast off: a recipe says what an operation computes in, and nothing else does."""

    def run(static: Any, *args: Any) -> Any:
        device = next(x for x in args if isinstance(x, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return fn(static, *args)

    return run


def _refuse(name: str, why: str) -> Callable:
    """A derivative that raises NotImplementedError(``name: why``)."""

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(f"{name}: {why}")

    return refuse


class _Opaque:
    """An argument that is no pytree."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


_NO_FORWARD_MODE = "forward-mode derivatives are not defined; use reverse mode"


def custom_vjp(
    name: str,
    fwd: Callable[..., tuple[Tensor, Sequence[Tensor]]],
    bwd: Callable[..., Sequence[Tensor | None]],
) -> Callable[..., Tensor]:
    """Pair a function with its vector-Jacobian product, as ``jax.custom_vjp`` does.

    Args:
        name: what errors call the operation.
        fwd: ``fwd(static, *operands) -> (out, residuals)``; a residual may be an operand.
        bwd: ``bwd(static, needed, *residuals, cotangent) -> cotangents``, one an operand. ``needed``
            is a tuple of bools, one an operand; where it is False return None.

    Returns:
        ``op(static, *operands) -> out`` that keeps ``bwd`` as its derivative under every transform
        in ``docs/transforms.md``. Second order and forward mode raise NotImplementedError.
    """
    fwd, bwd = _as_written(fwd), _as_written(bwd)
    # vmap compares the structures of outputs, and autograd turns a list into a tuple on the way.
    no_second_order = _refuse(name, "second-order derivatives are not defined")

    def forward_of_backward(static: _Opaque, *residuals: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(bwd(*static.value, *residuals))

    backward_once = _function(name, forward_of_backward, no_second_order, no_second_order)

    def forward(static: _Opaque, *operands: Tensor) -> tuple[Tensor, ...]:
        out, residuals = fwd(static.value, *operands)
        # A Function may not return an input as an output; a view of it is fine.
        is_operand = {id(x) for x in operands}
        return (out, *(r.view_as(r) if id(r) in is_operand else r for r in residuals))

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        # The residuals stay differentiable on purpose. Marked non-differentiable they would hide
        # from an outer grad that they depend on the operands, and second order would be zero.
        ctx.static = inputs[0]
        # Or autograd fills a tensor of zeros for every residual: as large as the operands.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    def backward(ctx: Any, cotangent: Tensor | None, *_residuals: None) -> tuple[Any, ...]:
        needed = tuple(ctx.needs_input_grad[1:])
        if cotangent is None:  # nothing downstream depends on the result
            return (None,) * (1 + len(needed))
        static = _Opaque((ctx.static.value, needed))
        return (None, *backward_once.apply(static, *ctx.saved_tensors, cotangent))

    function = _function(name, forward, backward, _refuse(name, _NO_FORWARD_MODE), setup_context)

    def op(static: Any, *operands: Tensor) -> Tensor:
        # To a function mode the operation is one call: the arithmetic inside is not the caller's.
        if has_torch_function(operands):
            return handle_torch_function(op, operands, static, *operands)
        return function.apply(_Opaque(static), *operands)[0]

    op.__name__ = name
    return torch.compiler.allow_in_graph(op)


def non_differentiable(name: str, fn: Callable, instead: str) -> Callable:
    """``fn(static, *operands)`` as an operation whose derivative raises and says what to do instead."""
    no_derivative = _refuse(name, f"has no useful derivative; {instead}")

    def forward(static: _Opaque, *operands: Tensor) -> Any:
        return fn(static.value, *operands)

    function = _function(name, forward, no_derivative, no_derivative)

    def op(static: Any, *operands: Tensor) -> Any:
        return function.apply(_Opaque(static), *operands)

    return torch.compiler.allow_in_graph(op)


# --- remat ---------------------------------------------------------------------------------------


class ReplayedMode(TorchFunctionMode):
    """A function mode that a rematerialised function has to run under the second time as well."""

    def replay(self, leaves: Sequence[Any]) -> Callable[[Sequence[Any]], TorchFunctionMode]:
        """Given the arguments of the first run, a mode for the arguments of a later run."""
        raise NotImplementedError


class _Call:
    """A call of a rematerialised function without its tensors."""

    def __init__(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> None:
        self.spec = spec
        self.modes = [m for m in _get_current_function_mode_stack() if isinstance(m, ReplayedMode)]
        self.replays = [mode.replay(leaves) for mode in self.modes]

    def first(self, fn: Callable, leaves: Sequence[Any]) -> Any:
        # Under a transform the whole Function is one call to a function mode, which is not in force inside.
        active = _get_current_function_mode_stack()
        return self._under([mode for mode in self.modes if mode not in active], fn, leaves)

    def again(self, fn: Callable, leaves: Sequence[Any]) -> Any:
        return self._under([replay(leaves) for replay in self.replays], fn, leaves)

    def _under(self, modes: Sequence[TorchFunctionMode], fn: Callable, leaves: Sequence[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return fn(*args, **kwargs)


class _RefuseCaptured(TorchFunctionMode):
    """Raise when a tensor being differentiated enters a rematerialised function other than as an
    argument: its gradient would be lost.

    Inside the function the arguments have lost their outermost wrapper, so such a tensor shows
    either as one of a higher transform level than the current, or as one that requires grad.
    """

    def __init__(self, arguments: Sequence[Any], name: str) -> None:
        super().__init__()
        self.allowed = {id(x): x for x in arguments}
        self.level = _functorch.maybe_current_level() or 0
        self.name = name

    def captured(self, x: Any) -> bool:
        if not isinstance(x, Tensor) or id(x) in self.allowed:
            return False
        level = _functorch.maybe_get_level(x)
        if level > 0:  # an inner transform of the function reuses the level numbers: look outside it
            return level > self.level == (_functorch.maybe_current_level() or 0)
        return x.requires_grad

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in pytree.tree_leaves((args, kwargs)):
            if self.captured(x):
                raise ValueError(
                    f"remat({self.name}): the function uses a tensor that is being differentiated "
                    f"but is not one of its arguments (shape {tuple(x.shape)}); its gradient would "
                    f"be lost. Pass it as an argument."
                )
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            # reshape to the same shape gives an alias of an argument that still requires grad.
            if isinstance(x, Tensor) and _functorch.maybe_get_level(x) <= 0 and x.requires_grad:
                self.allowed[id(x)] = x
        return out


def remat(fn: Callable) -> Callable:
    """Recompute ``fn`` in the backward pass instead of keeping its intermediates.

    ``remat(fn)(*args, **kwargs)`` equals ``fn(*args, **kwargs)`` and has the same gradients; between
    forward and backward only the arguments are kept. Unlike ``torch.utils.checkpoint`` it works
    inside ``torch.func`` transforms, under any nesting of them, and under ``torch.compile`` (where
    the compiler may choose to keep what it would recompute).

    Args:
        fn: a function of pytrees of tensors, returning a pytree of tensors. It must be pure:
            everything it differentiates comes in as an argument (under ``torch.compile`` every
            tensor does), and it draws no random numbers. Bind static arguments first,
            ``remat(partial(block, config=config))``.

    Returns:
        The function with the same signature. Call ``remat`` outside compiled functions.

    Raises:
        ValueError: when ``fn`` uses a tensor under differentiation that is not an argument. (One
            used only inside a further transform within ``fn`` is not noticed.)
        NotImplementedError: under forward-mode differentiation.

    >>> square_sum = remat(lambda x: (x * x).sum())
    >>> torch.func.grad(square_sum)(torch.tensor([1.0, 2.0]))
    tensor([2., 4.])
    """
    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError("remat: call remat(fn) outside the compiled function and use the result inside")
    fn_name = getattr(fn, "__name__", type(fn).__name__)
    # The structure of the result, known once the function has run.
    out_spec: pytree.TreeSpec

    def forward(call: _Call, *leaves: Any) -> tuple[Tensor, ...]:
        nonlocal out_spec
        with _RefuseCaptured(leaves, fn_name):
            out_leaves, out_spec = pytree.tree_flatten(call.first(fn, leaves))
        return tuple(out_leaves)

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.call, *leaves = inputs
        ctx.is_tensor = [isinstance(x, Tensor) for x in leaves]
        ctx.static = [x for x in leaves if not isinstance(x, Tensor)]
        ctx.save_for_backward(*(x for x in leaves if isinstance(x, Tensor)))

    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        tensors, static = iter(ctx.saved_tensors), iter(ctx.static)
        leaves = [next(tensors) if is_tensor else next(static) for is_tensor in ctx.is_tensor]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]

        def rerun(*differentiated: Tensor) -> Tensor:
            merged = list(leaves)
            for i, x in zip(wanted, differentiated, strict=True):
                merged[i] = x
            outs = pytree.tree_leaves(ctx.call.again(fn, merged))
            pairs = [(y, g) for y, g in zip(outs, cotangents, strict=True) if y.is_floating_point()]
            # Its gradient is the pullback of the cotangents. torch.func.vjp would run the backward after
            # its transform level has ended, and a remat inside fn still needs that level.
            return torch.stack([(y * g).sum() for y, g in pairs]).sum()

        gradients = torch.func.grad(rerun, tuple(range(len(wanted))))(*(leaves[i] for i in wanted))
        grads: list[Any] = [None] * len(leaves)
        for i, g in zip(wanted, gradients, strict=True):
            grads[i] = g
        return (None, *grads)

    name = f"remat({fn_name})"
    function = _function(name, forward, backward, _refuse(name, _NO_FORWARD_MODE), setup_context)

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        out_leaves = function.apply(_Call(leaves, spec), *leaves)
        return pytree.tree_unflatten(out_leaves, out_spec)

    traced = torch._dynamo.nonstrict_trace(run)

    @functools.wraps(fn)
    def rematerialised(*args: Any, **kwargs: Any) -> Any:
        return traced(*args, **kwargs)

    return rematerialised
