"""One experts module: within the noise of the recipe, in every layout of the contract, under transforms."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ffn_noise import Gate, Noisy, Weights, check_within_noise, expert_ffn
from hf_families import FAMILIES, randomize
from transformers.integrations.moe import use_experts_implementation

import moefp8.integrations.transformers  # noqa: F401  (registers the names)
from moefp8 import Recipe
from moefp8.recipe import PRESETS

families = pytest.mark.parametrize("family", FAMILIES)
recipes = pytest.mark.parametrize("recipe", PRESETS)


@families
@recipes
def test_experts_within_the_noise_of_the_recipe(family, recipe):
    """Output and every gradient of one experts module, against its eager forward in float64.

    What is allowed (ffn_noise.py) follows quantisation and rounding through the layer; its centre
    must be the family's own result, which shows that it is the right layer.
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
    expected = noise(module, x, index, score, dy, PRESETS[recipe])
    model.set_experts_implementation("eager")
    module.double()
    want = run(torch.float64)
    assert got.keys() == want.keys() == expected.keys()
    for name, noisy in expected.items():
        torch.testing.assert_close(noisy.mid, want[name], rtol=1e-12, atol=1e-12)
        check_within_noise(name, got[name], noisy)


def noise(
    module: Any,
    x: torch.Tensor,
    index: torch.Tensor,
    score: torch.Tensor,
    dy: torch.Tensor,
    recipe: Recipe,
) -> dict[str, Noisy]:
    """The layer as a loop over its experts, on Noisy values."""
    half = module.down_proj.shape[1 if module.is_transposed else 2]
    if module.is_concatenated:
        gate = Gate(slice(0, half), slice(half, None))
    else:
        gate = Gate(slice(0, None, 2), slice(1, None, 2), alpha=module.alpha, shift=1.0)
    names = ["gate_up_proj", "down_proj"] + ["gate_up_proj_bias", "down_proj_bias"] * module.has_bias
    total = {"y": x, "x": x, "score": score} | {name: getattr(module, name) for name in names}
    total = {name: Noisy.exact(torch.zeros_like(value)) for name, value in total.items()}
    for e in range(module.num_experts):
        token, slot = torch.where(index == e)
        if not len(token):
            continue
        up, down = module.gate_up_proj[e], module.down_proj[e]
        if not module.is_transposed:
            up, down = up.mT, down.mT
        if module.has_bias:
            biases = [Noisy.exact(b[e]) for b in (module.gate_up_proj_bias, module.down_proj_bias)]
        else:
            biases = [Noisy.exact(w.new_zeros(w.shape[1])) for w in (up, down)]
        weights = Weights(Noisy.exact(up), biases[0], Noisy.exact(down), biases[1])
        rows = [Noisy.exact(v) for v in (x[token], score[token, slot].unsqueeze(1), dy[token])]
        ffn = expert_ffn(rows[0], rows[1], weights, gate, rows[2], recipe)
        assert ffn.preactivation < getattr(module, "limit", torch.inf)  # else the gate has a kink inside
        for name, value in (("y", ffn.y), ("x", ffn.dx)):
            total[name].mid.index_add_(0, token, value.mid)
            total[name].var.index_add_(0, token, value.var)
        orient = (lambda b: b) if module.is_transposed else (lambda b: b.mT)
        pieces = {"gate_up_proj": orient(ffn.dup), "down_proj": orient(ffn.ddown)}
        pieces |= {"gate_up_proj_bias": ffn.dup_bias, "down_proj_bias": ffn.ddown_bias}
        for name in names:
            total[name].mid[e], total[name].var[e] = pieces[name].mid, pieces[name].var
        total["score"].mid[token, slot], total["score"].var[token, slot] = ffn.dscore.mid, ffn.dscore.var
    # Two results a token are added up and rounded.
    return {name: v.rounded(2) if name in ("y", "x") else v for name, v in total.items()}


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
