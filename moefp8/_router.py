"""The router's product for 16-bit tokens: float32 results without a float32 copy of the tokens.

Left to autograd, ``x.to(float32) @ router.T`` writes a float32 copy of the tokens and keeps it for the
backward: twice the bytes of the tokens themselves, the largest tensor of the layer for some models. The
VJP here keeps the tokens, which are alive anyway.

A GPU needs no copy at all. The product of two bfloat16 numbers is exact in float32, and a float32 is
the sum of three bfloat16 (:func:`split`)::

    r = r1 + r2 + r3        x . r = x . r1 + x . r2 + x . r3

so that tensor cores multiply bfloat16 and add in float32. ``test_router.py`` has the error bounds.
float16 tokens are widened, as on a CPU: terms in float16 would lack the exponents of a float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from moefp8._custom_vjp import custom_vjp
from moefp8._leaf import by_loop, leaf


def _product_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


@leaf("router_product", fake=_product_fake, vmap=by_loop)
def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of 16-bit matrices, added and returned in float32."""
    if not a.is_cuda:  # torch has no kernel there; a cast is exact
        return a.float() @ b.float()
    if not a.numel():
        return a.new_zeros(a.shape[0], b.shape[1], dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32)


def split(x: Tensor) -> tuple[Tensor, ...]:
    """bfloat16 tensors that add up to ``x``: itself, or three of a float32.

    Each takes the next 8 bits of the 24. The sum is exact where ``|x| >= 2^-110`` or x is 0; below, the
    last bits fall under the smallest bfloat16 and it is off by 2^-134 at most. An infinity or NaN is
    the first term alone, and so is a number that rounds to an infinity in bfloat16, 2^128 - 2^119 and up.
    """
    if x.dtype == torch.bfloat16:
        return (x,)
    # Few and mixed operations: on a GPU each of them is a launch.
    first = x.bfloat16()
    rest = torch.nan_to_num(x - first, nan=0.0, posinf=0.0, neginf=0.0)
    second = rest.bfloat16()
    return first, second, (rest - second).bfloat16()


def logits_by_terms(x: Tensor, router: Tensor) -> Tensor:
    """``x (T, D) @ router (E, D)^T``, float32, of bfloat16 ``x``."""
    terms = split(router)
    stacked = product(x, torch.cat(terms).mT)  # one reading of x for all terms
    return stacked.unflatten(1, (len(terms), -1)).sum(1)


def router_gradient_by_terms(terms: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """``g (T, E)^T @ x (T, D)``, float32, of the ``terms`` of float32 g and bfloat16 ``x``."""
    stacked = product(torch.cat(terms, 1).mT, x)
    return stacked.unflatten(0, (len(terms), -1)).sum(0)


def token_gradient_by_terms(terms: tuple[Tensor, ...], router: Tensor) -> Tensor:
    """``g (T, E) @ router (E, D)``, added in float32 and rounded to bfloat16 once, of the ``terms`` of g.

    All pairs of terms along one contraction, but for those under 2^-26 of the product, so that there is
    no float32 result to be written and read.
    """
    others = split(router)
    pairs = [(a, b) for i, a in enumerate(terms) for j, b in enumerate(others) if i + j < 3]
    return torch.cat([a for a, _ in pairs], 1) @ torch.cat([b for _, b in pairs])


def _by_terms(x: Tensor, router: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and router.dtype in (torch.bfloat16, torch.float32)


def _logits_fwd(static: None, x: Tensor, router: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    if _by_terms(x, router):
        return logits_by_terms(x, router), (x, router)
    wide = torch.promote_types(router.dtype, torch.float32)
    return x.to(wide) @ router.to(wide).mT, (x, router)


def _logits_bwd(
    static: None, needed: tuple[bool, ...], x: Tensor, router: Tensor, g: Tensor
) -> Sequence[Tensor | None]:
    dx = d_router = None
    terms = split(g) if _by_terms(x, router) else None
    if needed[0]:
        dx = token_gradient_by_terms(terms, router) if terms else (g @ router.to(g.dtype)).to(x.dtype)
    if needed[1]:
        d_router = router_gradient_by_terms(terms, x) if terms else g.mT @ x.to(g.dtype)
        d_router = d_router.to(router.dtype)
    return dx, d_router


_logits = custom_vjp("route", _logits_fwd, _logits_bwd)


def router_linear(x: Tensor, router: Tensor) -> Tensor:
    """``x (..., D) @ router (E, D)^T``, by plain autograd.

    A router is never quantised, so function modes, that of ``low_precision`` among them, see this product
    whole, as they do the one of 16-bit tokens.
    """
    if has_torch_function_variadic(x, router):
        return handle_torch_function(router_linear, (x, router), x, router)
    return torch.nn.functional.linear(x, router)


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """``x (..., D) @ router (E, D)^T`` in float32, or float64 if an operand is."""
    if x.dtype not in (torch.bfloat16, torch.float16):  # plain autograd keeps no copy, and goes further
        wide = torch.promote_types(x.dtype, torch.promote_types(router.dtype, torch.float32))
        return router_linear(x.to(wide), router.to(wide))
    logits = _logits(None, x.reshape(-1, x.shape[-1]), router)
    return logits.reshape(*x.shape[:-1], router.shape[0])
