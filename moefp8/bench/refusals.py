"""What may stop a candidate, as opposed to a bug, and how to say it in one line."""

import torch

#: What this library may raise where it cannot serve a call; everything else is a bug.
REFUSALS = (torch.OutOfMemoryError, NotImplementedError, ExceptionGroup)
#: What a peer may raise where it cannot: they assert, or raise whatever comes.
PEER_FAILURES = (*REFUSALS, RuntimeError, AssertionError, ValueError, TypeError)


def may_raise(name: str) -> tuple[type[Exception], ...]:
    """What a candidate of this name may raise and be reported as missing."""
    return REFUSALS if name.startswith("moefp8") else PEER_FAILURES


def explain(error: BaseException) -> str:
    """An exception in one line; of a group, what each member says."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(explain(member) for member in error.exceptions)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
