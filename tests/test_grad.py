"""``torch.func.grad`` and ``grad_and_value``."""

from torch.func import grad, grad_and_value


def test_grad_is_eager(case):
    operands = case.operands()
    case.agree(grad(case.loss, case.argnums)(*operands), case.eager(*operands))


def test_grad_and_value(case):
    operands = case.operands()
    gradients, value = grad_and_value(case.loss, case.argnums)(*operands)
    case.agree(gradients, case.eager(*operands))
    case.agree(value, case.loss(*operands))


def test_grad_of_a_pytree(case):
    """Weights in a plain dict, data captured: how a training step is written."""
    a, *weights = case.operands()
    params = {f"w{i}": w for i, w in enumerate(weights)}
    got = grad(lambda params: case.loss(a, *params.values()))(params)
    case.agree(list(got.values()), case.eager(a, *weights)[1:])
