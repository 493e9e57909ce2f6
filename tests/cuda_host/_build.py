"""Compiles CUDA kernels for the host with g++ and loads them, rebuilding when a source changes."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_host"
# -O1 keeps the build at seconds; nvcc contracts products and sums, too; fortified longjmp would
# take the fibres' jumps between stacks for an attack.
FLAGS = ["-x", "c++", "-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=fast"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


@cache
def load(name: str) -> ctypes.CDLL:
    """Compile ``tests/cuda_host/<name>.cpp`` unless that has been done; load it."""
    return ctypes.CDLL(str(_compiled(HERE / f"{name}.cpp")))


def compiled_binding(source: Path) -> Path:
    """Library of a CUDA binding of ``csrc/bindings`` whose ops take CPU tensors."""
    torch_home = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    headers = torch_home / "include"
    options = [
        f"-I{HERE / 'bound'}", f"-isystem{headers}",
        f"-isystem{headers / 'torch/csrc/api/include'}", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", "-include", str(HERE / "bound/prelude.h"),
    ]  # fmt: skip
    link = [f"-L{torch_home / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]
    return _compiled(source, options, link)


def _compiled(source: Path, options: Sequence[str] = (), link: Sequence[str] = ()) -> Path:
    """Library of a source, compiled anew when it, a header or the command changes."""
    include = [f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}"]
    command = [compiler() or "g++", *FLAGS, *options, *include]
    digest = hashlib.sha256(" ".join([*command, *link]).encode())
    csrc = [path for kind in ("cuh", "h") for path in (ROOT / "csrc").rglob(f"*.{kind}")]
    for file in sorted([*HERE.rglob("*.h"), *csrc, source]):
        digest.update(file.read_bytes())
    library = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}.tmp")
        done = subprocess.run(
            [*command, str(source), *link, "-o", str(partial)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"g++ refused {source.name}:\n{done.stderr}")
        for outdated in BUILD.glob(f"{source.stem}-*.so"):
            outdated.unlink(missing_ok=True)
        partial.replace(library)  # at once, so that parallel test runs never load half a file
    return library


def call(function, *arguments) -> None:
    """Call a guarded entry point; RuntimeError with its message if it reports one."""
    function.restype = ctypes.c_char_p
    message = function(*arguments)
    if message is not None:
        raise RuntimeError(message.decode())
