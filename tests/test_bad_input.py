"""Wrong arguments of the products: one error each, which names the argument."""

from typing import NamedTuple

import pytest
import torch
from torch.func import grad, jacrev, vjp, vmap

from moefp8 import BF16, MXFP8, Gemm, MXArray, Recipe, quantize_mx, scaled_grouped_mm, scaled_mm
from moefp8._dispatch import Implementation, Request, choose

A, B, BIAS = torch.ones(8, 32), torch.ones(2, 32, 16), torch.ones(2, 16)
OFFS = torch.tensor([3, 8], dtype=torch.int32)


class Bad(NamedTuple):
    """Arguments that replace good ones, and the error they get."""

    name: str
    change: dict
    error: type[Exception]
    match: str


def array(axis=-1, **options):
    return quantize_mx(A, axis, **options)


def tracked(q):
    return MXArray(q.data.requires_grad_(), q.scale, q.axis, q.group)


GROUPED = [
    Bad("a has rank 1", {"a": A[0]}, ValueError, r"^a, b: expected 2D x 3D, .*\(32,\) and \(2, 32, 16\)"),
    Bad("b has rank 4", {"b": B[None]}, ValueError, r"^a, b: expected 2D x 3D"),
    Bad("3D x 2D", {"a": A[None], "b": B[0]}, ValueError, r"^a, b: expected 2D x 3D"),
    Bad("K differs", {"a": A[:, :31]}, ValueError, r"^a, b: contraction lengths differ.*\(8, 31\)"),
    Bad("K differs, 2D x 2D", {"b": A, "bias": None}, ValueError, r"^a, b: contraction lengths differ"),
    Bad("G differs", {"a": A.expand(3, 8, 32), "offs": None}, ValueError, "^a, b: numbers of groups"),
    Bad("offs with 3D x 3D", {"a": A.expand(2, 8, 32)}, ValueError, "^offs: .*leave offs out"),
    Bad("no offs", {"offs": None}, ValueError, "^offs: group ends are needed"),
    Bad("no offs, 2D x 2D", {"a": A.mT, "b": A, "offs": None, "bias": None}, ValueError, "^offs: "),
    Bad("offs are int64", {"offs": OFFS.long()}, TypeError, "^offs: expected an int32 tensor.*int64"),
    Bad("offs are a list", {"offs": [3, 8]}, TypeError, "^offs: expected an int32 tensor.*list"),
    Bad("offs too short", {"offs": OFFS[:1]}, ValueError, "^offs: .* each of 2 groups, got 1"),
    Bad("offs of rank 2", {"offs": OFFS[None]}, ValueError, r"^offs: expected shape \(G,\)"),
    Bad("offs elsewhere", {"offs": OFFS.to("meta")}, ValueError, "^offs: is on meta, the operands on cpu"),
    Bad("offs decrease", {"offs": OFFS.flip(0)}, ValueError, r"^offs: expected non-decreasing.*\[8, 3\]"),
    Bad("offs past the end", {"offs": OFFS + 1}, ValueError, r"^offs: .* in \[0, 8\], got \[4, 9\]"),
    Bad("offs negative", {"offs": OFFS - 4}, ValueError, r"^offs: .* in \[0, 8\], got \[-1, 4\]"),
    Bad("a is integer", {"a": A.int()}, TypeError, "^a: expected a float64, .*int32"),
    Bad("a is fp8", {"a": A.to(torch.float8_e4m3fn)}, TypeError, "^a: expected a float64, .*float8_e4m3fn"),
    Bad("b is integer", {"b": B.long()}, TypeError, "^b: expected a float64, .*int64"),
    Bad("b is float64", {"b": B.double()}, TypeError, "^b: is float64, .* quantises fwd, dgrad, wgrad"),
    Bad("a is float64", {"a": A.double()}, TypeError, "^a: is float64, but recipe quantises"),
    Bad("b is quantised", {"b": quantize_mx(B, -2)}, TypeError, "^b: expected a high-precision tensor"),
    Bad("b elsewhere", {"b": B.to("meta")}, ValueError, "^b: is on meta, a on cpu"),
    Bad("bias of M", {"bias": torch.ones(8)}, ValueError, r"^bias: .* \(16,\) or \(2, 16\), got \(8,\)"),
    Bad("bias of rank 3", {"bias": BIAS[None]}, ValueError, r"^bias: expected shape"),
    Bad("bias is integer", {"bias": BIAS.int()}, TypeError, "^bias: expected a float64, .*int32"),
    Bad("bias elsewhere", {"bias": BIAS.to("meta")}, ValueError, "^bias: is on meta"),
    Bad("bias, 2D x 2D", {"a": A.mT, "b": A, "bias": BIAS}, ValueError, "^bias: is not defined"),
    Bad("array along M", {"a": array(0)}, ValueError, "^a: .* quantised along K .*got axis -2"),
    Bad("array in E5M2", {"a": array(dtype=torch.float8_e5m2)}, ValueError, "^a: is an MXArray of .*e5m2"),
    Bad("array and BF16", {"a": array(), "recipe": BF16}, ValueError, "^a: is an MXArray .*format 'none'"),
    Bad("array, 2D x 2D", {"a": quantize_mx(A.mT), "b": A, "bias": None}, ValueError, "^a: an MXArray is"),
    Bad("array with a gradient", {"a": tracked(array())}, TypeError, r"^a: .*quantize_mx\(a.detach\(\)\)"),
    Bad("out_dtype", {"out_dtype": torch.int32}, TypeError, "^out_dtype: expected float64.*int32"),
    Bad("recipe is a name", {"recipe": "mxfp8"}, TypeError, "^recipe: .* such as moefp8.MXFP8"),
    Bad("recipe of tuples", {"recipe": Recipe(("mx",))}, TypeError, "^recipe.fwd: expected a Gemm"),
    Bad("group of 48", {"recipe": Recipe(dgrad=Gemm(group=48))}, ValueError, "^recipe.dgrad: group: .*48"),
    Bad("group of 0", {"recipe": Recipe(Gemm(group=0))}, ValueError, "^recipe.fwd: group: "),
    Bad("unknown rule", {"recipe": Recipe(wgrad=Gemm(rule="even"))}, ValueError, "^recipe.wgrad: rule: "),
    Bad("unknown format", {"recipe": Recipe(Gemm(format="mx4"))}, ValueError, "^recipe.fwd: format: "),
    Bad("element dtype", {"recipe": Recipe(Gemm(dtype=torch.int8))}, TypeError, "^recipe.fwd: dtype: "),
    Bad("promote of 100", {"recipe": Recipe(Gemm(promote=100))}, ValueError, "^recipe.fwd: promote: .*100"),
    Bad("unknown implementation", {"implementation": "cutlass"}, ValueError, "^implementation: .*cutlass"),
    Bad("no implementation", {"implementation": ()}, ValueError, "^implementation: expected one or more"),
]  # fmt: skip


