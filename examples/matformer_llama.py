"""Convert a Llama of transformers into a supernet with nested feed-forward blocks.

As MatFormer (Devvrit et al., 2023): each layer's feed-forward block runs with the first 1/8, 1/4,
1/2 or all of its hidden units. One call converts the model, and four granularities are trained
jointly; subnets in between, with another width in each layer, need no training of their own, but
do well only where neighbouring layers differ little. Each subnet is compared with a model of its
size trained alone, and the granularities are exported into a plain LlamaForCausalLM. The text is
Python's own standard library, byte by byte, a tenth of its files kept for validation. Minutes on
a CPU (``--quick``: seconds, to see that it works)::

    pip install weightshare-kernels[demo,transformers]
    python examples/matformer_llama.py
"""

import argparse
import json
import math
import platform
from functools import partial
from pathlib import Path
from time import process_time

import torch
from _text import VOCABULARY, load, windows
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from weightshare import convert
from weightshare.supernet import (
    Draw,
    PerLayer,
    SearchSpace,
    Supernet,
    count_parameters,
    sandwich_step,
)

WIDTH, LAYERS, HEADS = 96, 4, 4
GRANULARITIES = (48, 96, 192, 384)
BATCH, CONTEXT = 12, 96
# Subnets that no step trains: another width in each layer, falling or rising.
MIXES = ((96, 96, 48, 48), (48, 96, 192, 384), (192, 192, 384, 384))


def make_llama(ffn: int = GRANULARITIES[-1]) -> LlamaForCausalLM:
    """A small Llama over bytes with fresh weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=ffn,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


def make_supernet(seed: int) -> Supernet:
    torch.manual_seed(seed)
    return convert(make_llama(), {"ffn": PerLayer(GRANULARITIES, LAYERS)})  # the one line


def batch(text: Tensor, step: int, seed: int) -> Tensor:
    """Stretches of text ``[BATCH, CONTEXT + 1]``: the same for every model in a step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return windows(text, BATCH, CONTEXT + 1, generator)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens[:, :-1]).logits


