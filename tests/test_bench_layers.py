"""What the benchmark of the MoE layer measures: the baseline, the routing, bytes, and where time goes."""

import json
from pathlib import Path

import pytest
import torch
from bench_cases import CPU, is_png, written

from moefp8 import BF16, MoEConfig, moe_ffn
from moefp8.bench import layers, memory, moe_layer, timing, where
from moefp8.bench.__main__ import main
from moefp8.bench.markdown import render

SIZES = {"dim": 32, "hidden": 48, "num_experts": 8}
CONFIGS = {
    "softmax, top-2": MoEConfig(**SIZES, top_k=2),
    "Llama4": MoEConfig(**SIZES, top_k=1, score="sigmoid", normalize=False, scores_on="input"),
    "DeepSeek-V3": MoEConfig(**SIZES, top_k=3, score="sigmoid", route_scale=2.5),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("take", [layers.take_eager, layers.take_plain])
@pytest.mark.parametrize("skewed", [False, True])
def test_the_baseline_is_the_same_layer(config: MoEConfig, take, skewed: bool) -> None:
    """y and all gradients against moe_ffn in bf16: both round a handful of bfloat16 tensors in a row.

    Eight roundings of 2^-8, relative to the largest value of each result: sums of products are no longer
    than the hidden width and cancel, so errors relative to each element would not be bounded.
    """
    problem = layers.LayerProblem("tiny", 64, config)
    inputs = layers.draw_layer(problem, CPU, skewed=skewed)
    ours = moe_layer.step_of(lambda p, x: moe_ffn(p, x, config=config, recipe=BF16)[0], inputs)()
    base = moe_layer.step_of(layers.bf16_layer(config, take), inputs)()
    for value, want in zip(base, ours, strict=True):
        assert (value.float() - want.float()).abs().max() <= 8 * 2**-8 * want.float().abs().max()


def test_routing_follows_the_probabilities() -> None:
    """Skewed: every eighth expert is empty, and the first of Zipf's seven takes 1 / H(7) = 38.6 % of the
    tokens, within five standard deviations. Balanced: an eighth each."""
    problem = layers.LayerProblem("tiny", 4096, MoEConfig(**SIZES, top_k=1))
    for skewed, largest in ((True, 1 / sum(1 / i for i in range(1, 8))), (False, 1 / 8)):
        inputs = layers.draw_layer(problem, CPU, skewed=skewed)
        _, stats = moe_ffn(inputs.params, inputs.x, config=problem.config, recipe=BF16)
        share = stats.tokens_per_expert / 4096
        deviation = (largest * (1 - largest) / 4096) ** 0.5
        assert abs(share.max().item() - largest) <= 5 * deviation
        assert (share == 0).sum() == (1 if skewed else 0)


def test_bytes_kept_for_the_backward() -> None:
    """x * x.exp() * y keeps x (an argument that does not count), the exponential twice over, and y."""
    x, y = (torch.zeros(100, requires_grad=True) for _ in range(2))
    # exp keeps its result, the first product x and the same result, the second product their product and y.
    assert memory.kept_bytes(lambda: x * x.exp() * y, [x]) == 3 * 400
    assert memory.kept_bytes(lambda: x * x.exp() * y, [x, y]) == 2 * 400
    assert memory.peak_bytes(lambda: None, CPU) is None


def test_fp8_keeps_less_than_bf16() -> None:
    """Eager bfloat16 keeps rows (D), gate, up, silu(gate) and hidden (H each): 2 D + 8 H bytes a row."""
    config = MoEConfig(**SIZES, top_k=1)
    inputs = layers.draw_layer(layers.LayerProblem("tiny", 64, config), CPU, skewed=False)
    weights = {name: p for name, p in inputs.params.items() if name != "router"}
    offs = torch.arange(8, 65, 8, dtype=torch.int32)
    rows = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    base = memory.kept_bytes(lambda: layers.bf16_experts(weights, rows, offs), list(weights.values()))
    # and the group ends
    assert base == 64 * (2 * 32 + 8 * 48) + offs.nbytes


# --- running out of memory -----------------------------------------------------------------------


def test_fewer_tokens_where_memory_runs_out() -> None:
    said: list[str] = []

    def layer(problem: layers.LayerProblem, params: layers.Params):
        def step(params, x):
            if problem.tokens > 64:
                raise torch.OutOfMemoryError("a long story")
            return x * params["router"].sum() * sum(p.sum() for n, p in params.items() if n != "router")

        return step

    small = moe_layer.LayerCandidate("small", layer, lambda: lambda params, rows, offs: rows * 1.0)
    problem = layers.LayerProblem("tiny", 200, MoEConfig(**SIZES, top_k=1))
    rows = moe_layer.measure_layer(problem, [small], timing.Timer(CPU), 1, lambda: None, said.append)
    assert {row.problem.tokens for row in rows} == {64}
    assert [line.split("now with ")[1] for line in said] == ["128 tokens", "64 tokens"]


# --- where the time goes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("_gemm_kernel", "GEMM"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "GEMM"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x", "GEMM"),
        ("_quantize_rows_kernel", "quantise"),
        ("_repair_poisoned_kernel", "quantise"),
        ("_swiglu_rows_kernel", "SwiGLU"),
        ("triton_poi_fused_mul_silu_3", "SwiGLU"),
        ("void at::native::radixSortKVInPlace", "routing"),
        ("_plan_kernel", "routing"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::MulFunctor", None),
    ],
)
def test_kernels_are_told_by_name(kernel: str, part: str | None) -> None:
    assert where.part_by_name(kernel) == part


