"""Batches whose rows use different adapters: one call of the kernel for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from weightshare.lora.pool import ShardPool
from weightshare_kernels import AdapterGroups, _checks, group_by_adapter

BASE = "__base__"  # PEFT's name for rows that use no adapter
Key = tuple[str, int, int]  # type, d_in, d_out of the modules that share a pool


class Stack:
    """The pools of several adapters, one behind the other, and tables of numbers in the whole.

    Shards of different widths are cut to their greatest common divisor; smaller ranks are filled
    up with shards of zeros (-1).
    """

    def __init__(self, pools: Sequence[ShardPool | None]):
        self.rank = max(pool.plan.r for pool in pools if pool is not None)
        self.a, self._a = _laid([pool and (pool.a, pool.a_index) for pool in pools], self.rank)
        self.b, self._b = _laid([pool and (pool.b, pool.b_index) for pool in pools], self.rank)
        self._tables: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def tables(self, numbers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Tables ``[adapters, r, l]`` of A and B, of each adapter's layer; -1: has none there."""
        found = self._tables.get(numbers)
        if found is None:
            found = self._tables[numbers] = _picked(self._a, numbers), _picked(self._b, numbers)
        return found


def _laid(sides: Sequence, rank: int) -> tuple[Tensor, list[Tensor | None]]:
    """One pool of all, and each adapter's table ``[layers, rank, l]`` in it."""
    shards = [side[0] for side in sides if side is not None]
    width = math.gcd(*[shard.shape[1] for shard in shards])
    parts: list[Tensor] = []
    tables: list[Tensor | None] = []
    first = 0
    for side in sides:
        if side is None:
            tables.append(None)
            continue
        shard, table = side
        pieces = shard.shape[1] // width
        parts.append(shard if pieces == 1 else shard.reshape(-1, width))
        inside = torch.arange(pieces, dtype=torch.int32, device=table.device)
        fine = first + table[..., None] * pieces + inside
        there = ((table >= 0) & (table < shard.shape[0]))[..., None]
        fine = torch.where(there, fine, -1).flatten(-2)  # no shard stays none
        tables.append(F.pad(fine, (0, 0, 0, rank - fine.shape[1]), value=-1))
        first += parts[-1].shape[0]
    return parts[0] if len(parts) == 1 else torch.cat(parts), tables


def _picked(tables: list[Tensor | None], numbers: tuple[int, ...]) -> Tensor:
    like = next(table for table in tables if table is not None)[0]
    none = torch.full_like(like, -1)
    return torch.stack(
        [
            none if table is None or number < 0 else table[number]
            for table, number in zip(tables, numbers, strict=True)
        ]
    )


class MixedBatch:
    """Which adapter each row of a batch uses; made once per forward pass, for all layers.

    Args:
        names: adapter of each sequence, or ``"__base__"``.
        pools: of each adapter that is named, by the modules that share them.
        scales: alpha / r of each of them.
        dropouts: of each of them.
        device: of the model.
    """

    def __init__(
        self,
        names: Sequence[str],
        pools: Mapping[str, Mapping[Key, ShardPool]],
        scales: Mapping[str, float],
        dropouts: Mapping[str, float],
        device: torch.device,
        stacks: dict[Key, Stack] | None = None,
    ):
        self.adapters = tuple(pools)
        numbers = {name: number for number, name in enumerate(self.adapters)} | {BASE: -1}
        self.ids = torch.tensor([numbers[name] for name in names], device=device)
        self._factors = [scales[name] for name in self.adapters]
        self._scales: dict[tuple, Tensor] = {}
        self._dropouts = [dropouts[name] for name in self.adapters]
        self._groups: dict[tuple, AdapterGroups] = {}
        self.stacks = stacked(pools) if stacks is None else stacks

    def groups(self, x: Tensor) -> AdapterGroups:
        """The rows of x ``[batch, ..., d_in]`` by adapter.

        Generation with several beams or samples makes the batch a multiple of the names.

        Raises:
            ValueError: x has not as many sequences as there are names.
        """
        rows, count = x.shape[:-1].numel(), self.ids.shape[0]
        if x.shape[0] != count and (x.dim() < 3 or x.shape[0] % count):
            raise ValueError(
                f"adapter_names has {count} names, but a module got x of shape {tuple(x.shape)}; "
                "give one name per sequence"
            )
        key = rows // count, x.device
        if key not in self._groups:
            ids = self.ids.to(x.device)
            self._groups[key] = group_by_adapter(ids, len(self.adapters), key[0])
        return self._groups[key]

    def scales(self, x: Tensor) -> Tensor:
        """Alpha / r of each adapter, in the dtype that the kernel takes beside x."""
        kind = _checks.accumulate_dtype(x.dtype), x.device
        if kind not in self._scales:
            self._scales[kind] = torch.tensor(self._factors, dtype=kind[0], device=kind[1])
        return self._scales[kind]

    def dropped(self, x: Tensor) -> Tensor:
        """X with each row's share of elements dropped, in training."""
        if len(set(self._dropouts)) == 1:
            return F.dropout(x, self._dropouts[0])
        rates = torch.tensor([*self._dropouts, 0.0], device=x.device)[self.ids.to(x.device)]
        rates = rates.repeat_interleave(x.shape[0] // rates.shape[0])
        rates = rates.view(-1, *[1] * (x.dim() - 1))
        kept = torch.rand(x.shape, device=x.device) >= rates
        return x * (kept / (1 - rates)).to(x.dtype)


def stacked(pools: Mapping[str, Mapping[Key, ShardPool]]) -> dict[Key, Stack]:
    """The pools of some adapters, by the modules that share them; differentiable."""
    keys = dict.fromkeys(key for mine in pools.values() for key in mine)
    return {key: Stack([mine.get(key) for mine in pools.values()]) for key in keys}
