"""Timing candidates against one another on a machine whose clock moves under load.

A power-capped GPU slows down as it warms, so two loops timed one after the other compare two
temperatures. Here the candidates take turns: one call of each, then the next round in reverse order.
Every call finds the caches cold, because a buffer larger than the last-level cache is written before
it; the write also keeps the device busy while the host launches, so that launches are not timed.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Any]

#: Bytes written between calls; the L2 of an H100 holds 50 MB, that of a B200 126 MB.
FLUSH_BYTES = 512 * 2**20


class Timer:
    """Times single calls on one device, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def once(self, step: Step) -> float:
        if self._flush is None:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def first_call(self, step: Step) -> float:
        """Wall time of a call and of the device work it starts: for a new shape this compiles."""
        start = time.perf_counter()
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def alternate(
        self, steps: dict[str, Step], repeats: int, advance: Callable[[], None] = lambda: None
    ) -> dict[str, list[float]]:
        """Seconds of ``repeats`` calls of each step, taking turns; ``advance`` is called after each."""
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(repeats):
            for name in list(steps) if turn % 2 == 0 else reversed(steps):
                times[name].append(self.once(steps[name]))
                advance()
        return times


def summary(times: list[float]) -> dict[str, float]:
    """Median, minimum and spread (interquartile range over median) of a list of seconds."""
    median = statistics.median(times)
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
    return {
        "median_s": median,
        "min_s": min(times),
        "spread": (quartiles[2] - quartiles[0]) / median if median else 0.0,
    }
