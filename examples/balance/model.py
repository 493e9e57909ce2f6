"""A small language model with sparse mixtures of experts, and one training of it."""

from __future__ import annotations

import argparse
import math
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from _text import VOCABULARY, load, windows
from torch import Tensor, nn
from torch.nn import functional as F
from weightshare.moe import LoadBalancer, MoE, MoEOutput, max_violation, sequence_balance_loss
from weightshare.nn import MultiheadAttention

CONTEXT, DIM, HEADS, LAYERS = 64, 64, 4, 3
HIDDEN, EXPERTS, TOP = 32, 32, 4
RULES = ("sign", "proportional", "inverse", "inverse_sqrt")
LOSSES = {"loss 0.001": 1e-3, "loss 0.01": 1e-2}
METHODS = (*RULES, *LOSSES, "none")


class Corpus(NamedTuple):
    """Two kinds of text, each in files that train and files that do not."""

    code: Tensor
    code_unseen: Tensor
    prose: Tensor
    prose_unseen: Tensor


def read_corpus() -> Corpus:
    """The standard library's source, and the language reference that ``help()`` shows."""
    code = load()
    pages = "".join(topics[name] for name in sorted(topics)).encode()
    prose = torch.frombuffer(bytearray(pages), dtype=torch.uint8).long().clamp(max=127)
    cut = len(prose) * 5 // 6
    return Corpus(code.train, code.valid, prose[:cut], prose[cut:])


class Block(nn.Module):
    """Attention, then a mixture of experts, each added to its input ``[batch, tokens, d]``."""

    def __init__(self, bias: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = MultiheadAttention(DIM, HEADS, DIM // HEADS)
        self.moe = MoE(DIM, HIDDEN, EXPERTS, TOP, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, MoEOutput]:
        """The sum, and what the mixture did."""
        x = x + self.attention(self.norm1(x), is_causal=True)
        mixed = self.moe(self.norm2(x), return_routing=True)
        return x + mixed.output, mixed


class ByteLM(nn.Module):
    """Bytes ``[batch, tokens]`` -> scores of the next byte, and the routing of every layer.

    Args:
        bias: whether the choice of experts has a bias to balance it.
    """

    def __init__(self, bias: bool):
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, DIM), nn.Embedding(CONTEXT, DIM)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.1)
        self.blocks = nn.ModuleList(Block(bias) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, list[MoEOutput]]:
        """Scores ``[batch, tokens, vocabulary]`` and one ``MoEOutput`` a layer."""
        x = self.token(x) + self.position(torch.arange(x.shape[1]))
        routed = []
        for block in self.blocks:
            x, mixed = block(x)
            routed.append(mixed)
        return self.head(self.norm(x)), routed


def loss_of(model: ByteLM, batch: Tensor, alpha: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats per byte, and the balance loss of all layers for a weight alpha.

    The whole batch is one sequence of the balance loss, which makes it that of the Switch
    Transformer but for k > 1 and sigmoid scores: ``alpha * sum_i f_i P_i``, 1 alpha if even.
    """
    logits, routed = model(batch[:, :-1])
    entropy = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    if not alpha:
        return entropy, entropy.new_zeros(())
    losses = [
        sequence_balance_loss(layer.logits, TOP, alpha=alpha, score_fn="sigmoid")
        for layer in routed
    ]
    return entropy, torch.stack(losses).sum()


class Test(NamedTuple):
    """A model on unseen files: bits per byte, and MaxVio of all their tokens, mean of layers."""

    bits: float
    violation: float


@torch.no_grad()
def test(model: ByteLM, text: Tensor, count: int) -> Test:
    """Test on the same ``count`` windows every time; nothing is counted for the balance."""
    model.eval()
    batches = windows(text, count, CONTEXT + 1, torch.Generator().manual_seed(0)).split(64)
    loss, counts = 0.0, torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    for batch in batches:
        logits, routed = model(batch[:, :-1])
        loss += F.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
        counts += torch.stack([layer.routing.counts for layer in routed])
    model.train()
    bits = loss / (count * CONTEXT) / math.log(2)
    return Test(bits, max_violation(counts).mean().item())


@torch.no_grad()
def routing_of(model: ByteLM, text: Tensor, tokens: int) -> list[dict[str, Tensor]]:
    """Of each layer: scores ``[tokens, E]`` of tokens here and there in a text, and bias ``[E]``.

    Both are float64. Neighbours are alike, and tokens that are not tell more about the text.
    """
    model.eval()
    draw = torch.Generator().manual_seed(1)
    batch = windows(text, 8 * -(-tokens // CONTEXT), CONTEXT, draw)
    some = torch.randperm(batch.numel(), generator=draw)[:tokens]
    layers = []
    for block, mixed in zip(model.blocks, model(batch)[1], strict=True):
        bias = block.moe.router.balance_bias
        bias = torch.zeros(EXPERTS) if bias is None else bias
        layers.append({
            "scores": mixed.logits[some].double().sigmoid(), "bias": bias.double().clone(),
        })  # fmt: skip
    model.train()
    return layers


def rate_at(step: int, options: argparse.Namespace) -> float:
    """Share of the highest learning rate: warm-up, a cosine down to 10 %, then constant."""
    warm = max(options.steps // 20, 1)
    if step < warm:
        return (step + 1) / warm
    progress = min((step - warm) / max(options.steps - warm, 1), 1.0)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def ends(options: argparse.Namespace) -> list[int]:
    """Where the last steps on code begin and end, and those on prose."""
    last = options.steps + options.drift_steps
    return [options.steps - options.tail, options.steps, last - options.tail, last]


def total(balancer: LoadBalancer) -> Tensor:
    """Tokens of each expert since the beginning, ``[layers, E]``."""
    return torch.stack(list(balancer.state_dict()["all"].values()))


def train(method: str, seed: int, corpus: Corpus, options: argparse.Namespace) -> dict:
    """Train on code, then go on with prose; everything that was measured on the way.

    All methods of a seed begin with the same weights and see the same batches.
    """
    torch.manual_seed(seed)
    model, draw = ByteLM(bias=method in RULES), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, options))
    # Without a bias to move it measures only.
    balancer = LoadBalancer(model, rule=method if method in RULES else "sign").attach(optimizer)
    run: dict = {"method": method, "seed": seed, "violation": [], "loss": [], "tests": []}
    seen = {0: total(balancer)}  # tokens of each expert up to some steps
    for step in range(options.steps + options.drift_steps):
        text, unseen = corpus[:2] if step < options.steps else corpus[2:]
        if step == options.steps:
            run["code"] = test(model, corpus.code_unseen, options.valid)
            run["routing"] = routing_of(model, corpus.code, 2 * options.tokens)
            run["switch"] = test(model, unseen, options.valid)
        optimizer.zero_grad()
        batch = windows(text, options.batch, CONTEXT + 1, draw)
        entropy, balance = loss_of(model, batch, LOSSES.get(method, 0.0))
        (entropy + balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        run["violation"].append(balancer.max_violation().mean())
        run["loss"].append(entropy.detach())
        if step + 1 in ends(options):
            seen[step + 1] = total(balancer)
        if (step + 1) % options.every == 0:
            run["tests"].append((step + 1, *test(model, unseen, options.valid // 4)))
    run["settled"] = [
        max_violation(seen[last] - seen[first]).mean().item()
        for first, last in zip(*[iter(ends(options))] * 2, strict=True)
    ]
    run["prose"] = test(model, corpus.prose_unseen, options.valid)
    for name in ("violation", "loss"):
        run[name] = torch.stack(run[name]).tolist()
    return run
