"""Nothing waits for the device: no value is read on the host, and forward and backward fit a CUDA graph."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from moe_oracle import VARIANTS, make, tokens
from specs import Layout, randn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vjp

from moefp8 import MoEConfig, init_moe_ffn, moe_ffn, quantize_params, scaled_grouped_mm
from moefp8.kernels.sm90 import in_fp8
from moefp8.recipe import PRESETS, Recipe

variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
recipes = pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS)


def step(params: Any, quantized: Any, x: Tensor, g: Tensor, config: MoEConfig, **options: Any) -> Any:
    """Output, statistics and all gradients of the layer."""

    def layer(params: Any, x: Tensor) -> Any:
        return moe_ffn(params, x, config=config, quantized=quantized, **options)

    y, pullback, stats = vjp(layer, params, x, has_aux=True)
    return y, stats, pullback(g)


# --- without a GPU -------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("with_copies", [False, True], ids=["", "quantized"])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_outside_of_the_leaf_operators_no_value_is_read(variant, implementation, with_copies):
    """A fake tensor has a shape and no values: whatever asks for one raises, on the host as on a GPU."""
    # Multiples of 16, as the kernels want them.
    config = variant.config._replace(hidden=32, shared_hidden=32 * bool(variant.config.shared_hidden))
    params = make(variant._replace(config=config), dtype=torch.bfloat16)
    x = tokens(6, dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        params, x = pytree.tree_map(mode.from_tensor, (params, x))
        q = quantize_params(params, implementation=implementation) if with_copies else None
        y, stats, (gradient, dx) = step(params, q, x, x, config, implementation=implementation)
    assert y.shape == dx.shape == x.shape
    assert stats.tokens_per_expert.shape == (config.num_experts,)
    assert gradient["w1"].shape == params["w1"].shape


# --- on the GPU ----------------------------------------------------------------------------------


@contextlib.contextmanager
def synchronising_raises() -> Iterator[None]:
    try:
        with warnings.catch_warnings():  # it warns of being a prototype
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Captured:
    """``fn`` recorded into a CUDA graph once, and replayed on other values of its arguments."""

    def __init__(self, fn: Callable[..., Any], *arguments: Any) -> None:
        self.arguments = pytree.tree_map(torch.clone, arguments)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles the kernels
            fn(*self.arguments)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = fn(*self.arguments)

    def __call__(self, *arguments: Any) -> Any:
        pytree.tree_map(lambda own, new: own.copy_(new), self.arguments, arguments)
        self.graph.replay()
        return pytree.tree_map(torch.clone, self.out)


def bits(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous().view(torch.uint8)


def check_replays(fn: Callable[..., Any], recorded: Any, replayed: list[Any]) -> None:
    graph = Captured(fn, *recorded)
    for arguments in (*replayed, recorded):
        got, want = graph(*arguments), fn(*arguments)
        for (path, a), b in zip(pytree.tree_leaves_with_path(got), pytree.tree_leaves(want), strict=True):
            assert torch.equal(bits(a), bits(b)), pytree.keystr(path)


def product(layout: Layout, recipe: Recipe, seed: int) -> tuple[Tensor, ...]:
    """x, w, group ends, cotangent and, where the product takes one, a bias."""
    num_groups = len(layout.sizes)
    shapes = [(layout.rows, 256), (num_groups, 192, 256), (layout.rows, 192)]
    shapes += [(num_groups, 192)] if in_fp8(recipe.fwd) else []
    x, w, g, *bias = (
        randn(*shape, seed=seed + i, dtype=torch.bfloat16).cuda() for i, shape in enumerate(shapes)
    )
    return (x, w, layout.offs("cuda"), g, *bias)


def product_step(recipe: Recipe) -> Callable[..., Any]:
    def step(x: Tensor, w: Tensor, offs: Tensor, g: Tensor, *bias: Tensor) -> Any:
        def forward(x: Tensor, w: Tensor, *bias: Tensor) -> Tensor:
            return scaled_grouped_mm(x, w.mT, offs, bias=bias[0] if bias else None, recipe=recipe)

        out, pullback = vjp(forward, x, w, *bias)
        return out, pullback(g)

    return step


@pytest.mark.gpu
@recipes
def test_a_captured_product_replays_with_other_groups(recipe):
    """The same number of rows, shared out otherwise: the grid is the graph's, the groups are not."""
    layouts = [
        Layout("", (300, 40, 1, 171)),
        Layout("", (0, 512, 0, 0)),
        Layout("", (7, 0, 350, 100), 55),
        Layout("", (0, 0, 0, 0), 512),
    ]
    recorded, *replayed = (product(layout, recipe, 10 * seed) for seed, layout in enumerate(layouts))
    check_replays(product_step(recipe), recorded, replayed)


