"""``vmap(grad(f))`` and ``grad(vmap(f))``: gradients of each entry of a batch."""

import torch
from torch.func import grad, vjp, vmap

BATCH = 3


def test_gradients_of_each_entry(case):
    operands = case.operands(1, (BATCH,))
    loop = [case.eager(*(x[i] for x in operands)) for i in range(BATCH)]
    want = [torch.stack(entries) for entries in zip(*loop, strict=True)]
    case.agree(vmap(grad(case.loss, case.argnums))(*operands), want)


def test_per_sample_gradients_of_shared_weights(case):
    """Data mapped, weights not: each entry still gives a gradient of the weights of its own."""
    a, *weights = (case.operands(1, (BATCH,))[0], *case.operands()[1:])
    loop = [case.eager(entry, *weights) for entry in a]
    want = [torch.stack(entries) for entries in zip(*loop, strict=True)]
    dims = (0, *(None for _ in weights))
    case.agree(vmap(grad(case.loss, case.argnums), dims)(a, *weights), want)


def test_ensembles(case):
    """Weights mapped, data not."""
    a, *weights = (case.operands()[0], *case.operands(1, (BATCH,))[1:])
    loop = [case.eager(a, *(w[i] for w in weights)) for i in range(BATCH)]
    want = [torch.stack(entries) for entries in zip(*loop, strict=True)]
    dims = (None, *(0 for _ in weights))
    case.agree(vmap(grad(case.loss, case.argnums), dims)(a, *weights), want)


def test_grad_of_vmap(case):
    """The gradient of a sum over a batch; that of shared weights is the sum over its entries."""
    a, *weights = (case.operands(1, (BATCH,))[0], *case.operands()[1:])

    def total(a, *weights):
        return vmap(lambda entry: case.loss(entry, *weights))(a).sum()

    da, *dweights = grad(total, case.argnums)(a, *weights)
    loop = [case.eager(entry, *weights) for entry in a]
    case.agree(da, torch.stack([gradients[0] for gradients in loop]))
    for i, dw in enumerate(dweights, 1):
        # The sum over the batch is autograd's own, in one order for eager and another for the stack.
        want = torch.stack([gradients[i] for gradients in loop]).double()
        eps = torch.finfo(dw.dtype).eps
        assert ((dw.double() - want.sum(0)).abs() <= 2 * BATCH * eps * want.abs().sum(0)).all()


def test_over_group_ends(grouped_case):
    case = grouped_case
    operands = case.operands()
    ends = torch.tensor([[10, 10, 33], [0, 1, 40], [0, 0, 0]], dtype=torch.int32, device=case.offs.device)

    def gradients(offs):
        return grad(lambda *xs: case.loss(*xs, offs=offs), case.argnums)(*operands)

    loop = [gradients(offs) for offs in ends]
    case.agree(vmap(gradients)(ends), [torch.stack(entries) for entries in zip(*loop, strict=True)])


def test_vjp_over_cotangents(case):
    """One forward, a batch of cotangents."""
    operands = case.operands()
    pullback = vjp(case.call, *operands)[1]
    g = torch.stack([case.cotangent(), -case.cotangent().flip(0)])
    loop = [pullback(entry) for entry in g]
    case.agree(vmap(pullback)(g), [torch.stack(entries) for entries in zip(*loop, strict=True)])
