"""Weights quantised once: the bits of quantising on the fly, under every transform; stale copies raise."""

import functools

import pytest
import torch
import torch.utils._pytree as pytree
from moe_oracle import VARIANTS, D, E, H, make, tokens
from specs import Layout, randn
from torch.func import grad, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from moefp8 import BF16, MXFP8, MXFP8_EXACT, MXFP8_WGRAD_HP, expert_ffn, moe_ffn, quantize_params, remat
from moefp8.kernels import sm90
from moefp8.recipe import FP8_ROWWISE, PRESETS

variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
recipes = pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS)
VARIANT = VARIANTS["biases"]


def layer(params, quantized, x, config=VARIANT.config, recipe=MXFP8):
    return moe_ffn(params, x, config=config, recipe=recipe, quantized=quantized)[0]


def loss(params, quantized, x):
    return layer(params, quantized, x).square().sum()


def bits(x):
    return x.contiguous().view(torch.uint8)


def same(got, want):
    got, want = pytree.tree_leaves_with_path(got), pytree.tree_leaves(want)
    assert len(got) == len(want) > 0
    for (path, a), b in zip(got, want, strict=True):
        assert torch.equal(bits(a), bits(b)), pytree.keystr(path)


def setup(seed=0, dtype=torch.float32):
    params = make(VARIANT, seed, dtype)
    return params, quantize_params(params), tokens(11, dtype=dtype)


# --- the same bits -------------------------------------------------------------------------------


@variants
@recipes
def test_output_and_gradients_are_those_of_quantising_on_the_fly(variant, recipe):
    params, x, g = make(variant, dtype=torch.bfloat16), tokens(11), tokens(11, seed=2)
    x, g = x.bfloat16(), g.bfloat16()
    q = quantize_params(params, recipe)
    got, got_vjp = vjp(lambda p, x: layer(p, q, x, variant.config, recipe), params, x)
    want, want_vjp = vjp(lambda p, x: layer(p, None, x, variant.config, recipe), params, x)
    assert torch.equal(got, want)
    same(got_vjp(g), want_vjp(g))


def check_experts(implementation, recipe, dtype, device):
    layout = Layout("tail", (5, 0, 9), 2)
    params = {
        "w1": randn(3, 48, 32, seed=1),
        "w2": randn(3, 32, 48, seed=2),
        "w3": randn(3, 48, 32, seed=3),
    }
    params = {name: p.to(device, dtype) for name, p in params.items()}
    x, g = (randn(layout.rows, 32, seed=seed).to(device, dtype) for seed in (4, 5))
    offs = layout.offs(device)
    q = quantize_params(params, recipe, implementation=implementation)
    assert q.source.implementation == implementation
    options = {"recipe": recipe, "implementation": implementation}
    got, got_vjp = vjp(lambda p, x: expert_ffn(p, x, offs, recipe=recipe, quantized=q), params, x)
    want, want_vjp = vjp(lambda p, x: expert_ffn(p, x, offs, **options), params, x)
    assert torch.equal(got, want)
    same(got_vjp(g), want_vjp(g))


@pytest.mark.parametrize("recipe", [MXFP8, FP8_ROWWISE, MXFP8_WGRAD_HP], ids=["mx", "row", "wgrad hp"])
def test_kernels_interpreted(recipe):
    """The interpreter is slow: of one product alone the result, and all that the backward will read."""
    w, x = randn(2, 16, 32), randn(7, 32)
    arguments = (x, w.mT, torch.tensor([3, 7], dtype=torch.int32), None, recipe, torch.float32)
    got, got_kept = sm90.rows_forward(*arguments, sm90.quantize_weights(w, recipe))
    want, want_kept = sm90.rows_forward(*arguments)
    assert torch.equal(got, want)
    tables = 2  # of the plan, whose unused entries are not compared here
    same([bits(x) for x in got_kept[tables:]], [bits(x) for x in want_kept[tables:]])


@recipes
@pytest.mark.gpu
def test_kernels(recipe):
    check_experts("triton", recipe, torch.bfloat16, "cuda")


class Quantisations(TorchDispatchMode):
    """Counts what is quantised, by number of axes: weights have three."""

    def __init__(self):
        super().__init__()
        self.weights = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.weights += func is torch.ops.moefp8.quantize.default and args[0].ndim == 3
        return func(*args, **(kwargs or {}))


