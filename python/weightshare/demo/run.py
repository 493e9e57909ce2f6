"""Runs the demo's trainings in order, stops between two steps, and resumes there."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from weightshare.demo import checkpoint, measure, report
from weightshare.demo.data import Digits, load_digits
from weightshare.demo.settings import Settings
from weightshare.demo.train import Alone, Phase, Search, Shared

SAVE_EVERY = 5.0  # seconds; a checkpoint takes some 10 ms


class Interrupted(Exception):
    """The run was stopped and can be resumed from its checkpoint."""


def run(
    settings: Settings,
    out: Path,
    resume: bool | None = None,
    console: Console | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Run the demo, or what is left of it.

    Args:
        settings: what the results depend on.
        out: folder for ``demo.json``, ``demo.png``, ``subnet.pt``, ``subnet.py`` and, until the
            run is complete, ``checkpoint.pt``.
        resume: True to go on from a checkpoint that must be there, False to start again, None
            to go on if there is one.
        console: where progress and results are printed.
        stop: asked after every step; the default listens to SIGINT and SIGTERM.

    Returns:
        What ``demo.json`` holds.

    Raises:
        Interrupted: the run was stopped; a checkpoint is left.
        CheckpointError: there is a checkpoint, but it cannot be used.
    """
    console = console or Console()
    path = out / "checkpoint.pt"
    state = _starting_state(path, settings, resume)
    if state["results"] or state["phase"]:
        console.print(f"Resuming from {path}")
    digits = load_digits()
    # Layers this small run faster, and are timed more steadily, on one thread.
    with _threads(1), _stopping(stop) as stopped:
        _train(settings, digits, path, state, console, stopped)
        found = measure.evaluate(settings, digits, state["results"], out)
    report.write(found, out, console)
    path.unlink()
    return found


def _starting_state(path: Path, settings: Settings, resume: bool | None) -> dict[str, Any]:
    if resume is not False and path.exists():
        return checkpoint.load_run(path, settings.as_dict())
    if resume:
        raise checkpoint.CheckpointError(f"{path} does not exist: there is nothing to resume.")
    return {"phase": "", "progress": {}, "results": {}}


def _train(
    settings: Settings,
    digits: Digits,
    path: Path,
    state: dict[str, Any],
    console: Console,
    stopped: Callable[[], bool],
) -> None:
    """Bring every phase to its end and its result into ``state["results"]``."""
    columns = (
        TextColumn("{task.description:<30}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[status]}"),
    )
    results = state["results"]
    with Progress(*columns, console=console) as progress:
        for kind in (Shared, Alone, Search):
            if kind.name in results:
                continue
            weights = (results["shared"]["model"],) if kind is Search else ()
            phase = kind(settings, digits, *weights)
            if state["phase"] == phase.name:
                _restore(phase, state["progress"], path)
            _drive(phase, settings, path, results, progress, stopped)
            results[phase.name] = phase.result()
            state["phase"] = ""
        _save(None, settings, path, results)


def _drive(
    phase: Phase,
    settings: Settings,
    path: Path,
    results: dict[str, Any],
    progress: Progress,
    stopped: Callable[[], bool],
) -> None:
    task = progress.add_task(
        phase.title, total=phase.total, completed=phase.position, status=phase.status
    )
    _save(phase, settings, path, results)
    saved = time.monotonic()
    while phase.position < phase.total:
        phase.advance()
        progress.update(task, completed=phase.position, status=phase.status)
        if stopped():
            _save(phase, settings, path, results)
            raise Interrupted(f"stopped at step {phase.position} of {phase.total}: {phase.title}")
        if time.monotonic() - saved > SAVE_EVERY:
            _save(phase, settings, path, results)
            saved = time.monotonic()


def _save(phase: Phase | None, settings: Settings, path: Path, results: dict[str, Any]) -> None:
    state = {
        "phase": phase.name if phase else "",
        "progress": phase.state_dict() if phase else {},
        "results": results,
    }
    checkpoint.save_run(path, settings.as_dict(), state)


def _restore(phase: Phase, state: dict[str, Any], path: Path) -> None:
    try:
        phase.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise checkpoint.refused(path, f"does not fit this demo ({error})") from error


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _stopping(stop: Callable[[], bool] | None) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag; a second SIGINT interrupts at once."""
    if stop is not None or threading.current_thread() is not threading.main_thread():
        yield stop or (lambda: False)
        return
    asked = threading.Event()

    def ask(number, frame):
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
