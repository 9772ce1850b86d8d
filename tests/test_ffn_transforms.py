"""expert_ffn under every function transform gives the bits that plain ``.backward()`` gives."""

import functools

import pytest
import torch
import torch.utils._pytree as pytree
from ffn_cases import cases
from specs import TRITON, Layout
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from moefp8 import remat
from moefp8.recipe import PRESETS

LAYOUT = Layout("transforms", (10, 0, 23), 7)
BATCH = 3
every = pytest.mark.parametrize("case", cases("mxfp8", "fp8_rowwise", "bf16"))
#: For what takes long and does not depend on the recipe.
one = pytest.mark.parametrize("case", cases("mxfp8"))


def operands(case, seed=0):
    return case.params(len(LAYOUT.sizes), seed), case.rows(LAYOUT.rows, seed=50 + seed)


def loss_of(case, offs=None):
    """A scalar whose gradients are the VJP at a fixed cotangent."""
    g, ends = case.rows(LAYOUT.rows, seed=9), case.offs(LAYOUT) if offs is None else offs

    def loss(params, x, offs=ends):
        return (case.ffn(params, x, offs) * g).sum()

    return loss


def eager(loss, *trees):
    """Gradients by ``.backward()``."""
    leaves, spec = pytree.tree_flatten(trees)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss(*pytree.tree_unflatten(leaves, spec)).backward()
    return pytree.tree_unflatten([leaf.grad for leaf in leaves], spec)


def stack(trees, dim=0):
    return pytree.tree_map(lambda *leaves: torch.stack(leaves, dim), *trees)


def same(got, want):
    got, want = pytree.tree_leaves_with_path(got), pytree.tree_leaves(want)
    assert len(got) == len(want) > 0
    for (path, a), b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), pytree.keystr(path)


@every
def test_grad_vjp_and_jacrev(case):
    loss, (params, x) = loss_of(case), operands(case)
    want = eager(loss, params, x)
    same(grad(loss, (0, 1))(params, x), want)
    same(jacrev(loss, (0, 1))(params, x), want)
    g = case.rows(LAYOUT.rows, seed=9)
    same(vjp(lambda p, x: case.ffn(p, x, case.offs(LAYOUT)), params, x)[1](g), want)


@every
def test_vmap_and_vmap_of_grad(case):
    """Over tokens, over weights, over both, over both along the last axis."""
    loss, each = loss_of(case), [operands(case, seed) for seed in range(BATCH)]
    params, xs = each[0][0], torch.stack([x for _, x in each])
    ensemble, offs = stack([p for p, _ in each]), case.offs(LAYOUT)
    same(
        vmap(lambda x: case.ffn(params, x, offs))(xs), torch.stack([case.ffn(params, x, offs) for x in xs])
    )
    over_data = vmap(grad(loss, (0, 1)), (None, 0))
    same(over_data(params, xs), stack([eager(loss, params, x) for x in xs]))
    over_weights = vmap(grad(loss, (0, 1)), (0, None))
    same(over_weights(ensemble, xs[0]), stack([eager(loss, p, xs[0]) for p, _ in each]))
    want = stack([eager(loss, *both) for both in each])
    same(vmap(grad(loss, (0, 1)))(ensemble, xs), want)
    last = stack([p for p, _ in each], dim=-1)
    got = vmap(grad(loss, (0, 1)), (-1, 0))(last, xs)
    if case.backend is TRITON and case.recipe == PRESETS["fp8_rowwise"]:
        # Gradients of weights in another memory order are computed transposed: (acc sa) sb in float32, not
        # (acc sb) sa, and rounded to bfloat16. Two neighbours are at most 2^-7 apart.
        for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
            torch.testing.assert_close(a, b, rtol=2.0**-7, atol=0)
    else:
        same(got, want)


@every
def test_vmap_over_group_ends(case):
    loss, (params, x) = loss_of(case), operands(case)
    ends = torch.tensor([[10, 10, 33], [0, 40, 40], [1, 2, 3]], dtype=torch.int32, device=x.device)
    got = vmap(grad(loss, (0, 1)), (None, None, 0))(params, x, ends)
    same(got, stack([eager(functools.partial(loss, offs=offs), params, x) for offs in ends]))


@one
def test_functional_call(case):
    class Experts(torch.nn.Module):
        def __init__(self, params):
            super().__init__()
            for name, p in params.items():
                self.register_parameter(name, torch.nn.Parameter(p))

        def forward(self, x):
            return loss_of(case)(dict(self.named_parameters()), x)

    params, x = operands(case)
    module = Experts(params)
    got = grad(lambda p: functional_call(module, p, (x,)))(params)
    same(got, eager(loss_of(case), params, x)[0])


@every
def test_make_fx(case):
    loss, (params, x) = loss_of(case), operands(case)
    other = operands(case, 1)
    traced = make_fx(lambda params, x: grad(loss, (0, 1))(params, x))(params, x)
    same(traced(*other), eager(loss, *other))


@one
@pytest.mark.parametrize("transform", ["backward", "grad", "vmap of grad"])
def test_compile(case, transform, fresh_compiler):
    """The whole graph, so that nothing falls back to eager unnoticed."""
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    loss, (params, x) = loss_of(case), operands(case)
    if transform == "backward":
        same(eager(compiled(loss), params, x), eager(loss, params, x))
    elif transform == "grad":
        same(compiled(grad(loss, (0, 1)))(params, x), eager(loss, params, x))
    else:
        xs = torch.stack([operands(case, seed)[1] for seed in range(BATCH)])
        got = compiled(vmap(grad(loss, (0, 1)), (None, 0)))(params, xs)
        same(got, stack([eager(loss, params, x) for x in xs]))


@every
def test_checkpoint_and_remat(case):
    loss, (params, x) = loss_of(case), operands(case)
    want = eager(loss, params, x)

    def checkpointed(params, x):
        return torch.utils.checkpoint.checkpoint(loss, params, x, use_reentrant=False)

    same(eager(checkpointed, params, x), want)
    same(eager(remat(loss), params, x), want)
    same(grad(remat(loss), (0, 1))(params, x), want)
    same(vmap(grad(remat(loss), (0, 1)), (None, 0))(params, x[None]), stack([want]))


@one
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_second_order_and_forward_mode_raise_by_name(case):
    loss, (params, x) = loss_of(case), operands(case)
    with pytest.raises(NotImplementedError, match="expert_ffn: second-order"):
        grad(lambda x: grad(loss, 1)(params, x).sum())(x)
    with pytest.raises(NotImplementedError, match="expert_ffn: forward-mode"):
        jvp(lambda x: loss(params, x), (x,), (x,))


@every
def test_autocast_changes_nothing(case):
    loss, (params, x) = loss_of(case), operands(case)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        got = eager(loss, params, x)
    same(got, eager(loss, params, x))
