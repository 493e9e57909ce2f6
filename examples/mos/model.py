"""A small Llama over bytes, and many adapters for it that are trained in the same batches."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from _text import VOCABULARY, load, windows
from mos.data import Play
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from weightshare.lora import ShardPlan, ShardPool

from weightshare_kernels.ops import group_by_adapter, shard_lora

CONTEXT, DIM, HIDDEN, LAYERS, HEADS = 128, 64, 192, 8, 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA, SHARDS = 16.0, 4


@dataclass(frozen=True)
class Method:
    """A kind of adapter: of rank r, with the parameters of a LoRA of rank e."""

    rank: int
    budget: int

    @property
    def shares(self) -> bool:
        """Whether layers have vectors in common."""
        return self.rank > self.budget

    @property
    def name(self) -> str:
        """What the study calls it."""
        return f"MoS {self.budget} -> {self.rank}" if self.shares else f"LoRA {self.rank}"

    def plan(self, seed: int) -> ShardPlan:
        """Of one rank private and the rest shared, as published; LoRA has all private."""
        private, shards = (1, SHARDS) if self.shares else (self.budget, 1)
        return ShardPlan(self.rank, self.budget, private, shards, LAYERS, seed=seed)


LORA = tuple(Method(rank, rank) for rank in (2, 4, 8, 16))
MOS = tuple(Method(rank, budget) for budget, rank in ((2, 4), (2, 8), (4, 8), (4, 16)))
METHODS = {method.name: method for method in (*LORA, *MOS)}
GRID = (3e-3, 5e-3, 6.5e-3, 8e-3, 10e-3, 12e-3, 16e-3, 20e-3)
# Of the grid, what left fewest bits of other plays (``run.py --tune``), all inside its bounds.
RATES = {
    "LoRA 2": 6.5e-3, "LoRA 4": 6.5e-3, "LoRA 8": 8e-3, "LoRA 16": 10e-3,
    "MoS 2 -> 4": 8e-3, "MoS 2 -> 8": 12e-3, "MoS 4 -> 8": 10e-3, "MoS 4 -> 16": 12e-3,
}  # fmt: skip


def llama() -> LlamaForCausalLM:
    """Fresh weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=DIM, intermediate_size=HIDDEN,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=512,
            tie_word_embeddings=True, use_cache=False, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def rate_at(step: int, steps: int) -> float:
    """Share of the highest learning rate: a short warm-up, then a cosine down to 0."""
    warm = max(steps // 20, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(steps - warm, 1))


def entropy(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean loss in nats per byte of windows ``[n, T + 1]``."""
    logits = model(batch[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def pretrain(options: argparse.Namespace) -> tuple[LlamaForCausalLM, float]:
    """A model of Python's standard library, and its bits per byte on files kept from it."""
    torch.manual_seed(0)
    model, text, draw = llama(), load(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), options.base_lr, weight_decay=0.1)
    for step in range(options.base_steps):
        optimizer.param_groups[0]["lr"] = options.base_lr * rate_at(step, options.base_steps)
        optimizer.zero_grad()
        entropy(model, windows(text.train, options.base_batch, CONTEXT + 1, draw)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.requires_grad_(False).eval()
    unseen = stretches(text.valid)[:512]
    return model, bits(model, unseen).mean().item()


class Adapters(nn.Module):
    """Pools of one projection type for many adapters, one behind the other.

    Args:
        pools: a ``ShardPool`` for each adapter, all of one plan's sizes.
    """

    def __init__(self, pools: Sequence[ShardPool]):
        super().__init__()
        self.a, self.b = (
            nn.Parameter(torch.cat([getattr(pool, side).detach() for pool in pools]))
            for side in "ab"
        )
        for side in "ab":  # [layers, adapters, r, l], in the shards of the joint pool
            tables = [getattr(pool, f"{side}_index") for pool in pools]
            shards = getattr(pools[0], side).shape[0]
            joint = torch.stack([table + n * shards for n, table in enumerate(tables)], 1)
            self.register_buffer(f"{side}_index", joint.int())


class Adapted(nn.Module):
    """A frozen layer with the adapters of its type; each row takes that of its sequence."""

    def __init__(self, base: nn.Linear, adapters: Adapters, layer: int, scale: float, batch: dict):
        super().__init__()
        self.base, self.adapters, self.layer, self.scale = base, adapters, layer, scale
        self.batch = batch

    def forward(self, x: Tensor) -> Tensor:
        """``[sequences, T, d_in]`` -> ``[sequences, T, d_out]``."""
        own = self.adapters
        return shard_lora(
            x, self.base(x), own.a, own.b, own.a_index[self.layer], own.b_index[self.layer],
            self.scale, adapters=self.batch["groups"],
        )  # fmt: skip


class Many(nn.Module):
    """A model with an adapter for each seed given; one forward pass serves any mixture of them.

    The loss of a batch is a sum over adapters and Adam goes element by element, so that training
    them together is training each alone.

    Args:
        base: the pretrained model; taken over and changed.
        method: kind of adapter.
        seeds: of each adapter's shards and first values.
    """

    def __init__(self, base: LlamaForCausalLM, method: Method, seeds: Sequence[int]):
        super().__init__()
        self.count, self.batch = len(seeds), {"groups": None}
        self.pools = nn.ModuleDict()
        for number, target in enumerate(TARGETS):
            places = [m for name, m in base.named_modules() if name.endswith(target)]
            pools = []
            for seed in seeds:
                torch.manual_seed(seed + number)
                plan = method.plan(seed + number)
                pools.append(ShardPool(places[0].in_features, places[0].out_features, plan))
            self.pools[target] = Adapters(pools)
        for layer, block in enumerate(base.model.layers):
            for part in (block.self_attn, block.mlp):
                for target in TARGETS:
                    if hasattr(part, target):
                        scale = ALPHA / method.rank
                        linear, pool = getattr(part, target), self.pools[target]
                        setattr(part, target, Adapted(linear, pool, layer, scale, self.batch))
        self.base = base

    def forward(self, batch: Tensor, ids: Tensor):
        """Windows ``[n, T]`` and the adapter of each."""
        self.batch["groups"] = group_by_adapter(ids, self.count, batch.shape[1])
        return self.base(batch)


def stretches(text: Tensor) -> Tensor:
    """All of a text as windows ``[n, CONTEXT + 1]`` that share one byte; a short rest is left."""
    return text.unfold(0, CONTEXT + 1, CONTEXT)


@torch.no_grad()
def bits(model: Callable, batch: Tensor, *ids: Tensor) -> Tensor:
    """Bits per byte of each window ``[n, T + 1]``."""
    found = []
    for parts in zip(batch.split(64), *(i.split(64) for i in ids), strict=True):
        logits = model(parts[0][:, :-1], *parts[1:]).logits
        losses = F.cross_entropy(logits.transpose(1, 2), parts[0][:, 1:], reduction="none")
        found.append(losses.mean(1) / math.log(2))
    return torch.cat(found)


def test(model: Many, texts: Sequence[Tensor]) -> list[float]:
    """Bits per byte of a text for each adapter."""
    parts = [stretches(text) for text in texts]
    ids = torch.cat([torch.full((len(part),), n) for n, part in enumerate(parts)])
    found = bits(model, torch.cat(parts), ids)
    return [found[ids == n].mean().item() for n in range(len(parts))]


def train(
    base: LlamaForCausalLM, method: Method, seed: int, plays: Sequence[Play], lr: float,
    options: argparse.Namespace,
) -> Many:  # fmt: skip
    """An adapter for each play, all at once; every method of a seed sees the same batches."""
    names = [crc32(f"{seed} {play.name}".encode()) for play in plays]
    model = Many(base, method, names)
    draws = [torch.Generator().manual_seed(name) for name in names]
    ids = torch.arange(len(plays)).repeat_interleave(options.batch)
    optimizer = torch.optim.Adam(model.pools.parameters(), lr)
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = lr * rate_at(step, options.steps)
        optimizer.zero_grad()
        batch = torch.cat([
            windows(play.train, options.batch, CONTEXT + 1, draw)
            for play, draw in zip(plays, draws, strict=True)
        ])  # fmt: skip
        logits = model(batch[:, :-1], ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        (loss * len(plays)).backward()
        optimizer.step()
    return model
