"""examples/train_moe_lm.py: parts against oracles, the whole job in miniature, stopping, resuming."""

import argparse
import functools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import lm_checkpoint  # noqa: E402
import lm_report  # noqa: E402
import lm_text  # noqa: E402
import train_moe_lm as example  # noqa: E402

from moefp8 import BF16, MXFP8, MoEConfig  # noqa: E402

TINY = ["--batch", "2", "--length", "16", "--layers", "1", "--dim", "32", "--heads", "2", "--hidden", "32"]
CONFIG = example.ModelConfig(layers=2, heads=2, moe=MoEConfig(dim=32, hidden=32, num_experts=4, top_k=2))


def no_report(run):
    pass


@pytest.fixture(scope="module")
def corpus():
    return lm_text.load_corpus()


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [BF16, MXFP8])
def test_a_logit_depends_on_no_later_byte(recipe):
    params = example.init_model(torch.Generator().manual_seed(0), CONFIG)
    text = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(1))
    logits, _ = example.model(params, text, CONFIG, recipe)
    text[0, 7:] = 0
    changed, _ = example.model(params, text, CONFIG, recipe)
    # The rows of the products move between groups, so their sums may round differently.
    torch.testing.assert_close(
        changed[0, :7], logits[0, :7], rtol=0, atol=2.0**-8 * logits.abs().max().item()
    )
    assert not torch.allclose(changed[0, 7:], logits[0, 7:], atol=0.1)