def test_weights_are_quantised_once_for_all_micro_batches():
    params, q, x = setup()
    with Quantisations() as count:
        got = [grad(loss, (0, 2))(params, q, part) for part in x.split(4)]
    assert count.weights == 0
    with Quantisations() as count:
        want = [grad(loss, (0, 2))(params, None, part) for part in x.split(4)]
    assert count.weights == len(want) * 6 * 2  # three weights, both ways, of the experts and the shared one
    same(got, want)


@recipes
def test_takes_two_bytes_an_element_and_the_scales(recipe):
    """A scale of one byte to 32 elements, or of four to a row. What is not quantised is not copied."""
    params = {
        "w1": torch.ones(2, 64, 64),
        "w2": torch.ones(2, 64, 64),
        "w3": torch.ones(2, 64, 64),
    }
    copies = pytree.tree_leaves(quantize_params(params, recipe).copies)
    size = sum(x.numel() * x.element_size() for x in copies)
    elements, ways = 3 * 2 * 64 * 64, sum(gemm.format != "none" for gemm in recipe[:2])
    scales = {"mx": elements // 32, "row": 4 * elements // 64, "none": 0}[recipe.fwd.format]
    assert size == ways * (elements + scales)


def test_the_weights_as_they_are_passed_are_quantised():
    """Masters in float32, the layer in bfloat16: cast, then quantise."""
    masters, _, x = setup()
    low = {name: pytree.tree_map(torch.Tensor.bfloat16, p) for name, p in masters.items()}
    q, x = quantize_params(low), x.bfloat16()

    def cast_loss(masters, q):
        low = {name: pytree.tree_map(torch.Tensor.bfloat16, p) for name, p in masters.items()}
        return loss(low, q, x)

    gradient = grad(cast_loss)(masters, q)
    same(gradient, grad(cast_loss)(masters, None))
    assert gradient["w1"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"quantized: was made from params\['w1'\] .* torch.bfloat16, got"):
        layer(masters, q, x)


# --- transforms ----------------------------------------------------------------------------------


def test_it_is_a_pytree():
    _, q, _ = setup()
    leaves, spec = pytree.tree_flatten(q)
    assert all(torch.is_tensor(leaf) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.source == q.source
    assert again.shared.source == q.shared.source
    same(again, q)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(q)]
    assert {".copies[0][0]", ".sample", ".shared.copies[2][3]"} <= set(paths)


def test_backward_of_parameters_that_require_grad():
    params, _, x = setup()
    params = pytree.tree_map(lambda p: p.requires_grad_(), params)
    q = quantize_params(params)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(q))
    loss(params, q, x).backward()
    got = pytree.tree_map(lambda p: p.grad, params)
    same(got, grad(loss)(pytree.tree_map(torch.Tensor.detach, params), None, x))


def test_made_inside_the_loss_it_is_a_constant():
    params, _, x = setup()
    got = grad(lambda params: loss(params, quantize_params(params), x))(params)
    same(got, grad(loss)(params, None, x))


def test_vmap_over_data():
    params, q, _ = setup()
    x = tokens(3, 5).float()
    got = vmap(grad(loss), (None, None, 0))(params, q, x)
    same(got, vmap(grad(loss), (None, None, 0))(params, pytree.tree_map(torch.clone, q), x))
    for i, one in enumerate(x):
        for a, b in zip(
            pytree.tree_leaves(got), pytree.tree_leaves(grad(loss)(params, q, one)), strict=True
        ):
            torch.testing.assert_close(a[i], b)  # the router sums in another order under vmap


def test_vmap_over_an_ensemble_and_its_copies():
    """Made under vmap or stacked afterwards, they serve the ensemble they are of."""
    each = [make(VARIANT, seed, torch.float32) for seed in range(3)]
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *each)
    x = tokens(5).float()
    plain = vmap(grad(lambda p: loss(p, None, x)))(stacked)
    mapped = vmap(quantize_params)(stacked)
    gathered = pytree.tree_map(lambda *leaves: torch.stack(leaves), *map(quantize_params, each))
    for q in (mapped, gathered):
        same(vmap(grad(loss), (0, 0, None))(stacked, q, x), plain)
    with pytest.raises(ValueError, match="were they stacked and not mapped over"):
        layer(each[0], gathered, x)


@pytest.mark.parametrize("transform", ["backward", "grad", "vmap of grad"])
def test_compile(transform, fresh_compiler):
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    params, q, x = setup()
    if transform == "backward":
        leaves = pytree.tree_map(lambda p: p.clone().requires_grad_(), params)
        compiled(loss)(leaves, q, x).backward()
        got = pytree.tree_map(lambda p: p.grad, leaves)
        same(got, grad(loss)(params, None, x))
    elif transform == "grad":
        same(compiled(grad(loss))(params, q, x), grad(loss)(params, None, x))
    else:
        x, in_dims = tokens(3, 5).float(), (None, None, 0)
        same(compiled(vmap(grad(loss), in_dims))(params, q, x), vmap(grad(loss), in_dims)(params, q, x))