@pytest.mark.parametrize("bad", GROUPED, ids=lambda bad: bad.name)
def test_grouped(bad):
    good = {"a": A, "b": B, "offs": OFFS, "bias": BIAS, "recipe": MXFP8}
    arguments = {**good, **bad.change}
    with pytest.raises(bad.error, match=bad.match):
        scaled_grouped_mm(arguments.pop("a"), arguments.pop("b"), arguments.pop("offs"), **arguments)
    scaled_grouped_mm(A, B, OFFS, bias=BIAS)  # the good ones are


DENSE = [
    Bad("b of rank 3", {"b": B}, ValueError, r"^a, b: expected shapes \(..., K\) and \(K, N\)"),
    Bad("a of rank 0", {"a": A[0, 0]}, ValueError, r"^a, b: expected shapes"),
    Bad("K differs", {"a": A[:, :31]}, ValueError, r"^a, b: expected shapes .*\(8, 31\) and \(32, 16\)"),
    Bad(
        "bias per group",
        {"bias": BIAS},
        ValueError,
        r"^bias: expected shape \(N,\) = \(16,\), got \(2, 16\)",
    ),
    Bad("a is integer", {"a": A.long()}, TypeError, "^a: expected a float64, .*int64"),
    Bad("b is float64", {"b": B[0].double()}, TypeError, "^b: is float64, but recipe quantises"),
    Bad("array along M", {"a": array(0)}, ValueError, "^a: expected an MXArray quantised along K"),
    Bad("unknown implementation", {"implementation": "cutlass"}, ValueError, "^implementation: "),
]


