"""Running candidates on a case: who can, in what time, and why the others cannot."""

from collections.abc import Callable
from typing import NamedTuple

from moefp8.bench.candidates import Candidate, Case, Results
from moefp8.bench.refusals import explain, may_raise
from moefp8.bench.timing import Timer


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
    the call or runs out of memory. Any other error of ours is a bug and propagates, and so does
    DeviceLostError, after which nothing can be measured.
    """
    reason = candidate.refuse(case)
    if reason is not None:
        return Outcome(candidate, None, reason, None)
    try:
        step = candidate.build(case)
        seconds = timer.first_call(step)
    except may_raise(candidate.name) as error:
        timer.check_device(candidate.name, error)
        return Outcome(candidate, None, explain(error), None)
    return Outcome(candidate, step, None, seconds)
