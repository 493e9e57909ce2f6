"""Text that every machine with Python has: the source of its standard library, byte by byte."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

VOCABULARY = 128  # ASCII; what is not ASCII (one byte in 24,000) counts as byte 127


class Text(NamedTuple):
    """Bytes of three sets of files: 8 of 10 files train, 1 chooses architectures, 1 is the test."""

    train: Tensor
    search: Tensor
    valid: Tensor


def load() -> Text:
    """Read the modules at the top of the standard library, in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: tuple[list[bytes], ...] = ([], [], [])
    for number, file in enumerate(files):
        parts[{4: 1, 9: 2}.get(number % 10, 0)].append(file.read_bytes())
    return Text(
        *(
            torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8).long().clamp(max=127)
            for part in parts
        )
    )


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Some stretches of a text ``[count, length]`` that begin anywhere."""
    start = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[start + torch.arange(length)]
