"""Timing candidates against one another on a machine whose clock moves under load.

A power-capped GPU slows down as it warms, so two loops timed one after the other compare two
temperatures. Here the candidates take turns, one call of each a round, every round in another random
order. Every call finds the caches cold, because a buffer larger than the last-level cache is written
before it.

A GPU is timed by events on its own clock, and it must not wait for the host between them. So it is
put to sleep first, for as long as the host needs to launch the whole step; a call whose first event has
passed before the host came to the end is thrown away and repeated after a longer sleep. A step that
waits for the device itself can never be hidden like that: it is timed as it is, and named as exposed.
"""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefp8.bench.refusals import explain

Step = Callable[[], Any]
Errors = tuple[type[Exception], ...]

#: Bytes written between calls; the L2 of an H100 holds 50 MB, that of a B200 126 MB.
FLUSH_BYTES = 512 * 2**20
#: Seconds of sleep before a call: at first, how they grow, and where a step counts as exposed. An
#: eager forward and backward is some hundred launches of 10 to 50 us, so a few milliseconds.
FIRST_LEAD, LEAD_FACTOR, LONGEST_LEAD = 2e-3, 4.0, 0.2
#: The device sleeps in cycles. No GPU's clock is faster, so a sleep is at least as long as asked for.
CYCLES_PER_SECOND = 3e9


class DeviceLostError(Exception):
    """A candidate left the device unusable for all that come after it."""


class Timings(NamedTuple):
    """What became of a set of steps.

    Attributes:
        seconds: of each call, round by round, of the steps that ran to the end.
        exposed: steps in whose time the device waited for the host.
        failed: steps that raised what they may raise, and its words.
    """

    seconds: dict[str, list[float]]
    exposed: set[str]
    failed: dict[str, str]


class Timer:
    """Times single calls on one device, in seconds."""

    def __init__(self, device: torch.device, peer_seconds: float = 240.0) -> None:
        self.device = device
        #: What the first call of a peer that tunes itself may take.
        self.peer_seconds = peer_seconds
        #: Called whenever something is about to run: a watchdog's.
        self.beat: Callable[[], None] = lambda: None
        self._flush: Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def once(self, step: Step, lead: float = 0.0) -> tuple[float, bool]:
        """Seconds of a call, and whether the device came to it after the host was done with it."""
        self.beat()
        if self._flush is None:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start, True
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(lead * CYCLES_PER_SECOND))
        self._flush.zero_()
        begin.record()
        step()
        end.record()
        hidden = not begin.query()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, hidden

    def _hidden(self, step: Step, lead: float) -> tuple[float, float]:
        """Seconds of a call that the host did not delay, and the sleep it took; infinite if none did."""
        while lead <= LONGEST_LEAD:
            seconds, hidden = self.once(step, lead)
            if hidden:
                return seconds, lead
            lead *= LEAD_FACTOR
        return self.once(step)[0], float("inf")

    def first_call(self, step: Step) -> float:
        """Wall time of a call and of the device work it starts: for a new shape this compiles."""
        self.beat()
        start = time.perf_counter()
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def check_device(self, name: str, error: Exception) -> None:
        """After ``error`` of the candidate ``name``: raise DeviceLostError if the device does not answer.

        An illegal access, unlike a refusal, fails every later call of the process.
        """
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:
                raise DeviceLostError(f"{name} left the device unusable: {explain(error)}") from error

    def alternate(
        self,
        steps: dict[str, Step],
        repeats: int,
        advance: Callable[[], None] = lambda: None,
        may_raise: Callable[[str], Errors] = lambda name: (),
    ) -> Timings:
        """Seconds of ``repeats`` calls of each step, taking turns; ``advance`` is called after each.

        A step that raises one of ``may_raise(name)`` drops out, with all its times.
        """
        order = list(steps)
        turns = random.Random(0)
        leads = dict.fromkeys(steps, FIRST_LEAD)
        result = Timings({name: [] for name in steps}, set(), {})
        for _ in range(repeats):
            turns.shuffle(order)
            for name in list(order):
                try:
                    seconds, leads[name] = self._hidden(steps[name], leads[name])
                except may_raise(name) as error:
                    self.check_device(name, error)
                    order.remove(name)
                    del result.seconds[name]
                    result.exposed.discard(name)
                    result.failed[name] = explain(error)
                    continue
                if leads[name] > LONGEST_LEAD:
                    result.exposed.add(name)
                result.seconds[name].append(seconds)
                advance()
        return result


def summary(times: list[float]) -> dict[str, float]:
    """Median, minimum and spread (interquartile range over median) of a list of seconds."""
    median = statistics.median(times)
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
    return {
        "median_s": median,
        "min_s": min(times),
        "spread": (quartiles[2] - quartiles[0]) / median if median else 0.0,
    }
