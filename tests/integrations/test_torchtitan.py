"""TorchTitan's debug models with the override, built through its own configuration, on a CPU."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ffn_noise import Gate, Noisy, Weights, check_within_noise, expert_ffn
from titan_cpu import build
from torchtitan.config import ConfigManager, apply_overrides
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

from moefp8 import MXFP8, Gemm, Recipe
from moefp8.integrations import torchtitan as integration
from moefp8.recipe import PRESETS

MODELS = {"deepseek_v3": "deepseek_v3_debugmodel", "qwen3": "qwen3_moe_debug"}
models = pytest.mark.parametrize("module", MODELS)
recipes = pytest.mark.parametrize("recipe", PRESETS)


def flag(recipe: str) -> str:
    """What stands behind --override.imports."""
    return f'moefp8.integrations.torchtitan.experts={{"recipe": "{recipe}"}}'


def debug_model(module: str, *overrides: str) -> Any:
    # A qwen3 layer has 64 experts, 38 million parameters: one of the eight keeps the tests short.
    layers = {"deepseek_v3": None, "qwen3": 1}[module]
    return build(module, MODELS[module], *overrides, layers=layers)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(2048, (2, 25), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:], torch.arange(24).expand(2, 24)


def loss_of(model: Any) -> torch.Tensor:
    inputs, labels, positions = batch()
    logits = model(inputs, attention_masks=None, positions=positions)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def experts_in(model: Any) -> list[GroupedExperts]:
    return [m for m in model.modules() if isinstance(m, GroupedExperts)]


# --- whole models --------------------------------------------------------------------------------


@models
def test_training_steps_against_the_bf16_path(module):
    """Five steps of AdamW under MXFP8 and on TorchTitan's own bf16 path, from the same weights.

    How much of the progress may differ: an operand of a product is off by at most 1/17 of itself,
    and the gradient of an expert weight has at most eight quantised operands behind it (x and w of
    the forward, w of the second product, cotangent, w and then both operands of its own product).
    """
    losses = {}
    for name, overrides in {"mxfp8": [flag("mxfp8")], "bf16": []}.items():
        model = debug_model(module, *overrides)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        curve = losses[name] = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        for experts in experts_in(model):
            assert (type(experts) is GroupedExperts) == (name == "bf16")
            for parameter in experts.parameters():
                assert parameter.grad.isfinite().all()
                assert parameter.grad.any()
    progress = losses["bf16"][0] - losses["bf16"][-1]
    # The same 48 tokens, of 2048, every time: from log 2048 = 7.6 they are soon known by heart.
    assert progress > 2, losses
    assert abs(losses["mxfp8"][-1] - losses["bf16"][-1]) < 8 / 17 * progress, losses


@models
@pytest.mark.parametrize("recipe", ["bf16", "mxfp8"])
def test_func_grad_equals_backward(module, recipe):
    """torch.func.grad, with the one change that TorchTitan's combine needs for it (titan_cpu.py).

    The forward has the same bits. In the backward torch takes another formula for the derivative of
    silu when that may be differentiated again: five operations in bfloat16, each rounding by 2^-8,
    so at most three ulps, and one more where gradients add up in another order. Where a cotangent
    that moved by an ulp is quantised, it may fall on the other side of a tie. How often is chance;
    what is allowed is what quantising one operand costs, 1/17 of the whole.
    """
    # eval(): in training a layer counts its tokens in place, in a buffer that torch.func may not write.
    model = debug_model(module, flag(recipe), "titan_cpu.dispatcher").eval()
    want_loss = loss_of(model)
    want_loss.backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    params = {name: p.detach() for name, p in model.named_parameters()}
    inputs, labels, positions = batch()

    def loss(params: dict[str, torch.Tensor]) -> torch.Tensor:
        kwargs = {"attention_masks": None, "positions": positions}
        logits = torch.func.functional_call(model, params, (inputs,), kwargs)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    got, got_loss = torch.func.grad_and_value(loss)(params)
    assert torch.equal(got_loss, want_loss)
    assert got.keys() == want.keys()
    for name in want:
        difference = got[name] - want[name]
        if recipe == "bf16":
            assert difference.abs().max() <= 4 * 2.0**-7 * want[name].abs().max(), name
        else:
            assert difference.norm() <= want[name].norm() / 17, name


def test_only_the_seam_changes():
    """Same parameters, initial values and dispatcher; a checkpoint of one loads into the other."""
    stock, scaled = debug_model("deepseek_v3"), debug_model("deepseek_v3", flag("fp8_rowwise"))
    assert len(experts_in(scaled)) == len(experts_in(stock)) == 5  # the first of six layers is dense
    assert all(experts.recipe == PRESETS["fp8_rowwise"] for experts in experts_in(scaled))
    want, got = stock.state_dict(), scaled.state_dict()
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
    stock.load_state_dict(got)
    for block, same in zip(stock.layers.values(), scaled.layers.values(), strict=True):
        if block.moe_enabled:
            dispatchers = [b.moe.routed_experts.token_dispatcher for b in (block, same)]
            assert len({type(d) for d in dispatchers}) == 1


@pytest.mark.inductor
def test_compiled_experts():
    """TorchTitan compiles block by block with fullgraph=True."""
    module = experts(GroupedExperts, "mxfp8")
    x, counts = torch.randn(20, 40), torch.tensor([7, 0, 13])
    want = module(x, counts)
    got = torch.compile(module, fullgraph=True)(x, counts)
    # silu and the multiplication behind it may be fused, without rounding between. What then moves by
    # an ulp may be quantised to the other side of a tie: at most an operand quantised anew, 1/17.
    assert (got - want).norm() <= want.norm() / 17


# Dynamo looks at the .grad of a block's input, which comes from the block before.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_block_is_captured_in_one_graph():
    """The same through a whole block with attention, router, dispatch and combine."""
    model = debug_model("deepseek_v3", flag("mxfp8"))
    want = loss_of(model)
    model.layers["1"].compile(backend="aot_eager", fullgraph=True)
    got = loss_of(model)
    # The compiled block may decompose silu and softmax otherwise: an ulp of its bfloat16 results.
    torch.testing.assert_close(got, want, rtol=2.0**-8, atol=0)
    got.backward()
    assert model.layers["1"].moe.routed_experts.inner_experts.w2_EDF.grad.any()


def test_activation_checkpointing():
    """The debug configuration's own, selective: recomputing gives the same bits."""
    plain, recomputed = (debug_model("deepseek_v3", flag("mxfp8")) for _ in range(2))
    arguments = ["--module", "deepseek_v3", "--config", "deepseek_v3_debugmodel"]
    checkpointing = ConfigManager().parse_args(arguments).activation_checkpoint
    checkpointing.build(dump_folder="").apply(recomputed)
    for model in (plain, recomputed):
        loss_of(model).backward()
    got = dict(recomputed.named_parameters())
    wrapper = "_checkpoint_wrapped_module."
    assert any(wrapper in name for name in got)
    got = {name.replace(wrapper, ""): parameter.grad for name, parameter in got.items()}
    for name, parameter in plain.named_parameters():
        assert torch.equal(got[name], parameter.grad), name


