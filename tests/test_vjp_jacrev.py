"""``torch.func.vjp`` and ``jacrev``."""

import torch
from torch.func import jacrev, vjp


def test_vjp_is_eager(case):
    operands = case.operands()
    out, pullback = vjp(case.call, *operands)
    case.agree(out, case.call(*operands))
    case.agree(pullback(case.cotangent()), case.eager(*operands))


def test_vjp_takes_a_cotangent_of_stride_zero(case):
    operands = case.operands()
    out, pullback = vjp(case.call, *operands)
    one = out.new_ones(())
    case.agree(pullback(one.expand(out.shape)), pullback(torch.ones_like(out)))


def test_jacrev_is_a_vjp_for_every_output(case):
    """The Jacobian of the first two rows of the output, one eager backward a row of it."""
    operands = case.operands()

    def f(*operands):
        return case.call(*operands).flatten(0, -2)[:2, ::4]

    leaves = [x.clone().requires_grad_() for x in operands]
    out = f(*leaves)
    rows = [torch.autograd.grad(y, leaves, retain_graph=True) for y in out.flatten()]
    want = [torch.stack(entries).unflatten(0, out.shape) for entries in zip(*rows, strict=True)]
    case.agree(jacrev(f, case.argnums)(*operands), want)
