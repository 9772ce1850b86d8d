"""The router's product for 16-bit tokens: exact terms, float32 error bounds, what is kept, transforms."""

import pytest
import torch
from torch.func import grad, jvp, vmap

from moefp8 import MoEConfig, init_moe_ffn, moe_ffn, route
from moefp8._router import (
    logits_by_terms,
    router_gradient_by_terms,
    router_logits,
    split,
    token_gradient_by_terms,
)

T, D, E = 70, 48, 8
U = 2.0**-24
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
devices = pytest.mark.parametrize("device", DEVICES)
routers = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


def draw(*shape, seed, dtype, device="cpu"):
    """Rows and columns of unlike size, so that a lost term shows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * torch.exp2(torch.randint(-8, 9, (shape[0], 1), generator=generator))
    return x.to(device, dtype)


def operands(dtype, device="cpu"):
    x = draw(T, D, seed=0, dtype=torch.bfloat16, device=device)
    router = draw(E, D, seed=1, dtype=dtype, device=device)
    return x, router, draw(T, E, seed=2, dtype=torch.float32, device=device)


def within(got, a, b, terms, rounding=0.0, smallest=0.0):
    """``got`` is a @ b but for the error of a sum of n = terms K products, each exact, in float32.

    A sum of n terms in any order is off by at most (n - 1) u of its sum of magnitudes (to first order);
    tensor cores truncate where they align, so u = 2^-23 and not 2^-24. The terms' magnitudes sum to at
    most (1 + 2^-7) of those of the operands. ``rounding``: relative, of the result; ``smallest``: half
    its smallest subnormal.
    """
    a, b = a.double(), b.double()
    want, magnitude = a @ b, a.abs() @ b.abs()
    n = terms * a.shape[1]
    bound = n * 2 * U * (1 + 2.0**-7) * magnitude
    bound = bound + rounding * (want.abs() + bound) + smallest
    assert ((got.double() - want).abs() <= bound).all()
    # The bound has teeth: without the second and third term, or with the sign lost, it is exceeded.
    assert not ((0.99 * want - want).abs() <= bound).all()


def test_three_terms_are_the_float32_and_what_is_no_number_stays():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    x = codes.view(torch.float32)
    total = sum(term.double() for term in split(x))
    inside = (x.abs() >= 2.0**-110) & (x.abs() < 2.0**128 - 2.0**119)
    assert torch.equal(total[inside], x[inside].double())
    small = x.abs() < 2.0**-110
    assert small.any()
    assert ((total - x.double()).abs()[small] <= 2.0**-134).all()
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    torch.testing.assert_close(
        sum(term.float() for term in split(special)), special, rtol=0, atol=0, equal_nan=True
    )
    assert split(special.bfloat16())[0].dtype == torch.bfloat16


@devices
@routers
def test_products_by_terms_are_float32_products(dtype, device):
    x, router, g = operands(dtype, device)
    count = len(split(router))
    logits, d_router = logits_by_terms(x, router), router_gradient_by_terms(split(g), x)
    assert logits.dtype == d_router.dtype == torch.float32
    within(logits, x, router.mT, count)
    within(d_router, g.mT, x, 3)


@devices
@routers
def test_the_gradient_of_tokens_is_rounded_once(dtype, device):
    """Pairs of terms left out: 2^-27 twice and 2^-36, less than one rounding u of each product."""
    x, router, g = operands(dtype, device)
    dx = token_gradient_by_terms(split(g), router)
    assert dx.dtype == torch.bfloat16
    if device == "cuda":
        within(dx, g, router, 6, rounding=2.0**-8)
    else:  # how a CPU adds bfloat16 is its own affair: the same terms in float64
        assert dx.shape == x.shape
        pairs = [(a, b) for i, a in enumerate(split(g)) for j, b in enumerate(split(router)) if i + j < 3]
        within(sum(a.double() @ b.double() for a, b in pairs), g, router, 6)


@devices
@pytest.mark.parametrize("tokens", [torch.bfloat16, torch.float16])
@routers
def test_the_vjp_is_that_of_a_float32_product(tokens, dtype, device):
    x, router, g = operands(dtype, device)
    x, router, g = x.to(tokens), router / 64, g / 64  # the gradient of float16 must not overflow
    leaves = [x.clone().requires_grad_(), router.clone().requires_grad_()]
    logits = router_logits(*leaves)
    dx, d_router = torch.autograd.grad(logits, leaves, g)
    assert (logits.dtype, dx.dtype, d_router.dtype) == (torch.float32, tokens, dtype)
    within(logits.detach(), x, router.mT, 3)
    half_ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[tokens]
    within(dx, g, router, 6, half_ulp, smallest=2.0**-25 if tokens == torch.float16 else 0.0)
    within(d_router, g.mT, x, 3, rounding=2.0**-8 if dtype == torch.bfloat16 else 0.0)


@devices
def test_keeps_the_tokens_and_no_copy(device):
    x, router, _ = operands(torch.float32, device)
    x.requires_grad_()
    router.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        route({"router": router}, x, MoEConfig(D, 1, E, top_k=2))
    large = [t for t in kept if t.numel() >= x.numel()]
    assert {t.data_ptr() for t in large} == {x.data_ptr()}


@devices
def test_no_tokens(device):
    x = torch.zeros(0, D, dtype=torch.bfloat16, device=device)
    router = draw(E, D, seed=1, dtype=torch.float32, device=device)
    assert router_logits(x, router).shape == (0, E)
    assert not grad(lambda r: router_logits(x, r).sum())(router).any()


def loss(router, x):
    return router_logits(x, router).sin().sum()


@devices
def test_transforms_give_what_backward_gives(device):
    """Same sums, perhaps in another order: twice the bound of ``within`` on either side."""
    x, _, _ = operands(torch.float32, device)
    x = x.view(2, T // 2, D) / 16
    router = draw(E, D, seed=1, dtype=torch.float32, device=device) / 64
    want = torch.stack([grad(loss)(router, one) for one in x])
    compiled = torch.compile(grad(loss), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(router, x[0]), want[0])
    mapped = vmap(grad(loss), (None, 0))(router, x)
    # |sin'| <= 1; logits off by n u of their magnitudes move the cotangent by as much.
    size = x.double().abs()
    shift = 2 * 3 * D * 2 * U * (size @ router.double().abs().mT) + 2 * 3 * T * 2 * U
    assert ((mapped - want).abs().double() <= 2 * shift.mT @ size).all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_order_raises_for_16_bits_and_works_for_32(dtype):
    x, router, _ = operands(torch.float32)
    x = x.to(dtype)
    with pytest.raises(NotImplementedError, match="route: second-order"):
        grad(lambda r: grad(loss)(r, x).sum())(router)
    with pytest.raises(NotImplementedError, match="route: forward-mode"):
        jvp(lambda r: loss(r, x), (router,), (router,))
    assert grad(lambda r: grad(loss)(r, x.float()).sum())(router).any()
    assert jvp(lambda r: loss(r, x.float()), (router,), (router,))[1].isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_so_does_the_router_inside_the_layer(dtype):
    """Its statistics, which depend on the router alone; what the experts add raises in every dtype."""
    config = MoEConfig(D, 32, E, top_k=2)
    params = init_moe_ffn(torch.Generator().manual_seed(0), config)
    x = draw(5, D, seed=0, dtype=dtype) / 256

    def second(of, x):
        def f(router):
            return of(moe_ffn(params | {"router": router}, x, config=config))

        return grad(lambda router: grad(f)(router).square().sum())(params["router"])

    def of_statistics(out):
        return out[1].z_loss

    with pytest.raises(NotImplementedError, match="route: second-order"):
        second(of_statistics, x)
    assert second(of_statistics, x.float()).any()
    with pytest.raises(NotImplementedError, match="expert_ffn: second-order"):
        second(lambda out: out[0].sum(), x.float())
