"""Train a supernet of vision transformers, search it, and check what was found.

As AutoFormer (Chen et al., 2021): width, depth, and each layer's heads and feed-forward ratio are
choices. One set of weights is trained by the sandwich rule, then searched by evolution for subnets
of few parameters and few errors on validation images. Some found ones are exported and tested on
images that nothing saw before, beside the same architectures trained alone. The images are
scikit-learn's digits, upscaled to 32 x 32. Minutes on a CPU (``--quick``: seconds)::

    pip install weightshare-kernels[demo,search]
    python examples/autoformer_digits.py
"""

import argparse
import json
from functools import partial
from pathlib import Path
from time import process_time
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from weightshare.nn import MLP, Conv2d, Embedding, LayerNorm, Layers, Linear, MultiheadAttention
from weightshare.supernet import (
    PerLayer,
    SandwichSampler,
    SearchSpace,
    Supernet,
    count_parameters,
    sandwich_step,
    search,
)

LAYERS, PATCH, HEAD_DIM, BATCH = 4, 8, 16, 64


class Images(NamedTuple):
    """Images ``[n, 1, 32, 32]`` and labels ``[n]``."""

    x: Tensor
    y: Tensor


class Block(nn.Module):
    """A transformer layer."""

    def __init__(self, embed, heads, ratio):
        super().__init__()
        self.norm1, self.attn = LayerNorm(embed), MultiheadAttention(embed, heads, HEAD_DIM)
        self.norm2, self.mlp = LayerNorm(embed), MLP(embed, embed * ratio)

    def forward(self, x):
        """Tokens ``[n, tokens, embed]``."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer that averages its tokens."""

    def __init__(self, embed, heads, ratio, depth):
        super().__init__()
        self.patches = Conv2d(1, embed, PATCH, stride=PATCH)
        self.positions = Embedding((32 // PATCH) ** 2, embed)
        blocks = [Block(embed, h, r) for h, r in zip(heads, ratio, strict=True)]
        self.layers = Layers(nn.Sequential(*blocks), depth)
        self.norm, self.head = LayerNorm(embed), Linear(embed, 10)

    def forward(self, x):
        """Images ``[n, 1, 32, 32]`` -> logits ``[n, 10]``."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.layers(x + self.positions(torch.arange(x.shape[1])))
        return self.head(self.norm(x).mean(1))


def make_supernet() -> Supernet:
    per_layer = {"heads": PerLayer([2, 3, 4], LAYERS), "ratio": PerLayer([1, 2, 4], LAYERS)}
    space = SearchSpace(embed=[32, 48, 64], depth=[1, 2, 3, 4], **per_layer)
    return Supernet(ViT(**space), space)


def load() -> tuple[Images, Images, Images]:
    """Half of the images to train, a quarter to validate, a quarter to test; always the same."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    x, y = F.interpolate(x, (32, 32), mode="bilinear"), torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, val, test = order.tensor_split([len(y) // 2, 3 * len(y) // 4])
    x = (x - x[train].mean()) / x[train].std()
    return Images(x[train], y[train]), Images(x[val], y[val]), Images(x[test], y[test])


def batch(images: Images, step: int, seed: int) -> Images:
    """Random images, moved by up to three pixels: the same for every model in a step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    chosen = torch.randint(len(images.y), (BATCH,), generator=generator)
    down, right = torch.randint(-3, 4, (2,), generator=generator).tolist()
    return Images(images.x[chosen].roll((down, right), (2, 3)), images.y[chosen])


def fit(model: nn.Module, images: Images, steps: int, seed: int, backward) -> nn.Module:
    """Train a model; ``backward(step, x, y)`` leaves the gradients of a batch."""
    optimizer = torch.optim.AdamW(model.train().parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        optimizer.zero_grad()
        backward(step, *batch(images, step, seed))
        optimizer.step()
        schedule.step()
    return model


def train_supernet(supernet: Supernet, images: Images, steps: int, seed: int) -> None:
    """Sandwich rule: the largest learns from the labels, smaller subnets from the largest."""
    model, sampler = supernet.model, SandwichSampler(supernet.space, random=2, seed=seed)

    def backward(step, x, y):
        forward, loss = partial(model, x), partial(F.cross_entropy, target=y)
        sandwich_step(supernet, sampler, step, forward, loss)

    fit(model, images, steps, seed, backward)


def train_alone(supernet: Supernet, arch, images: Images, steps: int, seed: int) -> nn.Module:
    """The same architecture from fresh weights, on the same batches."""
    torch.manual_seed(seed)
    model = supernet.get_active_subnet(arch)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return fit(model, images, steps, seed, lambda _, x, y: F.cross_entropy(model(x), y).backward())


@torch.no_grad()
def error(model: nn.Module, images: Images) -> float:
    """Share of images that are told wrong, in percent."""
    return 100 * (model.eval()(images.x).argmax(1) != images.y).float().mean().item()


def run(steps: int, trials: int, seed: int) -> dict:
    train, val, test = load()
    torch.manual_seed(seed)
    supernet = make_supernet()
    start = process_time()
    train_supernet(supernet, train, steps, seed)
    seconds = process_time() - start

    def evaluate(arch):
        supernet.set_active_subnet(arch)
        return count_parameters(supernet), error(supernet.model, val)

    goals, space = ("minimize", "minimize"), supernet.space
    result = search(space, evaluate, trials, directions=goals, population=20, seed=seed)
    front = result.front
    spread = [front[i * (len(front) - 1) // 3] for i in range(4)]
    found = {f"found {n}": trial.arch for n, trial in enumerate(dict.fromkeys(spread), 1)}
    archs = {"smallest": space.smallest(), **found, "largest": space.largest()}
    rows = []
    for name, arch in archs.items():
        subnet = supernet.get_active_subnet(arch)  # plain PyTorch, weights of its own
        alone = train_alone(supernet, arch, train, steps, seed)
        row = {"name": name, "arch": dict(arch)}
        row["parameters"] = sum(p.numel() for p in subnet.parameters())
        row |= {"val": error(subnet, val), "test": error(subnet, test)}
        rows.append({**row, "alone_test": error(alone, test)})
    return {
        "settings": {"steps": steps, "trials": trials, "seed": seed, "batch": BATCH},
        "images": {"train": len(train.y), "val": len(val.y), "test": len(test.y)},
        "architectures": space.count,
        "cpu_seconds": {"supernet": round(seconds), "whole run": round(process_time() - start)},
        "trials": [trial.values for trial in result.trials],
        "front": [trial.values for trial in front],
        "subnets": rows,
    }


def table(found: dict) -> Table:
    rows, images, seconds = found["subnets"], found["images"], found["cpu_seconds"]
    chart = Table(
        title=f"{len(rows)} of {found['architectures']:,} subnets in one set of weights",
        caption=f"errors in % of {images['val']} validation images and of {images['test']} test "
        "images, the latter also of the same architecture trained alone; CPU seconds: "
        + ", ".join(f"{name} {value}" for name, value in seconds.items()),
    )
    chart.add_column("subnet")
    for name in ("embed", "heads", "ratio", "parameters", "val", "test", "alone"):
        chart.add_column(name, justify="right")
    for row in rows:
        arch = row["arch"]
        layers = range(arch["depth"])
        heads, ratio = (
            " ".join(str(arch[f"{name}.{layer}"]) for layer in layers)
            for name in ("heads", "ratio")
        )
        errors = (f"{row[key]:.1f}" for key in ("val", "test", "alone_test"))
        sizes = str(arch["embed"]), heads, ratio, f"{row['parameters']:,}"
        chart.add_row(row["name"], *sizes, *errors)
    return chart


def picture(found: dict, path: Path) -> None:
    """The search on validation images; subnets on test images, shared against alone."""
    figure = Figure(figsize=(11, 4.8), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    images, rows = found["images"], found["subnets"]
    tried, front = (tuple(zip(*found[key], strict=True)) for key in ("trials", "front"))
    left.scatter(*tried, s=16, color="#9a9a9a", alpha=0.5, label="tried")
    left.step(*front, where="post", color="#1f6fb4")
    left.scatter(*front, s=40, color="#1f6fb4", zorder=3, label="Pareto front")
    left.set(title=f"Search on {images['val']} validation images", ylabel="error (%)")
    sizes = [row["parameters"] for row in rows]
    shared, alone = ([row[key] for row in rows] for key in ("test", "alone_test"))
    right.vlines(sizes, shared, alone, color="#b8b8b8", zorder=1)
    right.scatter(sizes, shared, s=60, color="#1f6fb4", label="shared weights")
    right.scatter(sizes, alone, s=60, color="#d1662b", marker="s", label="trained alone")
    right.set(title=f"Smallest, found and largest on {images['test']} test images")
    ticks = [10, 20, 50, 100, 200]
    for panel in (left, right):
        panel.set(xscale="log", xlabel="parameters (thousands)")
        panel.set_xticks([1000 * tick for tick in ticks], ticks)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of each model")
    parser.add_argument("--trials", type=int, default=200, help="subnets that the search tries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    options = parser.parse_args(arguments)
    steps, trials = (40, 20) if options.quick else (options.steps, options.trials)
    found = run(steps, trials, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "autoformer_digits.json").write_text(json.dumps(found, indent=1) + "\n")
    picture(found, options.out / "autoformer_digits.png")
    Console().print(table(found))
    return found


if __name__ == "__main__":
    main()
