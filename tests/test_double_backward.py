"""Double backward through layers that share weights: a use's gradient is that of the use alone."""

import pytest
import torch

from weightshare_kernels import moe_mlp, route, shard_lora
from weightshare_kernels.ops.shard_lora.reference import matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed):
    draw = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=draw, dtype=torch.float64).to(DEVICE)
    return (made * shape[-1] ** -0.5).requires_grad_()


def mixture(ours):
    """Three layers of two pools, whose x depends on the pools, too."""
    x, a, b = randn(5, 8, seed=0), randn(6, 4, seed=1), randn(6, 4, seed=2)
    y = x
    for n in range(3):
        tables = [
            torch.randperm(6, generator=torch.Generator().manual_seed(seed))[:4].view(2, 2)
            for seed in (n, n + 9)
        ]
        tables = [table.to(DEVICE, torch.int32) for table in tables]
        if ours:
            y = torch.tanh(shard_lora(y, y, a, b, *tables, 0.5))
        else:
            y = torch.tanh(y + 0.5 * y @ matrix(a, tables[0]).t() @ matrix(b, tables[1]))
    return y, [x, a, b]


def moe(ours):
    """Two layers of one set of experts; gates depend on the x that the experts get."""
    x, gate_up = randn(5, 8, seed=0), randn(3, 12, 8, seed=1)
    down, router = randn(3, 8, 6, seed=2), randn(3, 8, seed=3)
    y = x
    for _ in range(2):
        routing = route(y @ router.t(), 2)
        if ours:
            y = torch.tanh(moe_mlp(y, gate_up, down, routing))
            continue
        total = torch.zeros_like(y)
        for k in range(2):
            w = gate_up[routing.experts[:, k]]
            gate, up = torch.einsum("td,tfd->tf", y, w).chunk(2, 1)
            h = torch.nn.functional.silu(gate) * up
            out = torch.einsum("tf,tdf->td", h, down[routing.experts[:, k]])
            total = total + routing.gates[:, k : k + 1] * out
        y = torch.tanh(total)
    return y, [x, gate_up, down, router]


def differentiated(net, ours):
    """Gradients in a graph, and theirs."""
    y, leaves = net(ours)
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return first, second


@pytest.mark.parametrize("net", [mixture, moe])
def test_layers_in_a_row(net):
    torch.testing.assert_close(differentiated(net, True), differentiated(net, False))


def test_gradient_after_a_functorch_level_has_ended():
    x, a, b = randn(5, 8, seed=0).detach(), randn(6, 8, seed=1), randn(6, 8, seed=2).detach()
    table = torch.arange(6, device=DEVICE, dtype=torch.int32)[:, None]
    y, back = torch.func.vjp(lambda a: shard_lora(x, x, a, b, table, table), a.detach())
    (wanted,) = torch.autograd.grad((x + x @ a.t() @ b).sum(), [a])
    torch.testing.assert_close(back(torch.ones_like(y))[0], wanted)
