"""A job for ``torchrun`` on 4 processes: experts spread over all of them, and over two.

Usage: torchrun --nproc_per_node 4 parallel_job.py RESULTS
"""

import copy
import datetime
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as shards
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint
from weightshare.moe import LoadBalancer, MoE
from weightshare.moe.parallel import (
    average_gradients_,
    clip_gradients_,
    expert_parameters,
    parallelize_experts,
)

STEPS = 3
WIDTHS = [12, 0, 7, 12, 3, 9]
PATIENCE = 4  # seconds that a process waits for its peers where they do not come

# Name: tokens of each process, and what is special.
KINDS = {
    "pair": {"tokens": (10, 6)},
    "pair_without_tokens": {"tokens": (12, 0), "padded": True},
    "pair_clipped": {"tokens": (5, 8), "clip": 0.05},
    "pair_ddp": {"tokens": (8, 8), "wrap": "ddp"},
    "four": {"tokens": (5, 7, 3, 9), "width": 7},
    "four_recomputed": {"tokens": (9, 0, 8, 4), "padded": True, "recompute": True},
    "four_on_one": {"tokens": (6, 6, 0, 4), "favoured": (2, 3)},
    "four_of_three": {"tokens": (4, 3, 2, 1), "experts": 3},
    "four_of_five": {"tokens": (4, 3, 2, 1), "experts": 5, "sums": True},
    "four_widths": {"tokens": (0, 7, 3, 9), "width": WIDTHS},
    "four_fsdp": {"tokens": (4, 4, 4, 4), "wrap": "fsdp"},
    "four_replicas": {"tokens": (4, 4, 4, 4), "wrap": "replicas", "clip": 0.05},
}


class Net(nn.Module):
    def __init__(self, experts=6, recompute=False):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.moes = nn.ModuleList(
            [
                MoE(8, 12, experts, 2, shared_hidden=5, scale=2.0),
                MoE(8, 12, experts, 1, activation="relu2", score_fn="softmax", normalize=False),
            ]
        )
        self.recompute = recompute

    def forward(self, x, padding):
        x = self.stem(x)
        for moe in self.moes:
            if self.recompute:
                x = x + checkpoint(moe, x, padding, use_reentrant=False)
            else:
                x = x + moe(x, padding)
        return self.head(x)


def make(experts=6, recompute=False, width=None, favoured=(), **_):
    torch.manual_seed(0)
    net = Net(experts, recompute).double()
    for moe in net.moes:
        nn.init.normal_(moe.router.weight)
        moe.set_active(width)
        for expert in favoured:
            moe.router.balance_bias[expert] += 10
    return net


def batch(tokens, padded=False, **_):
    """Tokens and targets of all processes together."""
    generator = torch.Generator().manual_seed(1)
    count = sum(tokens)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return x, y, torch.arange(count) % 4 == 1 if padded else None


