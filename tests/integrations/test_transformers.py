"""Model families of transformers under every recipe, against their own eager experts."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ffn_bound import Ball, Gate, Weights, expert_ffn
from hf_families import FAMILIES, randomize, tokens
from transformers import AutoModelForCausalLM, Llama4TextConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from moefp8 import MXFP8, Gemm, Recipe
from moefp8.integrations import transformers as integration
from moefp8.recipe import PRESETS

families = pytest.mark.parametrize("family", FAMILIES)
recipes = pytest.mark.parametrize("recipe", PRESETS)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss_of(model, ids).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def experts_of(model: Any) -> Any:
    return model.get_submodule(next(iter(integration.check(model))))


# --- whole models --------------------------------------------------------------------------------


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
    assert experts_of(model).down_proj.grad.any()


# --- expert modules against their own eager forward ------------------------------------------------


@families
@recipes
def test_experts_within_the_bound_of_the_recipe(family, recipe):
    """Output and every gradient of one experts module, against its eager forward in float64.

    The bound (ffn_bound.py) follows quantisation and rounding through the layer; its centre must be
    the family's own result, which shows that it bounds the right thing.
    """
    model = randomize(FAMILIES[family].build("eager"))
    module = next(m for m in model.modules() if hasattr(m, "is_transposed"))
    generator = torch.Generator().manual_seed(3)
    num_tokens, experts, width = 20, module.num_experts, model.config.hidden_size
    x = torch.randn(num_tokens, width, generator=generator)
    # Any two distinct experts a token, but never the last expert: its gradients must be zero.
    index = torch.rand(num_tokens, experts - 1, generator=generator).topk(2).indices
    score = torch.rand(num_tokens, 2, generator=generator)
    dy = torch.randn(num_tokens, width, generator=generator)

    def run(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        inputs = {"x": x.to(dtype).requires_grad_(), "score": score.to(dtype).requires_grad_()}
        params = dict(module.named_parameters())
        out = module(inputs["x"], index, inputs["score"])
        grads = torch.autograd.grad(out, [*inputs.values(), *params.values()], dy.to(dtype))
        return {"y": out, **dict(zip([*inputs, *params], grads, strict=True))}

    model.set_experts_implementation("moefp8_" + recipe)
    got = run(torch.float32)
    bound = bounds(module, x, index, score, dy, PRESETS[recipe])
    model.set_experts_implementation("eager")
    module.double()
    want = run(torch.float64)
    assert got.keys() == want.keys() == bound.keys()
    for name, ball in bound.items():
        torch.testing.assert_close(ball.mid, want[name], rtol=1e-12, atol=1e-12)
        error = (got[name].double() - want[name]).abs()
        assert (error <= ball.rad).all(), f"{name}: {(error / ball.rad).max()} of the bound"


def bounds(
    module: Any,
    x: torch.Tensor,
    index: torch.Tensor,
    score: torch.Tensor,
    dy: torch.Tensor,
    recipe: Recipe,
) -> dict[str, Ball]:
    """The layer as a loop over its experts, on Balls."""
    half = module.down_proj.shape[1 if module.is_transposed else 2]
    if module.is_concatenated:
        gate = Gate(slice(0, half), slice(half, None))
    else:
        gate = Gate(slice(0, None, 2), slice(1, None, 2), alpha=module.alpha, shift=1.0)
    names = ["gate_up_proj", "down_proj"] + ["gate_up_proj_bias", "down_proj_bias"] * module.has_bias
    total = {"y": x, "x": x, "score": score} | {name: getattr(module, name) for name in names}
    total = {name: Ball.exact(torch.zeros_like(value)) for name, value in total.items()}
    for e in range(module.num_experts):
        token, slot = torch.where(index == e)
        if not len(token):
            continue
        up, down = module.gate_up_proj[e], module.down_proj[e]
        if not module.is_transposed:
            up, down = up.mT, down.mT
        if module.has_bias:
            biases = [Ball.exact(b[e]) for b in (module.gate_up_proj_bias, module.down_proj_bias)]
        else:
            biases = [Ball.exact(w.new_zeros(w.shape[1])) for w in (up, down)]
        weights = Weights(Ball.exact(up), biases[0], Ball.exact(down), biases[1])
        rows = [Ball.exact(v) for v in (x[token], score[token, slot].unsqueeze(1), dy[token])]
        ffn = expert_ffn(rows[0], rows[1], weights, gate, rows[2], recipe)
        assert ffn.preactivation < getattr(module, "limit", torch.inf)  # else the gate has a kink inside
        for name, value in (("y", ffn.y), ("x", ffn.dx)):
            total[name].mid.index_add_(0, token, value.mid)
            total[name].rad.index_add_(0, token, value.rad)
        orient = (lambda b: b) if module.is_transposed else (lambda b: b.mT)
        pieces = {"gate_up_proj": orient(ffn.dup), "down_proj": orient(ffn.ddown)}
        pieces |= {"gate_up_proj_bias": ffn.dup_bias, "down_proj_bias": ffn.ddown_bias}
        for name in names:
            total[name].mid[e], total[name].rad[e] = pieces[name].mid, pieces[name].rad
        total["score"].mid[token, slot], total["score"].rad[token, slot] = ffn.dscore.mid, ffn.dscore.rad
    # Two results a token are added up and rounded.
    return {name: ball.rounded(2) if name in ("y", "x") else ball for name, ball in total.items()}


# --- every layout of the contract ------------------------------------------------------------------


class Layout:
    """An experts module as the contract allows it, beside its mathematics as a loop over pairs."""

    def __init__(
        self, *, gated: bool, concatenated: bool, transposed: bool, biased: bool, norm: bool
    ) -> None:
        num_experts, width, hidden = 3, 6, 5

        @use_experts_implementation(
            is_concatenated=concatenated,
            is_transposed=transposed,
            has_bias=biased,
            has_gate=gated,
            has_post_expert_norm=norm,
        )
        class Experts(torch.nn.Module):
            def __init__(self, config: Any) -> None:
                super().__init__()
                generator = torch.Generator().manual_seed(5)
                inner = hidden * 2 if gated else hidden
                shapes = {
                    "gate_up_proj" if gated else "up_proj": (width, inner),
                    "down_proj": (hidden, width),
                }
                for name, (k, n) in shapes.items():
                    weight = torch.randn(num_experts, k, n, generator=generator, dtype=torch.float64)
                    weight = weight if transposed else weight.mT.contiguous()
                    setattr(self, name, torch.nn.Parameter(weight))
                    if biased:
                        bias = torch.randn(num_experts, n, generator=generator, dtype=torch.float64)
                        setattr(self, name + "_bias", torch.nn.Parameter(bias))
                self.num_experts = num_experts
                self.act_fn = F.silu
                # With a bias, so that a row of another rank would not stay zero behind it.
                norm_layer = torch.nn.LayerNorm(width, dtype=torch.float64)
                torch.nn.init.normal_(norm_layer.bias, generator=generator)
                self.post_expert_norm = norm_layer if norm else None

            def forward(self, x, index, weights):
                return torch.stack([self.token(*row) for row in zip(x, index, weights, strict=True)])

            def token(self, x, index, weights):
                y = torch.zeros_like(x)
                for e, weight in zip(index.tolist(), weights, strict=True):
                    if e < num_experts:
                        y = y + weight * self.ffn(x, e)
                return y

            def ffn(self, x, e):
                u = self.linear("gate_up_proj" if gated else "up_proj", x, e)
                if not gated:
                    h = F.silu(u)
                elif concatenated:
                    h = F.silu(u[:hidden]) * u[hidden:]
                else:
                    h = F.silu(u[::2]) * u[1::2]
                y = self.linear("down_proj", h, e)
                return self.post_expert_norm(y) if norm else y

            def linear(self, name, x, e):
                weight = getattr(self, name)[e]
                bias = getattr(self, name + "_bias")[e] if biased else None
                return F.linear(x, weight.mT if transposed else weight, bias)

        class Config:
            _experts_implementation = "eager"

        self.module = Experts(Config())


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("gate", ["none", "halves", "interleaved"])
def test_layouts_and_sentinels(gate, transposed, biased, norm):
    """Every layout, with pairs of other ranks among the rest, in float64: only rounding may differ."""
    layout = Layout(
        gated=gate != "none",
        concatenated=gate != "interleaved",
        transposed=transposed,
        biased=biased,
        norm=norm,
    )
    module = layout.module
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(9, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(9, 2, generator=generator, dtype=torch.float64).requires_grad_()
    index = torch.randint(6, (9, 2), generator=generator)  # experts 3, 4 and 5 live elsewhere
    assert (index >= module.num_experts).any()
    results = []
    for name in ("eager", "moefp8_bf16"):
        module.config._experts_implementation = name
        y = module(x, index, weights)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, weights, *module.parameters()])])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_sentinel_rows_hold_anything():
    """What the tokens of other ranks hold reaches neither output nor gradients: not even NaN."""
    module = Layout(gated=True, concatenated=True, transposed=False, biased=True, norm=False).module.float()
    module.config._experts_implementation = "moefp8_mxfp8"
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(7))
    x[3:] = torch.nan
    x.requires_grad_()
    index = torch.tensor([[0, 1], [2, 0], [1, 3], [3, 4], [9, 3]])
    y = module(x, index, torch.ones(5, 2))
    y[:3].sum().backward()
    assert y[:3].isfinite().all()
    assert not y[3:].any()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert x.grad.isfinite().all()
    assert not x.grad[3:].any()


def test_per_sample_gradients():
    """vmap over grad of functional_call: one gradient a sample, equal to the loop's."""
    module = Layout(gated=True, concatenated=True, transposed=False, biased=True, norm=False).module.float()
    module.config._experts_implementation = "moefp8_mxfp8"
    params = {name: p.detach() for name, p in module.named_parameters()}
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(3, 7, 6, generator=generator)
    index = torch.randint(4, (3, 7, 2), generator=generator)
    weights = torch.rand(3, 7, 2, generator=generator)

    def loss(params, x, index, weights):
        return torch.func.functional_call(module, params, (x, index, weights)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
    got = per_sample(params, x, index, weights)
    for i in range(3):
        want = torch.func.grad(loss)(params, x[i], index[i], weights[i])
        for name, g in want.items():
            torch.testing.assert_close(got[name][i], g, rtol=2.0**-20, atol=2.0**-20 * g.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_decides_the_dtype(dtype):
    """Under autocast the products run in its dtype, as an eager Linear does; x keeps its own."""
    module = Layout(gated=True, concatenated=True, transposed=False, biased=True, norm=False).module.float()
    module.config._experts_implementation = "moefp8_bf16"
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(9)).to(dtype)
    index, weights = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2]]), torch.ones(4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, index, weights)
    assert y.dtype == dtype
    rounded = Layout(
        gated=True, concatenated=True, transposed=False, biased=True, norm=False
    ).module.bfloat16()
    rounded.config._experts_implementation = "moefp8_bf16"
    want = rounded(x.bfloat16(), index, weights).to(dtype)
    # Scores and so the sum over experts are float32 either way; only the last rounding differs.
    torch.testing.assert_close(y, want, rtol=0 if dtype == torch.bfloat16 else 2.0**-8, atol=0)


