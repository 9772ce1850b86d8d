"""What ``low_precision`` still takes for a weight, and what it no longer does."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from moefp8 import MXFP8, explain, low_precision, remat, scaled_grouped_mm, scaled_mm


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = randn(5, 64, seed=9)

# Ways from a (32, 64) leaf to something that x (5, 64) can be multiplied by.
FOLLOWED = {
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "t": lambda w: w.t(),
    "transpose": lambda w: w.transpose(0, 1),
    "torch.transpose": lambda w: torch.transpose(w, 0, 1),
    "swapaxes": lambda w: w.swapaxes(0, 1),
    "permute": lambda w: w.permute(1, 0),
    "movedim": lambda w: torch.movedim(w, 0, 1),
    "view": lambda w: w.view(64, 32),
    "reshape": lambda w: w.T.reshape(64, 4, 8).reshape(64, -1),
    "flatten": lambda w: w.T.unflatten(1, (4, 8)).flatten(1),
    "narrow": lambda w: w.narrow(0, 3, 17).T,
    "slice": lambda w: w[8:24].T,
    "slice with a step": lambda w: w.T[:, ::2],
    "ellipsis and None": lambda w: w.T[..., None].squeeze(-1),
    "select": lambda w: w.unflatten(0, (4, 8)).select(0, 2).T,
    "an integer": lambda w: w.unflatten(0, (4, 8))[2].T,
    "an integer tensor": lambda w: w.unflatten(0, (4, 8))[torch.tensor(2)].T,
    "chunk": lambda w: w.chunk(2)[1].T,
    "split": lambda w: w.split([8, 24])[1].T,
    "torch.split": lambda w: torch.split(w, 16)[0].T,
    "tensor_split": lambda w: w.tensor_split(3)[1].T,
    "unbind": lambda w: w.unflatten(0, (4, 8)).unbind(0)[3].T,
    "iteration": lambda w: next(iter(w.unflatten(0, (4, 8)))).T,
    "unsqueeze and squeeze": lambda w: w.unsqueeze(0).squeeze(0).T,
    "expand": lambda w: w.unsqueeze(0).expand(2, -1, -1)[1].T,
    "contiguous": lambda w: w.T.contiguous(),
    "clone": lambda w: w.clone().T,
    "detach": lambda w: w.detach().T,
    "data": lambda w: w.data.T,
    "to float64 and back": lambda w: w.double().float().T,
    "bfloat16 and back": lambda w: w.to(torch.bfloat16).float().T,
    "type_as": lambda w: w.double().type_as(w).T,
    "view_as": lambda w: w.view_as(torch.empty(64, 32)),
    "cat of its chunks": lambda w: torch.cat(w.chunk(2)[::-1]).T,
    "stack of its slices": lambda w: torch.stack([w[i] for i in range(0, 32, 2)], dim=1),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_followed(name):
    way = FOLLOWED[name]
    low = low_precision(lambda p, x: (x @ way(p["w"])).square().sum(), [("w", MXFP8)])
    by_hand = grad(lambda p, x: scaled_mm(x, way(p["w"])).square().sum())
    p = {"w": randn(32, 64)}
    for got in (grad(low)(p, X), low_precision(grad(low.__wrapped__), [("w", MXFP8)])(p, X)):
        assert torch.equal(got["w"], by_hand(p, X)["w"])


def test_experts_gathered_by_token():
    """``w[ids]`` of stacked weights gives matrices, of a table rows: only the first is followed."""
    ids = torch.tensor([2, 0, 2, 1, 1])
    p = {"w": randn(3, 64, 8), "table": randn(3, 64, seed=1)}

    def model(p, x):
        return torch.bmm(x[:, None], p["w"][ids])[:, 0] + p["table"][ids] @ x.T[:, :1]

    want = scaled_grouped_mm(X[:, None], p["w"][ids])[:, 0] + p["table"][ids] @ X.T[:, :1]
    with pytest.warns(UserWarning, match="'table'"):
        assert torch.equal(low_precision(model, [("w", MXFP8), ("table", MXFP8)])(p, X), want)


def test_separate_experts_stacked():
    p = {"experts": [{"w": randn(64, 8, seed=i)} for i in range(3)]}
    offs = torch.tensor([2, 2, 5], dtype=torch.int32)

    def model(p, x):
        return F.grouped_mm(x, torch.stack([e["w"] for e in p["experts"]]), offs=offs)

    got = low_precision(model, [("experts.*", MXFP8)])(p, X)
    assert torch.equal(got, scaled_grouped_mm(X, torch.stack([e["w"] for e in p["experts"]]), offs))
    report = explain(model, [("experts.*", MXFP8)], p, X)
    assert [product.path for product in report.products] == ["experts.0.w + experts.1.w + experts.2.w"]
    assert not report.unused


# Ways to something that is no longer the weight, and what the report calls them.
LOST = {
    "scaled": (lambda w: w * 2.0, "lost at mul"),
    "masked": (lambda w: w.masked_fill(w > 0, 0.0), "lost at masked_fill"),
    "overwritten": (lambda w: w.clone().mul_(2.0), "lost at mul_ (overwritten)"),
    "an update": (lambda w: w.clone().__iadd__(1.0), "lost at add_ (overwritten)"),
    "an assignment": (lambda w: _assign(w.clone()), "lost at __setitem__ (overwritten)"),
    "a lookup": (lambda w: w[torch.arange(32)], "lost at __getitem__ (indexed with a tensor"),
    "joined with something else": (
        lambda w: torch.cat([w, torch.zeros(2, 64)]),
        "lost at cat (joined with a tensor that is no weight)",
    ),
}


def _assign(w):
    w[0] = 1.0
    return w


@pytest.mark.parametrize("name", LOST)
def test_lost(name):
    """The product stays as it is, the call warns, and the report says where."""
    way, why = LOST[name]

    def model(p, x):
        return x @ way(p["w"]).T

    p, rules = {"w": randn(32, 64)}, [("w", MXFP8)]
    with pytest.warns(UserWarning, match="no product used a weight of rule 'w'"):
        assert torch.equal(low_precision(model, rules)(p, X), X @ way(p["w"]).T)
    (product,) = explain(model, rules, p, X).products
    assert product.recipe is None
    assert product.why.startswith(f"w {why}")


def test_joined_under_different_recipes():
    def model(p, x):
        return x @ torch.cat([p["a"], p["b"]]).T

    p = {"a": randn(32, 64), "b": randn(32, 64, seed=1)}
    report = explain(
        model, [("a", MXFP8), ("b", MXFP8._replace(wgrad=MXFP8.fwd._replace(format="none")))], p, X
    )
    assert report.products[0].why == "b lost at cat (joined with weights under other recipes)"
    assert report.fp8_share == 0


def test_nothing_is_kept_alive():
    """A cast of a weight is freed when the function is done with it."""
    seen = []

    def model(p, x):
        wide = p["w"].double().float()
        seen.append(weakref.ref(wide))
        with torch.no_grad():
            out = x @ wide.T
        del wide
        gc.collect()
        assert seen[0]() is None
        return out

    low_precision(model, [("w", MXFP8)])({"w": randn(32, 64)}, X)
    assert len(seen) == 1


def test_a_new_tensor_with_an_old_id_is_no_weight():
    """Ids are used again: many short-lived casts, and activations born in their place."""

    def model(p, x):
        for _ in range(200):
            p["w"].double()
        fresh = [torch.ones(64, 8) for _ in range(200)]
        return torch.stack([x @ y for y in fresh]).sum(0) + x @ p["w"]

    p = {"w": randn(64, 8)}
    want = torch.stack([X @ torch.ones(64, 8) for _ in range(200)]).sum(0) + scaled_mm(X, p["w"])
    assert torch.equal(low_precision(model, [("w", MXFP8)])(p, X), want)


def test_views_under_an_inner_transform():
    """A view made at one transform level and used at another."""

    def model(p, x):
        views = p["w"].unflatten(0, (4, 8))
        return vmap(lambda w: grad(lambda x: (x @ w.T).square().sum())(x))(views).sum()

    def by_hand(p, x):
        views = p["w"].unflatten(0, (4, 8))
        return vmap(lambda w: grad(lambda x: scaled_mm(x, w.T).square().sum())(x))(views).sum()

    p = {"w": randn(32, 64)}
    assert torch.equal(low_precision(model, [("w", MXFP8)])(p, X), by_hand(p, X))


def test_views_made_inside_and_outside_remat():
    inside = remat(lambda w, x: (x @ w.chunk(2, -1)[0]).relu())

    def model(p, x):
        return (inside(p["w"].T, x) @ p["v"]).square().sum()

    def by_hand(p, x):
        return scaled_mm(scaled_mm(x, p["w"].T.chunk(2, -1)[0]).relu(), p["v"]).square().sum()

    p, rules = {"w": randn(64, 64), "v": randn(32, 8, seed=1)}, [("*", MXFP8)]
    want = grad(by_hand)(p, X)
    for got in (grad(low_precision(model, rules))(p, X), low_precision(grad(model), rules)(p, X)):
        assert all(torch.equal(got[name], want[name]) for name in p)
