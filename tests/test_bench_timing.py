"""How the benchmarks time: in turns, launches hidden, failures told apart, nothing waits for ever."""

import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_cases import CPU, written

from moefp8.bench import apart, timing
from moefp8.bench.__main__ import main


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


def test_summary() -> None:
    figures = timing.summary([4.0, 1.0, 3.0, 2.0, 5.0])
    assert figures["median_s"] == 3.0
    assert figures["min_s"] == 1.0
    assert timing.summary([2.0])["spread"] == 0.0


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


# --- what may never return -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "argument", "seconds", "says"),
    [
        ("instant", {"reason": None}, 60, None),
        ("instant", {"reason": "needs a larger card"}, 60, "needs a larger card"),
        ("broken", {}, 60, "ValueError: no such thing"),
        ("slow", {"seconds": 600}, 0.5, "its first call did not end within 0 s"),
    ],
)
def test_a_call_apart(
    function: str, argument: dict, seconds: float, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Returns, refuses, raises, or is ended; every time the caller goes on."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    start = time.perf_counter()
    reason = apart.call_apart(f"apart_targets:{function}", argument, seconds)
    assert time.perf_counter() - start < 60
    assert reason == says if says is None else reason.startswith(says)


def test_the_watchdog_ends_a_run_that_hangs() -> None:
    """In a process of its own, which shows what it has and ends with an error; beats keep it away."""
    script = """
import runpy, sys, time
Watchdog = runpy.run_path(sys.argv[1])["Watchdog"]
with Watchdog(0.5, lambda reason: print("tables", reason, flush=True)) as dog:
    for _ in range(5):
        time.sleep(0.2)
        dog.beat()
    print("alive", flush=True)
    time.sleep(600)
"""
    command = [sys.executable, "-c", script, apart.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout.split("\n")[:2] == ["alive", "tables nothing moved for 0 s; the device may hang"]
