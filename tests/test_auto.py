"""recipe="auto": the choice and its reasons, the fit of the model, and layers that use it."""

import json
import random
import re

import pytest
import torch
from moe_oracle import VARIANTS, make, tokens

from moefp8 import (
    BF16,
    MXFP8,
    MXFP8_WGRAD_HP,
    Card,
    Rates,
    auto,
    choose_recipe,
    cotangent_probe,
    expert_ffn,
    expert_statistics,
    moe_ffn,
    quantize_params,
    scaled_grouped_mm,
    scaled_mm,
)
from moefp8.auto import ALLOWED, Shape
from moefp8.bench.fit_auto import SHAPES, Measured, as_json, fit, fit_card, main, report

#: Rates of no card: products twice as fast under MXFP8, and everything else slower.
BF16_RATES = Rates(1e-4, 1e-6, 1.5e-15, 1e-12, 1e-12)
MXFP8_RATES = Rates(3e-4, 3e-6, 0.75e-15, 3e-12, 4e-12)
CARD = Card(BF16_RATES, MXFP8_RATES, 0.05, "made up")


# --- the choice ----------------------------------------------------------------------------------


def test_large_layers_take_mxfp8_and_small_ones_bf16():
    large = choose_recipe(131072, 5120, 8192, 8, card=CARD)
    assert large.recipe == MXFP8
    assert str(large).startswith("MXFP8: predicted to take 0.5")
    for rows, dim, hidden, experts in ((256, 2048, 768, 128), (4096, 256, 256, 8), (0, 64, 64, 2)):
        small = choose_recipe(rows, dim, hidden, experts, card=CARD)
        assert small.recipe == BF16
        assert str(small).startswith("BF16: MXFP8 is predicted to take")
        assert small.mxfp8_seconds > small.bf16_seconds


def test_predictions_are_the_model():
    """Rows are rounded up to 128 for each expert: 300 rows of 4 experts are 4 x 128."""
    choice = choose_recipe(300, 32, 64, 4, card=CARD)
    work = (1, 4, 18 * 512 * 32 * 64, 300 * 96, 3 * 4 * 32 * 64)
    assert choice.bf16_seconds == pytest.approx(sum(r * w for r, w in zip(BF16_RATES, work, strict=True)))
    assert choice.mxfp8_seconds == pytest.approx(sum(r * w for r, w in zip(MXFP8_RATES, work, strict=True)))


def test_a_gain_within_the_error_of_the_model_is_not_taken():
    """Predicted 0.99; with an error of 3 % at most 1.02, with one of 5 % up to 1.04."""
    mxfp8 = Rates(*(0.99 * r for r in BF16_RATES))
    sure = choose_recipe(4096, 256, 256, 8, card=Card(BF16_RATES, mxfp8, 0.03, ""))
    unsure = choose_recipe(4096, 256, 256, 8, card=Card(BF16_RATES, mxfp8, 0.05, ""))
    assert (sure.recipe, unsure.recipe) == (MXFP8, BF16)
    assert "predictions are off by up to 5 %, which could make it slower" in unsure.reason


@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"dtype": torch.float16}])
def test_what_no_kernel_multiplies_unquantised_takes_mxfp8(options):
    choice = choose_recipe(16, 32, 32, 2, card=CARD, **options)
    assert choice.recipe == MXFP8
    assert choice.reason.startswith("no kernel multiplies")


def test_float64_is_not_quantised():
    choice = choose_recipe(131072, 5120, 8192, 8, card=CARD, dtype=torch.float64)
    assert choice == (BF16, "float64 is not quantised", None, None)


def test_on_a_cpu_it_is_bf16():
    choice = choose_recipe(131072, 5120, 8192, 8, device="cpu")
    assert choice == (BF16, "FP8 is emulated on a CPU, and slower", None, None)


def test_a_card_without_measurements_refuses(monkeypatch):
    monkeypatch.setattr(auto, "_card_name", lambda device: "NVIDIA T1000")
    with pytest.raises(NotImplementedError, match=r"no measurements of 'NVIDIA T1000'.*Name a recipe, or"):
        choose_recipe(131072, 5120, 8192, 8, device="cuda:1")
    monkeypatch.setitem(auto.CARDS, "NVIDIA T1000", CARD)
    assert choose_recipe(131072, 5120, 8192, 8, device="cuda:1").recipe == MXFP8


