"""Build, test and measure on a machine with a GPU, in under nine minutes, without a network.

``make gpu`` or ``make gpu OPS="entangle"``. Uses the Python that runs it, with the torch and
triton it finds. A part that fails or outlasts its budget is reported and the others go on; the
exit status tells. ``--dry-run`` needs no GPU: it compiles every Triton kernel and the CUDA library
for all targets, checks that each command can start, and prints the plan.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
TOTAL = 530.0  # seconds, all parts together
SMALL = "vector or one_choice or index_both or qkv_blocks"  # what the sanitizer has time for


@dataclass(frozen=True)
class Part:
    """One command with its share of the time; ``missing`` says why it cannot run here."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""


def gpu() -> tuple[str, str] | None:
    """Name of the GPU and its nvcc target, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}{minor}" + ("a" if major >= 9 else "")


def pytest_part(name: str, seconds: float, files: list[str], ops: list[str], *options: str) -> Part:
    """A pytest run over the chosen ops."""
    chosen = ["-k", " or ".join(f"{op}-" for op in ops)] if ops else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files, *options, *chosen]
    absent = [file for file in files if not (ROOT / file).exists()]
    missing = f"{', '.join(absent)} is not there" if absent else needs("pytest")
    return Part(name, command, seconds, missing=missing)


def needs(module: str) -> str:
    """Why a module cannot be used, or nothing."""
    return "" if importlib.util.find_spec(module) else f"Python module {module} is not installed"


def plan(ops: list[str], target: str, out: Path) -> list[Part]:
    """Every part in order; shares add up to less than the total."""
    python, ops_test = sys.executable, ["tests/test_ops.py"]
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    sanitizer = shutil.which("compute-sanitizer")
    small = pytest_part("", 0, ops_test, [], "--backend", "auto", "-k", SMALL).command
    parts = [
        Part("build", build, 120, {"WEIGHTSHARE_CUDA_ARCHS": target}, needs("setuptools")),
        pytest_part("tests, chosen backend", 90, ops_test, ops),
        pytest_part("tests, triton", 120, ops_test, ops, "--backend", "triton"),
        pytest_part("tests, cuda", 60, ops_test, ops, "--backend", "cuda"),
        pytest_part("tests, compile", 60, ["tests/test_compile.py"], []),
        Part(
            "compute-sanitizer",
            [sanitizer or "compute-sanitizer", "--error-exitcode", "1", *small],
            90,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            "" if sanitizer else "compute-sanitizer is not installed",
        ),
    ]
    for dtype in ("bf16", "fp32"):
        limit = 90.0
        command = [python, "benchmarks/run.py", "--device", "cuda", "--dtype", dtype]
        command += ["--time-limit", str(limit), "--out", str(out)]
        command += ["--ops", *ops] if ops else []
        absent = "" if (ROOT / "benchmarks/run.py").exists() else "benchmarks/run.py is not there"
        parts.append(Part(f"benchmarks, {dtype}", command, limit + 20, missing=absent))
    return parts


def run(part: Part, seconds: float) -> str:
    """Run a part within its time; returns what went wrong, or nothing."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = os.environ | {"PYTHONPATH": path} | part.environment
    process = subprocess.Popen(part.command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the group is this part's own
        process.wait()
        return f"stopped after {seconds:.0f} s"
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return f"exit status {status}" if status else ""


def run_all(parts: list[Part]) -> dict[str, str]:
    """Outcome of every part: "ok", why it was left out, or what went wrong."""
    outcomes, end = {}, time.monotonic() + TOTAL
    for part in parts:
        left = end - time.monotonic()
        if part.missing or left < 10:
            outcomes[part.name] = f"left out: {part.missing or 'no time left'}"
            continue
        print(f"\n== {part.name}: {' '.join(part.command)}", flush=True)
        start = time.monotonic()
        wrong = run(part, min(part.seconds, left))
        outcomes[part.name] = (
            f"FAILED: {wrong}" if wrong else f"ok, {time.monotonic() - start:.0f} s"
        )
    return outcomes


def measured(folder: Path, since: float) -> list[str]:
    """One line per case measured since then: our time and the ratios."""
    lines = []
    for path in sorted(folder.glob("*/*.json")):
        if path.stat().st_mtime < since:
            continue
        for name, record in json.loads(path.read_text()).get("cases", {}).items():
            eager = record["variants"]["ours"]["both"]["median"]
            graph = record.get("graph", {"variants": {}, "ratios": {}})
            ours = graph["variants"].get("ours", {}).get("both", {}).get("median", float("nan"))
            pairs = [f"{b} {r['both']:.2f}" for b, r in graph["ratios"].items()]
            lines.append(
                f"{path.stem:24} {name:36} {ours:9.4f} ms (eager {eager:.4f})   {', '.join(pairs)}"
            )
    return lines


def dry_run(parts: list[Part]) -> dict[str, str]:
    """Compile all that a GPU would run, see that every command starts, print the plan."""
    python = sys.executable
    with tempfile.TemporaryDirectory() as scratch:
        compile_all = [python, "benchmarks/gpu_report.py", "--out", scratch]
        library = [python, "setup.py", "-q", "build_ext", "--build-lib", scratch]
        library += ["--build-temp", f"{scratch}/temp"]
        files = [part.command for part in parts if "pytest" in part.command and not part.missing]
        checks = [
            Part("compile kernels for all targets", compile_all, 600, missing=needs("triton")),
            Part(
                "compile the CUDA library", library, 400, {"WEIGHTSHARE_BUILD": "cuda"},
                "" if shutil.which("nvcc") else "nvcc is not installed",
            ),
            *[
                Part(f"collect {' '.join(c[c.index('-x') + 1 :])}",
                     [*c[c.index(python) :], "--collect-only", "-qq"], 120)
                for c in files if "cuda" not in c and "triton" not in c
            ],
        ]  # fmt: skip
        for part in parts:
            if "benchmarks/run.py" in part.command and not part.missing:
                command = [c if c != "cuda" else "cpu" for c in part.command]
                command += ["--cases", "(?!)", "--rounds", "1"]  # matches no case
                command[command.index("--out") + 1] = scratch
                checks.append(Part(f"start {part.name}", command, 120))
        outcomes = {}
        for part in checks:
            outcomes[part.name] = part.missing and f"left out: {part.missing}"
            if not part.missing:
                print(f"\n== {part.name}", flush=True)
                wrong = run(part, part.seconds)
                outcomes[part.name] = f"FAILED: {wrong}" if wrong else "ok"
    print("\nplan on a machine with a GPU:")
    for part in parts:
        what = f"would be left out here: {part.missing}" if part.missing else " ".join(part.command)
        print(f"  {part.name} (<= {part.seconds:.0f} s): {what}")
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="ops to test and measure (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="all that needs no GPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    options = parser.parse_args()
    known = {path.parent.name for path in (ROOT / "weightshare_kernels/ops").glob("*/cases.py")}
    if unknown := set(options.ops) - known:
        parser.error(
            f"no op named {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
        )
    found = gpu()
    if found is None and not options.dry_run:
        print("no GPU that PyTorch can use; `--dry-run` does all that needs none", file=sys.stderr)
        return 2
    start = time.time()
    parts = plan(options.ops, found[1] if found else "90a", options.out.resolve())
    outcomes = dry_run(parts) if options.dry_run else run_all(parts)
    lines = [] if options.dry_run else measured(options.out, start)
    print("\n".join(["", *lines, "", *[f"{name:40} {what}" for name, what in outcomes.items()]]))
    return int(any(what.startswith("FAILED") for what in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
