"""Calls that may never return: made in a process of their own, or watched.

A peer may compile and tune dozens of kernels at a new shape, for minutes, and do it in a thread of
autograd that no signal reaches. So its first call is made in another process, which can be ended, and
which leaves what it compiled and tuned in Triton's caches on disk for the call that is measured.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

#: Makes Triton keep the outcome of tuning on disk; read where kernels are defined.
TUNING_CACHE = "TRITON_CACHE_AUTOTUNING"

_CHILD = """
import importlib, json, sys
module, name = sys.argv[1].split(":")
reason = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
if reason is not None:
    sys.exit(reason)
"""


def call_apart(function: str, argument: dict[str, Any], seconds: float) -> str | None:
    """Call ``module:function(**argument)`` in another process.

    Args:
        function: returns None, or a reason in words.
        argument: as JSON holds it.
        seconds: after which the process is ended.

    Returns:
        None if it returned None; else its reason, the last line of its traceback, or that it took too long.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, function, json.dumps(argument)],
            env={**os.environ, TUNING_CACHE: "1"},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return (
            f"its first call did not end within {seconds:.0f} s (it may be tuning its kernels for the "
            f"shape: --peer-seconds gives it longer)"
        )
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"its process ended with status {done.returncode}"]
    return lines[-1]


class Watchdog:
    """Ends the process, after ``give_up(reason)``, if nobody calls :meth:`beat` for ``patience`` seconds.

    A kernel that never ends blocks whoever waits for the device, beyond the reach of exceptions.
    """

    def __init__(self, patience: float, give_up: Callable[[str], None]) -> None:
        self._patience, self._give_up = patience, give_up
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def beat(self) -> None:
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(max(0.0, self._last + self._patience - time.monotonic())):
            if time.monotonic() - self._last >= self._patience:
                try:
                    self._give_up(f"nothing moved for {self._patience:.0f} s; the device may hang")
                finally:
                    os._exit(1)

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
