"""What the test of calls in another process calls there; imports nothing that takes long."""

import time


def instant(reason: str | None) -> str | None:
    return reason


def slow(seconds: float) -> None:
    time.sleep(seconds)


def broken() -> None:
    raise ValueError("no such thing")