def layer(seed: int, config: MoEConfig) -> tuple[Any, Tensor, Tensor]:
    """Parameters, tokens and a cotangent."""
    generator = torch.Generator().manual_seed(seed)
    params = init_moe_ffn(generator, config, expert_bias=True, dtype=torch.bfloat16, device="cuda")
    params["expert_bias"] += 0.1 * seed * torch.arange(config.num_experts, device="cuda")
    x, g = torch.randn(2, 300, config.dim, generator=generator).bfloat16().cuda()
    return params, x, g


CONFIGS = {
    "mixtral": MoEConfig(dim=256, hidden=192, num_experts=8, top_k=2),
    "deepseek-v3": MoEConfig(
        dim=256, hidden=192, num_experts=16, top_k=6, score="sigmoid", num_groups=4, top_groups=2,
        shared_hidden=128,
    ),
    "llama4": MoEConfig(
        dim=256, hidden=192, num_experts=8, top_k=1, score="sigmoid", normalize=False, scores_on="input",
        shared_hidden=192,
    ),
}  # fmt: skip
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.mark.gpu
@configs
@recipes
def test_a_captured_layer_replays_with_other_tokens_and_weights(config, recipe):
    """Routing included: other tokens go to other experts."""
    recorded, *replayed = (layer(seed, config) for seed in range(3))
    counts = [moe_ffn(p, x, config=config)[1].tokens_per_expert for p, x, _ in (recorded, *replayed)]
    assert not torch.equal(counts[0], counts[1])
    check_replays(lambda p, x, g: step(p, None, x, g, config, recipe=recipe), recorded, replayed)


@pytest.mark.gpu
@configs
def test_a_captured_layer_reads_weights_quantised_outside_of_it(config):
    """The copies are arguments like any other, and their check is recorded with the rest."""

    def run(params: Any, quantized: Any, x: Tensor, g: Tensor) -> Any:
        return step(params, quantized, x, g, config)

    recorded, *replayed = (
        (p, quantize_params(p), x, g) for p, x, g in (layer(s, config) for s in range(3))
    )
    check_replays(run, recorded, replayed)


@pytest.mark.gpu
@recipes
def test_a_product_reads_nothing_on_the_host(recipe):
    arguments, run = product(Layout("", (300, 0, 41), 20), recipe, 0), product_step(recipe)
    run(*arguments)  # compiles the kernels, which may synchronise
    with synchronising_raises():
        out, gradients = run(*arguments)
    assert all(x.isfinite().all() for x in (out, *gradients))


@pytest.mark.gpu
@configs
@recipes
def test_a_layer_reads_nothing_on_the_host(config, recipe):
    params, x, g = layer(0, config)
    q = quantize_params(params, recipe)
    for quantized in (None, q):
        step(params, quantized, x, g, config, recipe=recipe)
    with synchronising_raises():
        results = [step(params, quantized, x, g, config, recipe=recipe) for quantized in (None, q)]
        quantize_params(params, recipe)
    assert torch.equal(results[0][0], results[1][0])
