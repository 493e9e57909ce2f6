"""Bilevel search: its steps, several processes, and planted best choices."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from weightshare.nn import Linear
from weightshare.nn.elastic import length
from weightshare.space import SearchSpace
from weightshare.supernet import DARTS, GDAS, SPOS, Bilevel, DrNAS, linear, search

FEATURES = [2, 4, 6, 8]


class Net(nn.Module):
    """Chooses how many of its eight inputs to read."""

    def __init__(self, space):
        super().__init__()
        torch.manual_seed(0)
        self.features = space["features"]
        self.first = Linear(self.features, 16)
        self.last = nn.Linear(16, 1)

    def forward(self, x):
        return self.last(self.first(x[:, : length(self.features)]).relu())


def new_data(seed, training):
    """The first four inputs tell the answer; the others do so on training data only."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, 8, generator=generator)
    y = x[:, :4].sum(1, keepdim=True)
    if training:
        x[:, 4:] = 0.5 * y + 0.5 * x[:, 4:]
    return x, y + 0.5 * torch.randn(1024, 1, generator=generator)


TRAIN, VALID = new_data(1, True), new_data(2, False)


def batches(steps):
    """Training and validation minibatches."""
    for step in range(steps):
        part = slice(64 * step % 1024, 64 * step % 1024 + 64)
        yield (TRAIN[0][part], TRAIN[1][part]), (VALID[0][part], VALID[1][part])


def loss_of(net, batch):
    return lambda: F.mse_loss(net(batch[0]), batch[1])


@torch.no_grad()
def validate(net):
    return loss_of(net, VALID)().item()


@pytest.fixture(scope="module", name="best")
def _best():
    """The best choice, found by training each alone."""
    losses = {}
    for features in FEATURES:
        space = SearchSpace(features=FEATURES)
        space.activate(space.arch(features=features))
        net = Net(space)
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for train, _ in batches(300):
            optimizer.zero_grad()
            loss_of(net, train)().backward()
            optimizer.step()
        losses[features] = validate(net)
    best, second = sorted(losses.values())[:2]
    assert second > 1.15 * best, losses
    return min(losses, key=losses.__getitem__)


@pytest.mark.parametrize(("kind", "unroll"), [(DARTS, 0), (DARTS, 0.01), (DrNAS, 0), (GDAS, 0)])
def test_finds_the_planted_choice(kind, unroll, best):
    for seed in range(2):
        space = SearchSpace(features=FEATURES)
        net, arch = Net(space), kind(space, seed=seed)
        step = Bilevel(
            arch,
            torch.optim.Adam(net.parameters(), 0.01),
            torch.optim.Adam(arch.parameters(), 0.03, betas=(0.5, 0.999)),
            steps=200,
            warmup=30,
            unroll=unroll,
            entropy=linear(0, 0.05),
        )
        for train, valid in batches(200):
            step(loss_of(net, train), loss_of(net, valid))
        assert arch.discretise()["features"] == best == 4, arch


def test_spos_and_a_search_find_the_planted_choice(best):
    space = SearchSpace(features=FEATURES)
    net, arch = Net(space), SPOS(space)
    step = Bilevel(arch, torch.optim.Adam(net.parameters(), 0.01), None, steps=600)
    for train, valid in batches(600):
        step(loss_of(net, train), loss_of(net, valid))

    def evaluate(found):
        space.activate(found)
        return validate(net)

    pytest.importorskip("optuna", reason="the extra [search] is not installed")
    assert search(space, evaluate, 20).best.arch["features"] == best == 4


def test_bilevel_follows_its_schedules():
    space = SearchSpace(features=FEATURES)
    net, arch = Net(space), GDAS(space, tau=linear(10, 1))
    weights = torch.optim.SGD(net.parameters(), 0.1)
    alphas = torch.optim.SGD(arch.parameters(), 2.0)
    step = Bilevel(arch, weights, alphas, steps=5, warmup=2, arch_rate=linear(1, 0), clip=1e-3)
    for number in range(5):
        before = [p.detach().clone() for p in arch.parameters()]
        old = torch.cat([w.detach().flatten() for w in net.parameters()])
        step(loss_of(net, TRAIN), loss_of(net, VALID))
        moved = not all(torch.equal(a, b) for a, b in zip(before, arch.parameters(), strict=True))
        assert moved == (number in (2, 3))  # warm-up, then a rate that ends at 0
        assert arch.progress == number / 4
        if number >= 2:
            assert alphas.param_groups[0]["lr"] == pytest.approx(2.0 * (1 - number / 4))
        new = torch.cat([w.detach().flatten() for w in net.parameters()])
        assert 0 < (new - old).norm() <= 0.1 * 1e-3 * 1.001
    assert step.state_dict() == {"step": 5}


def test_bilevel_leaves_weights_to_the_training_loss():
    """The step of the weights is that of plain SGD at the updated alpha."""
    space = SearchSpace(features=FEATURES)
    net, arch = Net(space), DARTS(space)
    start = [w.detach().clone() for w in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    step = Bilevel(arch, optimizer, torch.optim.Adam(arch.parameters(), 0.1), steps=2)
    step(loss_of(net, TRAIN), loss_of(net, VALID))
    got = [w.detach().clone() for w in net.parameters()]
    with torch.no_grad():
        for w, s in zip(net.parameters(), start, strict=True):
            w.copy_(s)
    space.mix({n: a.detach() for n, a in arch.weights().items()})
    grads = torch.autograd.grad(loss_of(net, TRAIN)(), list(net.parameters()))
    for w, s, g in zip(got, start, grads, strict=True):
        torch.testing.assert_close(w, s - 0.1 * g)


def gradient(part):
    """Gradient of the logits after one step on a part of the data."""
    space = SearchSpace(features=FEATURES)
    net, arch = Net(space), DrNAS(space, seed=4)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    step = Bilevel(arch, optimizer, torch.optim.SGD(arch.parameters(), 0.0), steps=2)
    train, valid = ([t[part] for t in data] for data in (TRAIN, VALID))
    step(loss_of(net, train), loss_of(net, valid))
    return arch.logits["features"].grad


def worker(rank, folder):
    torch.set_num_threads(1)
    where = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    torch.save(gradient(slice(rank, None, 2)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort the interpreter's shut-down


def test_ranks_agree_with_one_process(tmp_path):
    """Two processes, half of the data each: the logits' gradient is that of all of it."""
    multiprocessing.set_forkserver_preload(["weightshare.supernet"])  # imported once
    mp.start_processes(worker, (str(tmp_path),), nprocs=2, start_method="forkserver")
    grads = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(*grads)
    torch.testing.assert_close(grads[0], gradient(slice(None)))
    assert not torch.allclose(grads[0], gradient(slice(0, None, 2)))
