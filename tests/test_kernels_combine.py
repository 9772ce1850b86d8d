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


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_pair(dtype, device):
    y, slot, _, _ = operands(6, 4, 80, dtype, device)
    other = draw(y.shape, device, dtype=dtype, seed=7)
    got = combine_gpu.combine_pair(y, other, slot, 4)
    same_bits(got, combine.reference_pair(y, other, slot, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 48), (3, 1, 16), (2, 8, 2064), (0, 2, 32)])
def test_combine_backward(shape, dtype, device):
    """Rows bit for bit; each of the two sums of n products within n roundings of the sum of magnitudes."""
    y, slot, weights, g = operands(*shape, dtype, device)
    got, want = (f(y, slot, weights, g) for f in (combine_gpu.combine_backward, combine.reference_backward))
    same_bits(got[0], want[0])
    terms = y[slot].view(*shape).double() * g.double()[:, None]
    limit = (shape[2] + 1) * 2.0**-24 * terms.abs().sum(-1)
    for d_weights in (got[1], want[1]):
        assert d_weights.dtype == weights.dtype
        assert ((d_weights.double() - terms.sum(-1)).abs() <= limit).all()


def test_backward_is_the_transpose(device):
    """<combine(y), g> = <y, dy> = <weights, dweights>, on numbers for which every sum is exact."""
    generator = torch.Generator().manual_seed(0)
    slot = torch.randperm(12, generator=generator).to(device)
    y, g = (torch.randint(-8, 9, (n, 32), generator=generator).float().to(device) for n in (12, 4))
    weights = torch.randint(1, 5, (4, 3), generator=generator).float().to(device)
    dy, d_weights = combine.combine_backward(y, slot, weights, g)
    total = (combine.combine(y, slot, weights, 3) * g).sum()
    assert total == (y * dy).sum() == (weights * d_weights).sum()