@pytest.mark.parametrize("error", [AssertionError("no CUDA"), RuntimeError("no driver")])
def test_a_gpu_that_torch_does_not_find(error, monkeypatch):
    """Neither asked about with a card, nor for a CPU."""

    def name(device):
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    with pytest.raises(ValueError, match=r"^device: expected a GPU that torch finds, got 'cuda:7'; pass"):
        choose_recipe(131072, 5120, 8192, 8, device="cuda:7")
    assert choose_recipe(131072, 5120, 8192, 8, device="cuda:7", card=CARD).recipe == MXFP8
    assert choose_recipe(131072, 5120, 8192, 8, device="cpu").recipe == BF16


def test_without_a_gpu(fresh_compiler, monkeypatch):
    def name(device):
        raise AssertionError("Torch not compiled with CUDA enabled")

    def scaled(x):
        return x * len(choose_recipe(131072, 5120, 8192, 8).recipe)

    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    for f in (scaled, torch.compile(scaled, backend="eager")):
        with pytest.raises(ValueError, match=r"^device: expected a GPU that torch finds, got 'cuda'"):
            f(torch.ones(1))


@pytest.mark.parametrize("card", ["NVIDIA H100 80GB HBM3", "", tuple(CARD)], ids=["name", "empty", "tuple"])
def test_a_card_that_is_none(card):
    for device in ("cpu", "cuda"):
        with pytest.raises(TypeError, match=r"^card: expected a Card, got "):
            choose_recipe(16, 32, 32, 2, card=card, device=device)


def test_the_table_holds_what_was_measured():
    for name, card in auto.CARDS.items():
        assert all(rate >= 0 for rates in (card.bf16, card.mxfp8) for rate in rates), name
        assert 0 <= card.error < 1, name
        assert "moefp8.bench.fit_auto" in card.source


@pytest.mark.parametrize("sizes", [(-1, 8, 8, 8), (8, 0, 8, 8), (8, 8, 0, 8), (8, 8, 8, 0)])
def test_wrong_sizes(sizes):
    with pytest.raises(ValueError, match=r"expected at least [01], got"):
        choose_recipe(*sizes, card=CARD)


# --- layers --------------------------------------------------------------------------------------


