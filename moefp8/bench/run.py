"""Running candidates on a case: who can, in what time, and why the others cannot."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from moefp8.bench.candidates import Candidate, Case, Results
from moefp8.bench.timing import Timer

#: What this library may raise where it cannot serve a call; everything else is a bug.
REFUSALS = (torch.OutOfMemoryError, NotImplementedError, ExceptionGroup)
#: What a peer may raise where it cannot: they assert, or raise whatever comes.
PEER_FAILURES = (*REFUSALS, RuntimeError, AssertionError, ValueError, TypeError)


class Outcome(NamedTuple):
    """A candidate on a case: a step that ran once, or the reason why there is none."""

    candidate: Candidate
    step: Callable[[], Results] | None
    reason: str | None
    #: Seconds of the first call, compilation included.
    first_call: float | None


def start(candidate: Candidate, case: Case, timer: Timer) -> Outcome:
    """Build a candidate's step and call it once.

    A peer that raises is reported as missing, with its words; so is this library where it refuses
    the call or runs out of memory. Any other error of ours is a bug and propagates.
    """
    reason = candidate.refuse(case)
    if reason is not None:
        return Outcome(candidate, None, reason, None)
    ours = candidate.name.startswith("moefp8")
    expected: tuple[type[BaseException], ...] = (
        torch.OutOfMemoryError,
        NotImplementedError,
        ExceptionGroup,
    )
    if not ours:
        expected = (*expected, RuntimeError, AssertionError, ValueError, TypeError)
    try:
        step = candidate.build(case)
        seconds = timer.first_call(step)
    except expected as error:
        return Outcome(candidate, None, explain(error), None)
    return Outcome(candidate, step, None, seconds)


def explain(error: BaseException) -> str:
    """An exception in one line; of a group, what each member says."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(explain(member) for member in error.exceptions)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