def test_a_compiled_step_takes_new_copies_without_compiling_again(fresh_compiler):
    params, q, x = setup()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(loss, backend=counter, fullgraph=True)
    step(params, q, x)
    params = pytree.tree_map(lambda p: p * 2, params)
    assert torch.equal(step(params, quantize_params(params), x), loss(params, None, x))
    assert counter.frame_count == 1


def test_make_fx():
    params, q, x = setup()
    traced = make_fx(grad(loss))(params, q, x)
    same(traced(params, q, x), grad(loss)(params, None, x))


def test_remat_reuses_it():
    params, q, x = setup()
    with Quantisations() as count:
        got = grad(remat(loss))(params, q, x)
    assert count.weights == 0
    same(got, grad(loss)(params, None, x))


def test_checkpoint():
    params, _, x = setup()
    params = pytree.tree_map(lambda p: p.requires_grad_(), params)
    q = quantize_params(params)
    torch.utils.checkpoint.checkpoint(loss, params, q, x, use_reentrant=False).backward()
    got = pytree.tree_map(lambda p: p.grad, params)
    same(got, grad(loss)(pytree.tree_map(torch.Tensor.detach, params), None, x))


def test_it_cannot_be_differentiated():
    """Float32 scales torch would differentiate; power-of-two ones are integers, which it refuses itself."""
    params, _, x = setup()
    q = quantize_params(params, FP8_ROWWISE)
    differentiable = [i for i, leaf in enumerate(pytree.tree_leaves(q)) if leaf.is_floating_point()]
    leaves, spec = pytree.tree_flatten(q)

    def of_copies(chosen):
        merged = list(leaves)
        for i, leaf in zip(differentiable, chosen, strict=True):
            merged[i] = leaf
        quantized = pytree.tree_unflatten(merged, spec)
        return layer(params, quantized, x, recipe=FP8_ROWWISE).sum()

    with pytest.raises(TypeError, match="quantized: quantised weights have no gradient, and one is asked"):
        grad(of_copies)([leaves[i] for i in differentiable])
    with pytest.raises(RuntimeError, match="only Tensors of floating point dtype can require gradients"):
        grad(loss, 1)(params, quantize_params(params), x)


# --- stale copies --------------------------------------------------------------------------------


def changed(params, key, by):
    return params | {key: by(params[key])}


def one_expert(p):
    """An optimizer step on one expert alone, as small as float32 can see everywhere."""
    step = torch.zeros_like(p)
    step[3] = 1e-5
    return p + step


@pytest.mark.parametrize("key", ["w1", "w2", "w3"])
@pytest.mark.parametrize("by", [one_expert, lambda p: 1.001 * p, torch.neg], ids=["one", "all", "sign"])
def test_changed_weights_raise(key, by):
    params, q, x = setup()
    with pytest.raises(ValueError, match="quantized: is stale, params has changed since quantize_params"):
        layer(changed(params, key, by), q, x)
    layer(params, q, x)


def test_weights_changed_in_place_raise():
    params, q, x = setup()
    params["shared"]["w2"].mul_(0.999)
    with pytest.raises(ValueError, match=r"quantized: is stale, params\['shared'\] has changed"):
        layer(params, q, x)


def test_one_stale_member_of_an_ensemble_raises():
    each = [make(VARIANT, seed, torch.float32) for seed in range(3)]
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *each)
    q, x = vmap(quantize_params)(stacked), tokens(5).float()
    stacked["w3"][1, E - 1] *= 1.5
    with pytest.raises(ValueError, match="quantized: is stale"):
        vmap(layer, (0, 0, None))(stacked, q, x)


def test_a_compiled_function_notices_as_well(fresh_compiler):
    params, q, x = setup()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(params, q, x)
    with pytest.raises(ValueError, match="quantized: is stale"):
        compiled(changed(params, "w2", one_expert), q, x)