# --- the example -----------------------------------------------------------------------------------


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


# --- registry and errors ---------------------------------------------------------------------------


def test_importing_registers_every_preset():
    ours = {n: e.recipe for n, e in ALL_EXPERTS_FUNCTIONS.items() if isinstance(e, integration.Experts)}
    assert {name: ours["moefp8_" + name] for name in PRESETS} == PRESETS
    before, wrapped = dict(ALL_EXPERTS_FUNCTIONS), PreTrainedModel.__dict__["from_pretrained"]
    integration.register()
    assert dict(ALL_EXPERTS_FUNCTIONS) == before
    assert PreTrainedModel.__dict__["from_pretrained"] is wrapped


def test_recipe_of_ones_own():
    recipe = MXFP8._replace(dgrad=Gemm(dtype=torch.float8_e5m2))
    integration.register_recipe("test_e5m2", recipe, implementation=["reference"])
    integration.register_recipe("test_e5m2", recipe, implementation=["reference"])
    model = FAMILIES["qwen3_moe"].build("test_e5m2")
    assert set(integration.check(model).values()) == {recipe}
    assert gradients(model, tokens())["model.layers.0.mlp.experts.down_proj"].any()
    for taken in ("test_e5m2", "grouped_mm", "eager"):
        with pytest.raises(ValueError, match=f"name: '{taken}' already is an experts implementation"):
            integration.register_recipe(taken, MXFP8)
    with pytest.raises(TypeError, match="expected a Recipe"):
        integration.register_recipe("test_wrong", "mxfp8")


