"""Mixture of Shards against LoRA, then an adapter for each play of Shakespeare in one batch.

A small Llama over bytes (8 layers) learns the source of Python's standard library. Adapters then
teach it plays, one each: plain LoRA of several ranks, and MoS, whose layers put together more
ranks from the parameters of a smaller LoRA. Compared on bytes of each play that nobody trained on:
at equal parameters and at equal rank, every play, from several seeds. In the end all 37 plays have
an adapter, and one batch generates a line of each. ::

    python examples/mos/run.py           # 10 minutes on two cores; goes on where it was killed
    python examples/mos/run.py --quick   # seconds: shows the steps, proves nothing
    python examples/mos/run.py --texts FOLDER   # without the plays' package: any .txt files
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from zlib import crc32

import torch
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent.parent))  # for _text, wherever this is started from

from mos import data, model, serve
from mos.report import picture, summary, table

Job = tuple[str, int, float]  # method, seed, learning rate
BASE = ("base_steps", "base_batch", "base_lr")  # settings that the model depends on
DEPENDS = (*BASE, "steps", "batch", "plays", "texts")  # and the adapters


def evenly(plays: Sequence[data.Play], count: int) -> list[data.Play]:
    """Some, evenly from the list of all: the study must not choose what suits it."""
    return list(plays[:: max(len(plays) // count, 1)][:count])


def tuning_plays(plays: Sequence[data.Play], options: argparse.Namespace) -> list[data.Play]:
    """Half as many others, for the choice of learning rates."""
    count = max(options.plays // 2, 1)
    taken = {play.name for play in evenly(plays, options.plays)}
    return evenly([play for play in plays if play.name not in taken] or plays, count)


def one_job(job: Job, options: argparse.Namespace) -> dict:
    """One training of an adapter for each play of the study, on one thread."""
    torch.set_num_threads(1)
    name, seed, lr = job
    start, method = time.process_time(), model.METHODS[name]
    every = data.read(options.texts)
    plays = tuning_plays(every, options) if options.tune else evenly(every, options.plays)
    adapted = model.train(load_base(options), method, seed, plays, lr, options)
    held = [play.choose if options.tune else play.test for play in plays]
    found = model.test(adapted, held)
    return {
        "method": name, "seed": seed, "lr": lr,
        "parameters": sum(p.numel() for p in adapted.pools.parameters()) // len(plays),
        "bits": dict(zip([play.name for play in plays], found, strict=True)),
        "cpu_seconds": time.process_time() - start,
    }  # fmt: skip


class Journal:
    """Jobs that are done, a line each: a study that was killed goes on behind the last one.

    Args:
        path: the file; lines of other settings in it are not read.
        key: what the settings are.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict]:
        """Of these settings; a last line that was cut off is none."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row.pop("key", None) == self.key:
                rows.append(row)
        return rows

    def add(self, row: dict) -> None:
        """Write one line, at once."""
        with open(self.path, "a") as file:
            file.write("\n" + json.dumps({"key": self.key} | row))


def key_of(options: argparse.Namespace, *names: str, **more) -> str:
    """Of settings that results depend on, and of the texts if these are among them."""
    kept = more | {name: getattr(options, name) for name in names if name != "texts"}
    if "texts" in names:
        files = sorted(options.texts.glob("*.txt"))
        kept["texts"] = {file.stem: crc32(file.read_bytes()) for file in files}
    return f"{crc32(json.dumps(kept, sort_keys=True).encode()):08x}"


def keep(content: dict, path: Path) -> None:
    """Write a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path.with_suffix(f".{os.getpid()}"))
    path.with_suffix(f".{os.getpid()}").replace(path)


def base_path(options: argparse.Namespace) -> Path:
    return options.out / "mos" / f"base-{key_of(options, *BASE)}.pt"


def load_base(options: argparse.Namespace):
    """The pretrained model, frozen."""
    base = model.llama()
    base.load_state_dict(torch.load(base_path(options), weights_only=True)["model"])
    return base.requires_grad_(False).eval()


def make_base(options: argparse.Namespace) -> dict:
    """Pretrain unless that was done; what it came to."""
    path = base_path(options)
    if not path.exists():
        start, wall = time.process_time(), time.perf_counter()
        base, bits = model.pretrain(options)
        report = {"bits": bits, "parameters": sum(p.numel() for p in base.parameters())}
        report |= {"cpu_seconds": time.process_time() - start}
        report |= {"seconds": time.perf_counter() - wall}
        keep({"model": base.state_dict(), "report": report}, path)
    return torch.load(path, weights_only=True)["report"]


def spread(work: Callable, jobs: Sequence, options: argparse.Namespace) -> Iterator:
    """What the work on each job came to, as it is done, by as many processes as wanted."""
    if options.jobs == 1:
        yield from (work(job, options) for job in track(jobs, work.__name__, transient=True))
        return
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        futures = as_completed([pool.submit(work, job, options) for job in jobs])
        for future in track(futures, work.__name__, len(jobs), transient=True):
            yield future.result()


def study(options: argparse.Namespace) -> list[dict]:
    """Every method from every seed, or with every learning rate; rows in the order of jobs."""
    journal = Journal(options.out / "mos" / "journal.jsonl", key_of(options, *DEPENDS, "tune"))
    if options.tune:
        jobs = [(name, 1000, lr) for name in model.METHODS for lr in model.GRID]
    else:
        seeds = range(options.seed, options.seed + options.seeds)
        jobs = [(name, seed, lr) for seed in seeds for name, lr in model.RATES.items()]
    done = {(row["method"], row["seed"], row["lr"]) for row in journal.rows()}
    for row in spread(one_job, [job for job in jobs if job not in done], options):
        journal.add(row)
    rows = {(row["method"], row["seed"], row["lr"]): row for row in journal.rows()}
    return [rows[job] for job in jobs]