@pytest.mark.parametrize("bad", DENSE, ids=lambda bad: bad.name)
def test_dense(bad):
    arguments = {"a": A, "b": B[0], "bias": BIAS[0], **bad.change}
    with pytest.raises(bad.error, match=bad.match):
        scaled_mm(arguments.pop("a"), arguments.pop("b"), **arguments)


# --- quantised trees under differentiation -------------------------------------------------------


def loss(a):
    return scaled_grouped_mm(a, B, OFFS).sum()


def test_a_quantised_tree_is_not_differentiated():
    """Its scales are integers, which torch refuses: fp8 and E8M0 leaves alone it would accept."""
    for transform in (grad(loss), jacrev(loss), lambda q: vjp(loss, q)):
        with pytest.raises(
            RuntimeError, match="only Tensors of floating point dtype can require gradients"
        ):
            transform(array())


NO_GRADIENT = pytest.raises(TypeError, match=r"^a: a quantised array has no gradient")


def test_quantised_elements_are_not_differentiated():
    q = array()
    with NO_GRADIENT:
        grad(lambda data: loss(MXArray(data, q.scale, -1, 32)))(q.data)


@pytest.mark.usefixtures("fresh_compiler")
def test_no_gradient_through_a_quantised_operand():
    """``quantize_mx`` inside the loss would silently cut the gradient of ``a``."""
    with NO_GRADIENT:
        grad(lambda a: loss(quantize_mx(a)))(A)
    with NO_GRADIENT:
        grad(lambda a: scaled_mm(quantize_mx(a), B[0]).sum())(A)
    with NO_GRADIENT:
        vmap(grad(lambda a: loss(quantize_mx(a))))(A[None])
    with NO_GRADIENT:
        grad(lambda a: vmap(lambda a: loss(quantize_mx(a)))(a).sum())(A[None])
    with NO_GRADIENT:
        torch.compile(grad(lambda a: loss(quantize_mx(a))), backend="aot_eager")(A)
    with NO_GRADIENT:
        loss(quantize_mx(A.clone().requires_grad_()))


def test_the_advice_of_that_error_works():
    a = A.clone().requires_grad_()
    b = B.clone().requires_grad_()
    scaled_grouped_mm(quantize_mx(a.detach()), b, OFFS).sum().backward()
    assert a.grad is None
    assert b.grad is not None


# --- choosing an implementation ------------------------------------------------------------------


def refusing(name, reason):
    return Implementation(name, lambda request: reason, *(None,) * 10)


REQUEST = Request(
    "dense",
    torch.device("cpu"),
    (torch.float32,) * 2,
    MXFP8,
    torch.float32,
    (4, 32),
    (32, 8),
    None,
    False,
)
REGISTRY = {
    x.name: x
    for x in (refusing("no", "wants a GPU"), refusing("never", "is a test"), refusing("yes", None))
}


def test_the_first_that_serves():
    assert choose(None, [REQUEST], REGISTRY).name == "yes"
    assert choose(["never", "yes"], [REQUEST], REGISTRY).name == "yes"


def test_one_refusal_is_raised_as_it_is():
    with pytest.raises(NotImplementedError, match=r"^implementation 'no': wants a GPU$"):
        choose("no", [REQUEST], REGISTRY)


def test_all_refusals_are_raised_together():
    with pytest.raises(ExceptionGroup, match="none can serve") as raised:
        choose(["no", "never"], [REQUEST], REGISTRY)
    reasons = [str(error) for error in raised.value.exceptions]
    assert reasons == ["implementation 'no': wants a GPU", "implementation 'never': is a test"]
    assert all(isinstance(error, NotImplementedError) for error in raised.value.exceptions)


def test_a_recipe_is_data():
    """Hashable, comparable, printable, edited with ``_replace``."""
    edited = MXFP8._replace(wgrad=MXFP8.wgrad._replace(rule="floor"))
    assert edited != MXFP8
    assert len({edited, MXFP8, Recipe()}) == 2
    assert eval(repr(MXFP8), {"Recipe": Recipe, "Gemm": Gemm, "torch": torch}) == MXFP8
