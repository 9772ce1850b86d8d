"""The text of train_moe_lm.py: the source of the Python standard library, byte by byte."""

import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def load_corpus() -> tuple[Tensor, Tensor]:
    """The standard library's source as bytes: (training, held-out), one file in 16 held out by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    leave_out = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "__pycache__",
        "pydoc_data",
        "encodings",
    }
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not leave_out & set(name.parts):
            held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] % 16 == 0
            parts[held_out].append(path.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8) for p in parts)
    return train, held_out


def draw_batch(text: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """``batch`` random windows of ``length + 1`` bytes."""
    start = torch.randint(len(text) - length, (batch, 1), generator=generator)
    return text[start + torch.arange(length + 1)].long()


def held_out_windows(text: Tensor, batch: int, length: int, batches: int) -> list[Tensor]:
    """The same windows for every run, spread evenly over the held-out text."""
    start = torch.linspace(0, len(text) - length - 1, batch * batches).long()[:, None]
    return list(text[start + torch.arange(length + 1)].long().split(batch))
