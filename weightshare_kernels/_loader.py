"""Loads the native libraries beside this file and remembers why one is missing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from weightshare_kernels import _config

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Library:
    """State of one native library: loaded, or the reason why not."""

    name: str
    path: Path | None
    loaded: bool
    reason: str


def _load(name: str, wanted: bool, unwanted_because: str) -> Library:
    path = HERE / f"_C_{name}.so"
    if not wanted:
        return Library(name, path if path.exists() else None, False, unwanted_because)
    if not path.exists():
        why = "not built: no compiler, a failed build, or WEIGHTSHARE_BUILD left it out"
        return Library(name, None, False, why)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(name, path, False, f"the dynamic linker refused it: {error}")
    return Library(name, path, True, "loaded")


def _load_all() -> dict[str, Library]:
    backend = _config.get("WEIGHTSHARE_BACKEND")
    _config.get("WEIGHTSHARE_ISA")  # read by the CPU library, which would take a typo for auto
    forced = f"WEIGHTSHARE_BACKEND={backend}"
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    cpu = _load("cpu", backend != "reference" and not interpreted, forced)
    if torch.version.cuda is None:
        cuda = _load("cuda", False, "this torch has no CUDA")
    else:
        cuda = _load("cuda", backend in ("auto", "cuda"), forced)
    for library in (cpu, cuda):
        if backend == library.name and not library.loaded:
            raise ImportError(
                f"WEIGHTSHARE_BACKEND={backend}, but the {backend} library is not loaded: "
                f"{library.reason}. Reinstall with a compiler, or unset the variable."
            )
    return {"cpu": cpu, "cuda": cuda}


LIBRARIES: dict[str, Library] = _load_all()
