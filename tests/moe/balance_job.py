"""A job for ``torchrun``: balancing steps of two processes, and one that stays away.

Usage: torchrun --nproc_per_node 2 balance_job.py RESULTS
"""

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from weightshare.moe import Router
from weightshare.moe.balance import LoadBalancer, update_balance_bias_

DIM, STEPS, PASSES, TOKENS = 8, 3, 2, 12


class Gate(nn.Module):
    """A gate and its block as transformers writes them, the experts left out."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, DIM))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(5))
        self.experts = nn.Identity()

    def forward(self, x):
        scores = (x @ self.weight.T).sigmoid()
        chosen = (scores + self.e_score_correction_bias).topk(2).indices
        self.experts(chosen)
        return x * scores.gather(1, chosen).sum(1, keepdim=True)


class Net(nn.Module):
    """Layers of both kinds, of 5 and of 6 experts."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = Router(DIM, 6, 2), Gate(), Router(DIM, 6, 3)

    def forward(self, x):
        for layer in (self.first, self.last):
            x = x + layer(x)[0].gates.sum(1, keepdim=True)
        return self.gate(x)


def make():
    torch.manual_seed(0)
    return Net()


def batch(step, part):
    generator = torch.Generator().manual_seed(10 * step + part)
    return torch.randn(TOKENS, DIM, generator=generator)


def train(net, shares, group=None, wrap=lambda net: net):
    """Steps of balancing, each after some passes of which this process has a share."""
    balancer = LoadBalancer(net, rule="proportional", rate=0.1, process_group=group)
    net = wrap(net)
    for step in range(STEPS):
        for part in range(PASSES):
            x = batch(step, part)
            for share in shares(x, step):
                net(share).sum().backward()
        balancer.step()
    return {name: buffer.clone() for name, buffer in net.named_buffers()}, balancer.state_dict()


def halves(x, step):
    """This rank's half; the other rank gets nothing in the second step, and does not run."""
    if step == 1:
        return [x] if dist.get_rank() == 0 else []
    return [x.chunk(2)[dist.get_rank()]]


def even(x, step):
    return [x.chunk(2)[dist.get_rank()]]


def reduces(function):
    """What a function returns, and the number of all-reduces it made."""
    plain, calls = dist.all_reduce, []
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), plain(*args, **kwargs))[1]
    try:
        return function(), len(calls)
    finally:
        dist.all_reduce = plain


def shard(net):
    """FSDP2 over both processes, each layer by itself."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in (net.first, net.gate, net.last):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def sharded_bias():
    """What is said of a bias that is a parameter, as ERNIE's, and went to FSDP2 with the rest."""
    net = make()
    bias = net.gate.e_score_correction_bias
    del net.gate.e_score_correction_bias
    net.gate.e_score_correction_bias = nn.Parameter(bias[None], requires_grad=False)
    try:
        LoadBalancer(shard(net)).step()
    except TypeError as error:
        return str(error)


def stay_away(group):
    """Rank 1 does not step: what rank 0 gets told, after how long, and what it has left."""
    net = make()
    balancer = LoadBalancer(net, process_group=group)
    net(batch(0, 0))
    before = balancer.state_dict()
    if dist.get_rank() == 1:
        return None
    begin = time.monotonic()
    try:
        balancer.step()
    except RuntimeError as error:
        kept = str(balancer.state_dict()) == str(before)
        return str(error), time.monotonic() - begin, kept, net.first.balance_bias.clone()
    return None


def work():
    found = {}
    (buffers, state), found["reduces"] = reduces(lambda: train(make(), halves))
    found["plain"] = buffers, state
    ddp = nn.parallel.DistributedDataParallel
    found["ddp"] = train(make(), even, dist.group.WORLD, ddp)
    found["fsdp"] = train(make(), even, wrap=shard)
    found["sharded"] = sharded_bias()
    found["alone"] = train(make(), even, False)
    bias, counts = torch.zeros(3), torch.tensor([1, 2, 3 + dist.get_rank()])
    update_balance_bias_(bias, counts, rate=0.5, process_group=dist.group.WORLD, recentre=False)
    found["function"] = bias, counts
    short = dist.new_group(timeout=timedelta(seconds=2))
    found["away"] = stay_away(short)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = work()
    torch.save(found, f"{sys.argv[1]}.{dist.get_rank()}")
    dist.barrier()
    dist.destroy_process_group()
    # Threads of gloo now and then abort a shut-down that races with them; all is saved.
    os._exit(0)
