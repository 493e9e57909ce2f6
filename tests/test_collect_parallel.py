"""The gradient collector with several threads, processes and shards."""

import os
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn

from weightshare_kernels import entangled_linear, sliced_linear

WIDTHS = (24, 17, 8)
CHOICES = [(24, 8), (12, 16)]


class Net(nn.Module):
    """Two shared layers used at several widths, and one whose use is left out at times."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 24, dtype=torch.float64)
        self.second = nn.Linear(24, 4, dtype=torch.float64)
        self.mix = nn.Linear(16, 24, dtype=torch.float64)
        self.alpha = nn.Parameter(torch.tensor([0.3, 0.7], dtype=torch.float64))

    def forward(self, x, widths=WIDTHS):
        total = 0
        for width in widths:
            h = sliced_linear(x, self.first.weight, self.first.bias, out=width).tanh()
            y = sliced_linear(h, self.second.weight, self.second.bias, in_=width)
            total = total + y.square().sum()
        h = entangled_linear(x, self.mix.weight, self.mix.bias, CHOICES, self.alpha)
        return total + h.square().sum()


def batch():
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def wanted_gradients():
    net = Net()
    net(batch()).backward()
    return gradients(net)


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_threads_share_a_weight():
    """Backward passes of several threads, over graphs of one weight, keep apart."""
    net, x, threads, got = Net(), batch(), 6, {}
    wanted = [torch.autograd.grad(net(x, (w,)), net.first.weight)[0] for w in range(4, 4 + threads)]
    ready = threading.Barrier(threads)

    def work(number):
        ready.wait()
        for _ in range(20):
            got[number] = torch.autograd.grad(net(x, (4 + number,)), net.first.weight)[0]

    started = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    for number, value in enumerate(wanted):
        torch.testing.assert_close(got[number], value)


def test_threads_run_backward_on_living_graphs():
    """All graphs are made first, so that they share one collector; each thread takes one."""
    net, x = Net(), batch()
    losses = [net(x, (w,)) for w in (24, 20, 12, 8)]
    wanted = [torch.autograd.grad(l, net.first.weight, retain_graph=True)[0] for l in losses]
    got = [None] * len(losses)

    def work(number):
        for _ in range(10):
            got[number] = torch.autograd.grad(losses[number], net.first.weight, retain_graph=True)[
                0
            ]

    started = [threading.Thread(target=work, args=(n,)) for n in range(len(losses))]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def join_group(rank, size, where):
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=size)


def leave_group():
    """Leave together, and without the interpreter's shut-down.

    A gloo process that leaves while another still talks to it aborts at exit; and gloo's own
    threads now and then abort a shut-down that races with them, after all has been checked.
    """
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def ddp_worker(rank, where, results):
    torch.set_num_threads(1)
    join_group(rank, 2, where)
    net = nn.parallel.DistributedDataParallel(Net())  # find_unused_parameters is left False
    half = batch().chunk(2)[rank]
    for _ in range(2):  # the second step would raise if a parameter had gone unreported
        net.zero_grad()
        (net(half) * 2).backward()  # DDP averages; the loss is a sum
    if rank == 0:
        torch.save(gradients(net.module), results)
    del net
    leave_group()


def fsdp_worker(rank, where, results):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    join_group(rank, 2, where)
    net = fully_shard(Net(), mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    half = batch().chunk(2)[rank]
    for _ in range(2):
        net.zero_grad()
        (net(half) * 2).backward()
    full = {name: p.grad.full_tensor() for name, p in net.named_parameters()}
    if rank == 0:
        torch.save(full, results)
    del net, full
    leave_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("worker", [ddp_worker, fsdp_worker], ids=["ddp", "fsdp2"])
def test_two_processes(worker, tmp_path):
    """Two gloo processes with half the batch each give the gradients of one with all of it."""
    results = tmp_path / "gradients.pt"
    arguments = (str(tmp_path / "group"), str(results))
    torch.multiprocessing.spawn(worker, arguments, nprocs=2, join=True)
    assert_same(torch.load(results, weights_only=True), wanted_gradients())
