"""Wrong arguments of the numeric functions: one error each, naming the argument and what it was."""

import pytest
import torch

from moefp8 import dequantize_mx, mx_error_bound, quantize_mx, quantize_mx_jagged
from moefp8.mx import MXArray

X = torch.ones(4, 40)
Q = quantize_mx(X)
OFFS = torch.tensor([1, 4], dtype=torch.int32)


def both(**options):
    """The same wrong option given to both quantisers."""
    return [lambda: quantize_mx(X, **options), lambda: quantize_mx_jagged(X, OFFS, **options)]


def check(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_x_of_no_float_type(dtype):
    x = torch.ones(4, 40).to(dtype)
    message = f"x: expected a float64, float32, bfloat16 or float16 tensor, got {dtype}"
    for call in (
        lambda: quantize_mx(x),
        lambda: quantize_mx_jagged(x, OFFS),
        lambda: mx_error_bound(x, Q),
    ):
        check(call, TypeError, message)


def test_x_that_is_no_tensor():
    check(lambda: quantize_mx([1.0]), TypeError, "x: expected a float64, .* got list")
    check(lambda: quantize_mx(Q), TypeError, "x: expected a float64, .* got MXArray")


@pytest.mark.parametrize(("x", "axis"), [(X, 2), (X, -3), (torch.tensor(1.0), -1), (torch.tensor(1.0), 0)])
def test_axis_out_of_range(x, axis):
    message = rf"axis: {axis} is out of range for x of shape \({', '.join(map(str, x.shape))}\)"
    check(lambda: quantize_mx(x, axis), ValueError, message)


@pytest.mark.parametrize("axis", [0.0, "0", None, (0,)])
def test_axis_that_is_no_int(axis):
    check(lambda: quantize_mx(X, axis), TypeError, "axis: expected an int, got")


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float8_e4m3fnuz, torch.float8_e8m0fnu, "float8_e4m3fn"]
)
def test_dtype_of_no_element_format(dtype):
    for call in both(dtype=dtype):
        check(call, TypeError, f"dtype: expected torch.float8_e4m3fn or torch.float8_e5m2, got {dtype}")


@pytest.mark.parametrize("rule", ["ceil", "RCEIL", "fp32", "", None])
def test_unknown_rule(rule):
    for call in both(rule=rule):
        check(call, ValueError, f"rule: expected one of 'rceil', 'floor', got {rule!r}")


@pytest.mark.parametrize("group", [0, 1, 16, 48, -2, -32, 32.0, "32", None, True])
def test_group_that_is_no_multiple_of_32(group):
    for call in both(group=group):
        check(call, ValueError, f"group: expected a multiple of 32, or -1 for the whole axis, got {group}")


@pytest.mark.parametrize("q", [X, X.to(torch.float8_e4m3fn), (Q.data, Q.scale), None])
def test_q_that_is_no_mxarray(q):
    message = f"q: expected an MXArray, got {type(q).__name__}"
    check(lambda: dequantize_mx(q), TypeError, message)
    check(lambda: mx_error_bound(X, q), TypeError, message)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.complex64, "float32"])
def test_dequantising_to_no_float_type(dtype):
    message = f"dtype: expected float64, float32, bfloat16 or float16, got {dtype}"
    check(lambda: dequantize_mx(Q, dtype), TypeError, message)


def test_bound_of_another_shape():
    message = r"q: expected the shape of x, \(4, 39\), got \(4, 40\)"
    check(lambda: mx_error_bound(X[:, 1:], Q), ValueError, message)


# --- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40,), (2, 4, 40), ()])
def test_jagged_x_that_is_no_matrix(shape):
    message = r"x: expected shape \(M, K\), got \("
    check(lambda: quantize_mx_jagged(torch.ones(shape), OFFS), ValueError, message)


@pytest.mark.parametrize("offs", [OFFS.long(), OFFS.float(), [1, 4]])
def test_offs_of_another_type(offs):
    got = getattr(offs, "dtype", "list")
    message = f"offs: expected an int32 tensor of group ends, got {got}"
    check(lambda: quantize_mx_jagged(X, offs), TypeError, message)


@pytest.mark.parametrize("offs", [OFFS[:0], OFFS[None], OFFS[0]])
def test_offs_of_another_shape(offs):
    check(
        lambda: quantize_mx_jagged(X, offs), ValueError, r"offs: expected shape \(G,\) with G >= 1, got \("
    )


def test_offs_on_another_device():
    message = "offs: is on meta, the operands on cpu"
    check(lambda: quantize_mx_jagged(X, OFFS.to("meta")), ValueError, message)


BAD_ENDS = [[4, 1], [-1, 4], [1, 5], [0, 2, 1]]
ENDS_MESSAGE = r"offs: expected non-decreasing group ends in \[0, 4\], got \["


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("ends", BAD_ENDS)
def test_ends_that_are_no_layout(ends, group):
    """Seen without a host read: the tensor is on the host."""
    offs = torch.tensor(ends, dtype=torch.int32)
    check(lambda: quantize_mx_jagged(X, offs, group=group), ValueError, ENDS_MESSAGE)


def test_ends_that_are_no_layout_under_vmap():
    offs = torch.tensor([[1, 4], [4, 1]], dtype=torch.int32)
    message = r"offs: expected non-decreasing group ends in \[0, 4\], got \[\[1, 4\], \[4, 1\]\]"
    batched = torch.vmap(lambda o: quantize_mx_jagged(X, o)[1])
    check(lambda: batched(offs), ValueError, message)


# --- derivatives ---------------------------------------------------------------------------------


def dequantized_codes(x):
    return dequantize_mx(MXArray(x.to(torch.float8_e4m3fn), Q.scale, Q.axis, Q.group), torch.float32)


# The first jvp of a process makes torch 2.13 use its own deprecated torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("quantize_mx", lambda x: quantize_mx(x).data.float()),
        ("quantize_mx_jagged", lambda x: quantize_mx_jagged(x, OFFS)[0].data.float()),
        ("dequantize_mx", dequantized_codes),
    ],
)
def test_differentiating_through_quantisation(name, fn):
    message = rf"^{name}: has no useful derivative; for a straight-through estimate write x \+ "
    for call in (
        lambda: torch.func.grad(lambda x: fn(x).sum())(X),
        lambda: fn(X.clone().requires_grad_()).sum().backward(),
        lambda: torch.func.jvp(fn, (X,), (X,)),
    ):
        check(call, NotImplementedError, message)


def test_the_straight_through_estimate_it_recommends():
    def fake(x):
        return (x + (dequantize_mx(quantize_mx(x), x.dtype) - x).detach()).sum()

    assert torch.equal(torch.func.grad(fake)(X), torch.ones_like(X))


def test_a_quantised_tree_as_the_argument_of_grad():
    """torch refuses the uint8 scales; its data alone, the only float leaf, is refused by name."""

    def value(q):
        return dequantize_mx(q, torch.float32).sum()

    check(lambda: torch.func.grad(value)(Q), RuntimeError, "only Tensors of floating point dtype")
    data_alone = torch.func.grad(lambda data: value(MXArray(data, Q.scale, Q.axis, Q.group)))
    check(lambda: data_alone(Q.data), NotImplementedError, "dequantize_mx: has no useful derivative")
