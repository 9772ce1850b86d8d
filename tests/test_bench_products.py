"""What the benchmarks of grouped products measure: operands, candidates, figures, refusals."""

import math

import pytest
import torch
from bench_cases import CPU, TINY, exact, fails, tiny_case

from moefp8.bench import accumulation, candidates, ceilings, gemm, peers, problem, quantize, run, timing
from moefp8.bench.grouped_mm import measure_shape
from moefp8.recipe import PRESETS


def test_operations_and_bytes_of_one_token() -> None:
    """M = K = N = G = 1: one multiply-add a product; 3 elements, each read and written as counted."""
    one = problem.Problem(1, 1, 1, 1)
    assert one.operations == 2
    # bf16: 2 elements read and 1 written by each product, 2 bytes each.
    assert one.bytes_moved(backward=False, fp8=False) == 3 * 2
    assert one.bytes_moved(backward=True, fp8=False) == 3 * 3 * 2
    # FP8: forward, two operands read (2), copied (1) and read again (1), the result written (2); with
    # the backward three operands read once (2), copied twice (2), read twice (2), three results (2).
    assert one.bytes_moved(backward=False, fp8=True) == 2 * 4 + 2
    assert one.bytes_moved(backward=True, fp8=True) == 3 * 6 + 3 * 2


def test_limit_is_the_published_one() -> None:
    """(128000, 8192, 5120, 8) at 1357 TFLOP/s and 3.02 TB/s, with bf16 at 48.7 ms."""
    llama4 = problem.Problem(128000, 5120, 8192, 8)
    quantisers = 4 * (128000 * 5120 + 128000 * 8192 + 8 * 5120 * 8192) / 3.02e12
    products = 6 * 128000 * 5120 * 8192 / 1357e12
    assert llama4.least_seconds(True, 1357e12, 3.02e12) == pytest.approx(products + quantisers, rel=1e-12)


@pytest.mark.parametrize("multiple_of", [1, 16, 32])
def test_group_ends(multiple_of: int) -> None:
    uneven = problem.Problem(100, 8, 8, 3)
    assert problem.equal_offs(uneven, CPU).tolist() == [33, 66, 100]
    ends = problem.unequal_offs(uneven, CPU, multiple_of).tolist()
    assert ends == sorted(ends)
    assert ends[-1] == 100
    assert all(end % multiple_of == 0 for end in ends[:-1])


def test_case_knows_what_divides_its_groups() -> None:
    operands = problem.draw(TINY, CPU)
    case = candidates.make_case(TINY, operands._replace(offs=torch.tensor([32, 32, 80])), True)
    assert case.multiple_of == 16  # sizes 32, 0, 48


def test_ratios_pair_the_times_of_a_round() -> None:
    """Every other round is ten times as slow for all: the ratio must not see it."""
    calls = iter(range(100))

    class Fake(timing.Timer):
        def once(self, step: timing.Step, lead: float = 0.0) -> tuple[float, bool]:
            return step() * (10.0 if next(calls) // 2 % 2 else 1.0), True

        def first_call(self, step: timing.Step) -> float:
            return 0.0

    baseline = candidates.Candidate(peers.BASELINE, lambda case: lambda: 1.0, fp8=False)
    two = [baseline, candidates.Candidate(peers.TORCHAO, lambda case: lambda: 2.0)]
    rows = measure_shape(
        TINY, two, Fake(CPU), ceilings.Ceilings(1.0, 1.0, math.nan),
        unequal=None, backward=True, repeats=4, advance=lambda: None,
    )  # fmt: skip
    assert [row.figures["speedup"] for row in rows] == [1.0, 0.5]
    assert [row.figures["over_torchao"] for row in rows] == [2.0, 1.0]


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize(
    "name", ["torch bf16", "torchao mxfp8 emulated", "moefp8 mxfp8", "moefp8 fp8_rowwise"]
)
def test_every_candidate_computes_the_same_product(name: str, backward: bool) -> None:
    """Within what two roundings to E4M3 can do, summed over the contraction.

    An element x of a block with largest magnitude A errs by at most u |x| + v A: u = 1/17, and half the
    smallest subnormal number, 2^-10, of a scale that is at most 2 A / 448. A product of two such errs by
    (2 u + u^2) |x y| + (2 + 2 u + v) v A B. A bfloat16 result adds 2^-8 of itself.
    """
    case = tiny_case(backward=backward)
    known = {c.name: c for c in [*peers.peers(), *candidates.ours(PRESETS, None)]}
    outcome = run.start(known[name], case, timing.Timer(CPU))
    assert outcome.reason is None
    results = outcome.step()
    assert len(results) == (3 if backward else 1)
    a, b, offs, g = case.operands
    sizes = exact(case._replace(operands=problem.Operands(a.abs(), b.abs(), offs, g.abs())))
    u, v = 1 / 17, 2**-10 * 2 / 448
    top, length = max(x.abs().max().item() for x in (a, b, g)), max(TINY)
    subnormal = length * (2 + 2 * u + v) * v * top**2
    for value, want, size in zip(results, exact(case), sizes, strict=False):
        assert value.shape == want.shape
        error = (value.double() - want).abs()
        assert (error <= ((2 * u + u**2) * size + subnormal) * (1 + 2**-8) + 2**-8 * want.abs()).all()


def test_peers_say_what_they_need() -> None:
    """On a CPU with odd groups no FP8 peer can run, and each says why."""
    case = tiny_case(multiple_of=1)
    assert case.multiple_of % 16
    reasons = {c.name: c.refuse(case) for c in peers.peers()}
    assert reasons.pop("torch bf16") is None
    assert reasons.pop("torchao mxfp8 emulated") == "needs group sizes that are multiples of 32"
    assert set(reasons.values()) == {"needs a CUDA device"}


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("a peer", RuntimeError("no kernel\nfor this"), "no kernel"),
        ("a peer", AssertionError(), "AssertionError"),
        ("moefp8 mxfp8", NotImplementedError("implementation 'x': no"), "implementation 'x': no"),
        (
            "moefp8 mxfp8",
            ExceptionGroup("none", [NotImplementedError("a: no"), NotImplementedError("b: no")]),
            "a: no; b: no",
        ),
        ("moefp8 mxfp8", torch.OutOfMemoryError("a long story"), "out of memory"),
    ],
)
def test_refusals_are_reported(name: str, error: Exception, reason: str) -> None:
    outcome = run.start(fails(error, name), tiny_case(), timing.Timer(CPU))
    assert (outcome.step, outcome.reason) == (None, reason)


