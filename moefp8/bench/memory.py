"""Bytes: what a forward keeps for its backward, and the most that a step takes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def kept_bytes(forward: Callable[[], Tensor], apart_from: Sequence[Tensor]) -> int:
    """Bytes of the storages that autograd saves in ``forward``, each counted once.

    Args:
        forward: a differentiable call.
        apart_from: tensors whose storages do not count: parameters, which are there anyway.
    """
    alive: dict[int, int] = {}
    not_counted = {t.untyped_storage().data_ptr() for t in apart_from}
    held: list[Tensor] = []  # so that no storage is freed and its address used again

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in not_counted:
            alive[storage.data_ptr()] = storage.nbytes()
        held.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward()
    total = sum(alive.values())
    del out
    return total


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes that a call of ``step`` adds to what is allocated, results included; None off a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del results
    return peak
