"""Measures every benchmark case against its baselines, interleaved in one process.

``python benchmarks/run.py --ops sliced_linear --cases mlp --quick``; see benchmarks/README.md
for what each number means.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from weightshare_kernels import _register
from weightshare_kernels._cases import Case, Inputs, Maker, Workload, all_cases, leaves

sys.path.insert(0, str(Path(__file__).parent))  # where this runs as benchmarks.run
import blocks
import graphs
import lora_blocks
import moe_blocks
from graphs import outputs_of
from memory import peak_bytes, saved_bytes

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOORS = ("dense", "dense_lora", "clone", "read")  # the least a case can cost, by preference
PHASES = ("forward", "backward", "both")
SECONDS_PER_VARIANT, LEAST_ROUNDS, MOST_ROUNDS = 1.5, 15, 300
LEAST_SAMPLE = 2e-3  # seconds; shorter steps are repeated within one sample


@dataclass
class Variant:
    """One side of a comparison: a workload, its output gradients and its samples in seconds."""

    name: str
    work: Workload
    grads: list[Tensor] = field(default_factory=list)
    repeats: int = 1
    compile_s: float | None = None
    samples: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PHASES})


class Clock:
    """Times a forward and a backward pass: events on a GPU, the monotonic clock elsewhere."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.marks: list = []

    def mark(self) -> None:
        """Note a moment."""
        if not self.cuda:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def laps(self) -> list[float]:
        """Seconds between successive marks; forgets them."""
        marks, self.marks = self.marks, []
        pairs = itertools.pairwise(marks)
        if not self.cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def clear(work: Workload) -> None:
    """Drop all gradients, so that every repetition makes them anew."""
    for leaf in work.leaves:
        leaf.grad = None


def once(variant: Variant, clock: Clock) -> dict[str, float]:
    """Seconds per phase of one repetition; a ``step`` is timed whole, its forward pass apart.

    ``both`` is what a training step pays: forward, backward, and dropping the gradients that it
    made (large ones go back to the system page by page).
    """
    work = variant.work
    clear(work)
    clock.mark()
    outputs = outputs_of(work)
    clock.mark()
    if work.step is not None:
        del outputs
        (forward,) = clock.laps()
        clock.mark()
        work.step()
        clear(work)
        clock.mark()
        (both,) = clock.laps()
        return {"forward": forward, "backward": max(both - forward, 0.0), "both": both}
    torch.autograd.backward(outputs, variant.grads)
    del outputs
    clock.mark()
    clear(work)
    clock.mark()
    forward, backward, cleared = clock.laps()
    return {"forward": forward, "backward": backward, "both": forward + backward + cleared}


def sample(variant: Variant, clock: Clock) -> None:
    """Record the mean of ``repeats`` repetitions."""
    runs = [once(variant, clock) for _ in range(variant.repeats)]
    for phase in PHASES:
        variant.samples[phase].append(sum(r[phase] for r in runs) / len(runs))


def gradient(y: Tensor, seed: int) -> Tensor:
    """A gradient of an output, drawn where that is, the same for every dtype."""
    generator = torch.Generator(y.device).manual_seed(seed)
    return torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype)


def prepare(variant: Variant, clock: Clock, seed: int = 0) -> float:
    """Make output gradients, warm up, choose the repeats; returns seconds per sample."""
    start = time.perf_counter()
    variant.grads = [gradient(y, seed) for y in outputs_of(variant.work)]
    once(variant, clock)
    if variant.compile_s is not None:
        variant.compile_s = time.perf_counter() - start
    seconds = min(once(variant, clock)["both"] for _ in range(2))
    variant.repeats = max(1, min(100, round(LEAST_SAMPLE / max(seconds, 1e-6))))
    return seconds * variant.repeats


def rounds_for(seconds: list[float], options) -> int:
    """How many rounds: about 1.5 s per variant, at least 15 (5 where one round takes 4 s)."""
    if options.rounds:
        return options.rounds
    if options.quick:
        return 5
    least = LEAST_ROUNDS if sum(seconds) < 4 else 5
    return max(least, min(MOST_ROUNDS, round(SECONDS_PER_VARIANT / max(*seconds, 1e-6))))


def measure(variants: list[Variant], clock: Clock, options, deadline: float) -> int:
    """Fill the samples round by round, the order rotating, so that drift hits all alike."""
    rounds = rounds_for([prepare(v, clock) for v in variants], options)
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            if number >= 3 and time.monotonic() > deadline:
                return number
            turn = number % len(variants)
            for variant in variants[turn:] + variants[:turn]:
                sample(variant, clock)
    finally:
        gc.enable()
    return rounds


def run_with_gradients(function: Callable, inputs: Inputs) -> list[Tensor]:
    """Output and gradients of a function, under one fixed output gradient."""
    y = function(**inputs)
    return [y.detach(), *torch.autograd.grad(y, leaves(inputs), gradient(y, 1))]


