"""Checkpoints that are whole or absent, and never execute what they contain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from weightshare.files import save

__all__ = ["CheckpointError", "load_run", "refused", "save", "save_run"]

FORMAT, VERSION = "weightshare-demo", 1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message says why and what to do."""


def save_run(path: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Write the state of a run and the settings it belongs to."""
    save(path, {"format": FORMAT, "version": VERSION, "settings": settings, **state})


def load_run(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read the state of a run that was started with the same settings.

    Raises:
        CheckpointError: the file is damaged, is something else, or belongs to another run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, by how the file is broken
        raise refused(path, f"cannot be read, it is damaged ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise refused(path, "is not a checkpoint of this demo")
    absent = {"settings", "phase", "progress", "results"} - state.keys()
    if absent:
        raise refused(path, f"lacks {', '.join(sorted(absent))}")
    if state.get("version") != VERSION:
        raise refused(path, f"has version {state.get('version')}, this demo reads {VERSION}")
    theirs = state["settings"]
    differing = [
        f"{key} {theirs.get(key)} instead of {value}"
        for key, value in settings.items()
        if theirs.get(key) != value
    ]
    if differing:
        raise refused(path, f"was made with other settings: {', '.join(differing)}")
    return state


def refused(path: Path, why: str) -> CheckpointError:
    """The error for a checkpoint that cannot be used."""
    return CheckpointError(
        f"{path} {why}. Start again with --fresh, which replaces it, or give another --out."
    )
