"""Compiles CUDA kernels for the host with g++ and loads them, rebuilding when a source changes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
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
    command = [compiler() or "g++", *FLAGS, f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}"]
    digest = hashlib.sha256(" ".join(command).encode())
    headers = [*HERE.rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), HERE / f"{name}.cpp"]
    for source in sorted(headers):
        digest.update(source.read_bytes())
    library = BUILD / f"{name}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}.tmp")
        command += [str(HERE / f"{name}.cpp"), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ refused {name}.cpp:\n{done.stderr}")
        for outdated in BUILD.glob(f"{name}-*.so"):
            outdated.unlink(missing_ok=True)
        partial.replace(library)  # at once, so that parallel test runs never load half a file
    return ctypes.CDLL(str(library))


def call(function, *arguments) -> None:
    """Call a guarded entry point; RuntimeError with its message if it reports one."""
    function.restype = ctypes.c_char_p
    message = function(*arguments)
    if message is not None:
        raise RuntimeError(message.decode())
