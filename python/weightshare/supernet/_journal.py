"""A search's journal: a file that several processes share and that survives their being killed."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import BinaryIO


class FileLock:
    """One process at a time on a journal, told by the kernel: a lock dies with its holder.

    Optuna's own locks are files, which outlive a killed maker by 30 s. This one may be taken again
    while it is held, as Optuna's journal does within our own steps. A line that its writer was
    killed in the middle of is cut off before anybody appends to it.

    Args:
        path: the journal, on a file system with ``flock`` (local ones, NFS).
    """

    def __init__(self, path: Path):
        self._path, self._depth = path, 0
        self._file: BinaryIO | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        if self._depth == 0:
            # Opened anew each time: a process forked in between must not share the lock.
            self._file = open(self._path, "r+b")  # noqa: SIM115 (closed by release)
            _lock(self._file, wait=True)
            _mend(self._file)
        self._depth += 1
        return True

    def release(self) -> None:
        """Let the next process in."""
        self._depth -= 1
        if self._depth == 0 and self._file is not None:
            self._file.close()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error) -> None:
        self.release()


class Worker:
    """Shows other processes that this one lives: it holds a locked file next to the journal.

    Made and left while the journal's lock is held.

    Attributes:
        name: to be noted with what the worker is at.
    """

    def __init__(self, journal: Path):
        self._journal, self.name = journal, uuid.uuid4().hex[:12]
        self._sweep()
        self._file = open(self._sign(self.name), "xb")  # noqa: SIM115 (closed by leave)
        _lock(self._file, wait=True)

    def lives(self, name: str) -> bool:
        """Whether the worker of this name still runs, on whatever machine."""
        try:
            with open(self._sign(name), "rb") as file:
                return not _lock(file, wait=False)
        except FileNotFoundError:
            return False

    def leave(self) -> None:
        """Be done."""
        self._file.close()
        self._sweep()

    def _sweep(self) -> None:
        """Remove the files of workers that are no more."""
        start, end = f"{self._journal.name}.", ".worker"
        for path in self._journal.parent.iterdir():
            if path.name.startswith(start) and path.name.endswith(end):
                name = path.name[len(start) : -len(end)]
                if not self.lives(name):
                    path.unlink(missing_ok=True)

    def _sign(self, name: str) -> Path:
        return self._journal.with_name(f"{self._journal.name}.{name}.worker")


def _lock(file: BinaryIO, wait: bool) -> bool:
    """Lock an open file; tell whether that worked (always, where it waits)."""
    import fcntl  # not on Windows, where a search lives in memory

    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    return False


def _mend(file: BinaryIO) -> None:
    """Cut off a last line that has no end: its writer was killed, and nobody relied on it."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
