"""What is installed, built, loaded and chosen here, and why not.

Run it as ``python -m weightshare_kernels.info``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Sequence
from typing import Any

import torch

import weightshare_kernels
from weightshare_kernels import _config, _loader, _register


def collect() -> dict[str, Any]:
    """Everything :func:`main` prints, as JSON-ready data.

    Returns:
        ``versions``, ``machine``, ``libraries``, ``ops`` (op -> device -> backend),
        ``environment`` and ``hints``, the last a list of sentences on what is missing.
    """
    facts: dict[str, Any] = {
        "versions": _versions(),
        "machine": _machine(),
        "libraries": {
            name: {
                "built": library.path is not None,
                "loaded": library.loaded,
                "reason": library.reason,
            }
            for name, library in _loader.LIBRARIES.items()
        },
        "ops": {
            name: {device: _register.backend_of(name, device) for device in _devices()}
            for name in sorted(_register.OPS)
        },
        "environment": {
            name: {
                "value": os.environ.get(name, variable.default),
                "set": name in os.environ,
                "allowed": variable.allowed,
                "purpose": variable.purpose,
            }
            for name, variable in _config.TABLE.items()
        },
    }
    facts["hints"] = _hints(facts)
    return facts


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "weightshare-kernels": weightshare_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch cuda": torch.version.cuda,
    }
    for name in ("triton", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpu capability (torch)": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "c++ compiler": shutil.which(os.environ.get("CXX", "c++").split()[0]),
        "nvcc": shutil.which("nvcc"),
    }


def _devices() -> list[str]:
    return ["cpu"] if torch.version.cuda is None else ["cpu", "cuda"]


def _hints(facts: dict[str, Any]) -> list[str]:
    """What is missing, what that costs and how to mend it."""
    hints = []
    machine, libraries = facts["machine"], facts["libraries"]
    rebuild = "`pip install --no-build-isolation --force-reinstall --no-deps .`"
    if not libraries["cpu"]["built"]:
        mend = (
            f"WEIGHTSHARE_BUILD=cpu {rebuild} compiles them and shows what fails"
            if machine["c++ compiler"]
            else f"install a C++ compiler, then run {rebuild}"
        )
        hints.append(f"CPU tensors are served by PyTorch references, not by C++ kernels: {mend}.")
    elif not libraries["cpu"]["loaded"]:
        hints.append(f"The C++ kernels are built but not used: {libraries['cpu']['reason']}.")
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        hints.append(
            "This torch has no CUDA, though nvidia-smi is here: install a CUDA build of torch."
        )
    if torch.version.cuda is not None:
        if not machine["gpus"]:
            hints.append("torch was built for CUDA, but sees no GPU.")
        if facts["versions"]["triton"] is None:
            hints.append("CUDA tensors are served by PyTorch references: pip install triton.")
        if not libraries["cuda"]["built"]:
            hints.append(
                "The CUDA C++ kernels are not built; Triton serves their ops. To build them, "
                f"install nvcc and run WEIGHTSHARE_BUILD=cuda {rebuild}."
            )
    return hints


def _text(facts: dict[str, Any]) -> str:
    """The facts as aligned plain text."""
    lines: list[str] = []

    def section(title: str, rows: dict[str, str]) -> None:
        width = max(map(len, rows), default=0)
        lines.extend([title, *(f"  {key:<{width}}  {value}" for key, value in rows.items()), ""])

    section("versions", {k: v or "none" for k, v in facts["versions"].items()})
    machine = {k: v or "none" for k, v in facts["machine"].items() if k != "gpus"}
    section("machine", {**machine, "gpus": ", ".join(facts["machine"]["gpus"]) or "none"})
    section("native libraries", {k: _state(v) for k, v in facts["libraries"].items()})
    section(
        "backend of each op",
        {
            op: ", ".join(f"{device}: {backend}" for device, backend in served.items())
            for op, served in facts["ops"].items()
        },
    )
    section(
        "environment",
        {
            f"{name}={v['value']}": v["purpose"]
            + (f" ({' | '.join(v['allowed'])})" if v["allowed"] else "")
            + ("" if v["set"] else " [default]")
            for name, v in facts["environment"].items()
        },
    )
    lines.extend(facts["hints"] or ["Nothing is missing."])
    return "\n".join(lines)


def _state(library: dict[str, Any]) -> str:
    if library["loaded"]:
        return "built, loaded"
    return f"built, not loaded: {library['reason']}" if library["built"] else library["reason"]


def _brief(facts: dict[str, Any]) -> str:
    """Versions and backends in one line, then the hints."""
    versions = facts["versions"]
    served = {}
    for device in _devices():
        backends = sorted({op[device] for op in facts["ops"].values()})
        served[device] = "/".join(backends)
    return "\n".join(
        [
            f"weightshare-kernels {versions['weightshare-kernels']} on Python "
            f"{versions['python']}, torch {versions['torch']}; backends: "
            + ", ".join(f"{device}: {backend}" for device, backend in served.items()),
            *facts["hints"],
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is installed, built, loaded and chosen.

    Args:
        argv: command-line arguments; ``--json`` prints machine-readable data, ``--brief`` one
            line and the hints.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(
        prog="weightshare_kernels.info",
        description="What is installed, built, loaded and chosen here, and why not.",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--brief", action="store_true", help="print one line and the hints")
    arguments = parser.parse_args(argv)
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        print(_brief(facts) if arguments.brief else _text(facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
