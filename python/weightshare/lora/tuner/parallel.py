"""Pools under FSDP2: replicated, while the base model is sharded."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import nn

from weightshare.lora.pool import ShardPool


def pool_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of all pools in a module, each once.

    All layers of a type read a pool wherever its shards lie, so pools are replicated under FSDP2;
    they are small beside the base model. Example::

        pools = set(pool_parameters(model))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model, ignored_params=pools)
        ...
        loss.backward()
        average_pool_gradients_(model)
        optimizer.step()

    The processes must begin with equal pools: draw them after the same ``torch.manual_seed``, or
    load an adapter.
    """
    seen = set()
    for pool in module.modules():
        if isinstance(pool, ShardPool):
            for parameter in pool.parameters():
                if parameter not in seen:
                    seen.add(parameter)
                    yield parameter


def average_pool_gradients_(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Average the gradients of pools over processes, in place, between backward and the step.

    Pools without a gradient on one process count as zero there; without one anywhere they keep
    none.

    Args:
        module: a model with pools, the same on all processes.
        group: processes that hold replicas; None: all.

    Raises:
        RuntimeError: torch.distributed is not initialised, or a peer does not take part.
    """
    from weightshare.moe.parallel import average_gradients_

    average_gradients_(nn.ParameterList(pool_parameters(module)), group)