def some_adapters(names: list[str], options: argparse.Namespace) -> tuple[dict, float]:
    """Adapters to serve for some plays, trained together; kept in a file."""
    rate = model.RATES[serve.SERVED]
    key = key_of(options, *DEPENDS, "seed", names=names, rate=rate)
    path = options.out / "mos" / f"adapters-{key}.pt"
    if not path.exists():
        torch.set_num_threads(1)
        start = time.process_time()
        plays = [play for play in data.read(options.texts) if play.name in names]
        method = model.METHODS[serve.SERVED]
        adapted = model.train(load_base(options), method, options.seed, plays, rate, options)
        made = dict(zip(names, serve.states(adapted), strict=True))
        keep({"adapters": made, "cpu_seconds": time.process_time() - start}, path)
    found = torch.load(path, weights_only=True)
    return found["adapters"], found["cpu_seconds"]


def make_adapters(plays: Sequence[data.Play], options: argparse.Namespace) -> tuple[dict, float]:
    """An adapter for every play, by name, and the CPU seconds that they took."""
    names = [play.name for play in plays]
    parts = [names[n : n + options.plays] for n in range(0, len(names), options.plays)]
    adapters, cpu = {}, 0.0
    for made, seconds in spread(some_adapters, parts, options):
        adapters |= made
        cpu += seconds
    return {name: adapters[name] for name in names}, cpu


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Mixture of Shards against LoRA; serving.")
    parser.add_argument("--texts", type=Path, help=".txt files (default: fetched into --out)")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plays", type=int, default=6, help="of the comparison")
    parser.add_argument("--steps", type=int, default=200, help="of an adapter")
    parser.add_argument("--batch", type=int, default=1, help=f"windows of {model.CONTEXT} bytes")
    parser.add_argument("--base-steps", type=int, default=800, help="of the model")
    parser.add_argument("--base-batch", type=int, default=32)
    parser.add_argument("--base-lr", type=float, default=6e-3)
    parser.add_argument("--new", type=int, default=96, help="bytes to generate of each play")
    parser.add_argument("--timed", type=int, default=24, help="bytes of each play, against time")
    parser.add_argument("--repeats", type=int, default=3, help="of each throughput")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--tune", action="store_true", help="try learning rates, then stop")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for results")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(
            seeds=2, plays=2, steps=3, base_steps=3, base_batch=4, new=4, timed=2, repeats=1, jobs=1
        )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict:
    options, console = parse(argv), Console()
    start = time.perf_counter()
    if options.texts is None:
        options.texts = options.out / "mos" / "texts"
        if not list(options.texts.glob("*.txt")):
            data.fetch(options.texts)
    plays = data.read(options.texts)
    base = make_base(options)
    rows = study(options)
    if options.tune:
        tuning_path(options).write_text(json.dumps(averages(rows), indent=1) + "\n")
        console.print(tuned(averages(rows)))
        return averages(rows)
    result = measured(plays, base, rows, options)
    result["seconds_of_this_start"] = time.perf_counter() - start
    (options.out / "mos.json").write_text(json.dumps(result, indent=1) + "\n")
    picture(result, options.out / "mos.png")
    console.print(table(result))
    for line in result["summary"]:
        console.print(line, highlight=False)
    return result


def measured(plays: Sequence[data.Play], base: dict, rows: list[dict], options) -> dict:
    """Train what is to be served, serve it, and put all results together."""
    adapters, cpu = make_adapters(plays, options)
    start, some = time.process_time(), evenly(plays, options.plays)
    served = serve.serve(load_base(options), plays, adapters, options)
    served["crossed"] = serve.crossed(load_base(options), plays, adapters, [p.name for p in some])
    base = base | {"plays": serve.without(load_base(options), some)}
    cpu += time.process_time() - start + base["cpu_seconds"]
    result: dict = {
        "settings": {k: v for k, v in vars(options).items() if k not in ("out", "texts")},
        "model": {name.lower(): getattr(model, name) for name in (
            "CONTEXT", "DIM", "HIDDEN", "LAYERS", "HEADS", "ALPHA", "SHARDS")},
        "base": base, "texts": {play.name: [len(part) for part in play[1:]] for play in plays},
        "cpu_seconds": cpu + sum(row["cpu_seconds"] for row in rows),
        "python": sys.version.split()[0], "torch": torch.__version__,
        "runs": rows, "serving": served,
    }  # fmt: skip
    if tuning_path(options).exists():
        result["tuning"] = json.loads(tuning_path(options).read_text())
    return result | {"summary": summary(result)}


def tuning_path(options: argparse.Namespace) -> Path:
    """What ``--tune`` found, for the record of later starts."""
    return options.out / "mos" / "tuning.json"


def averages(rows: list[dict]) -> dict[str, dict[float, float]]:
    """Bits per byte of each method by learning rate, mean over plays."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["lr"]] = mean(row["bits"].values())
    return found


def tuned(found: dict[str, dict[float, float]]) -> dict[str, float]:
    """The learning rate of each method that leaves fewest bits."""
    return {name: min(bits, key=bits.__getitem__) for name, bits in found.items()}


if __name__ == "__main__":
    main()
