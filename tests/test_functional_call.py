"""``torch.func.functional_call``: the products as the body of a module whose weights come from outside."""

import torch
from torch.func import functional_call, grad, stack_module_state, vmap


class Layer(torch.nn.Module):
    """Everything but the data is a parameter."""

    def __init__(self, case, seed=0):
        super().__init__()
        self.case = case
        self.weights = torch.nn.ParameterList(case.operands(seed)[1:])

    def forward(self, a):
        return (self.case.call(a, *self.weights) * self.case.cotangent()).sum()


def test_gradients_of_parameters(case):
    layer, other = Layer(case), case.operands(1)
    params = {name: other[i] for i, (name, _) in enumerate(layer.named_parameters(), 1)}
    got = grad(lambda params: functional_call(layer, params, (other[0],)))(params)
    assert list(got) == list(params)
    case.agree(list(got.values()), case.eager(*other)[1:])
    assert all(p.grad is None for p in layer.parameters())


def test_ensemble_of_modules(case):
    layers = [Layer(case, seed) for seed in (1, 2)]
    params, buffers = stack_module_state(layers)
    a = case.operands()[0]
    got = vmap(grad(lambda p: functional_call(layers[0], (p, buffers), (a,))))(params)
    loop = [case.eager(a, *case.operands(seed)[1:])[1:] for seed in (1, 2)]
    case.agree(list(got.values()), [torch.stack(entries) for entries in zip(*loop, strict=True)])