def test_use_takes_names_and_recipes():
    model = FAMILIES["qwen3_moe"].build("eager")
    for recipe in ("mxfp8_exact", "moefp8_mxfp8_exact", PRESETS["mxfp8_exact"]):
        integration.use(model, "bf16")
        assert integration.use(model, recipe) is model
        assert set(integration.check(model).values()) == {PRESETS["mxfp8_exact"]}
    mine = MXFP8._replace(wgrad=Gemm(format="row"))
    integration.use(model, mine)
    assert set(integration.check(model).values()) == {mine}
    with pytest.raises(ValueError, match=r"expected a Recipe or one of 'moefp8_mxfp8', .* got 'mxfp9'"):
        integration.use(model, "mxfp9")
    with pytest.raises(ValueError, match="got 'grouped_mm'"):
        integration.use(model, "grouped_mm")


def test_a_typo_is_an_error():
    with pytest.raises(ValueError, match="moefp8_mxpf8"):
        FAMILIES["qwen3_moe"].build("moefp8_mxpf8")


def test_check_says_which_implementation_runs():
    model = FAMILIES["qwen3_moe"].build("grouped_mm")
    with pytest.raises(
        ValueError, match=r"2 experts modules \(model.layers.0.mlp.experts, .* run .*'grouped_mm'"
    ):
        integration.check(model)