def loss_of(tokens: Tensor, logits: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def fit(model: nn.Module, text: Tensor, steps: int, seed: int, backward) -> nn.Module:
    """Train a model; ``backward(step, tokens)`` leaves the gradients of a batch."""
    optimizer = torch.optim.AdamW(model.train().parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        optimizer.zero_grad()
        backward(step, batch(text, step, seed))
        optimizer.step()
        schedule.step()
    return model


class Granularities:
    """Sampler of the uniform subnets: all of them at each step, or one in turn."""

    def __init__(self, space: SearchSpace, joint: bool):
        self.archs = [space.arch(ffn=ffn) for ffn in reversed(GRANULARITIES)]
        self.joint = joint

    def sample(self, step: int) -> list[Draw]:
        """Subnets of a step."""
        archs = self.archs if self.joint else [self.archs[step % len(self.archs)]]
        return [Draw(arch, 0.0) for arch in archs]


def train_supernet(supernet: Supernet, text: Tensor, steps: int, seed: int, joint: bool) -> None:
    """Every granularity learns from the data, in one set of weights."""
    model, sampler = supernet.model, Granularities(supernet.space, joint)

    def backward(step, tokens):
        forward = partial(logits_of, model, tokens)
        sandwich_step(supernet, sampler, step, forward, partial(loss_of, tokens), distill=None)

    fit(model, text, steps, seed, backward)


def train_alone(arch, text: Tensor, steps: int, seed: int) -> nn.Module:
    """A plain model of an architecture, from fresh weights, on the same batches."""
    model = make_supernet(seed).get_active_subnet(arch)

    def backward(_, tokens):
        loss_of(tokens, logits_of(model, tokens)).backward()

    return fit(model, text, steps, seed, backward)


@torch.no_grad()
def validate(model: nn.Module, tokens: Tensor) -> float:
    """Validation loss in bits per byte."""
    model.eval()
    parts = tokens.split(64)
    total = sum(len(p) * loss_of(p, logits_of(model, p)).item() for p in parts)
    return total / len(tokens) / math.log(2)


@torch.no_grad()
def check_export(supernet: Supernet, ffn: int, tokens: Tensor) -> float:
    """Load a subnet into a plain LlamaForCausalLM; largest difference of a logit."""
    supernet.set_active_subnet({"ffn": ffn})
    plain = make_llama(ffn).eval()
    plain.load_state_dict(supernet.get_active_subnet().state_dict())
    ours, theirs = (logits_of(model, tokens[:4]) for model in (supernet.model.eval(), plain))
    return (ours - theirs).abs().max().item()


def run(steps: int, count: int, mixes, seed: int, joint: bool) -> dict:
    text = load()
    val = windows(text.valid, count, CONTEXT + 1, torch.Generator().manual_seed(seed))
    supernet = make_supernet(seed)
    start = process_time()
    train_supernet(supernet, text.train, steps, seed, joint)
    trained = process_time()
    rows = []
    for ffn in (*GRANULARITIES, *mixes):
        arch = supernet.set_active_subnet({"ffn": ffn})
        row = {"ffn": ffn, "parameters": count_parameters(supernet)}
        row["shared"] = validate(supernet.model, val)
        row["alone"] = validate(train_alone(arch, text.train, steps, seed), val)
        if ffn in GRANULARITIES:
            row["export_difference"] = check_export(supernet, ffn, val)
        rows.append(row)
    return {
        "settings": {"steps": steps, "seed": seed, "joint": joint, "batch": [BATCH, CONTEXT]},
        "python": platform.python_version(),  # whose standard library is the text
        "bytes": {"train": len(text.train), "scored": count * CONTEXT},
        "cpu_seconds": {
            "supernet": round(trained - start),
            "alone": round(process_time() - trained),
        },
        "subnets": rows,
    }


def table(found: dict) -> Table:
    seconds = found["cpu_seconds"]
    how = "jointly" if found["settings"]["joint"] else "in turn"
    chart = Table(
        title=f"{len(GRANULARITIES)} granularities of a Llama, trained {how}",
        caption=f"bits per byte of {found['bytes']['scored']:,} validation bytes; CPU seconds: "
        f"shared {seconds['supernet']}, all alone {seconds['alone']}",
    )
    for name in ("ffn of each layer", "parameters", "shared", "alone", "gap", "exported, differs"):
        chart.add_column(name, justify="right")
    for row in found["subnets"]:
        if row is found["subnets"][len(GRANULARITIES)]:
            chart.add_section()
        shared, alone = row["shared"], row["alone"]
        losses = f"{shared:.3f}", f"{alone:.3f}", f"{shared - alone:+.3f}"
        differs = f"{row['export_difference']:.0e}" if "export_difference" in row else ""
        name = str(row["ffn"]) if isinstance(row["ffn"], int) else " ".join(map(str, row["ffn"]))
        chart.add_row(name, f"{row['parameters']:,}", *losses, differs)
    return chart


def picture(found: dict, path: Path) -> None:
    """Validation loss over parameters: one set of weights against models of their own."""
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    panel = figure.add_subplot()
    trained, mixed = found["subnets"][: len(GRANULARITIES)], found["subnets"][len(GRANULARITIES) :]
    for rows, kind, style in ((trained, "", "-o"), (mixed, ", mix-and-match", "D")):
        for key, label, colour in (
            ("shared", "one set of weights", "#1f6fb4"),
            ("alone", "trained alone", "#d1662b"),
        ):
            xs, ys = [row["parameters"] for row in rows], [row[key] for row in rows]
            fill = colour if rows is trained else "white"
            panel.plot(xs, ys, style, color=colour, mfc=fill, ms=8, label=label + kind)
    for row in trained:
        text, where = f"ffn {row['ffn']}", (row["parameters"], min(row["shared"], row["alone"]))
        panel.annotate(text, where, xytext=(-4, -18), textcoords="offset points", ha="right")
    panel.set(xlabel="parameters", ylabel="validation loss (bits per byte)")
    panel.set_title("Nested feed-forward widths in a Llama (text: Python's standard library)")
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.margins(0.1)
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    parser.add_argument("--in-turn", action="store_true", help="one granularity a step, not all")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    options = parser.parse_args(arguments)
    steps, count, mixes = (6, 16, MIXES[:1]) if options.quick else (options.steps, 512, MIXES)
    found = run(steps, count, mixes, options.seed, not options.in_turn)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "matformer_llama.json").write_text(json.dumps(found, indent=1) + "\n")
    picture(found, options.out / "matformer_llama.png")
    Console().print(table(found))
    return found


if __name__ == "__main__":
    main()
