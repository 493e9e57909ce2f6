"""Every environment variable of the library, in one table."""

from __future__ import annotations

import os
from dataclasses import dataclass

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class Variable:
    """One environment variable: its default, its allowed values and what it does."""

    default: str
    allowed: tuple[str, ...] | None
    purpose: str


TABLE: dict[str, Variable] = {
    "WEIGHTSHARE_BACKEND": Variable("auto", BACKENDS, "force one backend for every op"),
    "WEIGHTSHARE_BUILD": Variable(
        "auto", ("auto", "none", "cpu", "cuda"), "what an install compiles (read by setup.py)"
    ),
    "WEIGHTSHARE_CUDA_ARCHS": Variable(
        "80,90a,100a", None, "GPU targets of the CUDA library (read by setup.py)"
    ),
    "WEIGHTSHARE_GRAD_CACHE_MB": Variable(
        "1024", None, "most CPU memory of freed gradient buffers kept for the next step; 0: none"
    ),
    "WEIGHTSHARE_ISA": Variable(
        "auto", ("auto", "avx512", "avx2", "baseline"), "instruction set of the CPU kernels"
    ),
}


def get(name: str) -> str:
    """Return the value of a variable in :data:`TABLE`; ValueError if it is not allowed."""
    variable = TABLE[name]
    value = os.environ.get(name, variable.default)
    if variable.allowed is not None and value not in variable.allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(variable.allowed)}")
    return value


def get_int(name: str) -> int:
    """Return a variable that is a whole number; ValueError if it is not."""
    value = get(name)
    if not value.isdecimal():
        raise ValueError(f"{name}={value!r}: expected a whole number")
    return int(value)