def deviation(case: Case, inputs: Inputs) -> str | None:
    """Check a case against float64; None, or what is wrong. The rule is that of the tests."""

    def cast(value):
        wanted = isinstance(value, Tensor) and value.requires_grad
        return value.detach().double().requires_grad_() if wanted else value

    def error(got: Tensor, exact: Tensor) -> float:
        scale = exact.abs().max().clamp_min(1e-30)
        return ((got.double() - exact).abs().max() / scale).item() if got.numel() else 0.0

    exact = run_with_gradients(case.reference, {k: cast(v) for k, v in inputs.items()})
    ours = run_with_gradients(case.call, inputs)
    torchs = run_with_gradients(case.reference, inputs)
    names = ["output", *[k for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad]]
    lowest = max(torch.finfo(t.dtype).eps for t in ours)
    for name, o, t, e in zip(names, ours, torchs, exact, strict=True):
        allowed = max(2 * error(t, e), 8 * lowest)
        if not error(o, e) <= allowed:
            return f"{name}: error {error(o, e):.2e} against float64, allowed {allowed:.2e}"
    return None


def variants_of(case: Case, inputs: Inputs, compiled: bool) -> list[Variant]:
    """Ours first, then the baselines; with ``compiled``, each once more through torch.compile."""
    works = {"ours": case.workload(inputs)}
    works |= {name: make(inputs) for name, make in case.baselines.items()}
    found = [Variant(name, work) for name, work in works.items()]
    if compiled:
        for name, work in works.items():
            if work.step is None:  # a step is more than one function
                fast = replace(work, forward=torch.compile(work.forward))
                found.append(Variant(f"{name}+compile", fast, compile_s=0.0))
    return found


