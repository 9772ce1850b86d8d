"""examples/train_gpu.py in miniature: its runs differ in nothing but their recipe."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import train_gpu as example  # noqa: E402
import train_moe_lm as lm  # noqa: E402

from moefp8 import BF16, MXFP8, MoEConfig  # noqa: E402


def test_in_miniature(tmp_path: Path) -> None:
    """Three runs see the same batches; on a CPU nothing is promoted, so the last two are the same bits."""
    example.main(
        ["--short", "--device", "cpu", "--runs", "bf16,mxfp8,mxfp8_unpromoted", "--out", str(tmp_path)]
    )
    content = json.loads((tmp_path / "results.json").read_text())
    bf16, mxfp8, unpromoted = content["runs"]
    assert [run["run"] for run in content["runs"]] == ["bf16", "mxfp8", "mxfp8_unpromoted"]
    assert mxfp8["train_loss"] == unpromoted["train_loss"]
    assert mxfp8["held_out"] == unpromoted["held_out"]
    assert mxfp8["train_loss"] != bf16["train_loss"]
    # Before the first update only the products differ: 28 dB of noise in the experts of one layer.
    assert mxfp8["train_loss"][0] == pytest.approx(bf16["train_loss"][0], rel=0.02)
    assert [step for step, _ in bf16["held_out_points"]] == [3, 6]
    assert bf16["held_out_points"][-1][1] == bf16["held_out"]
    assert all(run["tokens_per_s"] > 0 and run["peak_bytes"] is None for run in content["runs"])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"| mxfp8 | {mxfp8['held_out']:.4f} |" in (tmp_path / "table.md").read_text()


@pytest.mark.gpu
def test_a_graph_takes_the_steps_that_python_takes() -> None:
    """Parameters and state after three steps at rates that differ.

    The gradient of the embedding is summed by atomics in any order, and Adam makes much of little: noise
    of 1e-6 in every gradient ends as 0.06 of the way (simulated on a CPU). A rate or a state that stays as
    it was captured is 0.8 of it off, a step taken twice 0.3.
    """
    config = lm.ModelConfig(layers=1, heads=2, moe=MoEConfig(dim=64, hidden=64, num_experts=4, top_k=2))
    step = functools.partial(example.train_step, config=config, recipe=MXFP8)
    texts = torch.randint(256, (3, 2, 33), generator=torch.Generator().manual_seed(1)).cuda()
    rates = torch.tensor([1e-3, 1e-2, 3e-3]).cuda()

    def start() -> list[Any]:
        params = lm.init_model(torch.Generator().manual_seed(0), config)
        params = pytree.tree_map(lambda p: p.cuda(), params)
        return [params, pytree.tree_map(lambda s: s.cuda(), lm.adamw_init(params))]

    begin, eager, graph = start(), start(), start()
    replay = example.graphed(step, *graph, texts[0], rates[0])
    for nth, (text, rate) in enumerate(zip(texts, rates, strict=True), 1):
        *eager, entropy = step(*eager, text, rate)
        *graph, from_graph = replay(*graph, text, rate)
        assert graph[1].step.item() == eager[1].step.item() == nth
        assert nth > 1 or from_graph == entropy
    leaves = (pytree.tree_leaves(x[0]) for x in (begin, eager, graph))
    moved = [(y - x, z - x) for x, y, z in zip(*leaves, strict=True)]
    wrong = sum((a - b).square().sum() for a, b in moved).sqrt()
    assert wrong < 0.2 * sum(a.square().sum() for a, _ in moved).sqrt()


def test_the_model_is_that_of_the_small_example() -> None:
    """In bf16, but for attention, which rounds to bfloat16 here: some 8 roundings of 2^-8."""
    config = lm.ModelConfig(layers=1, heads=2, moe=MoEConfig(dim=32, hidden=32, num_experts=4, top_k=2))
    params = lm.init_model(torch.Generator().manual_seed(0), config)
    text = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(1))
    here, _ = example.cross_entropy(params, text, config, BF16)
    there, _ = lm.cross_entropy(params, text, config, BF16)
    assert here.item() == pytest.approx(there.item(), abs=8 * 2**-8 * there.item())


@pytest.mark.parametrize(
    ("args", "message"),
    [("--runs fp4", "expected some of bf16, mxfp8"), ("--steps 5", "no CUDA device here")],
)
def test_wrong_arguments(args: str, message: str, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        example.main(args.split())
    assert message in capsys.readouterr().err
