"""Does a mixture of supernets come closer to training each width alone? Measured, not assumed.

One set of weights for several widths is a compromise. Mixture-of-Supernets (Jawahar et al., 2023)
loosens it: every layer has M weights, and a small router makes the layer's weight out of them for
each architecture. Here a network that guesses the next byte of a text from the 16 before it has a
hidden width of 16 to 128; it is trained as a plain supernet, as a mixture with one set of mixture
weights per layer, and with one per neuron, all by the sandwich rule on the same batches; and each
width alone. What counts is the gap: the loss of a width in the supernet minus that of the same
width alone, from the same seed. ::

    python examples/mixture_of_supernets.py           # some minutes on one core
    python examples/mixture_of_supernets.py --quick   # seconds: shows the steps, proves nothing
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from _text import VOCABULARY, Text, load, windows
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from weightshare.nn import ArchRouter, ExpertMixtureLinear, Linear
from weightshare.supernet import Dim, SandwichSampler, SearchSpace, Supernet, sandwich_step

CONTEXT, EMBED, EXPERTS = 16, 16, 2
WIDTHS = (16, 32, 64, 128)
METHODS = {"shared": None, "layer-wise": "layer", "neuron-wise": "neuron"}
COLOURS = {"shared": "#1f6fb4", "layer-wise": "#d1662b", "neuron-wise": "#3a923a"}


class ByteNet(nn.Module):
    """Bytes ``[batch, 16]`` -> scores of the next byte ``[batch, vocabulary]``.

    Args:
        width: of both hidden layers, a dim of a space or a number.
        space: with a level, what the routers read.
        level: ``"layer"`` or ``"neuron"`` for experts in the hidden layers; None: one weight.
        noise: how unlike the experts are at first.
    """

    def __init__(self, width: Dim | int, space=None, level: str | None = None, noise: float = 1.0):
        super().__init__()

        def hidden(in_: Dim | int) -> nn.Module:
            if level is None:
                return Linear(in_, width)
            router = ArchRouter(space, EXPERTS, width, level)
            return ExpertMixtureLinear(in_, width, EXPERTS, router=router, noise=noise)

        self.embed = nn.Embedding(VOCABULARY, EMBED)
        self.layers = nn.Sequential(
            hidden(CONTEXT * EMBED), nn.GELU(), hidden(width), nn.GELU(), Linear(width, VOCABULARY)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the byte after x."""
        return self.layers(self.embed(x).flatten(1))


