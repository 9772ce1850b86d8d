"""How a broken law is reported: by its first offending element."""

from torch import Tensor


def fail(law: str, bad: Tensor, **values: Tensor) -> None:
    """Raise for the first True of ``bad``, quoting every named tensor there."""
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        quoted = ", ".join(f"{name} = {v.expand(bad.shape)[at].item()!r}" for name, v in values.items())
        raise AssertionError(f"{law}: {int(bad.sum())} of {bad.numel()} differ, first at {at}: {quoted}")


def differs(got: Tensor, want: Tensor) -> Tensor:
    """Where two tensors of one shape differ; NaN equals NaN and -0 equals 0."""
    if got.shape != want.shape:
        raise AssertionError(f"shape: got {tuple(got.shape)}, expected {tuple(want.shape)}")
    return (got != want) & ~(got.isnan() & want.isnan())
