"""``explain``: every product once, with its reason, its FLOPs, and a table."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

from moefp8 import (
    BF16,
    FP8_ROWWISE,
    MXFP8,
    MXFP8_WGRAD_HP,
    explain,
    low_precision,
    scaled_grouped_mm,
    scaled_mm,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = randn(5, 64, seed=9)
OFFS = torch.tensor([2, 2, 5], dtype=torch.int32)


def model(p, x):
    for layer in p["layers"]:
        q, k = x @ layer["q"], F.linear(x, layer["k"], layer["bias"])
        x = x + F.scaled_dot_product_attention(q[None], k[None], k[None])[0] * layer["gain"]
        x = x + F.grouped_mm(x, layer["experts"], offs=OFFS)
    return x @ (p["head"] * 2.0)


def tree():
    def layer(seed):
        return {
            "q": randn(64, 64, seed=seed),
            "k": randn(64, 64, seed=seed + 1),
            "bias": randn(64, seed=seed + 2),
            "gain": randn(64, seed=seed + 3),
            "experts": randn(3, 64, 64, seed=seed + 4),
        }

    return {"layers": [layer(0), layer(10)], "head": randn(64, 8, seed=20)}


RULES = [("layers.*.q", BF16), ("layers.0.*", MXFP8), ("layers.1.experts", FP8_ROWWISE), ("head", MXFP8)]


def test_every_product():
    dense, grouped, scores = 2 * 5 * 64 * 64, 2 * 5 * 64 * 64, 2 * 2 * 5 * 5 * 64
    hidden = "not one of the products that are replaced"
    pair, attention = ((5, 64), (64, 64)), ((1, 5, 64),) * 3
    assert explain(model, RULES, tree(), X).products == (
        ("layers.0.q", "matmul", pair, None, "opted out by its rule", dense),
        ("layers.0.k", "linear", pair, MXFP8, "", dense),
        ("", "scaled_dot_product_attention", attention, None, hidden, scores),
        ("layers.0.experts", "_grouped_mm", ((5, 64), (3, 64, 64)), MXFP8, "", grouped),
        ("layers.1.q", "matmul", pair, None, "opted out by its rule", dense),
        ("layers.1.k", "linear", pair, None, "no rule matches", dense),
        ("", "scaled_dot_product_attention", attention, None, hidden, scores),
        ("layers.1.experts", "_grouped_mm", ((5, 64), (3, 64, 64)), FP8_ROWWISE, "", grouped),
        ("", "matmul", ((5, 64), (64, 8)), None, "head lost at mul", 2 * 5 * 64 * 8),
    )


def test_unused_weights_say_what_became_of_them():
    """The bias of a product is used; a gain and a scaled weight are not."""
    unused = explain(model, RULES, tree(), X).unused
    assert unused == (("layers.0.gain", MXFP8, "taken by mul"), ("head", MXFP8, "lost at mul"))


def test_shares():
    report = explain(model, RULES, tree(), X)
    dense, scores, head = 2 * 5 * 64 * 64, 4 * 5 * 5 * 64, 2 * 5 * 64 * 8
    assert report.flops == 6 * dense + 2 * scores + head
    assert report.fp8_share == 3 * dense / report.flops
    assert report.fp8_training_share == report.fp8_share
    partly = explain(lambda p, x: x @ p, [("", MXFP8_WGRAD_HP)], randn(64, 8), X)
    assert (partly.fp8_share, partly.fp8_training_share) == (1.0, 2 / 3)
    nothing = explain(lambda p, x: x * p.sum(), [("", MXFP8)], randn(64, 8), X)
    assert (nothing.flops, nothing.fp8_share) == (0, 0.0)


def test_table():
    table = """\
path              product                       shapes                                recipe                                          FLOPs     %
----------------  ----------------------------  ------------------------------------  ---------------------------------------------  ------  ----
layers.*.q (2x)   matmul                        (5, 64) . (64, 64)                    - (opted out by its rule)                      81.9 k  31.1
layers.0.k        linear                        (5, 64) . (64, 64)                    MXFP8                                            41 k  15.5
- (2x)            scaled_dot_product_attention  (1, 5, 64) . (1, 5, 64) . (1, 5, 64)  - (not one of the products that are replaced)  12.8 k   4.9
layers.0.experts  _grouped_mm                   (5, 64) . (3, 64, 64)                 MXFP8                                            41 k  15.5
layers.1.k        linear                        (5, 64) . (64, 64)                    - (no rule matches)                              41 k  15.5
layers.1.experts  _grouped_mm                   (5, 64) . (3, 64, 64)                 FP8_ROWWISE                                      41 k  15.5
-                 matmul                        (5, 64) . (64, 8)                     - (head lost at mul)                           5.12 k   1.9

products: 9, 264 kFLOP forward. In FP8: 46.6% of the forward, 46.6% of forward and backward

