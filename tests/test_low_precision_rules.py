"""Which weights ``low_precision`` matches, and what it says when a rule is wrong or has no effect."""

import re
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad

from moefp8 import (
    BF16,
    FP8_ROWWISE,
    MXFP8,
    MoEConfig,
    explain,
    init_moe_ffn,
    low_precision,
    moe_ffn,
    scaled_mm,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = randn(5, 64, seed=9)


def total(p, x):
    """Every leaf, multiplied by x and added up."""
    return sum(x @ w for w in torch.utils._pytree.tree_leaves(p))


def tree():
    layers = [{"attn": {"wq": randn(64, 8, seed=i)}, "w1": randn(64, 8, seed=5 + i)} for i in range(2)]
    return {"layers": layers, "head": randn(64, 8, seed=8)}


def expected(recipes):
    """``recipes``: one for each leaf of ``tree()`` in order, None for the plain product."""
    leaves = torch.utils._pytree.tree_leaves(tree())
    pairs = zip(leaves, recipes, strict=True)
    return sum(X @ w if r is None else scaled_mm(X, w, recipe=r) for w, r in pairs)


M, R = MXFP8, FP8_ROWWISE

# rules and the recipe of layers.0.attn.wq, layers.0.w1, layers.1.attn.wq, layers.1.w1, head.
RULES = {
    "one": ([("*", M)], [M, M, M, M, M]),
    "a star crosses dots": ([("layers.*", M)], [M, M, M, M, None]),
    "a glob covers the whole path": ([("*.wq", M)], [M, None, M, None, None]),
    "first match wins": ([("*.wq", R), ("layers.*", M)], [R, M, R, M, None]),
    "opting out": ([("head", BF16), ("layers.1.*", BF16), ("*", M)], [M, M, None, None, None]),
    "character class": ([("layers.[1-9].w?", M)], [None, None, None, M, None]),
    "regular expression": ([(re.compile(r"layers\.\d+\.w1|head"), R)], [None, R, None, R, R]),
    "case matters": ([("*W1*", M), ("head", R)], None),
    "a regular expression covers the whole path": ([(re.compile("layers"), M)], None),
}


@pytest.mark.parametrize("name", [name for name, (_, want) in RULES.items() if want])
def test_rules(name):
    rules, recipes = RULES[name]
    assert torch.equal(low_precision(total, rules)(tree(), X), expected(recipes))


@pytest.mark.parametrize("name", [name for name, (_, want) in RULES.items() if not want])
def test_rules_that_match_nothing(name):
    with pytest.raises(ValueError, match=r"rules\[0\]: .* matches none of 5 parameters; the closest are"):
        low_precision(total, RULES[name][0])(tree(), X)


def test_a_typo_names_the_closest_paths():
    with pytest.raises(ValueError, match="matches none") as caught:
        low_precision(total, [("layers.*.atn.wq", MXFP8)])(tree(), X)
    assert str(caught.value) == (
        "rules[0]: 'layers.*.atn.wq' matches none of 5 parameters; "
        "the closest are 'layers.*.attn.wq', 'layers.*.w1', 'head'"
    )


def test_a_rule_in_the_shade_of_another_raises():
    with pytest.raises(
        ValueError, match=r"rules\[1\]: 'head' matches only .* rules\[0\], '\*', takes first"
    ):
        low_precision(total, [("*", MXFP8), ("head", BF16)])(tree(), X)


def test_checked_again_for_other_parameters():
    low = low_precision(total, [("head", MXFP8)])
    low(tree(), X)
    with pytest.raises(ValueError, match="matches none of 1"):
        low({"tail": randn(64, 8)}, X)


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def test_paths_through_tuples_and_a_bare_tensor():
    p = (Pair(randn(64, 8), randn(64, 8, seed=1)), None, 3)
    out = low_precision(lambda p, x: x @ p[0].left + x @ p[0].right, [("0.right", MXFP8)])(p, X)
    assert torch.equal(out, X @ p[0].left + scaled_mm(X, p[0].right))
    assert torch.equal(
        low_precision(lambda w, x: x @ w, [("", MXFP8)])(p[0].left, X), scaled_mm(X, p[0].left)
    )


@pytest.mark.parametrize("argnums", [1, -1, (0, 1)])
def test_argnums(argnums):
    p = {"w": randn(64, 8)}
    low = low_precision(lambda q, p: q["x"] @ p["w"], [("w", MXFP8)], argnums=argnums)
    assert torch.equal(low({"x": X}, p), scaled_mm(X, p["w"]))


def test_parameters_by_keyword_raise():
    with pytest.raises(TypeError, match="positional argument 0, but the call has 0"):
        low_precision(total, [("head", MXFP8)])(p=tree(), x=X)


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ([], ValueError, "expected at least one"),
        (["head"], TypeError, r"rules\[0\]: expected a \(pattern, recipe\) pair"),
        ([("head", MXFP8), (3, MXFP8)], TypeError, r"rules\[1\]: expected a glob"),
        ([("head", "mxfp8")], TypeError, "expected a Recipe"),
    ],
)
def test_malformed_rules(rules, error, message):
    with pytest.raises(error, match=message):
        low_precision(total, rules)