def test_a_first_call_apart() -> None:
    """What the other process runs: the peer itself on such a case, or its own reason."""
    ends = [32, 32, 96]
    assert run.first_call("torch bf16", list(TINY), ends, True, "cpu") is None
    reason = run.first_call("torchao mxfp8 emulated", list(TINY), [31, 32, 96], True, "cpu")
    assert reason == "needs group sizes that are multiples of 32"
    assert quantize.first_call("torchao rows, mx 32 emulated", list(TINY), None, "cpu") is None


def test_a_peer_that_tunes_itself_is_called_apart_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU only; its reason is that of the other process."""
    calls = []

    def apart(function: str, argument: dict, seconds: float) -> str:
        calls.append((function, argument, seconds))
        return "took too long"

    class OnGpu(candidates.Case):
        device = torch.device("cuda")

    monkeypatch.setattr(run, "call_apart", apart)
    case = OnGpu(*tiny_case())
    tuned = fails(RuntimeError("never called"), "a peer")._replace(tunes=True)
    outcome = run.start(tuned, case, timing.Timer(CPU, peer_seconds=7.0))
    assert (outcome.step, outcome.reason) == (None, "took too long")
    function, argument, seconds = calls[0]
    assert (function, seconds) == ("moefp8.bench.run:first_call", 7.0)
    assert argument["name"] == "a peer"
    assert argument["ends"] == case.operands.offs.tolist()


def test_a_bug_of_ours_is_not_reported_as_missing() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        run.start(fails(RuntimeError("a bug"), "moefp8 mxfp8"), tiny_case(), timing.Timer(CPU))


def test_recipes_with_promotion_intervals() -> None:
    recipes = candidates.named_recipes(["mxfp8", "bf16"], [512])
    assert list(recipes) == ["mxfp8", "mxfp8, promote=512", "bf16"]
    assert {gemm.promote for gemm in recipes["mxfp8, promote=512"]} == {512}


@pytest.mark.parametrize(
    "source", [pytest.param(s, marks=[pytest.mark.gpu] * (s.refuse(TINY, CPU, 32) is not None), id=s.name)
               for s in gemm.sources([128])]
)  # fmt: skip
def test_the_product_alone_is_the_product(source: gemm.Source) -> None:
    """Each product of numbers that E4M3 holds: bfloat16 rounds by 2^-8 and the interpreter, which cuts
    off, by 2^-7; promoted sums lose 0.1 %, fast sums of at most 128 terms 128 2^-13."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    operands = accumulation.positive_operands(problem.Problem(128, 64, 32, 1), device)
    bound = (2**-8 if device.type == "cuda" else 2**-7) + (128 * 2**-13 if "fast" in source.name else 1e-3)
    for steps in (*source.build(operands).values(), *source.cast(operands).values()):
        for product, step in steps.items():
            want = accumulation.exact_product(operands, product)
            want = want.T if product == "wgrad" else want  # torch's weights lie transposed
            assert ((step().double().view_as(want) - want).abs() <= bound * want).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [c.name for c in peers.peers() if not c.whole])
def test_bare_products_compute_the_product(name: str) -> None:
    """On operands that E4M3 represents, precise sums are within bf16's half ulp, 2^-8, and the 0.1 %
    that promotion every 128 may lose; fast sums of 256 terms lose 256 2^-13 at most."""
    device = torch.device("cuda")
    one = problem.Problem(256, 256, 256, 1)
    case = candidates.make_case(one, accumulation.positive_operands(one, device), True)
    outcome = run.start(next(c for c in peers.peers() if c.name == name), case, timing.Timer(device))
    assert outcome.reason is None
    bound = 2**-8 + (1e-3 if "precise" in name else 256 * 2**-13)
    for value, want in zip(outcome.step(), exact(case), strict=True):
        assert ((value.double() - want).abs() <= bound * want).all()
