"""``.backward()`` against the formula: the gradients that every other composition is compared with."""

import product_oracle as oracle
import torch


def test_backward_is_the_formula(case):
    operands, g = [x.cpu() for x in case.operands()], case.cotangent().cpu()
    if case.op.name == "2Dx3D":
        want = oracle.rows_vjp(*operands, case.offs.cpu(), g, case.recipe)[1:]
    elif case.op.name == "2Dx2D":
        want = oracle.contraction_vjp(*operands, case.offs.cpu(), g, case.recipe)[1:]
    else:
        want = oracle.dense_vjp(*operands, g, case.recipe)[1:]
    for got, product in zip(case.eager(*case.operands()), want, strict=True):
        product.check(got.cpu())


def test_gradients_add_up_over_two_backwards(case):
    """As for any torch function, ``.grad`` accumulates."""
    operands = [x.requires_grad_() for x in case.operands()]
    for _ in range(2):
        case.loss(*operands).backward()
    case.agree([x.grad for x in operands], [2 * g for g in case.eager(*operands)])


def test_only_wanted_gradients_are_made(case):
    """An operand that needs no gradient gets none, and the others keep theirs."""
    want = case.eager(*case.operands())
    for i in case.argnums:
        operands = list(case.operands())
        operands[i] = operands[i].requires_grad_()
        case.loss(*operands).backward()
        case.agree(operands[i].grad, want[i])
        assert all(x.grad is None for j, x in enumerate(operands) if j != i)


def test_no_grad_keeps_nothing(case):
    with torch.no_grad():
        out = case.call(*(x.requires_grad_() for x in case.operands()))
    assert out.grad_fn is None