def test_not_a_function():
    with pytest.raises(TypeError, match="fn: expected a function"):
        low_precision(tree(), [("*", MXFP8)])


# --- no effect -----------------------------------------------------------------------------------


def test_a_rule_without_a_product_warns():
    low = low_precision(lambda p, x: x * p["gain"] + F.linear(x, p["w"]), [("gain", MXFP8), ("w", MXFP8)])
    with pytest.warns(UserWarning, match="no product used a weight of rule 'gain'"):
        low({"gain": randn(64), "w": randn(64, 64)}, X)


def test_one_product_is_enough():
    """Experts without a token, norms, biases: a glob may well match more than the products use."""
    low = low_precision(lambda p, x: F.linear(x * p["gain"], p["w"], p["b"]), [("*", MXFP8)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low({"gain": randn(64), "w": randn(8, 64), "b": randn(8), "unused": randn(8, 64)}, X)


# --- ties ----------------------------------------------------------------------------------------


def test_tied_weights():
    def model(p, tokens):
        return (p["embed"][tokens] @ p["head"].T).square().sum()

    def by_hand(p, tokens):
        return scaled_mm(p["embed"][tokens], p["head"].T).square().sum()

    w, tokens = randn(10, 64), torch.tensor([1, 4, 4])

    def tied(fn):
        return lambda w: fn({"embed": w, "head": w}, tokens)

    for rules in ([("*", MXFP8)], [("head", MXFP8)], [("embed", MXFP8)]):
        assert torch.equal(grad(tied(low_precision(model, rules)))(w), grad(tied(by_hand))(w))
    with pytest.raises(ValueError, match="'embed' and 'head' are one tensor"):
        tied(low_precision(model, [("head", MXFP8), ("embed", BF16)]))(w)


def test_tied_module():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(10, 64), torch.nn.Linear(64, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    net, tokens = Tied(), torch.tensor([1, 4, 4])
    p = {name: x.detach() for name, x in net.named_parameters()}
    low = low_precision(lambda p: functional_call(net, p, (tokens,)).square().sum(), [("embed.*", MXFP8)])
    want = grad(lambda w: scaled_mm(w[tokens], w.T).square().sum())(p["embed.weight"])
    assert list(p) == ["embed.weight"]
    assert torch.equal(grad(low)(p)["embed.weight"], want)


def test_a_product_of_two_weights():
    p = {"a": randn(8, 64), "b": randn(64, 16, seed=1)}

    def low(*rules):
        return low_precision(lambda p: p["a"] @ p["b"], rules)(p)

    want = scaled_mm(p["a"], p["b"])
    assert torch.equal(low(("*", MXFP8)), want)
    assert torch.equal(low(("a", MXFP8)), want)
    assert torch.equal(low(("a", BF16), ("b", BF16)), p["a"] @ p["b"])
    with pytest.warns(UserWarning, match="rule 'b'"):  # a opts out
        assert torch.equal(low(("a", BF16), ("b", MXFP8)), p["a"] @ p["b"])
    with pytest.raises(ValueError, match="product of two weights, 'a' and 'b'"):
        low(("a", FP8_ROWWISE), ("b", MXFP8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rule_reaches_the_router_of_a_layer(dtype):
    """Whatever the tokens are; ``explain`` lists its product as one that is not replaced."""
    config = MoEConfig(64, 64, 4, 2)
    params, x = init_moe_ffn(torch.Generator().manual_seed(0), config), randn(32, 64).to(dtype)

    def layer(params, x):
        return moe_ffn(params, x, config=config)[0]

    assert torch.equal(low_precision(layer, [("*", MXFP8)])(params, x), layer(params, x))
    products = explain(layer, [("*", MXFP8)], params, x).products
    (product,) = [p for p in products if p.path == "router"]
    assert product.recipe is None
