"""Leaf operators: opaque to autograd and the compiler, transparent to vmap.

A leaf is a ``torch.library.custom_op`` with a fake (shapes for tracing) and a vmap rule. It has no
derivative of its own: only ``_custom_vjp`` gives a leaf one. Being opaque, it returns the same bits
in eager mode and under ``torch.compile``.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import Parameter


def leaf(name: str, *, fake: Callable, vmap: Callable) -> Callable[[Callable], Any]:
    """Register the decorated function as ``moefp8::name``.

    Args:
        name: operator name inside the ``moefp8`` namespace.
        fake: same signature, returns empty tensors of the right shape and dtype.
        vmap: ``over_leading`` or ``by_loop`` below.
    """

    def decorate(fn: Callable) -> Callable:
        op = torch.library.custom_op(f"moefp8::{name}", fn, mutates_args=())
        op.register_fake(fake)
        op.register_vmap(vmap(op))

        @functools.wraps(fn)
        def call(*args: Any) -> Any:
            # The same function either way; PyTorch's way to it takes 30 to 40 microseconds of Python.
            return fn(*args) if _unobserved(args) else op(*args)

        return call

    return decorate


def _unobserved(args: tuple) -> bool:
    """Whether nothing but this call sees ``args``: no tracer, transform, mode, profiler or autograd."""
    if (
        torch.compiler.is_compiling()
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    recorded = torch.is_grad_enabled()
    for x in args:
        if isinstance(x, Tensor):
            plain = type(x) is Tensor or type(x) is Parameter
            # The dispatcher also resolves a negation that is only noted, and zeros that are nowhere.
            if not plain or (recorded and x.requires_grad) or x.is_neg() or x._is_zerotensor():
                return False
    return True


def _lead(x: Any, dim: int | None, size: int) -> Any:
    """``x`` with its batch dimension in front; unbatched tensors are broadcast, the rest passes."""
    if not isinstance(x, Tensor):
        return x
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def over_leading(op: Callable) -> Callable:
    """Batching rule of an op that counts axes from the end: one more leading axis is all it takes."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        out = op(*(_lead(x, d, info.batch_size) for x, d in zip(args, in_dims, strict=True)))
        return out, pytree.tree_map(lambda _: 0, out)

    return rule


def by_loop(op: Callable) -> Callable:
    """Batching rule of an op of fixed rank: call it once per batch entry and stack."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        def entry(i: int) -> Any:
            picked = (
                x.select(d, i) if isinstance(x, Tensor) and d is not None else x
                for x, d in zip(args, in_dims, strict=True)
            )
            return op(*picked)

        if info.batch_size == 0:  # one entry of zeros, whose group ends are legal, gives the shapes
            args = tuple(
                x.new_zeros(x.movedim(d, 0).shape[1:]).unsqueeze(d) if d is not None else x
                for x, d in zip(args, in_dims, strict=True)
            )
            empty = pytree.tree_map(lambda x: x.new_empty(0, *x.shape), entry(0))
            return empty, pytree.tree_map(lambda _: 0, empty)
        outs = [entry(i) for i in range(info.batch_size)]
        stacked = pytree.tree_map(lambda *xs: torch.stack(xs), *outs)
        return stacked, pytree.tree_map(lambda _: 0, stacked)

    return rule