def test_the_same_weights_in_other_tensors_pass():
    """Cloned, cast once more, laid out anew, with a NaN: stale is about values, not about identity."""
    params, _, x = setup()
    params["w1"][0, 0, 0] = torch.nan
    q = quantize_params(params)
    layer({k: pytree.tree_map(torch.clone, p) for k, p in params.items()}, q, x)
    layer({k: pytree.tree_map(lambda p: p.double().float(), p) for k, p in params.items()}, q, x)
    other_order = {k: p.mT.contiguous().mT if k in ("w1", "w2", "w3") else p for k, p in params.items()}
    layer(other_order, q, x)
    layer(changed(params, "b1", torch.neg), q, x)  # biases are not quantised
    layer(changed(params, "router", torch.neg), q, x)


@pytest.mark.gpu
def test_a_stale_copy_on_a_gpu_is_noticed_without_waiting():
    """The check itself must not synchronise; that it fires would end this process's CUDA context, so it
    fires in a process of its own."""
    import subprocess
    import sys

    code = """
import torch
from moefp8 import expert_ffn, quantize_params
make = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)
params = {"w1": make(2, 64, 32), "w2": make(2, 32, 64), "w3": make(2, 64, 32)}
x, offs = make(8, 32), torch.tensor([3, 8], dtype=torch.int32, device="cuda")
q = quantize_params(params)
expert_ffn(params, x, offs, quantized=q)
torch.cuda.synchronize()
torch.cuda.set_sync_debug_mode("error")
expert_ffn(params, x, offs, quantized=q)
params["w1"].mul_(1.5)
expert_ffn(params, x, offs, quantized=q)
torch.cuda.set_sync_debug_mode("default")
print("not waited for")
torch.cuda.synchronize()
print("not noticed")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n") == ["not waited for", ""]
    assert done.returncode != 0
    assert "quantized: is stale, params has changed" in done.stderr


# --- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recipe": MXFP8_EXACT}, ValueError, "quantized: was made for Recipe.* but recipe is Recipe"),
        (
            {"implementation": "triton"},
            ValueError,
            "quantized: was made by implementation 'reference', got",
        ),
        (
            {"quantized": {"w1": 0}},
            TypeError,
            "quantized: expected the result of quantize_params, got dict",
        ),
    ],
)
def test_copies_for_something_else(options, error, message):
    params, q, x = setup()
    with pytest.raises(error, match=message):
        moe_ffn(params, x, **{"config": VARIANT.config, "quantized": q} | options)


def test_copies_of_a_layer_of_another_shape():
    params, _, x = setup()
    wider = make(VARIANT._replace(config=VARIANT.config._replace(hidden=2 * H)), dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"made from params\['w1'\] of shape \({E}, {2 * H}, {D}\)"):
        layer(params, quantize_params(wider), x)


def test_the_shared_expert_has_to_be_among_them():
    params, _, x = setup()
    q = quantize_params({k: p for k, p in params.items() if k != "shared"})
    with pytest.raises(ValueError, match="quantized: was made from parameters without 'shared'"):
        layer(params, q, x)


@pytest.mark.parametrize(
    ("params", "options", "error", "message"),
    [
        ({}, {}, ValueError, r"params\['w1'\]: expected a tensor of shape \(E, H, D\)"),
        ({"w1": torch.ones(2, 3, 4)}, {}, ValueError, r"params\['w2'\]: is missing"),
        ({"w1": torch.ones(2, 3, 4).long()}, {}, TypeError, r"params\['w1'\]: expected a float64"),
        ({}, {"recipe": "mxfp8"}, TypeError, "recipe: expected a Recipe"),
    ],
)
def test_wrong_parameters(params, options, error, message):
    with pytest.raises(error, match=message):
        quantize_params(params, **options)


def test_float64_and_what_it_allows():
    params = make(VARIANT)
    with pytest.raises(TypeError, match=r"params\['w1'\]: is float64, but recipe quantises"):
        quantize_params({k: p for k, p in params.items() if k != "shared"})
    q = quantize_params(params, BF16)
    same(layer(params, q, tokens(5), recipe=BF16), layer(params, None, tokens(5), recipe=BF16))


def test_the_dtype_of_the_tokens_decides_too():
    """Weights in float32 and tokens in bfloat16: said here, because it is not known here."""
    params, _, x = setup()
    q = quantize_params(params, MXFP8_WGRAD_HP, dtype=torch.bfloat16)
    got = layer(params, q, x.bfloat16(), recipe=MXFP8_WGRAD_HP)
    assert torch.equal(got, layer(params, None, x.bfloat16(), recipe=MXFP8_WGRAD_HP))


def test_it_prints_what_it_is_of():
    _, q, _ = setup()
    assert repr(q).startswith(f"QuantizedParams(shapes=(({E}, {H}, {D}), ({E}, {D}, {H}), ({E}, {H}, {D}))")