@pytest.mark.parametrize(
    ("shapes", "part"),
    [([[64, 48], [64, 48]], "SwiGLU"), ([[64, 32]], "gather and combine"), ([[64, 8], []], "routing")],
)
def test_the_rest_is_told_by_shapes(shapes: list, part: str) -> None:
    assert where.part_by_shapes(shapes, dim=32, hidden=48) == part


def test_time_by_part_adds_up() -> None:
    """A product, a sort, and elementwise work at each of the two widths, each in its own part."""
    a, wide, long = torch.randn(256, 256), torch.randn(4096, 48), torch.randn(4096, 32)

    def step() -> None:
        a @ a
        a.flatten().sort()
        wide.exp()
        long.exp()

    seconds = where.time_by_part(step, CPU, dim=32, hidden=48)
    assert set(seconds) == set(where.PARTS)
    assert all(seconds[part] > 0 for part in ("routing", "GEMM", "SwiGLU", "gather and combine"))
    assert seconds["quantise"] == 0


# --- the command ---------------------------------------------------------------------------------


def test_moe_layer_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = "moe-layer --device cpu --tokens 32 --repeats 2 --recipe mxfp8 --quantized --auto"
    main([*args.split(), "--json", str(tmp_path / "l.json"), "--png", str(tmp_path / "l.png")])
    rows = {(row["candidate"], row["layout"]): row for row in written(tmp_path / "l.json")["rows"]}
    ours = rows["moefp8 mxfp8", "balanced"]
    assert ours["problem"]["config"]["top_k"] == 2
    assert ours["problem"]["tokens"] == 32
    assert ours["speedup"] > 0
    assert ours["parts"]["quantise"] > 0
    assert rows["moefp8 mxfp8, weights ready", "balanced"]["median_s"] > 0
    assert rows["moefp8 auto", "balanced"]["choice"].startswith("BF16: FP8 is emulated on a CPU")
    assert ("moefp8 auto, weights ready", "balanced") not in rows  # those are of one recipe
    assert rows["moefp8 mxfp8", "skewed"]["over_balanced"] > 0
    assert rows[moe_layer.EAGER, "balanced"]["kept_bytes_ratio"] == 1.0
    assert rows[moe_layer.COMPILED, "balanced"]["missing"] == "is compiled for a CUDA device only"
    assert is_png(tmp_path / "l.png")
    assert is_png(tmp_path / "l-where.png")
    assert "| small, 32 tokens | moefp8 mxfp8 |" in render(tmp_path / "l.json")
    assert "gather and combine" in capsys.readouterr().out


def test_no_such_layer() -> None:
    with pytest.raises(SystemExit, match=r"--layer: expected a part of one of \['small'\]"):
        main(["moe-layer", "--device", "cpu", "--layer", "GPT"])


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_moe_layer_on_a_gpu(tmp_path: Path) -> None:
    main(f"moe-layer --layer Qwen3 --tokens 1024 --repeats 2 --json {tmp_path / 'l.json'}".split())
    rows = json.loads((tmp_path / "l.json").read_text())["rows"]
    assert all(row["missing"] is None for row in rows)
    assert all(row["peak_bytes"] > 0 for row in rows if row["layout"] == "balanced")


@pytest.mark.inductor
@pytest.mark.gpu
def test_the_compiled_baseline_is_the_same_layer() -> None:
    config = MoEConfig(256, 128, 16, 4)
    inputs = layers.draw_layer(layers.LayerProblem("tiny", 512, config), torch.device("cuda"), skewed=True)
    plain = layers.bf16_layer(config, layers.take_plain)
    eager, compiled = (moe_layer.step_of(fn, inputs)() for fn in (plain, moe_layer._compiled(plain)))
    for value, want in zip(compiled, eager, strict=True):
        assert (value.float() - want.float()).abs().max() <= 8 * 2**-8 * want.float().abs().max()
