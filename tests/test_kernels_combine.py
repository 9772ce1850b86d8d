"""The kernels that add up the rows of a token, beside their definition in torch."""

import pytest
import torch
from test_kernels import DEVICES, draw, same_bits

from moefp8.kernels import combine, combine_gpu

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def operands(tokens, copies, columns, dtype, device):
    generator = torch.Generator().manual_seed(0)
    slot = torch.randperm(tokens * copies, generator=generator).to(device)
    weights = torch.rand(tokens, copies, generator=generator).to(device)
    y, g = draw((tokens * copies, columns), device, dtype=dtype), draw((tokens, columns), device, seed=1)
    return y, slot, weights, g.to(dtype)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 48), (3, 1, 16), (2, 8, 2064), (0, 2, 32)])
def test_combine(shape, dtype, weighted, device):
    """Bit for bit, the order of additions included."""
    y, slot, weights, _ = operands(*shape, dtype, device)
    arguments = (y, slot, weights if weighted else None, shape[1])
    same_bits(combine_gpu.combine(*arguments), combine.reference(*arguments))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 48), (3, 1, 16), (2, 8, 2064), (0, 2, 32)])
def test_spread(shape, dtype, weighted, device):
    """Bit for bit."""
    _, slot, weights, x = operands(*shape, dtype, device)
    arguments = (x, slot.argsort(), weights if weighted else None, shape[1])
    same_bits(combine_gpu.spread(*arguments), combine.reference_spread(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 48), (3, 1, 16), (2, 8, 2064), (0, 2, 32)])
def test_row_dots(shape, dtype, device):
    """Each of the two sums of n products within n roundings of the sum of magnitudes."""
    y, slot, _, x = operands(*shape, dtype, device)
    terms = y[slot].view(*shape).double() * x.double()[:, None]
    limit = (shape[2] + 1) * 2.0**-24 * terms.abs().sum(-1)
    for dots in (f(y, slot, x, shape[1]) for f in (combine_gpu.row_dots, combine.reference_dots)):
        assert dots.dtype == torch.float32
        assert dots.shape == shape[:2]
        assert ((dots.double() - terms.sum(-1)).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 48), (3, 2064), (0, 32)])
def test_swiglu_dots(shape, dtype, device):
    """Within a rounding for each of the n terms, and a few for the sigmoid in each."""
    gate, up, x = (draw(shape, device, dtype=dtype, seed=seed) for seed in range(3))
    g = gate.double()
    terms = g * g.sigmoid() * up.double() * x.double()
    # exp, division and two products: 8 units in the last place between them.
    limit = (shape[1] + 9) * 2.0**-24 * terms.abs().sum(-1) + 2.0**-120
    for dots in (f(gate, up, x) for f in (combine_gpu.swiglu_dots, combine.reference_swiglu_dots)):
        assert dots.dtype == torch.float32
        assert ((dots.double() - terms.sum(-1)).abs() <= limit).all()


def test_they_are_transposes(device):
    """<combine(y), x> = <y, spread(x)> = <weights, row_dots>, on numbers for which every sum is exact."""
    generator = torch.Generator().manual_seed(0)
    slot = torch.randperm(12, generator=generator).to(device)
    y, x = (torch.randint(-8, 9, (n, 32), generator=generator).float().to(device) for n in (12, 4))
    weights = torch.randint(1, 5, (4, 3), generator=generator).float().to(device)
    total = (combine.combine(y, slot, weights, 3) * x).sum()
    assert total == (y * combine.spread(x, slot.argsort(), weights, 3)).sum()
    assert total == (weights * combine.row_dots(y, slot, x, 3)).sum()
