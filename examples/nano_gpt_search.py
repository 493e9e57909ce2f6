"""Search the shape of a small GPT by gradient, then train what was found from scratch.

The space is that of TangleNAS (Sukthanker et al., 2023) for nanoGPT, smaller: width, number of
heads and FFN ratio of each layer, depth. All 104,976 shapes share one set of weights. DrNAS mixes
them all in one pass and learns the mixture on other files than those that train the weights,
with a price on missing a budget of parameters. The shape it ends on is trained from scratch, beside
random shapes of as many parameters and the largest one: same data, same number of steps. ::

    python examples/nano_gpt_search.py           # some minutes on one core
    python examples/nano_gpt_search.py --quick   # seconds: shows the steps, proves nothing
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from _search_report import picture, summary, table
from _text import VOCABULARY, Text, load, windows
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from weightshare.nn import MLP, Embedding, LayerNorm, Layers, MultiheadAttention, TiedHead
from weightshare.supernet import (
    ArchConfig,
    Bilevel,
    Dim,
    DrNAS,
    PerLayer,
    SearchSpace,
    Supernet,
    UniformSampler,
    count_parameters,
)

CONTEXT, HEAD_DIM = 32, 16


def new_space() -> SearchSpace:
    return SearchSpace(
        embed=[24, 48, 72, 96],
        heads=PerLayer([2, 4, 6], 4),
        ratio=PerLayer([1, 2, 4], 4),
        depth=[1, 2, 3, 4],
    )


class Block(nn.Module):
    """A layer of GPT. Sizes are dims of a space or, in a model of one shape, numbers."""

    def __init__(self, embed: Dim | int, heads: Dim | int, ratio: Dim | int):
        super().__init__()
        self.norm1, self.attention = LayerNorm(embed), MultiheadAttention(embed, heads, HEAD_DIM)
        self.norm2, self.mlp = LayerNorm(embed), MLP(embed, embed * ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then feed forward, each added to x ``[batch, tokens, embed]``."""
        x = x + self.attention(self.norm1(x), is_causal=True)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Bytes ``[batch, tokens]`` -> scores of the next byte ``[batch, tokens, vocabulary]``."""

    def __init__(self, embed: Dim | int, heads: Sequence, ratio: Sequence, depth: Dim | int):
        super().__init__()
        self.token, self.position = Embedding(VOCABULARY, embed), Embedding(CONTEXT, embed)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.1)
        blocks = [Block(embed, h, r) for h, r in zip(heads, ratio, strict=True)]
        self.blocks = Layers(blocks, depth)
        self.norm, self.head = LayerNorm(embed), TiedHead(self.token)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the byte after each of x ``[batch, tokens]``."""
        x = self.token(x) + self.position(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def alone(arch: ArchConfig) -> GPT:
    """One shape with new weights of its own: the same class, on numbers."""
    layers = range(arch["depth"])
    heads, ratio = ([arch[f"{name}.{i}"] for i in layers] for name in ("heads", "ratio"))
    return GPT(arch["embed"], heads, ratio, arch["depth"])


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def expected_parameters(space: SearchSpace) -> Tensor:
    """Mean number of parameters when every dim is drawn by the mixture weights it carries."""

    def moment(dim: Dim, power: int = 1) -> Tensor:
        return (dim.alpha * torch.tensor([float(c) ** power for c in dim.choices])).sum()

    embed, square = moment(space["embed"]), moment(space["embed"], 2)
    total = (VOCABULARY + CONTEXT + 2) * embed  # tables and the last norm
    for number, (heads, ratio) in enumerate(zip(space["heads"], space["ratio"], strict=True)):
        width, ratio = moment(heads) * HEAD_DIM, moment(ratio)
        layer = 4 * embed * width + 3 * width + embed  # attention
        layer = layer + 2 * square * ratio + embed * ratio + embed  # FFN
        used = sum(
            (a for a, depth in zip(space["depth"].alpha, space["depth"].choices, strict=True)
             if depth > number), torch.zeros(()),
        )  # fmt: skip
        total = total + used * (layer + 4 * embed)  # and two norms
    return total


def search(text: Text, options: argparse.Namespace) -> tuple[Supernet, ArchConfig, list]:
    """Train the mixture of all shapes; return the supernet, the shape and alpha over time."""
    torch.manual_seed(options.seed)
    space = new_space()
    model = GPT(*space.values())
    draw = torch.Generator().manual_seed(options.seed)
    arch = DrNAS(space, seed=options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    step = Bilevel(
        arch, optimizer, torch.optim.Adam(arch.parameters(), 0.03, betas=(0.5, 0.999)),
        steps=options.search_steps, warmup=options.search_steps // 5,
        # Late, when the losses have had their say: it makes the mixture one shape.
        entropy=lambda progress: options.entropy * progress**3, clip=1.0,
    )  # fmt: skip

    def batch_loss(part: Tensor) -> Tensor:
        return loss_of(model, windows(part, options.batch, CONTEXT + 1, draw))

    def priced() -> Tensor:
        # Both ways: larger is better and mixtures lean to small choices, so spend the budget.
        size = expected_parameters(space) / options.budget
        return batch_loss(text.search) + options.price * size.log().square()

    history = []
    for _ in track(range(options.search_steps), "search", transient=True):
        step(lambda: batch_loss(text.train), priced)
        history.append(arch.probabilities())
    return Supernet(model, space), arch.discretise(), history


def train(arch: ArchConfig, seed: int, text: Text, options: argparse.Namespace) -> float:
    """Train one shape from scratch; its loss on files that nothing was trained or chosen on."""
    torch.manual_seed(seed)
    model, draw = alone(arch), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 5e-3, total_steps=options.steps, pct_start=0.1
    )
    for _ in range(options.steps):
        optimizer.zero_grad()
        loss_of(model, windows(text.train, options.batch, CONTEXT + 1, draw)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    valid = windows(text.valid, options.valid, CONTEXT + 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return mean(loss_of(model, part).item() for part in valid.split(128))


def compare(supernet: Supernet, found: ArchConfig, text: Text, options) -> list[dict]:
    """Train found, random and largest shapes, each from several seeds."""
    size = count_parameters(supernet, found)
    near = UniformSampler(
        supernet.space, options.random, seed=options.seed, tries=10_000,
        accept=lambda arch: abs(count_parameters(supernet, arch) / size - 1) < 0.08,
    )  # fmt: skip
    shapes = [("found", found)]
    shapes += [(f"random {i + 1}", draw.arch) for i, draw in enumerate(near.sample(0))]
    shapes += [("largest", supernet.space.largest())]
    rows = [{"name": n, "arch": dict(a), "parameters": count_parameters(supernet, a), "loss": []}
            for n, a in shapes]  # fmt: skip
    jobs = [(row, seed) for seed in range(options.seeds) for row in rows]
    for row, seed in track(jobs, "from scratch", transient=True):
        row["loss"].append(train(ArchConfig(row["arch"]), seed, text, options))
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Gradient search of a small GPT's shape.")
    parser.add_argument("--seed", type=int, default=0, help="of the search and the random shapes")
    parser.add_argument("--search-steps", type=int, default=250)
    parser.add_argument("--steps", type=int, default=400, help="of each model from scratch")
    parser.add_argument("--seeds", type=int, default=2, help="runs from scratch of each shape")
    parser.add_argument("--random", type=int, default=5, help="number of random shapes")
    parser.add_argument("--batch", type=int, default=32, help=f"windows of {CONTEXT} bytes")
    parser.add_argument("--valid", type=int, default=2048, help="windows for the final loss")
    parser.add_argument("--budget", type=float, default=150e3, help="parameters of the shape")
    parser.add_argument("--price", type=float, default=1.0, help="nats if off by a factor of e")
    parser.add_argument("--entropy", type=float, default=0.1, help="price on it at the end")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for results")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(search_steps=6, steps=4, seeds=2, random=1, batch=4, valid=32)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict:
    options, console, start = parse(argv), Console(), time.process_time()
    text = load()
    supernet, found, history = search(text, options)
    searched = time.process_time()
    rows = compare(supernet, found, text, options)
    result = {
        "settings": {k: v for k, v in vars(options).items() if k != "out"},
        "bytes": {name: len(part) for name, part in text._asdict().items()},
        "cpu_seconds": {"search": searched - start, "scratch": time.process_time() - searched},
        "torch": torch.__version__, "threads": torch.get_num_threads(),
        "alpha": history[-1], "models": rows, "summary": summary(rows),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "nano_gpt_search.json").write_text(json.dumps(result, indent=1) + "\n")
    picture(rows, history, supernet.space, options.out / "nano_gpt_search.png")
    console.print(table(rows))
    console.print(result["summary"], highlight=False)
    return result


if __name__ == "__main__":
    main()