def summary(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    numbers = {"median": statistics.median(ordered), "p20": at(0.2), "p80": at(0.8)}
    return {k: round(1e3 * v, 5) for k, v in numbers.items()}


def ratios(ours: Variant, other: Variant) -> dict[str, dict[str, float]]:
    """Baseline / ours per phase: of the medians, and the median over rounds."""
    found = {}
    for phase in PHASES:
        a, b = ours.samples[phase], other.samples[phase]
        pairs = [y / max(x, 1e-9) for x, y in zip(a, b, strict=True)]
        of_medians = statistics.median(b) / max(statistics.median(a), 1e-9)
        found[phase] = {
            "of_medians": round(of_medians, 4),
            "per_round": round(statistics.median(pairs), 4),
        }
    return found


def ratio(record: dict, baseline: str, phase: str) -> float:
    """Baseline / ours: on a GPU of the GPU's own times, where both could be captured."""
    graph = record.get("graph", {}).get("ratios", {})
    if baseline in graph:
        return graph[baseline][phase]
    return record["ratios"][baseline][phase]["of_medians"]


def judge(case: Case, record: dict) -> dict[str, dict]:
    """Each promised bar: what was wanted, what was got, whether it is met.

    ``baseline`` or ``baseline:phase`` is a least ratio of medians, baseline / ours; ``saved`` is
    the most bytes saved for backward, ours / floor, or ours / baseline in ``saved:baseline``.
    """
    verdicts = {}
    for bar, wanted in case.bars.items():
        name, _, phase = bar.partition(":")
        if name == "saved":
            floor = record["variants"][phase or record["floor"]]["saved_bytes"]
            got = record["variants"]["ours"]["saved_bytes"] / max(floor, 1)
            met = got <= wanted
        else:
            got = ratio(record, name, phase or "both")
            met = got >= wanted
        verdicts[bar] = {"wanted": round(wanted, 4), "got": round(got, 4), "met": met}
    return verdicts


def benchmark(op: str, case: Case, options, deadline: float) -> dict:
    """Measure one case; raises AssertionError where its correctness check fails."""
    dtype, device = DTYPES[options.dtype], options.device
    inputs = case.inputs(Maker(dtype, device))
    wrong = deviation(case, inputs)
    if wrong is not None:
        raise AssertionError(wrong)
    clock = Clock(device)
    graph = None
    if device == "cuda":
        rounds = options.rounds or (7 if options.quick else LEAST_ROUNDS)
        graph = graphs.measure(case, inputs, dtype, rounds, deadline, summary)
        torch.cuda.empty_cache()
    variants = variants_of(case, inputs, options.compile)
    rounds = measure(variants, clock, options, deadline)
    ours, itemsize = variants[0], dtype.itemsize
    record = {
        "environment": environment(device, options.dtype),
        "rounds": rounds,
        "flops": case.flops,
        "bytes": case.bytes(itemsize),
        "floor": next((name for name in FLOORS if name in case.baselines), None),
        "variants": {},
        "ratios": {v.name: ratios(ours, v) for v in variants[1:]},
        **({"graph": graph} if graph else {}),
    }
    for variant in variants:
        entry: dict = {phase: summary(variant.samples[phase]) for phase in PHASES}
        forward_s = entry["forward"]["median"] / 1e3
        entry["gflops"] = round(case.flops / max(forward_s, 1e-9) / 1e9, 2)
        entry["gbytes"] = round(case.bytes(itemsize) / max(forward_s, 1e-9) / 1e9, 2)
        entry["saved_bytes"], entry["saved_beyond_leaves"] = saved_bytes(variant.work)
        clear(variant.work)
        entry["peak_bytes"] = peak_bytes(partial(once, variant, clock), device)
        if variant.compile_s is not None:
            entry["compile_s"] = round(variant.compile_s, 2)
        record["variants"][variant.name] = entry
        clear(variant.work)
    record["bars"] = judge(case, record)
    return record


def environment(device: str, dtype: str) -> dict:
    """What a number depends on, and nothing that names a person or a path."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "backends": {name: _register.backend_of(name, device) for name in _register.OPS},
    }


def machine(device: str) -> str:
    """The processor's or GPU's model as a folder name."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpus = Path("/proc/cpuinfo")
        text = cpus.read_text() if cpus.exists() else ""
        model = re.search(r"model name\s*:\s*(.+)", text)
        name = f"{model[1] if model else platform.machine()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(path: Path, key: str, record: dict) -> None:
    """Add a case to its op's file, atomically; other cases stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    content["cases"][key] = record
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def table_of(op: str, records: dict[str, dict]) -> Table:
    """One row per case: our times, and how many times longer each baseline takes."""
    table = Table(title=f"{op}: ours in ms; baseline / ours, fwd+bwd", title_justify="left")
    gpu = any("graph" in record for record in records.values())
    columns = ("case", "fwd", "bwd", "both", *(["eager both"] if gpu else []))
    for column in columns:
        table.add_column(column, justify="left" if column == "case" else "right")
    table.add_column("baseline / ours")
    table.add_column("bars")
    for name, record in records.items():
        eager = [record["variants"]["ours"][phase]["median"] for phase in PHASES]
        graph = record.get("graph", {}).get("variants", {}).get("ours")
        times = eager
        if gpu:
            fwd, both = (graph[p]["median"] if graph else float("nan") for p in ("forward", "both"))
            times = [fwd, both - fwd, both, eager[-1]]
        pairs = [f"{b} {ratio(record, b, 'both'):.2f}" for b in record["ratios"]]
        bars = [
            f"[{'green' if v['met'] else 'red'}]{bar} {v['got']:.2f}"
            f"{' met' if v['met'] else ' MISSED'} ({v['wanted']:.2f})[/]"
            for bar, v in record["bars"].items()
        ]
        table.add_row(name, *[f"{t:.3g}" for t in times], ", ".join(pairs), "\n".join(bars))
    return table


def every_case() -> dict[str, list[Case]]:
    """The ops' cases, and those of whole blocks, by name."""
    whole = [*blocks.CASES, *moe_blocks.CASES, *lora_blocks.CASES]
    return all_cases("bench") | {"blocks": whole}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    parser.add_argument("--ops", nargs="*", help="ops to measure (default: all)")
    parser.add_argument("--cases", default="", help="regular expression on the case's name")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, help="fixed number of rounds (default: adaptive)")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--quick", action="store_true", help="5 rounds per case")
    parser.add_argument("--compile", action="store_true", help="torch.compile'd variants, too")
    options = parser.parse_args(argv)
    unknown = set(options.ops or ()) - set(every_case())
    if unknown:
        parser.error(f"--ops: no op named {', '.join(sorted(unknown))}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks; 0 if every case that was measured is correct."""
    options = parse(argv)
    console, failed, verdicts = Console(), [], []
    deadline = time.monotonic() + options.time_limit
    folder = options.out / machine(options.device)
    for op, cases in every_case().items():
        records = {}
        for case in cases:
            if (options.ops and op not in options.ops) or not re.search(options.cases, case.name):
                continue
            if time.monotonic() > deadline:
                console.print(f"[yellow]{op}/{case.name}: not measured, time limit reached[/]")
                continue
            try:
                with console.status(f"{op}/{case.name}"):
                    record = benchmark(op, case, options, deadline)
            except AssertionError as error:
                console.print(f"[red]{op}/{case.name}: WRONG, not recorded: {error}[/]")
                failed.append(case.name)
                continue
            key = case.name if options.dtype == "fp32" else f"{case.name}[{options.dtype}]"
            write(folder / f"{op}.json", key, record)
            records[key] = record
            verdicts += [v["met"] for v in record["bars"].values()]
        if records:
            console.print(table_of(op, records))
    console.print(f"bars met: {sum(verdicts)} of {len(verdicts)}; incorrect cases: {len(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
