"""A job for ``torchrun`` on 2 processes: a sharded base model with replicated pools.

Usage: torchrun --nproc_per_node 2 fsdp_job.py RESULTS
"""

import sys

import tiny_llama as tiny
import torch
import torch.distributed as dist
from tiny_llama import IDS
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from weightshare.lora import average_pool_gradients_, pool_parameters

NAMES = {False: None, True: ["default", "b", "__base__", "b"]}
CASES = [(mixed, recompute) for mixed in NAMES for recompute in (False, True)]


def model():
    made = tiny.adapted(torch.float32)
    tiny.add(made, "b", 4, r=2)
    made.base_model.set_adapter(["default", "b"])
    return made.train()


def step(made, mixed, rows=slice(None), after=None):
    """Gradients and, after a step of SGD, values of all pools."""
    names = NAMES[mixed] and NAMES[mixed][rows]
    made(IDS[rows], labels=IDS[rows], adapter_names=names).loss.backward()
    if after is not None:
        after(made)
    pools = {name: p for name, p in made.named_parameters() if "mos_pools" in name}
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in pools.items()
    }
    torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1).step()
    return grads, {name: p.detach().clone() for name, p in pools.items()}


def sharded(recompute):
    made = model()
    if recompute:
        made.gradient_checkpointing_enable({"use_reentrant": False})
    pools = set(pool_parameters(made))
    assert len(pools) == 2 * 6
    base = made.get_base_model()
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(made, ignored_params=pools)
    assert isinstance(base.model.layers[0].self_attn.q_proj.base_layer.weight, DTensor)
    assert not any(isinstance(p, DTensor) for p in pools)
    return made


def main(path):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = [
        step(sharded(recompute), mixed, slice(2 * rank, 2 * rank + 2), average_pool_gradients_)
        for mixed, recompute in CASES
    ]
    torch.save(found, f"{path}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
