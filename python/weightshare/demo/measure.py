"""What the demo measures once everything is trained."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightshare.demo import checkpoint, plain
from weightshare.demo.data import CLASSES, FEATURES, Digits, batch
from weightshare.demo.model import Subnet, Supernet
from weightshare.demo.settings import Settings
from weightshare.demo.train import (
    accuracy,
    descend,
    new_optimizer,
    new_supernet,
    sandwich,
    sandwich_loss,
)

LATENCY_BATCH = 64


def evaluate(
    settings: Settings, digits: Digits, results: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Measure all subnets, export the one that was found, and time a training step.

    Args:
        settings: of the run.
        digits: the images.
        results: of the three trainings, by name.
        out: folder that gets ``subnet.pt`` and ``subnet.py``.

    Returns:
        Plain numbers, lists and dicts, as written to ``demo.json``.
    """
    subnets = compare(settings, digits, results)
    return {
        "settings": settings.as_dict(),
        "torch": torch.__version__,
        "images": {name: len(split.y) for name, split in zip(digits._fields, digits, strict=True)},
        "latency_batch": LATENCY_BATCH,
        "subnets": subnets,
        "seconds": {name: result["seconds"] for name, result in results.items()},
        "losses": results["shared"]["losses"],
        "search": export_found(settings, digits, results["search"], subnets, out),
        "step": time_step(settings, digits),
    }


def compare(settings: Settings, digits: Digits, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each subnet in the shared weights against the same subnet trained alone."""
    model = new_supernet(settings)
    model.load_state_dict(results["shared"]["model"])
    model.eval()
    x = digits.test.x[:LATENCY_BATCH]
    rows = []
    for subnet, alone in zip(model.subnets, results["alone"]["scores"], strict=True):
        exported = model.export(subnet)
        model.set_active(subnet)
        calls = [partial(model, x), partial(exported, x)]
        sliced_us, exported_us = interleaved(calls, settings.rounds)
        rows.append(
            {
                "width": subnet.width,
                "depth": subnet.depth,
                "parameters": count(exported),
                "shared_val": accuracy(exported, digits.val),
                "shared_test": accuracy(exported, digits.test),
                "alone_val": alone[0],
                "alone_test": alone[1],
                "sliced_us": sliced_us,
                "exported_us": exported_us,
            }
        )
    return rows


def export_found(
    settings: Settings,
    digits: Digits,
    search: dict[str, Any],
    subnets: list[dict[str, Any]],
    out: Path,
) -> dict[str, Any]:
    """Write the found subnet as plain PyTorch, read it back, and check that it is the same.

    Raises:
        RuntimeError: what was read back does not compute what was written.
    """
    model = new_supernet(settings)
    model.load_state_dict(search["model"])
    found = Subnet(*search["found"])
    network = model.export(found).eval()
    path = out / "subnet.pt"
    checkpoint.save(path, {"config": network.config, "state": network.state_dict()})
    shutil.copyfile(plain.__file__, out / "subnet.py")
    reloaded = plain.load(path)
    with torch.no_grad():
        written, read = network(digits.test.x), reloaded(digits.test.x)
        sliced = model.eval().set_active(found)(digits.test.x)
    if not torch.equal(written, read):
        raise RuntimeError(f"{path} does not compute what was exported; the file is damaged")
    row = next(r for r in subnets if (r["width"], r["depth"]) == found)
    return {
        "width": found.width,
        "depth": found.depth,
        "features": FEATURES,
        "classes": CLASSES,
        "parameters": row["parameters"],
        "parameters_share": row["parameters"] / max(r["parameters"] for r in subnets),
        "cost_coefficient": settings.cost,
        "confidence": [max(alpha) for alpha in search["history"][-1]],
        "val": accuracy(reloaded, digits.val),
        "test": accuracy(reloaded, digits.test),
        "shared_test": row["shared_test"],
        "alone_test": row["alone_test"],
        "difference_to_sliced": (sliced - read).abs().max().item(),
        "history": search["history"],
        "file": path.name,
    }


def time_step(settings: Settings, digits: Digits) -> dict[str, float]:
    """Median time of a training step: sandwich of four subnets, ours and in eager slicing."""
    x, y = batch(digits.train, 0, settings.batch, settings.seed)

    def step(model: Supernet, optimizer: torch.optim.Optimizer, subnets: list[Subnet]) -> None:
        descend(sandwich_loss(model, subnets, x, y), optimizer, settings.lr)

    steps = []
    for eager in (False, True):
        model = new_supernet(settings, eager)
        subnets = sandwich(model, 2, torch.Generator().manual_seed(settings.seed))
        steps.append(partial(step, model, new_optimizer(model, settings), subnets))
    ours_us, eager_us = interleaved(steps, settings.rounds, grad=True)
    return {"ours_us": ours_us, "eager_us": eager_us, "ratio": eager_us / ours_us}


def interleaved(
    functions: Sequence[Callable[[], object]], rounds: int, grad: bool = False
) -> list[float]:
    """Median microseconds of each function, called in turns after a warm-up."""
    times: list[list[float]] = [[] for _ in functions]
    with torch.set_grad_enabled(grad):
        for turn in range(rounds + 3):
            for function, seen in zip(functions, times, strict=True):
                start = time.perf_counter()
                function()
                if turn >= 3:
                    seen.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(seen) for seen in times]


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
