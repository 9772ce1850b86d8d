"""``torch.func.vmap`` over data, weights, both, and group ends: the same as a loop."""

import functools

import pytest
import torch
from torch.func import vmap

from moefp8 import dequantize_mx, mx_error_bound, quantize_mx, quantize_mx_jagged

BATCH = 3


def check(case, mapped, in_dims=0):
    """Map the operands named by position in ``mapped`` along ``in_dims``, keep the others."""
    batched, single = case.operands(1, (BATCH,)), case.operands()
    operands = [batched[i].movedim(0, in_dims) if i in mapped else single[i] for i in case.argnums]
    dims = tuple(in_dims if i in mapped else None for i in case.argnums)
    loop = [
        case.call(*(batched[i][j] if i in mapped else single[i] for i in case.argnums))
        for j in range(BATCH)
    ]
    case.agree(vmap(case.call, dims)(*operands), torch.stack(loop))


def test_over_data(case):
    check(case, {0})


def test_over_weights(case):
    check(case, {1})


def test_over_both(case):
    check(case, {0, 1})


def test_over_everything_along_the_last_axis(case):
    check(case, set(case.argnums), -1)


def test_out_dims_and_chunks(case):
    operands = case.operands(1, (BATCH,))
    want = vmap(case.call)(*operands)
    case.agree(vmap(case.call, out_dims=-1)(*operands), want.movedim(0, -1))
    case.agree(vmap(case.call, chunk_size=2)(*operands), want)


def test_nested(case):
    """Every data set with every weight."""
    a, b, *bias = case.operands(1, (2,))
    bias = [x[0] for x in bias]
    pairs = vmap(vmap(lambda a, b: case.call(a, b, *bias), (None, 0)), (0, None))(a, b)
    loop = [[case.call(x, y, *bias) for y in b] for x in a]
    case.agree(pairs, torch.stack([torch.stack(row) for row in loop]))


def test_over_group_ends(case):
    if case.offs is None:
        return
    operands = case.operands()
    ends = torch.tensor(
        [[10, 10, 33], [0, 1, 40], [0, 0, 0]], dtype=torch.int32, device=case.backend.device
    )
    got = vmap(lambda offs: case.call(*operands, offs=offs))(ends)
    case.agree(got, torch.stack([case.call(*operands, offs=offs) for offs in ends]))


def test_a_batch_of_none(case):
    out = vmap(case.call)(*case.operands(1, (0,)))
    assert out.shape == (0, *case.op.out_shape)


# --- the quantisers, which have no derivative but do have a batch --------------------------------

quantized = pytest.mark.parametrize("group", [32, 64, -1])


def bits(x):
    return x.view(torch.uint8) if x.element_size() == 1 else x


def check_tree(got, loop):
    """Equal bits, float8 among them, leaf by leaf."""
    leaves = [torch.utils._pytree.tree_leaves(tree) for tree in loop]
    stacked = [torch.stack(entries) for entries in zip(*leaves, strict=True)]
    for x, y in zip(torch.utils._pytree.tree_leaves(got), stacked, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(bits(x), bits(y))


@quantized
@pytest.mark.parametrize("axis", [-1, 0])
def test_quantize_mx(axis, group):
    x = torch.randn(BATCH, 40, 72, generator=torch.Generator().manual_seed(0))
    got = vmap(lambda x: quantize_mx(x, axis, group=group))(x)
    loop = [quantize_mx(entry, axis, group=group) for entry in x]
    check_tree(got, loop)
    assert (got.axis, got.group) == (loop[0].axis, loop[0].group)
    check_tree(vmap(dequantize_mx)(got), [dequantize_mx(q) for q in loop])
    check_tree(vmap(mx_error_bound)(x, got), [mx_error_bound(v, q) for v, q in zip(x, loop, strict=True)])


@quantized
def test_quantize_mx_jagged(group):
    """Over tokens, over group ends, and over both."""
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([[5, 5, 38], [0, 32, 40]], dtype=torch.int32)
    f = functools.partial(quantize_mx_jagged, group=group)
    check_tree(vmap(f)(x, ends), [f(x[i], ends[i]) for i in range(2)])
    check_tree(vmap(f, (0, None))(x, ends[0]), [f(x[i], ends[0]) for i in range(2)])
    check_tree(vmap(f, (None, 0))(x[0], ends), [f(x[0], ends[i]) for i in range(2)])
