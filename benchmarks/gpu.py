"""Build, test and measure on a machine with a GPU, in under nine minutes, without a network.

``make gpu`` or ``make gpu OPS="entangle"``. Uses the Python that runs it, with the torch and
triton it finds. Tests run side by side, a process per op: a fault on a GPU takes the rest of its
process along, and no more. Then a process per op measures, one at a time. A part that fails, dies
or outlasts its time is reported and the others go on; its output is kept in the folder of logs,
and the exit status tells. ``--dry-run`` needs no GPU: it compiles every Triton kernel and the CUDA
library for all targets, checks that each command can start, and prints the plan.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, LOGS = ROOT / "benchmarks/results", ROOT / "build/gpu-logs"
TOTAL = 530.0  # seconds, all parts together
TESTS = 170.0  # of them for the tests, at most
SMALL = "vector or one_choice or index_both or qkv_blocks"  # what the sanitizer has time for
FILES = {  # tests of more than one op, or of more than its cases, by the op without which to skip
    "properties": "",
    "compile": "",
    "transforms": "",
    "collect": "",
    "sliced_linear": "sliced_linear",
    "grouped_sliced_linear": "grouped_sliced_linear",
    "expert_mixture_linear": "expert_mixture_linear",
    "route": "route",
    "moe_mlp": "moe_mlp",
}
FAULT = re.compile(
    r"Fatal Python error: .*|CUDA error: [^\n]*|.*Triton Error[^\n]*|ERROR SUMMARY: [1-9].*"
)


@dataclass(frozen=True)
class Part:
    """One command with the most time it may take; ``missing`` says why it cannot run here."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""

    @property
    def log(self) -> str:
        """File name of its output."""
        return re.sub(r"\W+", "_", self.name) + ".log"


@dataclass(frozen=True)
class Plan:
    """Parts in order: the build alone, tests side by side, then measurements one at a time."""

    build: Part
    tests: list[Part]
    benchmarks: list[Part]


def gpu() -> tuple[str, str] | None:
    """Name of the GPU and its nvcc target, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}{minor}" + ("a" if major >= 9 else "")


def known_ops() -> list[str]:
    """Every op that has cases."""
    return sorted(path.parent.name for path in ROOT.glob("weightshare_kernels/ops/*/cases.py"))


def needs(module: str) -> str:
    """Why a module cannot be used, or nothing."""
    return "" if importlib.util.find_spec(module) else f"Python module {module} is not installed"


def pytest_part(name: str, file: str, *options: str) -> Part:
    """A pytest run that tells everything at its end, whatever fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--timeout", "90"] if importlib.util.find_spec("pytest_timeout") else []
    absent = "" if (ROOT / file).exists() else f"{file} is not there"
    return Part(name, [*command, file, *options], TESTS, missing=absent or needs("pytest"))


def test_parts(ops: list[str]) -> list[Part]:
    """The op tests of every op, on Triton also where CUDA C++ would serve, and other files."""
    cases = "tests/test_ops.py"
    parts = [pytest_part(f"tests, {op}", cases, "-k", f"[{op}-") for op in ops]
    native = [op for op in ops if (ROOT / f"csrc/bindings/{op}_cuda.cu").exists()]
    for op in native:
        parts.append(
            pytest_part(f"tests, {op}, triton", cases, "--backend", "triton", "-k", f"[{op}-")
        )
    for name, op in FILES.items():
        if op in ops or (not op and set(ops) == set(known_ops())):
            parts.append(pytest_part(f"tests, {name}, more", f"tests/test_{name}.py"))
    sanitizer = shutil.which("compute-sanitizer")
    small = pytest_part("", cases, "-k", SMALL)
    parts.append(
        Part(
            "compute-sanitizer",
            [sanitizer or "compute-sanitizer", "--error-exitcode", "1", *small.command],
            TESTS,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            "" if sanitizer else "compute-sanitizer is not installed",
        )
    )
    return parts


def plan(ops: list[str], target: str, out: Path) -> Plan:
    """All that is to be done for some ops; ``blocks`` of transformers where all are meant."""
    build = Part(
        "build",
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        120,
        {"WEIGHTSHARE_CUDA_ARCHS": target},
        needs("setuptools"),
    )
    measured = [*ops, "blocks"] if set(ops) == set(known_ops()) else ops
    benchmarks = []
    for dtype, seconds in (("bf16", 20.0), ("fp32", 9.0)):
        for op in measured:
            command = [sys.executable, "benchmarks/run.py", "--device", "cuda", "--quick"]
            command += ["--dtype", dtype, "--ops", op, "--out", str(out)]
            command += ["--time-limit", str(seconds)]
            benchmarks.append(
                Part(f"benchmarks, {op}, {dtype}", command, seconds + 15, missing=needs("rich"))
            )
    return Plan(build, test_parts(ops), benchmarks)


