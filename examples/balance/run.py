"""Load balancing by a bias, on the routing of a real model: does it do what was published?

A small language model of bytes (3 layers, 32 experts of which each byte takes 4, sigmoid scores)
learns Python code, then has to go on with English prose. Balanced by a bias under each of four
rules, by an auxiliary loss of two strengths, and not at all: same first weights, same batches. What
the bias settles on is then compared with the dual of an assignment problem, solved by a linear
program. ::

    python examples/balance/run.py           # about 9 minutes on two cores
    python examples/balance/run.py --quick   # seconds: shows the steps, proves nothing
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import scipy
import torch
from rich.console import Console
from rich.progress import track
from weightshare.moe.balance import DEFAULT_RATES

sys.path.insert(0, str(Path(__file__).parent.parent))  # for _text, wherever this is started from

from balance import model, theory
from balance.report import picture, summary, table

MIDDLE = 1  # the layer whose fixed point is iterated to


def one_run(job: tuple[str, int, argparse.Namespace]) -> dict:
    """One training, on one thread, so that it is the same however many go on at a time."""
    method, seed, options = job
    before, start = torch.get_num_threads(), time.process_time()
    torch.set_num_threads(1)
    try:
        run = model.train(method, seed, model.read_corpus(), options)
        if method in model.RULES and seed == options.seed:
            run["duals"] = [theory.compare(**layer, k=model.TOP) for layer in run["routing"]]
    finally:
        torch.set_num_threads(before)
    return run | {"cpu_seconds": time.process_time() - start}


def train_all(options: argparse.Namespace) -> list[dict]:
    """Every method from every seed."""
    seeds = range(options.seed, options.seed + options.seeds)
    jobs = [(method, seed, options) for seed in seeds for method in model.METHODS]
    if options.jobs == 1:
        return [one_run(job) for job in track(jobs, "training", transient=True)]
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        done = pool.map(one_run, jobs)
        return list(track(done, "training", total=len(jobs), transient=True))


def fixed_point(run: dict, options: argparse.Namespace) -> dict:
    """The four rules on the same tokens of a trained layer, beside the assignment problem."""
    scores = run["routing"][MIDDLE]["scores"][: options.tokens]
    best = theory.assign(scores, model.TOP)
    curves = {
        rule: theory.iterate(scores, model.TOP, rule, options.iterations, best)
        for rule in model.RULES
    }
    last = {
        rule: {name: mean(values[-100:]) for name, values in rows.items()}
        for rule, rows in curves.items()
    }
    places = sorted({round(1.12**n) for n in range(200) if 1.12**n < options.iterations})
    thin = {
        rule: {name: [values[n - 1] for n in places] for name, values in rows.items()}
        for rule, rows in curves.items()
    }
    start = theory.dual(scores, torch.zeros_like(best.bias), model.TOP)[0]
    return {
        "tokens": options.tokens, "optimum": best.value, "at_zero": start, "unique": best.unique,
        "dual": best.bias.tolist(), "checks": theory.check_reading(scores, model.TOP, best),
        "steps": places, "curves": thin, "last": last,
    }  # fmt: skip


def thinned(run: dict, every: int) -> dict:
    """A run without its scores, its curves as means of some steps each."""
    kept = {name: value for name, value in run.items() if name != "routing"}
    for name in ("violation", "loss"):
        values = run[name]
        starts = range(0, len(values), every)
        kept[name] = [round(mean(values[n : n + every]), 4) for n in starts]
    return kept


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Load balancing without an auxiliary loss.")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=900, help="on code")
    parser.add_argument("--drift-steps", type=int, default=300, help="on prose, after it")
    parser.add_argument("--tail", type=int, default=100, help="steps that count as settled")
    parser.add_argument("--every", type=int, default=100, help="steps between two tests")
    parser.add_argument("--thin", type=int, default=10, help="steps of a point of the curves")
    parser.add_argument("--batch", type=int, default=32, help=f"windows of {model.CONTEXT} bytes")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--valid", type=int, default=1024, help="windows of a final test")
    # A prime: no expert's share is a whole number of tokens, so that few duals are not unique.
    parser.add_argument("--tokens", type=int, default=509, help="of the assignment problem")
    parser.add_argument("--iterations", type=int, default=5000, help="to the fixed point")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for results")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(
            seeds=1, steps=6, drift_steps=4, tail=2, every=2, thin=1, batch=4, valid=16,
            tokens=67, iterations=60, jobs=1,
        )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict:
    options, console = parse(argv), Console()
    start, cpu = time.perf_counter(), time.process_time()
    runs = train_all(options)
    point = fixed_point(runs[model.METHODS.index("sign")], options)
    here = time.process_time() - cpu
    theirs = 0.0 if options.jobs == 1 else sum(run["cpu_seconds"] for run in runs)
    result: dict = {
        "settings": {k: v for k, v in vars(options).items() if k != "out"},
        "model": {name.lower(): getattr(model, name) for name in (
            "CONTEXT", "DIM", "HEADS", "LAYERS", "HIDDEN", "EXPERTS", "TOP", "LOSSES")},
        "rates": DEFAULT_RATES,
        "bytes": {name: len(part) for name, part in model.read_corpus()._asdict().items()},
        "seconds": time.perf_counter() - start, "cpu_seconds": here + theirs,
        "python": sys.version.split()[0], "torch": torch.__version__, "scipy": scipy.__version__,
        "runs": [thinned(run, options.thin) for run in runs], "fixed_point": point,
    }  # fmt: skip
    result["summary"] = summary(result)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "balance.json").write_text(json.dumps(result, indent=1) + "\n")
    picture(result, options.out / "balance.png")
    console.print(table(result))
    for line in result["summary"]:
        console.print(line, highlight=False)
    return result


if __name__ == "__main__":
    main()
