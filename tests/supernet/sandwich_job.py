"""A job for ``torchrun``: sandwich steps of a small supernet under DDP or FSDP2.

Usage: torchrun --nproc_per_node 2 sandwich_job.py RESULTS KIND...
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from weightshare.nn import Linear
from weightshare.nn.depth import Layers
from weightshare.nn.norm import BatchNorm1d
from weightshare.space import SearchSpace
from weightshare.supernet import SandwichSampler, Supernet, sandwich_step

STEPS = 3


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(x)))


class Net(nn.Module):
    def __init__(self, space, norm=False):
        super().__init__()
        width, hidden = space["width"], space["hidden"]
        stem = Linear(6, width)
        self.stem = nn.Sequential(stem, BatchNorm1d(width)) if norm else stem
        self.layers = Layers([Block(width, hidden) for _ in range(3)], space["depth"])
        self.head = Linear(width, 3)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)))


def make(norm=False):
    torch.manual_seed(0)
    space = SearchSpace(width=[4, 6, 8], hidden=[5, 9], depth=[1, 2, 3])
    return Supernet(Net(space, norm).double(), space)


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (8,), generator=generator)


def train(supernet, x, y):
    """Steps with an optimizer, so that later ones depend on the gradients of earlier ones."""
    sampler = SandwichSampler(supernet.space, random=2, seed=3)
    optimizer = torch.optim.SGD(supernet.model.parameters(), 0.1)
    drawn = []
    for step in range(STEPS):
        drawn.append([dict(draw.arch) for draw in sampler.sample(step)])
        optimizer.zero_grad()
        losses = sandwich_step(
            supernet, sampler, step, lambda: supernet.model(x), lambda out: F.cross_entropy(out, y)
        )
        optimizer.step()
    grads = {name: whole(p.grad) for name, p in supernet.module.named_parameters()}
    weights = {name: whole(p.detach()) for name, p in supernet.module.named_parameters()}
    return {"grads": grads, "weights": weights, "losses": torch.stack(losses), "drawn": drawn}


def whole(tensor):
    """All of a tensor, gathered if it is a shard, in memory of its own."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def shard(supernet):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in supernet.model.layers.children():
        fully_shard(block, mesh=mesh)
    fully_shard(supernet.model, mesh=mesh)


def work(kind, results):
    """What one process does; the group is there. Returns what it found."""
    norm = kind == "ddp_norm"
    supernet = make(norm)
    if kind == "fsdp":
        shard(supernet)
    else:
        ddp = nn.parallel.DistributedDataParallel
        supernet.model = ddp(supernet.model, gradient_as_bucket_view=norm)
    rank = dist.get_rank()
    x, y = (part.chunk(2)[rank] for part in batch())
    found = train(supernet, x, y)
    supernet.save(f"{results}.{kind}.supernet")
    dist.barrier()
    other = make(norm)
    for parameter in other.model.parameters():
        nn.init.zeros_(parameter)
    if kind == "fsdp":
        shard(other)
    other.load(f"{results}.{kind}.supernet")
    found["loaded"] = {name: whole(p.detach()) for name, p in other.module.named_parameters()}
    return found


if __name__ == "__main__":
    results, *kinds = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for kind in kinds:
        torch.save(work(kind, results), f"{results}.{kind}.{dist.get_rank()}")
    dist.barrier()
    dist.destroy_process_group()
    # Threads of gloo now and then abort a shut-down that races with them; all is saved.
    os._exit(0)
