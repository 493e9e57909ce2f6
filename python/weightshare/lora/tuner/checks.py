"""Whether tensors of a file fit the pools of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from weightshare.lora.pool import ShardPool
from weightshare_kernels import shard_index

PARTS = ("a", "b", "a_index", "b_index")


def check_tensors(tensors: Mapping[str, Tensor], pools: Mapping[str, ShardPool]) -> None:
    """Raise unless the tensors of an adapter are those of the pools, and its tables are sound.

    Args:
        tensors: of a file in pool format, by ``type.part``.
        pools: of the model, by type.

    Raises:
        ValueError: types or tensors are missing or superfluous, shapes or kinds of numbers
            differ, or a table names a shard that the pool has not.
    """
    there = {name.rpartition(".")[0] for name in tensors}
    for verb, kinds in (("lacks", pools.keys() - there), ("has", there - pools.keys())):
        if kinds:
            raise ValueError(
                f"the adapter {verb} pools for {sorted(kinds)}: it has {sorted(there)}, and this "
                f"model adapts {sorted(pools)}; set target_modules to the adapter's"
            )
    wanted = {f"{kind}.{part}" for kind in pools for part in PARTS}
    if wanted != tensors.keys():
        missing, extra = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
        raise ValueError(f"not an adapter in pool format: missing {missing}, unknown {extra}")
    for kind, pool in pools.items():
        for part in PARTS:
            found, here = tensors[f"{kind}.{part}"], getattr(pool, part)
            if found.shape != here.shape:
                raise ValueError(
                    f"{kind}.{part}: the adapter has shape {tuple(found.shape)}, the model "
                    f"{tuple(here.shape)} ({pool.extra_repr()}); the adapter was made for another "
                    "base model or with other ranks or shards"
                )
            if found.is_floating_point() != here.is_floating_point():
                raise ValueError(f"{kind}.{part}: expected {here.dtype}, got {found.dtype}")
        for part in ("a", "b"):
            shards = tensors[f"{kind}.{part}"].shape[0]
            shard_index(tensors[f"{kind}.{part}_index"], shards, f"{kind}.{part}_index")
