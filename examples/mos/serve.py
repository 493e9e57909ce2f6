"""An adapter for each play, all in one batch: what they write, and how fast."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from mos import model
from mos.data import Play
from torch import Tensor
from transformers import LlamaForCausalLM
from weightshare.lora import AdapterBank

SERVED = "MoS 2 -> 8"
PROMPT = 32  # bytes of each play's test part


def states(adapted: model.Many) -> list[dict[str, Tensor]]:
    """Each adapter by itself, with the names of an adapter folder."""
    found: list[dict[str, Tensor]] = [{} for _ in range(adapted.count)]
    for target, pools in adapted.pools.items():
        for side in "ab":
            shards = getattr(pools, side).detach().chunk(adapted.count)
            tables = getattr(pools, f"{side}_index").unbind(1)
            for n, state in enumerate(found):
                state[f"{target}.{side}"] = shards[n].clone()
                state[f"{target}.{side}_index"] = tables[n] - n * len(shards[n])
    return found


def fill(base: LlamaForCausalLM, adapters: dict[str, dict[str, Tensor]]) -> AdapterBank:
    """A bank with just the room for these adapters of one method."""
    method = model.METHODS[SERVED]
    plan = method.plan(0)
    bank = AdapterBank(
        base, model.TARGETS, max_adapters=len(adapters), max_rank=method.rank, shards=plan.shards,
        pool_shards=len(adapters) * plan.pool_shards,
    )  # fmt: skip
    for name, state in adapters.items():
        bank.add(name, state, scale=model.ALPHA / method.rank)
    return bank


def without(base: LlamaForCausalLM, plays: Sequence[Play]) -> float:
    """Bits per byte of the pretrained model on plays, mean."""
    found = [model.bits(base, model.stretches(play.test)).mean() for play in plays]
    return torch.stack(found).mean().item()


def crossed(
    base: LlamaForCausalLM, plays: Sequence[Play], adapters: dict, names: Sequence[str]
) -> list[list[float]]:
    """Bits per byte of some plays (rows) with the adapter of each (columns)."""
    bank = fill(base, {name: adapters[name] for name in names})

    def under(name: str) -> Callable:
        def forward(batch: Tensor):
            with bank.batch([name] * len(batch)):
                return base(batch)

        return forward

    texts = [model.stretches(play.test) for play in plays if play.name in names]
    return [[model.bits(under(name), text).mean().item() for name in names] for text in texts]


@torch.no_grad()
def write(base: LlamaForCausalLM, prompts: Tensor, new: int, seed: int = 0) -> Tensor:
    """Go on with each prompt ``[n, T]``, sampled at temperature 0.7: ``[n, new]``."""
    torch.manual_seed(seed)
    made = base.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=True,
        temperature=0.7, use_cache=True, pad_token_id=0,
    )  # fmt: skip
    return made[:, prompts.shape[1] :]


def rates(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Bytes per second of each way, interleaved; one round before, unmeasured."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            count = way()
            if number:
                found[name].append(count / (time.perf_counter() - start))
    return found


def serve(
    base: LlamaForCausalLM, plays: Sequence[Play], adapters: dict, options: argparse.Namespace
) -> dict:
    """Generate a line of each play: in one batch, and one adapter after the other."""
    bank, names = fill(base, adapters), [play.name for play in plays]
    prompts = torch.stack([play.test[:PROMPT] for play in plays])

    def together(chosen: list[str | None], new: int) -> Tensor:
        with bank.batch(chosen):
            return write(base, prompts, new)

    def by_turns() -> int:
        for name, prompt in zip(names, prompts, strict=True):
            with bank.batch([name]):
                write(base, prompt[None], options.timed)
        return len(names) * options.timed

    ways = {
        "one batch": lambda: together(list(names), options.timed).numel(),
        "by turns": by_turns,
        "no adapters": lambda: together([None] * len(names), options.timed).numel(),
    }
    found = rates(ways, options.repeats)
    texts = [bytes(row.tolist()).decode("ascii") for row in together(list(names), options.new)]
    starts = [bytes(row.tolist()).decode("ascii") for row in prompts]
    size = bank.resident_bytes()
    return {
        "method": SERVED, "adapters": len(names), "bytes_per_second": found,
        "ratio": {
            name: median(a / b for a, b in zip(found["one batch"], found[name], strict=True))
            for name in ("by turns", "no adapters")
        },
        "resident_bytes": {"slabs": size.slabs, "tables": size.tables},
        "base_bytes": sum(p.nbytes for p in base.parameters()),
        "samples": [list(row) for row in zip(names, starts, texts, strict=True)],
    }  # fmt: skip
