"""Model families of transformers with their experts under every recipe: whole models, and the example."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_families import FAMILIES, gradients, loss_of, randomize, tokens
from transformers import AutoModelForCausalLM

from moefp8.integrations import transformers as integration
from moefp8.recipe import PRESETS

families = pytest.mark.parametrize("family", FAMILIES)
recipes = pytest.mark.parametrize("recipe", PRESETS)


@families
@recipes
def test_forward_and_backward(family, recipe):
    model = FAMILIES[family].build("moefp8_" + recipe)
    assert set(integration.check(model).values()) == {PRESETS[recipe]}
    grads = gradients(model, tokens())
    experts = [name for name in grads if ".experts." in name]
    assert experts
    for name, g in grads.items():
        assert g.isfinite().all(), name
    for name in experts:
        assert g.any(), name


@families
def test_high_precision_recipe_equals_eager(family):
    """In float64 nothing but rounding may differ: layouts, biases, gates and router gradients are right.

    The norms and softmaxes of these models compute in float32 whatever comes in, so a difference of
    one float64 ulp before them can become one of float32, 2^-23 relative. Two layers pass fewer than
    32 of them one behind the other, forward and backward.
    """
    ids = tokens()
    model = randomize(FAMILIES[family].build("eager").double())
    want = gradients(model, ids)
    integration.use(model, "bf16")
    got = gradients(model, ids)
    for name in want:
        atol = 32 * 2.0**-23 * want[name].abs().max().item()
        torch.testing.assert_close(
            got[name], want[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@families
def test_func_grad_equals_backward(family):
    """functional_call with torch.func.grad against .backward(), in float32.

    Both run the same products; what they add up in another order are the gradients of one tensor
    that several operations use, at most k = 2 experts, a residual and a router each time.
    """
    ids = tokens()
    model = FAMILIES[family].build("moefp8_mxfp8")
    want = gradients(model, ids)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, params, kwargs={"input_ids": ids, "labels": ids}).loss

    got = torch.func.grad(loss)(params)
    for name in want:
        atol = 32 * 2.0**-23 * want[name].abs().max().item()
        torch.testing.assert_close(
            got[name], want[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@families
def test_twenty_steps_of_training(family):
    ids = tokens()
    model = FAMILIES[family].build("moefp8_mxfp8")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Two sequences of 16 tokens drawn from 48 start at log 48 = 3.87 and can be learned by heart.
    assert losses[-1] < losses[0] / 2, losses


@families
def test_gradient_checkpointing(family):
    ids = tokens()
    model = FAMILIES[family].build("moefp8_mxfp8").train()
    want = gradients(model, ids)
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    got = gradients(model, ids)
    for name in want:
        assert torch.equal(got[name], want[name]), name


@families
def test_save_and_reload(family, tmp_path):
    ids = tokens()
    model = randomize(FAMILIES[family].build("moefp8_mxfp8")).eval()
    model.save_pretrained(tmp_path)
    # The choice belongs to the run, not to the checkpoint, as for attention implementations.
    assert "moefp8" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moefp8_mxfp8").eval()
    assert integration.check(again) == integration.check(model)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_compiled(family):
    ids = tokens()
    model = FAMILIES[family].build("moefp8_mxfp8")
    want = loss_of(model, ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = loss_of(compiled, ids)
    torch.testing.assert_close(got, want, rtol=2.0**-20, atol=0)
    got.backward()
    assert model.get_submodule(next(iter(integration.check(model)))).down_proj.grad.any()


def test_example(tmp_path):
    """End to end in miniature: two runs, a plot, two models; then on from one of them."""
    script = Path(__file__).parents[2] / "examples" / "finetune_hf_moe.py"
    # The runner's other processes want their core.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}

    def run(*flags: str) -> str:
        command = [sys.executable, script, "--short", *flags]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout

    out = run("--out", str(tmp_path / "first"))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    held_out = {row[0]: float(row[2]) for row in rows if row[0]}
    assert set(held_out) == {"eager", "mxfp8"}
    # Bytes at random cost log 256 = 5.5 nats; knowing how often each occurs already takes off 2.
    assert max(held_out.values()) < 3.5, held_out
    assert (tmp_path / "first" / "loss.png").read_bytes().startswith(b"\x89PNG")

    model = tmp_path / "first" / "moefp8_mxfp8"
    more = ["--load", str(model), "--steps", "2", "--learning-rate", "1e-4", "--runs", "moefp8_mxfp8"]
    out = run(*more, "--out", str(tmp_path / "more"))
    row = next(line.split("│") for line in out.splitlines() if line.startswith("│"))
    assert float(row[3]) < 3.5, out  # new weights would still be at 5.5
