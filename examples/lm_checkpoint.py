"""Stopping and going on: pytrees in safetensors files, written whole or not at all, and Ctrl-C."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree
from safetensors import safe_open
from safetensors.torch import save_file


def save(tree: Any, path: Path, settings: dict[str, Any]) -> None:
    """Write the pytree beside ``path`` and move it there, so that no moment leaves half a file."""
    leaves = {pytree.keystr(key): x.contiguous() for key, x in pytree.tree_leaves_with_path(tree)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    save_file(leaves, unfinished, metadata={"settings": json.dumps(settings)})
    os.replace(unfinished, path)


def load(path: Path, like: Any, settings: dict[str, Any]) -> Any:
    """The pytree saved at ``path``, of the structure of ``like``, if its settings are the same."""
    with safe_open(path, framework="pt") as file:
        saved = json.loads(file.metadata()["settings"])
        for name, value in settings.items():
            if saved[name] != value:
                flag = f"--{name.replace('_', '-')}"
                raise SystemExit(f"{flag}: {path} was started with {saved[name]}, got {value}")
        return pytree.tree_map_with_path(lambda key, _: file.get_tensor(pytree.keystr(key)), like)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C finish the step in progress: yields a function that says whether it came.

    A second Ctrl-C stops at once; the last checkpoint is then what is left.
    """
    came = False

    def handler(*_: Any) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)