def layers(recipe, dtype=torch.bfloat16):
    """Output of the layer, shared expert and all, and of the experts alone."""
    variant = VARIANTS["deepseek-v3"]
    params, x = make(variant, dtype=dtype), tokens(3, 5, dtype=dtype)
    offs = torch.tensor([1, 1, 2, 4, 5, 5, 6, 9], dtype=torch.int32)
    return (
        moe_ffn(params, x, config=variant.config, recipe=recipe)[0],
        expert_ffn(params, x.reshape(15, -1), offs, recipe=recipe),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layers_on_a_cpu_run_in_high_precision(dtype):
    for got, want in zip(layers("auto", dtype), layers(BF16, dtype), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("recipe", [MXFP8, BF16], ids=["mxfp8", "bf16"])
def test_layers_run_under_what_was_chosen(recipe, monkeypatch):
    asked = []

    def choose(*arguments):
        asked.append(arguments)
        return recipe

    monkeypatch.setattr(auto, "_faster", choose)
    for got, want in zip(layers("auto"), layers(recipe), strict=True):
        assert torch.equal(got, want)
    config, rest = VARIANTS["deepseek-v3"].config, (torch.bfloat16, None)
    sizes = config.dim, config.hidden, config.num_experts
    assert asked == [(15 * config.top_k, *sizes, *rest), (15, *sizes, *rest)]


@pytest.mark.parametrize("recipe", ["mxfp8", "AUTO", None])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_auto_is_the_only_name(recipe, compiled, fresh_compiler):
    """And where it is no name, the error does not offer it."""
    params, x = make(VARIANTS["mixtral"], dtype=torch.float32), tokens(9, dtype=torch.float32)
    offs = torch.full((8,), 9, dtype=torch.int32)
    takers = (
        lambda recipe: moe_ffn(params, x, config=VARIANTS["mixtral"].config, recipe=recipe),
        lambda recipe: expert_ffn(params, x, offs, recipe=recipe),
    )
    others = (
        lambda recipe: expert_statistics(params, x, offs, recipe=recipe),
        lambda recipe: quantize_params(params, recipe),
        lambda recipe: scaled_grouped_mm(x, params["w1"].mT, offs, recipe=recipe),
        lambda recipe: scaled_mm(x, params["w1"][0].mT, recipe=recipe),
    )
    cases = [(f, recipe, "MXFP8, or 'auto', got") for f in takers]
    cases += [(f, wrong, "MXFP8, got") for f in others for wrong in (recipe, "auto")]
    for f, wrong, end in cases:
        call = torch.compile(f, backend="eager") if compiled else f
        message = re.escape(f"recipe: expected a Recipe such as moefp8.{end} {wrong!r}")
        with pytest.raises(TypeError, match=f"^{message}$"):
            call(wrong)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("chosen", [MXFP8, BF16], ids=["mxfp8", "bf16"])
def test_copies_and_probes_are_for_what_was_chosen(chosen, compiled, fresh_compiler, monkeypatch):
    """Those of another recipe are refused with the name of the chosen one, which the caller cannot see."""
    monkeypatch.setattr(auto, "_faster", lambda *arguments: chosen)
    params, x = make(VARIANTS["mixtral"], dtype=torch.bfloat16), tokens(9, dtype=torch.bfloat16)
    offs = torch.full((8,), 9, dtype=torch.int32)

    def moe(x, **options):
        return moe_ffn(params, x, config=VARIANTS["mixtral"].config, **options)[0]

    def experts(x, **options):
        return expert_ffn(params, x, offs, **options)

    made = {"quantized": lambda recipe: quantize_params(params, recipe), "probe": cotangent_probe}
    names = (
        "BF16, which recipe 'auto' stands for here and which quantises nothing"
        if chosen == BF16
        else "MXFP8, which recipe 'auto' stands for here"
    )
    for layer in (moe, experts):
        f = torch.compile(layer, backend="eager") if compiled else layer
        for option, make_it in made.items():
            for recipe in (MXFP8, BF16, MXFP8_WGRAD_HP):
                options = {option: make_it(recipe)}
                if recipe == chosen:
                    assert torch.equal(f(x, recipe="auto", **options), layer(x, recipe=chosen, **options))
                    continue
                with pytest.raises(ValueError, match=f"^{option}: expected one made for {names}; name the"):
                    f(x, recipe="auto", **options)


def test_the_name_of_the_card_is_a_constant_of_a_compiled_function(fresh_compiler, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "four")
    compiled = torch.compile(lambda x: x + len(auto._card_name("cuda")), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 4


def test_compile(fresh_compiler):
    params, x = make(VARIANTS["mixtral"], dtype=torch.bfloat16), tokens(5, dtype=torch.bfloat16)

    def gradient(params, x):
        def loss(params):
            return moe_ffn(params, x, config=VARIANTS["mixtral"].config, recipe="auto")[0].float().sum()

        return torch.func.grad(loss)(params)

    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(params, x).values(), gradient(params, x).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [256, 131072])
def test_sizes_may_be_symbols(rows, fresh_compiler, monkeypatch):
    """Of a compiler, which cannot put them into words."""
    monkeypatch.setattr(auto, "_card_name", lambda device: "card")
    monkeypatch.setitem(auto.CARDS, "card", CARD)

    def scaled(x):
        recipe = auto._faster(x.shape[0], 5120, 8192, 8, torch.bfloat16, CARD)
        return x * (2 if recipe == MXFP8 else 3)

    x = torch.ones(rows, 1)
    compiled = torch.compile(scaled, backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x), scaled(x))
    want = MXFP8 if rows > 256 else BF16
    assert choose_recipe(rows, 5120, 8192, 8).recipe == want
    assert torch.equal(scaled(x), x * (2 if want == MXFP8 else 3))


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch, fresh_compiler):
    """Under a card of made-up rates both recipes occur, compiled as in eager mode."""
    monkeypatch.setitem(auto.CARDS, torch.cuda.get_device_name(), CARD)
    for rows, want in ((64, BF16), (131072, MXFP8)):
        params = {
            name: torch.randn(8, *shape, device="cuda", dtype=torch.bfloat16)
            for name, shape in (("w1", (512, 1024)), ("w2", (1024, 512)), ("w3", (512, 1024)))
        }
        x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
        offs = torch.arange(1, 9, device="cuda", dtype=torch.int32) * (rows // 8)
        assert choose_recipe(rows, 1024, 512, 8).recipe == want
        got = expert_ffn(params, x, offs, recipe="auto")
        assert torch.equal(got, expert_ffn(params, x, offs, recipe=want))
        compiled = torch.compile(
            lambda p, x, offs: expert_ffn(p, x, offs, recipe="auto"), backend="aot_eager", fullgraph=True
        )
        assert torch.equal(compiled(params, x, offs), got)


# --- fitting -------------------------------------------------------------------------------------


def measured(noise=0.0):
    draw = random.Random(0)

    def off(seconds):
        return seconds * (1 + noise * draw.uniform(-1, 1))

    return [Measured(s, off(BF16_RATES.seconds(s)), off(MXFP8_RATES.seconds(s))) for s in SHAPES]


def test_the_fit_finds_the_rates_that_made_the_times():
    assert fit([(m.shape, m.bf16) for m in measured()]) == pytest.approx(BF16_RATES, rel=1e-6)


def test_a_rate_that_would_be_negative_is_zero_and_the_rest_is_fitted_without_it():
    points = [(s, Rates(1e-4, 0, 1e-15, 0, 0).seconds(s) - 1e-6 * s.experts * 0.01) for s in SHAPES]
    found = fit(points)
    assert min(found) >= 0
    assert found.per_expert == 0
    assert found.per_flop == pytest.approx(1e-15, rel=0.01)


def test_the_error_covers_every_shape_that_would_take_mxfp8():
    """With 10 % of noise on every time, no measured shape chosen is slower than allowed."""
    points = measured(noise=0.1)
    card, predicted = fit_card(points, "made up")
    assert card.error > 0
    for m, p in zip(points, predicted, strict=True):
        assert p > 1 or m.ratio <= p * (1 + card.error) * (1 + 1e-12)  # a rounding of the division
        if choose_recipe(*m.shape, card=card).recipe == MXFP8:
            assert m.ratio <= ALLOWED
    text = report(points, card, predicted)
    assert text.count("\n") == len(points) + 2
    assert "MXFP8" in text
    assert "BF16" in text
    assert as_json(card, points)["measured"][0]["bf16"] == points[0].bf16


def test_no_times_to_win_by():
    slow = [m._replace(mxfp8=2 * m.bf16) for m in measured()]
    card, _ = fit_card(slow, "made up")
    assert card.error == 0
    assert {choose_recipe(*m.shape, card=card).recipe for m in slow} == {BF16}


def test_the_command_in_miniature(tmp_path, capsys):
    assert main(["--device", "cpu", "--repeats", "1", "--json", str(tmp_path / "auto.json")]) == 0
    shown, saved = capsys.readouterr().out, json.loads((tmp_path / "auto.json").read_text())
    assert "For moefp8.auto.CARDS:" in shown
    (name, card), *rest = saved.items()
    assert (name, rest) == ("a CPU", [])
    assert set(card["bf16"]) == set(Rates._fields)
    assert len(card["measured"]) == 8
    assert all(point["mxfp8"] > 0 for point in card["measured"])


def test_the_command_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 1
    assert "No CUDA device here" in capsys.readouterr().err


def test_work_counts_what_it_says():
    assert Shape(0, 8, 8, 4).work()[2:4] == (0.0, 0.0)
    assert Shape(1, 8, 8, 4).work()[2] == 18 * 4 * 128 * 64
