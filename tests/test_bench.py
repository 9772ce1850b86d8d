"""The benchmarks measure what they say: operands, turns, figures, refusals, files."""

import json
import math
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from moefp8 import MXFP8, dequantize_mx, quantize_mx
from moefp8.bench import accumulation, candidates, ceilings, peers, problem, quantize, run, timing
from moefp8.bench.__main__ import main
from moefp8.bench.grouped_mm import measure_shape
from moefp8.recipe import PRESETS

CPU = torch.device("cpu")
TINY = problem.Problem(96, 64, 32, 3)


def tiny_case(multiple_of: int = 32, backward: bool = True) -> candidates.Case:
    operands = problem.draw(TINY, CPU)
    offs = problem.unequal_offs(TINY, CPU, multiple_of, seed=1)
    return candidates.make_case(TINY, operands._replace(offs=offs), backward)


def fails(error: Exception, name: str) -> candidates.Candidate:
    def step() -> candidates.Results:
        raise error

    return candidates.Candidate(name, build=lambda case: step)


# --- problems ------------------------------------------------------------------------------------


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


# --- timing --------------------------------------------------------------------------------------


def test_candidates_take_turns_in_random_order() -> None:
    """Once each a round; twelve rounds of three do not all agree (6^-11), and a second run repeats them."""
    calls: list[str] = []
    steps = {name: partial(calls.append, name) for name in "abc"}
    seconds, exposed, failed = timing.Timer(CPU).alternate(steps, 12)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(t) for name, t in seconds.items()} == {"a": 12, "b": 12, "c": 12}
    assert not exposed
    assert not failed
    timing.Timer(CPU).alternate(steps, 12)
    assert calls[:36] == calls[36:]


def test_what_fails_later_drops_out_and_says_why() -> None:
    calls: list[str] = []

    def fails_later() -> None:
        calls.append("peer")
        if len(calls) == 3:
            raise RuntimeError("no more\nat all")

    steps = {"peer": fails_later, "other": lambda: None}
    peer_errors = {"peer": (RuntimeError,), "other": ()}
    seconds, _, failed = timing.Timer(CPU).alternate(steps, 5, may_raise=peer_errors.__getitem__)
    assert len(calls) == 3
    assert failed == {"peer": "no more"}
    assert {name: len(t) for name, t in seconds.items()} == {"other": 5}
    calls.clear()
    with pytest.raises(RuntimeError, match="no more"):
        timing.Timer(CPU).alternate(steps, 5)


@pytest.mark.parametrize(("launch", "exposed"), [(0.02, False), (math.inf, True)])
def test_sleeps_until_the_launch_is_hidden(launch: float, exposed: bool) -> None:
    """A call counts only if the device slept for longer than the launch, unless no sleep is enough."""
    leads: list[float] = []

    class Fake(timing.Timer):
        def once(self, step: timing.Step, lead: float = 0.0) -> tuple[float, bool]:
            leads.append(lead)
            return (1.0 if lead > launch else 2.0), lead > launch

    seconds, seen, _ = Fake(CPU).alternate({"a": lambda: None}, 2)
    assert seconds == {"a": [2.0, 2.0] if exposed else [1.0, 1.0]}
    assert seen == ({"a"} if exposed else set())
    enough = [2e-3, 8e-3, 32e-3, 32e-3]  # the second round begins where the first one ended
    assert leads == ([2e-3, 8e-3, 32e-3, 128e-3, 0.0, 0.0] if exposed else enough)


def test_a_lost_device_ends_the_run_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def lost(self: timing.Timer, *rest: object) -> timing.Timings:
        raise timing.DeviceLostError("a peer left the device unusable: illegal access")

    args = "quantize --device cpu --shape 64,32,32 --shape 32,32,32 --repeats 1 --without moefp8 --json"
    once = timing.Timer.alternate
    turns = iter([once, lost])
    monkeypatch.setattr(timing.Timer, "alternate", lambda *args: next(turns)(*args))
    with pytest.raises(SystemExit, match="a peer left the device unusable"):
        main([*args.split(), str(tmp_path / "q.json")])
    assert {row["problem"]["m"] for row in written(tmp_path / "q.json")["rows"]} == {64}
    assert "M 64" in capsys.readouterr().out