def test_rotary_logits_depend_on_distance_alone():
    """q[i] . k[j] is the same for all i - j; float32 angles up to 40 are good to 40 * 2^-24."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8, generator=generator).expand(1, 1, 40, 8) for _ in range(2))
    logits = (example.rotary(q) @ example.rotary(k).mT)[0, 0]
    scale = q[0, 0, 0].norm().item() * k[0, 0, 0].norm().item()
    for distance in (0, 1, 13):
        diagonal = logits.diagonal(-distance)
        torch.testing.assert_close(
            diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=200 * 2.0**-24 * scale
        )
    assert logits[0, 0] != logits[5, 0]


def test_adamw_is_torchs():
    """Against torch.optim.AdamW in float64; gradients of norm 3 are clipped to 1 first."""
    params = {"matrix": torch.ones(2, 2).double(), "vector": torch.ones(2).double()}
    reference = [p.clone().requires_grad_() for p in params.values()]
    groups = [
        {"params": reference[:1], "weight_decay": 0.1},
        {"params": reference[1:], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-9)
    state = example.adamw_init(params)
    for i in range(5):
        rate = 0.01 * (i + 1)
        grads = {"matrix": torch.tensor([[2.0, -2.0], [1.0, 0.0]]), "vector": torch.tensor([0.0, i - 1.0])}
        grads = {k: g.double() for k, g in grads.items()}
        norm = max(1.0, math.sqrt(9 + (i - 1) ** 2))
        params, state = example.adamw(params, grads, state, rate)
        for p, g in zip(reference, grads.values(), strict=True):
            p.grad = g / norm
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    assert state.step == 5
    for p, want in zip(params.values(), reference, strict=True):
        # 1 - 0.98^step >= 0.02 is float32, off by 2^-24: a relative error of 2^-24 / 0.02 in the square
        # root's argument, and less in the mean. The five updates are 0.15 (1 + decay) at most.
        torch.testing.assert_close(p, want.detach(), rtol=0, atol=0.2 * 2.0**-24 / 0.02)


def test_learning_rate_rises_and_falls_to_zero():
    rates = [example.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001
    assert example.learning_rate(0, 1, 1.0) == 1.0


def test_corpus_is_source_text_split_by_file(corpus):
    train, held_out = corpus
    assert train.dtype == held_out.dtype == torch.uint8
    assert 0.01 < len(held_out) / len(train) < 0.2
    assert b"def __init__(self" in bytes(train[:2_000_000].tolist())
    again = lm_text.load_corpus()
    assert torch.equal(again[0], train)
    assert torch.equal(again[1], held_out)


def test_windows_lie_inside_the_text():
    text = torch.arange(100, dtype=torch.uint8)
    batch = lm_text.draw_batch(text, 500, 9, torch.Generator().manual_seed(0))
    assert torch.equal(batch - batch[:, :1], torch.arange(10).expand(500, 10))
    assert batch.min() == 0
    assert batch.max() == 99
    windows = torch.cat(lm_text.held_out_windows(text, 3, 9, 4))
    assert windows.shape == (12, 10)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 99


def test_generation_repeats_for_a_seed():
    params = example.init_model(torch.Generator().manual_seed(0), CONFIG)
    first, second, other = (
        example.generate(params, "def ", 6, 8, CONFIG, MXFP8, seed) for seed in (0, 0, 1)
    )
    assert first.startswith("def ")
    assert first == second != other


# --- the whole job -------------------------------------------------------------------------------


def test_the_job_in_miniature(tmp_path, capsys):
    """Both recipes from one seed: checkpoints, plot, table, sample."""
    flags = [*TINY, "--short", "--steps", "16", "--every", "8", "--sample", "5", "--out", str(tmp_path)]
    assert example.main(flags) == 0
    shown = capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bf16.safetensors",
        "loss.png",
        "mxfp8.safetensors",
    ]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    for word in ("tokens/s", "held-out", "vs bf16", "tokens per expert", "written by mxfp8", "def "):
        assert word in shown
    assert re.search(r"mxfp8 .*[+-]\d\.\d\d %", shown)

    # A finished run is not trained again: its table comes from the checkpoint.
    before = (tmp_path / "mxfp8.safetensors").stat().st_size
    assert example.main([*flags, "--resume"]) == 0
    assert (
        re.search(r"│ bf16.*", shown)[0].split()
        == re.search(r"│ bf16.*", capsys.readouterr().out)[0].split()
    )
    assert (tmp_path / "mxfp8.safetensors").stat().st_size == before


def test_the_runs_differ_only_by_the_recipe_and_learn(corpus):
    args = example.parse_args(["--short", *TINY, "--steps", "20", "--learning-rate", "0.02", "--seed", "3"])
    config = example.ModelConfig(1, 2, MoEConfig(32, 32, 8, 2))
    data = (corpus[0], lm_text.held_out_windows(corpus[1], 2, 16, 1))

    def train(recipe):
        return example.train(
            example.new_run(args, config), args, config, recipe, data, no_report, no_report
        )

    runs = [train(recipe) for recipe in (BF16, BF16, MXFP8)]
    assert torch.equal(runs[0].train_loss, runs[1].train_loss)
    assert torch.equal(runs[0].random, runs[2].random)
    assert not torch.equal(runs[0].train_loss, runs[2].train_loss)
    for run in runs:
        assert run.train_loss[-5:].mean() < 0.8 * run.train_loss[0]


def test_micro_batches_step_as_their_mean(corpus):
    """The experts are quantised once for all parts; the gradient is the mean of those of the parts."""
    params = example.init_model(torch.Generator().manual_seed(0), CONFIG)
    text = lm_text.draw_batch(corpus[0], 4, 16, torch.Generator().manual_seed(0))
    loss = functools.partial(example.loss_fn, config=CONFIG, recipe=MXFP8)
    parts = [torch.func.grad(loss, has_aux=True)(params, part)[0] for part in text.chunk(2)]
    mean = pytree.tree_map(lambda *xs: torch.stack(xs).mean(0), *parts)
    state = example.adamw_init(params)
    got, _, entropy = example.train_step(params, state, text, 0.01, CONFIG, MXFP8, micro_batches=2)
    want, _ = example.adamw(params, mean, state, 0.01)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        assert torch.equal(a, b)
    each = [example.cross_entropy(params, part, CONFIG, MXFP8)[0] for part in text.chunk(2)]
    assert torch.equal(entropy, torch.stack(each).mean(0))


def test_statistics_over_training(tmp_path, capsys):
    flags = ["--short", *TINY, "--recipe", "bf16,mxfp8", "--steps", "4", "--every", "2", "--statistics"]
    assert example.main([*flags, "--micro-batches", "2", "--out", str(tmp_path)]) == 0
    assert "statistics_mxfp8.png" in capsys.readouterr().out.replace("\n", "")
    images = {path.name for path in tmp_path.glob("*.png")}
    assert images == {"loss.png", "statistics_mxfp8.png"}, "bf16 quantises nothing"
    args = example.parse_args(flags)
    config = example.ModelConfig(args.layers, args.heads, MoEConfig(args.dim, args.hidden, 8, 2))
    saved = lm_checkpoint.load(tmp_path / "mxfp8.safetensors", example.new_run(args, config), {})
    evaluations, layers, leaves = saved.statistics.shape
    assert (evaluations, layers) == (2, args.layers)
    assert leaves == (5 * 2 + 3 * 2) * 6
    assert saved.statistics.isfinite().all()
    assert (saved.statistics[..., 5::6] > 0).all(), "amax"


# --- stopping and resuming -----------------------------------------------------------------------


def test_stopping_and_resuming_changes_no_bit(tmp_path, corpus):
    """2 N steps in one go, and N steps, Ctrl-C, a checkpoint read back, N steps."""
    args = example.parse_args(["--short", *TINY, "--steps", "8", "--every", "3"])
    config = example.ModelConfig(1, 2, MoEConfig(32, 32, 8, 2))
    data = (corpus[0], lm_text.held_out_windows(corpus[1], 2, 16, 2))
    settings = {"steps": 8, "seed": 0}
    path = tmp_path / "run.safetensors"
    save = functools.partial(lm_checkpoint.save, path=path, settings=settings)
    start = example.new_run(args, config)
    whole = example.train(start, args, config, MXFP8, data, no_report, no_report)

    def ctrl_c(run):
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    half = example.train(start, args, config, MXFP8, data, save, ctrl_c)
    assert signal.getsignal(signal.SIGINT) is handler
    assert half.step == 4
    resumed = lm_checkpoint.load(path, example.new_run(args, config), settings)
    again = example.train(resumed, args, config, MXFP8, data, save, no_report)
    assert again.step == whole.step == 8
    for (key, got), want in zip(
        pytree.tree_leaves_with_path(again), pytree.tree_leaves(whole), strict=True
    ):
        if pytree.keystr(key) != ".seconds":
            assert got.dtype == want.dtype
            assert torch.equal(got, want), pytree.keystr(key)
    assert again.held_out[:, 0].tolist() == [3.0, 6.0, 8.0]
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside the checkpoint"


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    args = argparse.Namespace(seed=0)
    run = example.new_run(args, CONFIG)
    lm_checkpoint.save(run, tmp_path / "run.safetensors", {"top_k": 2})
    with pytest.raises(SystemExit, match=r"--top-k: .*run.safetensors was started with 2, got 3"):
        lm_checkpoint.load(tmp_path / "run.safetensors", run, {"top_k": 3})


def wait_for(path, process, newer_than=0.0):
    """Until the checkpoint is there; a process that ends first is an error with its output."""
    while not path.exists() or path.stat().st_mtime <= newer_than:
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        time.sleep(0.05)


def test_ctrl_c_leaves_a_checkpoint_and_the_command_that_goes_on(tmp_path):
    """The command printed is run as it stands, and stopped again further on."""
    script = ["examples/train_moe_lm.py", *TINY, "--recipe", "mxfp8", "--steps", "100000", "--every", "2"]
    command, path, newer_than, step = (
        [*script, "--out", str(tmp_path)],
        tmp_path / "mxfp8.safetensors",
        0.0,
        0,
    )
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for(path, process, newer_than)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 130, errors
        assert "Traceback" not in output + errors
        reached = int(re.search(r"mxfp8: stopped after step (\d+)", output)[1])
        assert reached > step
        python, *command = shlex.split(output.strip().splitlines()[-1])
        assert python == "python"
        assert command[-1] == "--resume"
        step, newer_than = reached, path.stat().st_mtime
    args = example.parse_args(command[1:])
    config = example.ModelConfig(1, 2, MoEConfig(32, 32, 8, 2))
    assert lm_checkpoint.load(path, example.new_run(args, config), {}).step == step


# --- wrong flags ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "fp4"], "argument --recipe: expected some of mxfp8, .*, got 'fp4'"),
        (["--recipe", "bf16,"], "argument --recipe: expected some of .*, got ''"),
        (["--steps", "0"], "argument --steps: expected at least 1, got 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--top-k", "9"], "argument --top-k: expected at most --experts = 8, got 9"),
        (
            ["--dim", "100", "--heads", "3"],
            "argument --dim: expected a multiple of 2 \\* heads = 6, got 100",
        ),
        (["--learning-rate", "-1"], "argument --learning-rate: expected at least 0, got -1.0"),
        (["--learning-rate", "nan"], "argument --learning-rate: expected at least 0, got nan"),
        (["--out", __file__], "argument --out: expected a folder, got the file .*test_example.py"),
        (["--recipes", "bf16,mxfp8", "--frobnicate"], "unrecognized arguments: .*--frobnicate"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        example.parse_args(flags)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_windows_longer_than_the_held_out_text(tmp_path):
    with pytest.raises(SystemExit, match="--length: expected less than"):
        example.main(["--length", "100000000", "--out", str(tmp_path)])


def test_nothing_to_resume(tmp_path):
    with pytest.raises(SystemExit, match="--resume: there is no checkpoint of bf16, mxfp8 in "):
        example.main(["--short", "--resume", "--out", str(tmp_path)])


def test_flags():
    assert example.parse_args([]).recipe == ["bf16", "mxfp8"]
    both = example.parse_args(["--recipe", "mxfp8", "--recipe", "fp8_rowwise,bf16"])
    assert both.recipe == ["mxfp8", "fp8_rowwise", "bf16"]
    short = example.parse_args(["--short", "--dim", "96"])
    assert short.steps == example.SHORT["steps"]
    assert short.dim == 96


def test_smoothing_is_a_mean_of_both_sides():
    got = lm_report._smooth(torch.tensor([1.0, 3.0, 8.0, 4.0, 0.0, 5.0]), 3)
    assert got.tolist() == [1.0, 4.0, 5.0, 4.0, 3.0, 2.5]
    line = torch.arange(9.0)
    assert torch.equal(lm_report._smooth(line, 4)[:7], line[:7]), "it does not lag"
