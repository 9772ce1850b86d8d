"""``low_precision`` on models of transformers, among them a family that its experts registry misses."""

import ast

import pytest
import torch
from hf_families import FAMILIES, gradients, loss_of, randomize, tokens
from test_transformers_registry import llama4
from torch.func import functional_call, grad
from transformers import AutoModelForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

import moefp8
from moefp8 import FP8_ROWWISE, MXFP8, explain, low_precision, scaled_grouped_mm
from moefp8.integrations import transformers as integration


def loss_fn(model):
    return lambda params, ids: functional_call(model, params, (), {"input_ids": ids, "labels": ids}).loss


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def build_llama4():
    return randomize(AutoModelForCausalLM.from_config(llama4()))


def printed_rules(model):
    """The rules in the error that points to ``low_precision``, as a user would paste them."""
    with pytest.raises(ValueError, match="low_precision") as caught:
        integration.use(model, MXFP8)
    text = str(caught.value)
    rules = ast.parse(text[text.index("low_precision(fn, ") :], mode="eval").body.args[1]
    return [(ast.literal_eval(rule.elts[0]), getattr(moefp8, rule.elts[1].id)) for rule in rules.elts]


def by_hand(recipe):
    """llama4's experts with both products written as calls of this library."""

    def forward(self, hidden_states):
        x = hidden_states.view(self.num_experts, -1, self.hidden_size)
        gate, up = scaled_grouped_mm(x, self.gate_up_proj, recipe=recipe).chunk(2, dim=-1)
        y = scaled_grouped_mm(up * self.act_fn(gate), self.down_proj, recipe=recipe)
        return y.view(-1, self.hidden_size)

    return forward


def test_the_rules_that_the_error_prints_are_what_llama4_needs(monkeypatch):
    """Pasted as they are, they give the same bits as calling ``scaled_grouped_mm`` in the model."""
    model = build_llama4()
    rules, loss, params, ids = printed_rules(model), loss_fn(model), parameters(model), tokens()
    assert [recipe for _, recipe in rules] == [MXFP8, MXFP8]
    got = grad(low_precision(loss, rules))(params, ids)
    assert not torch.equal(got["lm_head.weight"], grad(loss)(params, ids)["lm_head.weight"])
    monkeypatch.setattr(Llama4TextExperts, "forward", by_hand(MXFP8))
    want = grad(loss)(params, ids)
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_llama4_backward(monkeypatch):
    """The parameters of the model themselves, with plain autograd."""
    model, ids = build_llama4(), tokens()
    low_precision(loss_fn(model), [("*.experts.*", FP8_ROWWISE)])(
        dict(model.named_parameters()), ids
    ).backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    monkeypatch.setattr(Llama4TextExperts, "forward", by_hand(FP8_ROWWISE))
    want = gradients(model, ids)
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_explain_names_every_product_of_llama4():
    model = build_llama4()
    rules = printed_rules(model)
    report = explain(loss_fn(model), rules, parameters(model), tokens())
    quantised = [(p.path, p.op) for p in report.products if p.recipe == MXFP8]
    assert sorted(quantised) == sorted(
        (f"model.layers.{layer}.feed_forward.experts.{name}_proj", "bmm")
        for layer in range(2)
        for name in ("gate_up", "down")
    )
    assert report.unused == ()
    # What no rule matches is listed with its path: 4 of attention, 3 of the shared expert and the router
    # in each layer, and the head.
    others = [p for p in report.products if p.path and p.recipe is None]
    assert len(others) == 2 * (4 + 3 + 1) + 1
    # Each of 4 experts sees all 32 tokens: 2 M K N for gate and up, and for down.
    assert sum(p.flops for p in report.products if p.recipe) == 2 * 2 * 4 * 32 * (32 * 48 + 24 * 32)


def test_a_typo_names_the_experts():
    model = build_llama4()
    with pytest.raises(ValueError, match=r"matches none .*model\.layers\.\*\.feed_forward\.experts"):
        low_precision(loss_fn(model), [("model.layers.*.feedforward.experts.up_proj", MXFP8)])(
            parameters(model), tokens()
        )


def test_a_training_run():
    model, ids = build_llama4(), tokens()
    step, params = grad(low_precision(loss_fn(model), printed_rules(model))), parameters(model)
    before = loss_of(model, ids)
    for _ in range(10):
        grads = step(params, ids)
        params = {name: p - 0.1 * grads[name] for name, p in params.items()}
    assert loss_fn(model)(params, ids) < before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_eager_experts_of_other_families(family):
    """Every family keeps its experts in stacked weights and multiplies by one slice at a time."""
    model, ids = randomize(FAMILIES[family].build("eager")), tokens()
    rules = [("*.experts.*_proj", MXFP8), ("*.self_attn.*.weight", FP8_ROWWISE)]
    report = explain(loss_fn(model), rules, parameters(model), ids)
    ran = {p.path for p in report.products if p.recipe == MXFP8}
    stacked = {name for name in parameters(model) if ".experts." in name and name.endswith("_proj")}
    assert ran == stacked != set()
    assert any(p.recipe == FP8_ROWWISE and ".self_attn." in p.path for p in report.products)
    grads = grad(low_precision(loss_fn(model), rules))(parameters(model), ids)
    assert all(g.isfinite().all() for g in grads.values())
    assert all(grads[name].any() for name in stacked)