def llama4() -> Llama4TextConfig:
    return Llama4TextConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=24,
        intermediate_size_mlp=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
    )


def test_family_that_ignores_the_setting(tmp_path):
    """llama4 takes any registered name and does not use it; each way to set one raises."""
    pattern = (
        r"(?s)Llama4ForCausalLM: .* no effect .*low_precision\(fn, \[\('model\.layers\.\*\.feed_forward"
    )
    with pytest.raises(ValueError, match=pattern):
        AutoModelForCausalLM.from_config(llama4(), experts_implementation="moefp8_mxfp8")
    model = AutoModelForCausalLM.from_config(llama4())
    with pytest.raises(ValueError, match=pattern):
        model.set_experts_implementation("moefp8_mxfp8")
    with pytest.raises(ValueError, match=pattern):
        integration.use(model, MXFP8)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=pattern):
        AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moefp8_mxfp8")
    # Other names keep transformers' behaviour.
    AutoModelForCausalLM.from_config(llama4(), experts_implementation="batched_mm")


def test_importing_moefp8_needs_no_extra():
    """In a process where neither package can be imported; the integration then says what to install."""
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['torchtitan'] = None\n"
        "import moefp8, moefp8.integrations\n"
        "for name in ('transformers', 'torchtitan'):\n"
        "    try: __import__('moefp8.integrations.' + name)\n"
        "    except ImportError as error: assert f'moefp8[{name}]' in str(error), error\n"
        "    else: raise SystemExit(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