def batches(text: Text, seed: int, options: argparse.Namespace) -> Iterator[Tensor]:
    """The same batches ``[batch, 17]`` for every model of a seed."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(options.steps):
        yield windows(text.train, options.batch, CONTEXT + 1, draw)


def optimizer_of(model: nn.Module, options: argparse.Namespace):
    optimizer = torch.optim.Adam(model.parameters(), options.lr)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=options.steps, pct_start=0.1
    )


@torch.no_grad()
def test(model: nn.Module, text: Text, options: argparse.Namespace) -> float:
    """Mean loss in nats per byte on files that nothing was trained on."""
    fixed = torch.Generator().manual_seed(0)
    batch = windows(text.valid, options.valid, CONTEXT + 1, fixed)
    return F.cross_entropy(model(batch[:, :-1]), batch[:, -1]).item()


def train_supernet(level: str | None, seed: int, text: Text, options) -> list[float]:
    """Train all widths in one model; the loss of each."""
    torch.manual_seed(seed)
    space = SearchSpace(width=WIDTHS)
    model = ByteNet(space["width"], space, level, options.noise)
    supernet, sampler = Supernet(model, space), SandwichSampler(space, random=2, seed=seed)
    optimizer, schedule = optimizer_of(model, options)
    for step, batch in enumerate(batches(text, seed, options)):
        optimizer.zero_grad()
        sandwich_step(
            supernet, sampler, step,
            lambda batch=batch: model(batch[:, :-1]),
            lambda logits, batch=batch: F.cross_entropy(logits, batch[:, -1]),
            distill=None,  # all learn from the data, as the models that stand alone do
        )  # fmt: skip
        optimizer.step()
        schedule.step()
    losses = []
    for width in WIDTHS:
        supernet.set_active_subnet({"width": width})
        losses.append(test(model, text, options))
    return losses


def train_alone(width: int, seed: int, text: Text, options) -> float:
    """Train one width; its loss."""
    torch.manual_seed(seed)
    model = ByteNet(width)
    optimizer, schedule = optimizer_of(model, options)
    for batch in batches(text, seed, options):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[:, :-1]), batch[:, -1]).backward()
        optimizer.step()
        schedule.step()
    return test(model, text, options)


def measure(text: Text, options: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Losses of every way of training, ``[seeds][widths]``."""
    found: dict[str, list[list[float]]] = {name: [] for name in ("alone", *METHODS)}
    for seed in track(range(options.seed, options.seed + options.seeds), "seeds", transient=True):
        found["alone"].append([train_alone(w, seed, text, options) for w in WIDTHS])
        for name, level in METHODS.items():
            found[name].append(train_supernet(level, seed, text, options))
    return found


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over the seeds and its standard error."""
    return mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def gaps(found: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    """Loss in the supernet minus loss alone, ``[widths + 1][seeds]``; the last is their mean."""
    result = {}
    for name in METHODS:
        pairs = zip(found[name], found["alone"], strict=True)
        rows = [[ours - alone for ours, alone in zip(*pair, strict=True)] for pair in pairs]
        result[name] = [list(column) for column in zip(*([*r, mean(r)] for r in rows), strict=True)]
    return result


def table(found: dict[str, list[list[float]]]) -> Table:
    chart = Table(
        title="Gap to the same width trained alone",
        caption="nats per byte on unseen files, mean and standard error over seeds",
    )
    chart.add_column("width", justify="right")
    for name in ("alone (loss)", *METHODS):
        chart.add_column(name, justify="right")
    gap = gaps(found)
    alone = [*zip(*found["alone"], strict=True), [mean(row) for row in found["alone"]]]
    for row, width in enumerate([*WIDTHS, "all"]):
        if width == "all":
            chart.add_section()
        cells = [mean_error(alone[row]), *(mean_error(gap[name][row]) for name in METHODS)]
        signs = ["", *["+"] * len(METHODS)]
        chart.add_row(
            str(width), *(f"{m:{s}.3f} ± {e:.3f}" for s, (m, e) in zip(signs, cells, strict=True))
        )
    return chart


def summary(found: dict[str, list[list[float]]]) -> list[str]:
    """Whether experts helped, by differences between models of one seed."""
    gap = {name: rows[-1] for name, rows in gaps(found).items()}
    plain = mean(gap["shared"])
    lines = [f"Mean gap of the plain supernet: {plain:+.3f} nats per byte."]
    for name in list(METHODS)[1:]:
        change, error = mean_error(
            [ours - base for ours, base in zip(gap[name], gap["shared"], strict=True)]
        )
        if not abs(change) > 3 * error:  # 98 % where there are 10 seeds; never where there is 1
            verdict = "no difference that these seeds can tell"
        else:
            verdict = f"{'narrows' if change < 0 else 'widens'} it by {abs(change / plain):.0%}"
        lines.append(f"{EXPERTS} experts, {name}: {change:+.3f} ± {error:.3f}; {verdict}.")
    return lines


def picture(found: dict[str, list[list[float]]], path: Path) -> None:
    """The gap of each width, a bar for each method."""
    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=120)
    panel, gap = figure.add_subplot(), gaps(found)
    for number, (name, colour) in enumerate(COLOURS.items()):
        where = [place + 0.27 * (number - 1) for place in range(len(WIDTHS) + 1)]
        heights, errors = zip(*(mean_error(row) for row in gap[name]), strict=True)
        panel.bar(where, heights, 0.25, yerr=errors, capsize=3, color=colour, label=name)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_xticks(range(len(WIDTHS) + 1), [*map(str, WIDTHS), "mean"])
    panel.set(
        xlabel="hidden width", ylabel="gap to stand-alone training (nats per byte)",
        title=f"One supernet for {len(WIDTHS)} widths: what sharing costs\n"
        f"(mean and standard error of {len(found['alone'])} seeds)",
    )  # fmt: skip
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    panel.legend(title="weights")
    figure.savefig(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Mixture-of-Supernets against plain sharing.")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=800, help="of every model")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--noise", type=float, default=1.0, help="of the experts at first")
    parser.add_argument("--valid", type=int, default=20_000, help="bytes for the final loss")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for results")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(seeds=2, steps=20, valid=500)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict:
    options, console, start = parse(argv), Console(), time.process_time()
    text = load()
    losses = measure(text, options)
    result = {
        "settings": {k: v for k, v in vars(options).items() if k != "out"},
        "bytes": {name: len(part) for name, part in text._asdict().items()},
        "cpu_seconds": time.process_time() - start,
        "torch": torch.__version__, "threads": torch.get_num_threads(),
        "widths": WIDTHS, "losses": losses, "gaps": gaps(losses), "summary": summary(losses),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "mixture_of_supernets.json").write_text(json.dumps(result, indent=1) + "\n")
    picture(losses, options.out / "mixture_of_supernets.png")
    console.print(table(losses))
    for line in result["summary"]:
        console.print(line, highlight=False)
    return result


if __name__ == "__main__":
    main()
