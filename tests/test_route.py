"""Routing: every variant against a loop, what the biases may touch, statistics, wrong arguments."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_oracle import VARIANTS, D, E, agree, make, route_token, tokens
from torch.func import grad

from moefp8 import MoEConfig, Routing, route, routing_stats, update_expert_bias

variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
CONFIG = MoEConfig(dim=D, hidden=24, num_experts=E, top_k=2)


@variants
def test_equals_the_loop(variant):
    params, x = make(variant), tokens(3, 5)
    routing = route(params, x, variant.config)
    for i, token in enumerate(x.reshape(-1, D)):
        experts, weights = route_token(params, token, variant.config)
        assert routing.indices.reshape(15, -1)[i].tolist() == experts
        agree(routing.weights.reshape(15, -1)[i], torch.stack(weights))


def test_mixtral_is_a_softmax_over_the_chosen_logits():
    params, x = make(VARIANTS["mixtral"]), tokens(20)
    routing = route(params, x, CONFIG)
    agree(routing.weights, routing.logits.topk(2).values.softmax(-1))


@given(seed=st.integers(0, 2**31), top_k=st.integers(1, 4), score=st.sampled_from(["softmax", "sigmoid"]))
def test_weights_are_shares_of_distinct_experts(seed, top_k, score):
    config = CONFIG._replace(top_k=top_k, score=score, route_scale=2.5, num_groups=4, top_groups=2)
    routing = route(make(VARIANTS["deepseek-v3"], seed), tokens(9, seed=seed), config)
    agree(routing.weights.sum(-1), torch.full((9,), 2.5, dtype=torch.float64))
    assert (routing.weights > 0).all()
    for chosen in routing.indices.tolist():
        assert len(set(chosen)) == top_k
        assert len({e // 2 for e in chosen}) <= 2, "more groups than top_groups"


@given(seed=st.integers(0, 2**31))
def test_permuting_experts_renames_the_choices(seed):
    params, x = make(VARIANTS["biases"], seed), tokens(9, seed=seed)
    order = torch.randperm(E, generator=torch.Generator().manual_seed(seed))
    want = route(params, x, CONFIG)
    got = route({"router": params["router"][order], "router_bias": params["router_bias"][order]}, x, CONFIG)
    assert torch.equal(order[got.indices], want.indices)
    agree(got.weights, want.weights)


def test_expert_bias_changes_the_choice_but_no_weight_and_gets_no_gradient():
    config = CONFIG._replace(score="sigmoid", normalize=False)
    router = {"router": make(VARIANTS["mixtral"])["router"]}
    x = tokens(50)
    bias = torch.zeros(E, dtype=torch.float64)
    bias[5] = 2.0  # sigmoids lie in (0, 1): expert 5 comes first for every token
    biased = route(router | {"expert_bias": bias}, x, config)
    plain = route(router, x, config)
    assert (biased.indices[:, 0] == 5).all()
    assert not (plain.indices == 5).any(1).all()
    agree(biased.weights, plain.scores.gather(1, biased.indices))

    gradient = grad(lambda p: route(p, x, config).weights.square().sum())(router | {"expert_bias": bias})
    assert torch.equal(gradient["expert_bias"], torch.zeros(E, dtype=torch.float64))
    assert gradient["router"].abs().sum() > 0


def test_group_limit_takes_the_groups_with_the_best_two_experts():
    """Expert 0 is the best, but its group has the worst sum of two; the hand-made scores say so."""
    logits = torch.tensor([[4.0, -9.0, 3.0, 3.0, 2.0, 2.0, -9.0, -9.0]])
    config = MoEConfig(8, 1, 8, top_k=2, score="sigmoid", num_groups=4, top_groups=2)
    routing = route({"router": torch.eye(8)}, logits, config)
    assert sorted(routing.indices[0].tolist()) == [2, 3]


def test_router_runs_in_float32_whatever_the_tokens():
    params, x = make(VARIANTS["biases"], dtype=torch.bfloat16), tokens(7, dtype=torch.bfloat16)
    routing = route(params, x, CONFIG)
    wide = route({k: p.float() for k, p in params.items() if "router" in k}, x.float(), CONFIG)
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    assert torch.equal(routing.logits, wide.logits)
    assert torch.equal(routing.weights, wide.weights)


def test_no_leading_axes_and_no_tokens():
    params = make(VARIANTS["mixtral"])
    assert route(params, tokens(), CONFIG).indices.shape == (2,)
    empty = route(params, tokens(0), CONFIG)
    assert empty.weights.shape == (0, 2)
    stats = routing_stats(empty)
    assert stats.tokens_per_expert.tolist() == [0] * E
    assert stats.load_balance_loss == stats.z_loss == 0


def test_weights_stay_finite_when_every_sigmoid_underflows():
    params = {"router": -torch.ones(E, D)}
    x = torch.full((1, D), 100.0)
    config = CONFIG._replace(score="sigmoid")
    assert torch.equal(route(params, x, config).weights, torch.zeros(1, 2))
    assert grad(lambda p: route(p, x, config).weights.sum())(params)["router"].isfinite().all()


# --- statistics ----------------------------------------------------------------------------------


def test_stats_by_hand():
    """Two experts, three tokens with softmax probabilities (3/4, 1/4), (3/4, 1/4), (1/4, 3/4)."""
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0]]).log()
    routing = Routing(logits, logits.softmax(-1), torch.tensor([[0], [0], [1]]), torch.ones(3, 1))
    stats = routing_stats(routing)
    assert stats.tokens_per_expert.tolist() == [2, 1]
    # f = (2/3, 1/3), P = (7/12, 5/12): 2 (14/36 + 5/36) = 19/18; two roundings of each of a few terms.
    assert stats.load_balance_loss.item() == pytest.approx(19 / 18, rel=8 * 2.0**-24)
    # exp(logits) sums to 4 for every token; log and logsumexp round to 2^-24 of about 1.4 each.
    assert stats.z_loss.item() == pytest.approx(math.log(4) ** 2, rel=8 * 2.0**-24)


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_load_balance_loss_of_an_even_spread_is_one(top_k):
    ids = (torch.arange(E)[:, None] + torch.arange(top_k)) % E
    flat = torch.zeros(E, E)
    stats = routing_stats(Routing(flat, flat.softmax(-1), ids, torch.ones(E, top_k)))
    assert stats.tokens_per_expert.tolist() == [top_k] * E
    assert stats.load_balance_loss.item() == pytest.approx(1.0, rel=4 * E * 2.0**-24)


def test_load_balance_loss_of_a_single_expert_is_the_number_of_experts():
    scores = torch.zeros(5, E)
    scores[:, 3] = 1.0
    routing = Routing(scores, scores, torch.full((5, 1), 3), torch.ones(5, 1))
    assert routing_stats(routing).load_balance_loss.item() == E


@variants
def test_stats_equal_the_loop_and_count_over_all_leading_axes(variant):
    config = variant.config
    params, x = make(variant), tokens(3, 5)
    stats = routing_stats(route(params, x, config))
    assert stats.tokens_per_expert.sum() == 15 * config.top_k

    counts, probability, z = [0] * config.num_experts, [0.0] * config.num_experts, 0.0
    routing = route(params, x.reshape(-1, D), config)
    for token, logits, scores in zip(x.reshape(-1, D), routing.logits, routing.scores, strict=True):
        for e in route_token(params, token, config)[0]:
            counts[e] += 1
        probability = [p + s / sum(scores.tolist()) / 15 for p, s in zip(probability, scores, strict=True)]
        z += math.log(sum(math.exp(v) for v in logits.tolist())) ** 2 / 15
    assert stats.tokens_per_expert.tolist() == counts
    balance = sum(c / (15 * config.top_k) * p for c, p in zip(counts, probability, strict=True))
    agree(stats.load_balance_loss, torch.as_tensor(config.num_experts * balance))
    agree(stats.z_loss, torch.tensor(z, dtype=torch.float64))


def test_a_step_against_the_load_balance_loss_moves_probability_off_the_busy_expert():
    params, x = {"router": make(VARIANTS["mixtral"])["router"]}, tokens(200)
    stats = routing_stats(route(params, x, CONFIG))
    busy = stats.tokens_per_expert.argmax()
    direction = grad(lambda p: routing_stats(route(p, x, CONFIG)).load_balance_loss)(params)["router"]
    moved = route({"router": params["router"] - 0.1 * direction}, x, CONFIG)
    assert moved.scores[:, busy].mean() < route(params, x, CONFIG).scores[:, busy].mean()


def test_expert_bias_update_by_hand():
    bias = torch.tensor([0.25, 0.0, -0.25, 0.0])
    got = update_expert_bias(bias, torch.tensor([9, 4, 3, 4]), 0.125)
    assert got.tolist() == [0.125, 0.125, -0.125, 0.125]
    even = update_expert_bias(bias, torch.tensor([5, 5, 5, 5]), 0.125)
    assert torch.equal(even, bias)
    assert update_expert_bias(bias.bfloat16(), torch.tensor([1, 0, 0, 0]), 0.5).dtype == torch.bfloat16


def test_expert_bias_updates_even_out_a_skewed_router():
    """Rate r: once level, counts oscillate by what a bias of +-r moves. 300 steps of 0.01 are enough
    to cross the whole range of a sigmoid."""
    config = CONFIG._replace(score="sigmoid", top_k=1)
    x = torch.cat([tokens(1000)[:, : D - 1], torch.ones(1000, 1, dtype=torch.float64)], dim=1)
    router = 0.2 * make(VARIANTS["mixtral"])["router"]
    router[:, -1] = torch.linspace(-1, 1, E)  # the constant input favours the later experts
    params = {"router": router, "expert_bias": torch.zeros(E)}

    def imbalance(p):
        counts = routing_stats(route(p, x, config)).tokens_per_expert
        return (counts.max() / counts.double().mean()).item(), counts

    before, counts = imbalance(params)
    for _ in range(300):
        params["expert_bias"] = update_expert_bias(params["expert_bias"], counts, 0.01)
        after, counts = imbalance(params)
    assert before > 2
    assert after < 1.5


# --- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dim": 0}, ValueError, "config.dim: expected an integer of at least 1, got 0"),
        ({"hidden": 2.5}, ValueError, "config.hidden: expected an integer of at least 1, got 2.5"),
        ({"num_experts": -1}, ValueError, "config.num_experts: "),
        ({"top_k": 9}, ValueError, "config.top_k: expected at most 8"),
        ({"top_k": 0}, ValueError, "config.top_k: expected an integer of at least 1"),
        ({"score": "relu"}, ValueError, "config.score: expected 'softmax' or 'sigmoid', got 'relu'"),
        ({"scores_on": "both"}, ValueError, "config.scores_on: expected 'output' or 'input', got 'both'"),
        ({"num_groups": 3}, ValueError, "config.num_groups: expected a divisor of num_experts = 8, got 3"),
        ({"num_groups": 2, "top_groups": 3}, ValueError, "config.top_groups: expected at most num_groups"),
        ({"num_groups": 8, "top_groups": 1}, ValueError, "config.top_k: expected at most 1"),
        ({"shared_hidden": -1}, ValueError, "config.shared_hidden: expected a width, or 0, got -1"),
    ],
)
def test_config_out_of_range(change, error, message):
    with pytest.raises(error, match=message):
        route({"router": torch.ones(E, D)}, torch.ones(3, D), CONFIG._replace(**change))


@pytest.mark.parametrize(
    ("params", "x", "error", "message"),
    [
        ({}, torch.ones(3, D), ValueError, r"params\['router'\]: is missing; expected .* \(8, 16\)"),
        ({"router": torch.ones(D, E)}, torch.ones(3, D), ValueError, r"params\['router'\]: expected shape"),
        ({"router": None}, torch.ones(3, D), TypeError, r"params\['router'\]: is None; leave the key out"),
        (
            {"router": torch.ones(E, D).int()},
            torch.ones(3, D),
            TypeError,
            r"params\['router'\]: .* got torch.int32",
        ),
        (
            {"router": torch.ones(E, D), "expert_bias": torch.ones(E, 1)},
            torch.ones(3, D),
            ValueError,
            r"params\['expert_bias'\]: expected shape \(8,\), got \(8, 1\)",
        ),
        ({"router": torch.ones(E, D)}, torch.ones(3, 5), ValueError, r"x: expected shape .* got \(3, 5\)"),
        (
            {"router": torch.ones(E, D)},
            torch.ones(3, D).long(),
            TypeError,
            "x: expected .* got torch.int64",
        ),
    ],
)
def test_wrong_params_and_tokens(params, x, error, message):
    with pytest.raises(error, match=message):
        route(params, x, CONFIG)


@pytest.mark.parametrize("key", ["router", "router_bias", "expert_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_parameter_on_another_device(key, dtype, compiled, fresh_compiler):
    """A product of a CPU's and a meta tensor may return whatever lay in memory."""
    shapes = {"router": (E, D), "router_bias": (E,), "expert_bias": (E,)}
    params = {name: torch.ones(shape) for name, shape in shapes.items()}
    f = torch.compile(route, backend="eager") if compiled else route
    x = torch.ones(3, D, dtype=dtype)
    f(params, x, CONFIG)
    with pytest.raises(ValueError, match=rf"^params\['{key}'\]: is on meta, x on cpu$"):
        f(params | {key: params[key].to("meta")}, x, CONFIG)
    with pytest.raises(ValueError, match=r"^params\['router'\]: is on cpu, x on meta$"):
        f(params, x.to("meta"), CONFIG)


def test_wrong_types():
    with pytest.raises(TypeError, match="config: expected a MoEConfig, got None"):
        route({"router": torch.ones(E, D)}, torch.ones(3, D), None)
    with pytest.raises(ValueError, match="tokens_per_expert: expected the shape of bias"):
        update_expert_bias(torch.zeros(3), torch.zeros(4), 0.1)