def test_summary() -> None:
    figures = timing.summary([4.0, 1.0, 3.0, 2.0, 5.0])
    assert figures["median_s"] == 3.0
    assert figures["min_s"] == 1.0
    assert timing.summary([2.0])["spread"] == 0.0


def test_ratios_pair_the_times_of_a_round() -> None:
    """Every other round is ten times as slow for all: the ratio must not see it."""
    calls = iter(range(100))

    class Fake(timing.Timer):
        def once(self, step: timing.Step, lead: float = 0.0) -> tuple[float, bool]:
            return step() * (10.0 if next(calls) // 2 % 2 else 1.0), True

        def first_call(self, step: timing.Step) -> float:
            return 0.0

    baseline = candidates.Candidate(peers.BASELINE, lambda case: lambda: 1.0, fp8=False)
    two = [baseline, candidates.Candidate("half as fast", lambda case: lambda: 2.0)]
    rows = measure_shape(
        TINY, two, Fake(CPU), ceilings.Ceilings(1.0, 1.0, math.nan),
        unequal=None, backward=True, repeats=4, advance=lambda: None,
    )  # fmt: skip
    assert [row.figures["speedup"] for row in rows] == [1.0, 0.5]


# --- candidates ----------------------------------------------------------------------------------


def exact(case: candidates.Case) -> list[torch.Tensor]:
    """out, da and db of the high-precision product in float64, group by group."""
    a, b, offs, g = (x.detach().double() if x.is_floating_point() else x for x in case.operands)
    out, da, db = torch.zeros_like(g), torch.zeros_like(a), torch.zeros_like(b)
    ends = offs.tolist()
    for e, (lo, hi) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        out[lo:hi] = a[lo:hi] @ b[e]
        da[lo:hi] = g[lo:hi] @ b[e].T
        db[e] = a[lo:hi].T @ g[lo:hi]
    return [out, da, db]


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize(
    "name", ["torch bf16", "torchao mxfp8 emulated", "moefp8 mxfp8", "moefp8 fp8_rowwise"]
)
def test_every_candidate_computes_the_same_product(name: str, backward: bool) -> None:
    """Within what two roundings to E4M3 can do, summed over the contraction.

    An element x of a block with largest magnitude A errs by at most u |x| + v A: u = 1/17, and half the
    smallest subnormal number, 2^-10, of a scale that is at most 2 A / 448. A product of two such errs by
    (2 u + u^2) |x y| + (2 + 2 u + v) v A B. A bfloat16 result adds 2^-9 of itself.
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
        assert (error <= ((2 * u + u**2) * size + subnormal) * (1 + 2**-9) + 2**-9 * want.abs()).all()


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


def test_a_bug_of_ours_is_not_reported_as_missing() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        run.start(fails(RuntimeError("a bug"), "moefp8 mxfp8"), tiny_case(), timing.Timer(CPU))


def test_recipes_with_promotion_intervals() -> None:
    recipes = candidates.named_recipes(["mxfp8", "bf16"], [512])
    assert list(recipes) == ["mxfp8", "mxfp8, promote=512", "bf16"]
    assert {gemm.promote for gemm in recipes["mxfp8, promote=512"]} == {512}


# --- accumulation --------------------------------------------------------------------------------


def test_operands_of_the_bias_are_exact_in_every_format() -> None:
    x = accumulation._representable(96, 64, torch.Generator().manual_seed(0))
    assert (x > 0).float().mean() > 0.99
    for axis in (0, 1):
        for group in (32, -1):
            q = quantize_mx(x, axis, group=group)
            assert torch.equal(dequantize_mx(q), x)
        assert (x.amax(axis) == 448).all()  # so the scale of a row, amax / 448, is 1


def test_bias_sees_a_short_sum() -> None:
    """A product that loses a quarter of everything has a bias of -25 %; this library's has none.

    float32 sums of n positive terms err by at most n 2^-24, here 64 terms; each of the results is then
    rounded to bfloat16, at most 2^-9 of it either way (half an ulp of 8 bits).
    """

    def short(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        return 0.75 * torch._grouped_mm(a, b, offs=offs)

    lossy = candidates.Candidate("lossy", lambda case: candidates.differentiable(short, case))
    both = [lossy, *candidates.ours({"mxfp8": MXFP8}, None)]
    rows = accumulation.measure_bias(both, 64, 32, timing.Timer(CPU), lambda: None)
    bound = 64 * 2**-24 + 2**-9
    assert [row.product for row in rows[::2]] == ["fwd", "dgrad", "wgrad"]
    for row in rows:
        want = -0.25 if row.candidate == "lossy" else 0.0
        # 0.75 rounds a second time.
        assert abs(row.value - want) <= 2 * bound


def test_sqnr() -> None:
    assert accumulation.sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20.0)


@pytest.mark.parametrize("name", list(accumulation.DISTRIBUTIONS))
def test_distributions_are_finite_and_drawn_from_the_generator(name: str) -> None:
    draw = accumulation.DISTRIBUTIONS[name]
    first, again = (draw((64, 128), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.isfinite().all()


# --- quantisers ----------------------------------------------------------------------------------


def test_bytes_of_a_quantiser() -> None:
    inputs = quantize.Inputs(
        torch.zeros(64, 32), torch.zeros(64, 48), torch.zeros(2, 48, 32), torch.tensor([64])
    )
    bytes_of = {q.name: q.bytes_moved(inputs) for q in quantize.OURS}
    assert bytes_of["moefp8 rows of cotangent, mx"] == 64 * 48 * (2 + 1)
    assert bytes_of["moefp8 weights both ways, mx"] == 2 * 48 * 32 * 2 * (2 + 1)
    assert bytes_of["moefp8 reference rows, mx 32"] == 64 * 32 * (2 + 1) + 64


# --- command line --------------------------------------------------------------------------------


def written(path: Path) -> dict:
    content = json.loads(path.read_text())
    assert content["command"].startswith("python -m moefp8.bench")
    assert content["environment"]["torch"] == torch.__version__
    return content


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_grouped_mm_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = "grouped-mm --device cpu --shape 64,32,32 --groups 2 --repeats 2 --recipe mxfp8 --unequal 32"
    main([*args.split(), "--json", str(tmp_path / "g.json"), "--png", str(tmp_path / "g.png")])
    rows = written(tmp_path / "g.json")["rows"]
    assert {row["layout"] for row in rows} == {"equal", "unequal"}
    ours = [row for row in rows if row["candidate"] == "moefp8 mxfp8"]
    assert all(row["speedup"] > 0 and row["missing"] is None for row in ours)
    assert "over_equal" in ours[1]
    assert next(row for row in rows if row["candidate"] == "torch bf16")["speedup"] == 1.0
    assert is_png(tmp_path / "g.png")
    assert is_png(tmp_path / "g-roofline.png")
    printed = capsys.readouterr().out
    assert "moefp8 mxfp8" in printed
    assert "needs a CUDA device" in printed


def test_quantize_command(tmp_path: Path) -> None:
    args = "quantize --device cpu --shape 64,32,32 --groups 2 --repeats 1"
    args += " --without rowwise --without cotangent"
    main([*args.split(), "--json", str(tmp_path / "q.json"), "--png", str(tmp_path / "q.png")])
    rows = written(tmp_path / "q.json")["rows"]
    ours = [row for row in rows if row["candidate"].startswith("moefp8")]
    assert len(ours) == 4 + len(quantize.REFERENCE)
    assert all(row["copy_share"] > 0 for row in ours)
    assert is_png(tmp_path / "q.png")


def test_accumulation_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = "accumulation --device cpu --contraction 64 --size 32 --recipe mxfp8 --promote 64 --repeats 1"
    args += " --intervals 128 never --shape 128,64,32,1 --without torchao"
    main([*args.split(), "--json", str(tmp_path / "a.json"), "--png", str(tmp_path / "a.png")])
    rows = written(tmp_path / "a.json")["rows"]
    sqnr = {(r["candidate"], r["setting"], r["product"]): r["value"] for r in rows if r["kind"] == "sqnr"}
    assert {r["promote"] for r in rows if r["kind"] == "promotion"} == {None, 128, problem.NEVER}
    for setting in accumulation.DISTRIBUTIONS:
        for product in accumulation.PRODUCTS:
            # The reference's own span is 32: its MXFP8 is true MX to the bit, whatever the promotion.
            true = sqnr[accumulation.TRUE_MX, setting, product]
            assert sqnr["moefp8 mxfp8, promote=64", setting, product] == true
    assert is_png(tmp_path / "a.png")
    assert is_png(tmp_path / "a-sqnr.png")
    assert is_png(tmp_path / "a-promotion.png")
    assert "lognormal" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"No CUDA device(.|\n)*quantize --device cpu"):
        main(["quantize"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("grouped-mm --shape 1,2", "expected M,K,N, got '1,2'"),
        ("grouped-mm --shape 1,2,0", "expected positive M,K,N"),
        ("quantize --repeats 0", "expected a positive number"),
        ("accumulation --recipe fp4", "invalid choice: 'fp4'"),
    ],
)
def test_wrong_arguments(args: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(args.split())
    assert message in capsys.readouterr().err


def test_groups_of_no_published_shape() -> None:
    with pytest.raises(SystemExit, match=r"the published shapes have \[4\]; others need a --shape"):
        main(["quantize", "--device", "cpu", "--groups", "3"])


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", [c.name for c in peers.peers() if not c.whole])
def test_bare_products_compute_the_product(name: str) -> None:
    """On operands that E4M3 represents, precise sums are within bf16's half ulp, 2^-9, and the 0.1 %
    that promotion every 128 may lose; fast sums of 256 terms lose 256 2^-13 at most."""
    device = torch.device("cuda")
    one = problem.Problem(256, 256, 256, 1)
    case = candidates.make_case(one, accumulation.positive_operands(one, device), True)
    outcome = run.start(next(c for c in peers.peers() if c.name == name), case, timing.Timer(device))
    assert outcome.reason is None
    bound = 2**-9 + (1e-3 if "precise" in name else 256 * 2**-13)
    for value, want in zip(outcome.step(), exact(case), strict=True):
        assert ((value.double() - want).abs() <= bound * want).all()


@pytest.mark.gpu
def test_commands_on_a_gpu(tmp_path: Path) -> None:
    shape = "--shape 1024,512,512 --groups 4 --repeats 2"
    for command in (
        f"grouped-mm {shape} --unequal 32",
        f"quantize {shape}",
        "accumulation --contraction 1024",
    ):
        path = tmp_path / "x.json"
        main([*command.split(), "--json", str(path), "--png", str(tmp_path / "x.png")])
        assert all(row["missing"] is None for row in written(path)["rows"] if "moefp8" in row["candidate"])


@pytest.mark.gpu
def test_launching_is_not_timed() -> None:
    """A host that takes 10 ms to launch one small kernel; and one that cannot go on without the device."""
    x = torch.zeros(1, device="cuda")

    def slow_launch() -> None:
        time.sleep(10e-3)
        x.add_(1)

    def waits() -> float:
        time.sleep(10e-3)
        return x.add_(1).item()

    steps = {"slow launch": slow_launch, "waits": waits}
    seconds, exposed, _ = timing.Timer(torch.device("cuda")).alternate(steps, 3)
    assert exposed == {"waits"}
    assert max(seconds["slow launch"]) < 1e-3
    assert min(seconds["waits"]) > 5e-3  # the write that empties the caches covers a millisecond at most
