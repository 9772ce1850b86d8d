"""The registry of experts implementations: names, recipes, and errors where a name has no effect."""

import subprocess
import sys

import pytest
import torch
from hf_families import FAMILIES, gradients, tokens
from transformers import AutoModelForCausalLM, Llama4TextConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moefp8 import MXFP8, Gemm
from moefp8.integrations import transformers as integration
from moefp8.recipe import PRESETS


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
