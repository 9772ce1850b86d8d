"""Running candidates on a case: who can, in what time, and why the others cannot."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from moefp8.bench.apart import call_apart
from moefp8.bench.candidates import Candidate, Case, Results, make_case
from moefp8.bench.peers import peers
from moefp8.bench.problem import Problem, draw
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
    if reason is None and candidate.tunes and case.device.type == "cuda":
        timer.beat()
        reason = call_apart(
            "moefp8.bench.run:first_call", _as_argument(candidate, case), timer.peer_seconds
        )
    if reason is not None:
        return Outcome(candidate, None, reason, None)
    try:
        step = candidate.build(case)
        seconds = timer.first_call(step)
    except may_raise(candidate.name) as error:
        timer.check_device(candidate.name, error)
        return Outcome(candidate, None, explain(error), None)
    return Outcome(candidate, step, None, seconds)


def _as_argument(candidate: Candidate, case: Case) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "problem": list(case.problem),
        "ends": case.operands.offs.tolist(),
        "backward": case.backward,
        "device": str(case.device),
    }


def first_call(name: str, problem: list[int], ends: list[int], backward: bool, device: str) -> str | None:
    """Call the peer ``name`` once on such a case, in a process that the caller may end; why it cannot."""
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    shape = Problem(*problem)
    operands = draw(shape, torch.device(device))
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    peer = next(c for c in peers() if c.name == name)
    case = make_case(shape, operands._replace(offs=offs), backward)
    return start(peer._replace(tunes=False), case, Timer(torch.device(device))).reason