def train(model, net, data, scale, group, average=None, clip=None):
    """Steps on a process's part of the batch; ``scale`` makes the loss its share of the mean."""
    x, y, padding = data
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    balancer = LoadBalancer(net, rate=0.05, process_group=group).attach(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        out = model(x, padding)
        ((out - y).square().sum() * scale).backward()
        if average is not None:
            average()
        norm = torch.zeros(()) if clip is None else clip_gradients_(net, clip)
        optimizer.step()
    balancer.remove()
    found = {"out": out.detach(), "norm": norm}
    found["used"] = balancer.metrics()["max_violation_global"]
    found["grads"] = {name: whole(p.grad) for name, p in net.named_parameters()}
    found["state"] = {name: whole(value) for name, value in net.state_dict().items()}
    return found, optimizer


def alone(kind):
    """What one process finds with the whole batch."""
    settings = KINDS[kind]
    net, data = make(**settings), batch(**settings)
    return train(net, net, data, 1 / len(data[0]), False, clip=settings.get("clip"))[0]


def whole(tensor):
    """All of a tensor, gathered if it is a shard, in memory of its own."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def wrap(net, kind, group):
    """The net with its experts spread, and what is called in its place."""
    if kind == "replicas":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        parallelize_experts(net, mesh["ep"])
        for moe in net.moes:
            dist.fsdp.fully_shard(moe.experts, mesh=mesh["dp"])
        return dist.fsdp.fully_shard(net, mesh=mesh["dp", "ep"]._flatten("all"))
    parallelize_experts(net, group)
    if kind == "fsdp":
        ignored = set(expert_parameters(net))
        return dist.fsdp.fully_shard(
            net, mesh=init_device_mesh("cpu", (4,)), ignored_params=ignored
        )
    return nn.parallel.DistributedDataParallel(net, process_group=group)


def work(kind, group):
    """One kind of training on the processes of a group. Returns what it found, net, optimizer."""
    settings = KINDS[kind]
    rank, ranks, tokens = dist.get_rank(group), dist.get_world_size(group), settings["tokens"]
    net, data = make(**settings), batch(**settings)
    data = [None if part is None else part.split(tokens)[rank] for part in data]
    scale, sums = ranks / sum(tokens), settings.get("sums")
    if "wrap" in settings:
        model, average = wrap(net, settings["wrap"], group), None
    else:
        model = parallelize_experts(net, group, average=not sums)

        def average():
            average_gradients_(net, group)
            for parameter in net.parameters() if sums else ():
                if not hasattr(parameter, "full_tensor"):
                    parameter.grad *= ranks

    scale = 1 / sum(tokens) if sums else scale
    return *train(model, net, data, scale, group, average, settings.get("clip")), net


def save(path, group, net, optimizer):
    """A checkpoint of model and optimizer by two processes."""
    model, optim = shards.get_state_dict(net, optimizer)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=path, process_group=group)


def load(path):
    """What four processes read from the checkpoint, and do with it."""
    net = make()
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    parallelize_experts(net)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    model, optim = shards.get_state_dict(net, optimizer)
    dcp.load({"model": model, "optim": optim}, checkpoint_id=path)
    shards.set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=optim)
    found = {"state": {name: whole(value) for name, value in net.state_dict().items()}}
    found["moments"] = moments(net, optimizer)
    found["export"] = net.moes[0].export().state_dict()
    return found


def moments(net, optimizer):
    return {name: whole(optimizer.state[p]["exp_avg"]) for name, p in net.named_parameters()}


def variants():
    """One layer, entered in other ways, by four processes."""
    net, (x, _, _) = make(), batch((2, 3, 4, 5))
    state, x = net.state_dict(), x.split((2, 3, 4, 5))[dist.get_rank()]
    with torch.device("meta"):
        empty = make()
    parallelize_experts(empty).to_empty(device="cpu")
    empty.load_state_dict(state)
    found = {"meta": empty(x, None), "copy": copy.deepcopy(empty)(x, None)}
    moe = make(experts=3).float().moes[0]
    parallelize_experts(moe)
    with torch.autocast("cpu", torch.bfloat16):
        found["bfloat16"] = moe(net.stem(x).detach().float())
    found["bfloat16"].float().square().sum().backward()
    found["bfloat16_grad"] = whole(moe.experts.gate_up.grad)
    return {name: value.detach() for name, value in found.items()}


def refuse():
    """What processes say to models that differ, and two of them to a mesh of the others."""
    different = caught(lambda: parallelize_experts(make(experts=6 if dist.get_rank() else 5)))
    outside = caught(lambda: parallelize_experts(make(), DeviceMesh("cpu", [0, 1])))
    return {"different": different[0], "outside": outside[0]}


def fail(groups, store):
    """A peer is late in forward, one in backward, one dies. What the others see, and when."""
    rank, x = dist.get_rank(), torch.randn(4, 6, dtype=torch.float64)
    nets = [parallelize_experts(make(), group) if group else None for group in groups]
    if rank == 0:
        found = {"forward": caught(lambda: nets[0](x, None))}
        store.set("rank 0 is through", "")
        return found
    if rank == 1:
        store.wait(["rank 0 is through"], datetime.timedelta(seconds=60))
        return {}
    loss = nets[1](x, None).sum()
    if rank == 2:
        found = {"backward": caught(loss.backward)}
        store.set("rank 2 is through", "")
        return {**found, "death": caught(lambda: nets[2](x, None))}
    store.wait(["rank 2 is through"], datetime.timedelta(seconds=60))
    os._exit(0)


def caught(function):
    start = time.monotonic()
    try:
        function()
    except (RuntimeError, ValueError) as error:
        return str(error), time.monotonic() - start
    return "nothing was raised", 0.0


def main(results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    rank = dist.get_rank()
    pair, patience = dist.new_group([0, 1]), datetime.timedelta(seconds=PATIENCE)
    found = {}
    for kind in KINDS:
        group = pair if kind.startswith("pair") else dist.group.WORLD
        if rank in dist.get_process_group_ranks(group):
            found[kind], optimizer, net = work(kind, group)
            if kind == "pair":
                save(f"{results}.checkpoint", group, net, optimizer)
                found["moments"] = moments(net, optimizer)
    dist.barrier()
    found["loaded"] = load(f"{results}.checkpoint")
    found["variants"], found["refused"] = variants(), refuse()
    groups = [dist.new_group(ranks, timeout=patience) for ranks in ([0, 1], [2, 3], [2, 3])]
    members = [group if group != dist.GroupMember.NON_GROUP_MEMBER else None for group in groups]
    torch.save(found, f"{results}.{rank}")
    torch.save(fail(members, dist.distributed_c10d._get_default_store()), f"{results}.fail.{rank}")
    # Threads of gloo now and then abort a shut-down that races with them; all is saved.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