# --- expert modules --------------------------------------------------------------------------------


def experts(owner: type, recipe: str | None, **options: Any) -> Any:
    """Three experts, D = 40 and H = 24, whose weights bfloat16 holds exactly."""
    cfg = owner.Config(dim=40, hidden_dim=24, num_experts=3, **options)
    module = (cfg if recipe is None else integration.experts(cfg, recipe=recipe)).build()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            value = torch.randn(parameter.shape, generator=generator) * 40**-0.5
            parameter.copy_(value.bfloat16())
    return module


@recipes
@pytest.mark.parametrize("transform", ["backward", "func"])
def test_experts_within_the_noise_of_the_recipe(recipe, transform):
    """Output and gradients against the layer in float64, within the noise of recipe and bfloat16."""
    module = experts(GroupedExperts, recipe)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20, 40, generator=generator).bfloat16().float()
    dy = torch.randn(20, 40, generator=generator).bfloat16().float()
    counts = torch.tensor([7, 0, 13])
    params = [module.w1_EFD, module.w3_EFD, module.w2_EDF]
    named = {name: p.detach() for name, p in module.named_parameters()}

    def run(x: torch.Tensor, named: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(module, named, (x, counts))

    if transform == "func":
        y, pullback = torch.func.vjp(run, x, named)
        dx, grads = pullback(dy)
    else:
        y = module(x.requires_grad_(), counts)
        y.backward(dy)
        dx, grads = x.grad, {name: p.grad for name, p in module.named_parameters()}
    got = {"y": y, "x": dx, "w1": grads["w1_EFD"], "w3": grads["w3_EFD"], "w2": grads["w2_EDF"]}

    assert not any(got[name][1].any() for name in ("w1", "w2", "w3"))  # the expert without tokens
    for e, rows in enumerate(torch.arange(20).split(counts.tolist())):
        if not len(rows):
            continue
        w1, w3, w2 = (p[e].detach().double().requires_grad_() for p in params)
        x64 = x.detach()[rows].double().requires_grad_()
        want_y = (F.silu(x64 @ w1.mT) * (x64 @ w3.mT)) @ w2.mT
        want = dict(
            zip(
                ["x", "w1", "w3", "w2"],
                torch.autograd.grad(want_y, [x64, w1, w3, w2], dy[rows].double()),
                strict=True,
            )
        )
        want["y"] = want_y

        def exact(v: torch.Tensor) -> Noisy:
            return Noisy.exact(v, torch.bfloat16)

        zeros = [exact(torch.zeros(n)) for n in (48, 40)]
        weights = Weights(exact(torch.cat([w1, w3]).mT), zeros[0], exact(w2.mT), zeros[1])
        one = exact(torch.ones(len(rows), 1))
        gate = Gate(slice(0, 24), slice(24, 48))
        ffn = expert_ffn(exact(x[rows]), one, weights, gate, exact(dy[rows]), PRESETS[recipe])
        expected = {"y": ffn.y, "x": ffn.dx.rounded(2), "w2": ffn.ddown.mT}
        expected |= {"w1": ffn.dup.columns(slice(0, 24)).mT, "w3": ffn.dup.columns(slice(24, 48)).mT}
        for name, noisy in expected.items():
            torch.testing.assert_close(noisy.mid, want[name].detach(), rtol=1e-12, atol=1e-12)
            check_within_noise(f"{name}[{e}]", got[name][rows] if name in "xy" else got[name][e], noisy)


def test_high_precision_recipe_is_the_bf16_path():
    """Recipe bf16 multiplies what torch._grouped_mm multiplies; both accumulate in float32."""
    for owner in (GroupedExperts, GptOssGroupedExperts):
        stock, scaled = experts(owner, None), experts(owner, "bf16")
        x = torch.randn(24, 40, generator=torch.Generator().manual_seed(4))
        counts = torch.tensor([7, 0, 13])  # four rows behind the last group
        want, got = stock(x, counts)[:20].float(), scaled(x, counts)[:20].float()
        # Each of two products rounds once to bfloat16, 2^-8 of the largest sum that can enter it.
        torch.testing.assert_close(got, want, rtol=0, atol=2 * 2.0**-8 * want.abs().max().item())


@recipes
def test_biased_experts_of_gpt_oss(recipe):
    module = experts(GptOssGroupedExperts, recipe)
    assert type(module).__name__ == "ScaledGptOssGroupedExperts"
    x = torch.randn(24, 40, generator=torch.Generator().manual_seed(5), requires_grad=True)
    out = module(x, torch.tensor([7, 0, 13]))
    out.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad[0].any(), name
        assert parameter.grad[2].any(), name
        assert not parameter.grad[1].any(), name
    assert x.grad[:20].any(-1).all()
    assert not x.grad[20:].any()


def test_every_seam_gives_the_same_bits():
    """0.3.0 passes a transposed bfloat16 weight; later versions the parameter, and other names."""
    module = experts(GroupedExperts, "mxfp8")
    x, offs = torch.randn(20, 40), torch.tensor([7, 7, 20], dtype=torch.int32)
    weight = module.w1_EFD
    want = module._grouped_mm(A=x.bfloat16(), B_t=weight.bfloat16().mT, offs=offs)
    assert torch.equal(module._grouped_mm(A=x, weight_EOI=weight, offs=offs), want)
    assert torch.equal(module._grouped_mm(input_RI=x, weight_EOI=weight, offsets_E=offs), want)
    with pytest.raises(NotImplementedError, match=r"got \(A, weight, offs\).*newer than this integration"):
        module._grouped_mm(A=x, weight=weight, offs=offs)


# --- configuration ---------------------------------------------------------------------------------


def config() -> Any:
    return GroupedExperts.Config(dim=40, hidden_dim=24, num_experts=3)


def test_wrong_arguments_of_the_flag():
    with pytest.raises(ValueError, match=r"recipe: expected one of 'mxfp8', .*, got 'mxpf8'"):
        build("deepseek_v3", "deepseek_v3_debugmodel", flag("mxpf8"))
    with pytest.raises(ValueError, match=r"implementation: expected one of .*'reference', got 'tritn'"):
        integration.experts(config(), implementation="tritn")
    with pytest.raises(TypeError, match="recipes"):
        build(
            "deepseek_v3", "deepseek_v3_debugmodel", 'moefp8.integrations.torchtitan.experts={"recipes": 1}'
        )
    with pytest.raises(TypeError, match="expected a Recipe"):
        integration.with_recipe(config(), "mxfp8")


def test_recipe_of_ones_own():
    recipe = MXFP8._replace(dgrad=Gemm(dtype=torch.float8_e5m2))
    cfg = integration.with_recipe(config(), recipe, implementation="reference")
    assert cfg.build().recipe == recipe
    assert cfg.to_dict()["recipe"] == repr(recipe)
    assert integration.experts(config()).to_dict()["recipe"] == "mxfp8"
    assert isinstance(cfg.build().recipe, Recipe)


def test_override_of_ones_own_for_some_layers():
    model = build("deepseek_v3", "deepseek_v3_debugmodel", "titan_cpu.last_layer")
    *first, last = experts_in(model)
    assert {type(experts) for experts in first} == {GroupedExperts}
    assert last.recipe.dgrad == Gemm(dtype=torch.float8_e5m2)


def test_experts_that_would_not_heed_the_recipe():
    with pytest.raises(ValueError, match="ScaledGroupedExperts: already replaces _grouped_mm"):
        integration.experts(integration.experts(config()))

    class OwnForward(GroupedExperts):
        @dataclass(kw_only=True, slots=True)
        class Config(GroupedExperts.Config):
            pass

        def forward(self, x, counts):
            return torch._grouped_mm(x, self.w1_EFD.mT, offs=counts.cumsum(0))

    with pytest.raises(ValueError, match=r"OwnForward: its forward does not call .*low_precision"):
        integration.experts(OwnForward.Config(dim=40, hidden_dim=24, num_experts=3))


def test_a_second_override_of_the_experts_is_refused():
    """TorchTitan's own check: two overrides of one module are an error, never a silent choice."""
    arguments = ["--module", "deepseek_v3", "--config", "deepseek_v3_debugmodel", "--override.imports"]
    fused = "torchtitan.overrides.fused_swiglu.fused_grouped_experts"
    parsed = ConfigManager().parse_args([*arguments, flag("mxfp8"), fused])
    with pytest.raises(ValueError, match="both claim node"):
        apply_overrides(parsed.override, parsed)