class Running:
    """A part's process, writing its output to a file."""

    def __init__(self, part: Part, seconds: float, logs: Path):
        self.part, self.path = part, logs / part.log
        self.start = time.monotonic()
        self.limit = self.start + min(seconds, part.seconds)
        path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path} | part.environment
        with self.path.open("w") as file:
            self.process = subprocess.Popen(
                part.command, cwd=ROOT, env=environment, start_new_session=True,
                stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def outcome(self) -> str | None:
        """What came of it; None as long as it runs. Stops it when its time is over."""
        status = self.process.poll()
        if status is None and time.monotonic() < self.limit:
            return None
        took = f"{time.monotonic() - self.start:.0f} s"
        if status is None:
            self.stop()
            return f"FAILED: stopped after {took}; {self.last()}"
        if status == 0:
            return f"ok, {took}; {self.last()}"
        died = f"died of {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"FAILED: {died} after {took}; {self.last()}"

    def stop(self) -> None:
        """End the process group, which is this part's own."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last(self) -> str:
        """The first fault in its output, if any, and the last line."""
        text = self.path.read_text(errors="replace")
        fault = FAULT.search(text)
        lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
        return "; ".join([*([fault.group().strip()[:100]] if fault else []), lines[-1][:100]])


def run(parts: list[Part], jobs: int, seconds: float, logs: Path) -> dict[str, str]:
    """Outcome of every part: "ok", why it was left out, or what went wrong."""
    outcomes: dict[str, str] = {}
    waiting, running, end = list(parts), [], time.monotonic() + seconds
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                part, left = waiting.pop(0), end - time.monotonic()
                if part.missing or left < 10:
                    outcomes[part.name] = f"left out: {part.missing or 'no time left'}"
                else:
                    running.append(Running(part, left, logs))
            for process in list(running):
                if (outcome := process.outcome()) is not None:
                    running.remove(process)
                    outcomes[process.part.name] = outcome
                    print(f"{process.part.name:44} {outcome}", flush=True)
            time.sleep(0.2)
    finally:
        for process in running:
            process.stop()
    return outcomes


def run_all(todo: Plan, logs: Path) -> dict[str, str]:
    """Every part, in the time there is."""
    end = time.monotonic() + TOTAL
    jobs = max(2, (os.cpu_count() or 2) * 3 // 4)
    outcomes = run([todo.build], 1, TOTAL, logs)
    outcomes |= run(todo.tests, jobs, TESTS, logs)
    return outcomes | run(todo.benchmarks, 1, end - time.monotonic(), logs)


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


def dry_run(todo: Plan, logs: Path) -> dict[str, str]:
    """Compile all that a GPU would run, see that every command starts, print the plan."""
    with tempfile.TemporaryDirectory() as scratch:
        library = [*todo.build.command[:-1], "--build-lib", scratch, "--build-temp", f"{scratch}/t"]
        report = [sys.executable, "benchmarks/gpu_report.py", "--out", scratch]
        checks = [
            Part("compile kernels for all targets", report, 600, missing=needs("triton")),
            Part(
                "compile the CUDA library", library, 400, {"WEIGHTSHARE_BUILD": "cuda"},
                "" if shutil.which("nvcc") else "nvcc is not installed",
            ),
        ]  # fmt: skip
        for part in todo.tests:
            if sys.executable == part.command[0] and "triton" not in part.command:
                command = [*part.command, "--collect-only", "-qq"]
                checks.append(Part(f"collect {part.name}", command, 120, missing=part.missing))
        for part in todo.benchmarks[:1]:  # they differ in names only
            command = [word if word != "cuda" else "cpu" for word in part.command]
            command += ["--cases", "(?!)", "--rounds", "1"]  # matches no case
            command[command.index("--out") + 1] = scratch
            checks.append(Part(f"start {part.name}", command, 120, missing=part.missing))
        outcomes = run(checks, 2, 1200, logs)
    print("\nplan on a machine with a GPU:")
    for part in [todo.build, *todo.tests, *todo.benchmarks]:
        what = f"would be left out here: {part.missing}" if part.missing else " ".join(part.command)
        print(f"  {part.name} (<= {part.seconds:.0f} s): {what}")
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="ops to test and measure (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="all that needs no GPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder of every part's output")
    options = parser.parse_args()
    if unknown := set(options.ops) - set(known_ops()):
        parser.error(
            f"no op named {', '.join(sorted(unknown))}; there are {', '.join(known_ops())}"
        )
    found = gpu()
    if found is None and not options.dry_run:
        print("no GPU that PyTorch can use; `--dry-run` does all that needs none", file=sys.stderr)
        return 2
    options.logs.mkdir(parents=True, exist_ok=True)
    start = time.time()
    ops = options.ops or known_ops()
    todo = plan(ops, found[1] if found else "90a", options.out.resolve())
    outcomes = (dry_run if options.dry_run else run_all)(todo, options.logs.resolve())
    lines = [] if options.dry_run else measured(options.out, start)
    print("\n".join(["", *lines, "", *[f"{name:44} {what}" for name, what in outcomes.items()]]))
    return int(any(what.startswith("FAILED") for what in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