matched, but used by no product (2):
  layers.0.gain: taken by mul
  head: lost at mul"""  # noqa: E501
    assert str(explain(model, RULES, tree(), X)) == table


def test_layers_share_a_line():
    report = explain(model, [("layers.*", MXFP8), ("head", MXFP8)], tree(), X)
    lines = str(report).splitlines()
    assert [line.split("  ")[0] for line in lines[2:6]] == [
        "layers.*.q (2x)",
        "layers.*.k (2x)",
        "- (2x)",
        "layers.*.experts (2x)",
    ]
    assert lines[-2:] == ["  layers.*.gain (2x): taken by mul", "  head: lost at mul"]


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda p, x: x @ p["w"][:, 0], "the weight enters as a vector"),
        (lambda p, x: torch.einsum("td,df->f", x, p["w"]), "sums over an axis of one operand alone"),
        (lambda p, x: torch.einsum("td,ef->tdef", x, p["w"]), "contracts over nothing"),
        (lambda p, x: torch.einsum("td,ff->td", x, p["w"][:8]), "takes a diagonal"),
        (lambda p, x: torch.einsum("td,df,ef->te", x, p["w"], p["w"]), "einsum of 3 operands"),
        (lambda p, x: torch.mm(x, p["w"], out=torch.empty(5, 8)), "writes into out="),
        (lambda p, x: F.grouped_mm(p["w"].T, x.T, offs=OFFS * 10), "the weight is not stacked by groups"),
        (lambda p, x: torch.tensordot(x, p["w"], 1), "not one of the products that are replaced"),
    ],
)
def test_why_a_product_stays(fn, why):
    """Each of these runs as it did; the report says why."""
    p = {"w": randn(64, 8)}
    (product,) = explain(fn, [("w", MXFP8)], p, X).products
    assert product.recipe is None
    assert product.why.startswith(why)
    with pytest.warns(UserWarning, match="rule 'w'"):
        assert torch.equal(low_precision(fn, [("w", MXFP8)])(p, X), fn(p, X))


def test_integer_weights_stay():
    p = {"w": randn(64, 8).int()}
    (product,) = explain(lambda p, x: x.int() @ p["w"], [("w", MXFP8)], p, X).products
    assert (product.recipe, product.why) == (None, "operands are int32")


def test_multi_head_attention_hides_its_products():
    net = torch.nn.MultiheadAttention(64, 4, bias=False)
    p = {name: x.detach() for name, x in net.named_parameters()}
    report = explain(lambda p, x: functional_call(net, p, (x, x, x))[0], [("*", MXFP8)], p, X)
    assert [(product.path, product.op) for product in report.products] == [
        ("in_proj_weight @ out_proj.weight", "multi_head_attention_forward")
    ]
    assert report.fp8_share == 0


def test_under_transforms():
    """The forward products are listed once, and vmap multiplies their FLOPs."""

    def loss(p, x):
        return (x @ p["w"]).square().sum()

    p = {"w": randn(64, 8)}
    plain = explain(loss, [("w", MXFP8)], p, X)
    assert explain(grad(loss), [("w", MXFP8)], p, X) == plain
    (product,) = plain.products
    (batched,) = explain(vmap(grad(loss), (None, 0)), [("w", MXFP8)], p, X.expand(3, 5, 64)).products
    assert batched == product._replace(flops=3 * product.flops)


def test_products_asked_for_by_name():
    def fn(p, x):
        h = scaled_grouped_mm(x, p["w"].mT, OFFS, bias=p["b"], recipe=FP8_ROWWISE)
        return scaled_mm(h, p["v"], recipe=BF16)

    p = {"w": randn(3, 8, 64), "b": randn(8), "v": randn(8, 4)}
    report = explain(fn, [("*", MXFP8)], p, X)
    assert report.products == (
        ("w", "scaled_grouped_mm", ((5, 64), (3, 64, 8)), FP8_ROWWISE, "", 2 * 5 * 64 * 8),
        ("v", "scaled_mm", ((5, 8), (8, 4)), None, "asked for by the function", 2 * 5 * 8 * 4),
    )
    assert not report.unused


def test_inner_low_precision_is_seen():
    inner = low_precision(lambda p, x: x @ p["a"] + x @ p["b"], [("a", FP8_ROWWISE)])
    report = explain(inner, [("*", MXFP8)], {"a": randn(64, 8), "b": randn(64, 8, seed=1)}, X)
    assert [(p.path, p.op, p.recipe) for p in report.products] == [
        ("a", "scaled_mm", FP8_ROWWISE),
        ("b", "matmul", MXFP8),
    ]


def test_raises_as_the_call_does():
    with pytest.raises(ValueError, match="matches none"):
        explain(model, [("tail", MXFP8)], tree(), X)


def test_custom_recipe_in_the_table():
    recipe = MXFP8._replace(wgrad=FP8_ROWWISE.wgrad, dgrad=BF16.dgrad)
    assert "  mx/none/row  " in str(explain(lambda p, x: x @ p, [("", recipe)], randn(64, 8), X))
