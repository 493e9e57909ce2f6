"""Architecture optimizers: gradients by hand and by double backward, and planted best choices."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weightshare.nn import Linear
from weightshare.space import PerLayer, SearchSpace
from weightshare.supernet import (
    DARTS,
    GDAS,
    SPOS,
    DrNAS,
    arch_gradient,
    constant,
    cosine,
    linear,
)

EVERY = (DARTS, DrNAS, GDAS, SPOS)


def new_space():
    return SearchSpace(width=[4, 8, 16, 32], ratio=PerLayer([1, 2], 2))


class Net(nn.Module):
    """Two entangled layers in a row, float64."""

    def __init__(self, space):
        super().__init__()
        torch.manual_seed(0)
        width = space["width"]
        self.first = Linear(6, width, dtype=torch.float64)
        self.second = Linear(width, width * 2, dtype=torch.float64)
        self.last = Linear(width * 2, 3, dtype=torch.float64)

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()).tanh())


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    return x, x[:, :3].cos()


def loss_of(net, seed):
    x, y = batch(seed)
    return lambda: F.mse_loss(net(x), y)


@pytest.mark.parametrize("kind", EVERY)
def test_weights(kind):
    space = new_space()
    arch = kind(space)
    assert list(arch.weights()) == list(space.dims) == ["width", "ratio.0", "ratio.1"]
    for name, alpha in arch.weights().items():
        assert alpha.shape == (len(space.dims[name].choices),)
        torch.testing.assert_close(alpha.sum(), torch.tensor(1.0))
        if kind in (GDAS, SPOS):
            assert sorted(alpha.tolist())[-2:] == [0.0, 1.0]
    assert len(list(arch.parameters())) == 3
    entropy = math.log(4) + 2 * math.log(2)
    torch.testing.assert_close(arch.entropy().item(), entropy, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", EVERY)
def test_draws_depend_on_seed_and_count_alone(kind):
    """Equal on every rank, untouched by the global generator, continued by the state dict."""
    space = new_space()
    one, two = kind(space, seed=3), kind(new_space(), seed=3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = [one.weights() for _ in range(4)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    buffer = io.BytesIO()
    for step, drawn in enumerate(first):
        if step == 2:
            torch.save(two.state_dict(), buffer)
            buffer.seek(0)
            two = kind(new_space(), seed=77)
            two.load_state_dict(torch.load(buffer, weights_only=True))
        for name, alpha in two.weights().items():
            assert torch.equal(alpha, drawn[name])
    if kind is not DARTS:
        assert any(not torch.equal(first[0][n], first[1][n]) for n in first[0])


def test_only_some_dims():
    space = new_space()
    space.activate(space.smallest())
    arch = DARTS(space, ["ratio.1"])
    arch.mix()
    assert [n for n, d in space.dims.items() if d.alpha is not None] == ["ratio.1"]
    with torch.no_grad():
        arch.logits["ratio-1"].copy_(torch.tensor([0.0, 1.0]))
    assert arch.discretise() == space.arch(width=4, ratio=[1, 2])
    with pytest.raises(ValueError, match="depth: no such dimension; the space has width"):
        DARTS(space, ["depth"])


@pytest.mark.parametrize("kind", EVERY)
def test_what_is_not_allowed_has_no_weight(kind):
    space = new_space()
    arch = kind(space)
    with torch.no_grad():
        arch.logits["width"].copy_(torch.tensor([5.0, 0, 0, 4.9]))
    space.restrict("width", [8, 32])
    for _ in range(10):
        alpha = arch.weights()["width"]
        assert alpha[0] == alpha[2] == 0
        torch.testing.assert_close(alpha.sum(), torch.tensor(1.0))
    if kind is SPOS:
        return
    assert arch.discretise()["width"] == 32
    alphas = arch.mix()
    arch.backward([torch.arange(1.0, len(a) + 1) for a in alphas.values()])
    grad = arch.logits["width"].grad
    assert grad[0] == grad[2] == 0 and grad.isfinite().all()


def test_ties_go_to_the_smaller():
    space = new_space()
    arch = DARTS(space)
    with torch.no_grad():
        for logits in arch.parameters():
            logits.zero_()
    assert arch.discretise() == space.smallest()
    assert DARTS(space, seed=0).discretise() == DARTS(space, seed=0).discretise()


def test_wrong_shapes_are_refused():
    space = new_space()
    with pytest.raises(ValueError, match="width: expected one weight for each of"):
        space.mix({"width": torch.ones(3)})
    other = DARTS(SearchSpace(width=[4, 8], ratio=PerLayer([1, 2], 2)))
    with pytest.raises(RuntimeError, match=r"logits.width"):
        DARTS(space).load_state_dict(other.state_dict())
    arch = DARTS(space)
    with pytest.raises(RuntimeError, match="call mix"):
        arch.backward([])
    arch.mix()
    with pytest.raises(RuntimeError, match="shape"):
        arch.backward([torch.ones(3), torch.ones(2), torch.ones(2)])


def test_copies():
    space = new_space()
    arch = GDAS(space)
    arch.mix(grad=False)
    other = copy.deepcopy(arch)
    assert torch.equal(other.weights()["width"], arch.weights()["width"])
    assert "width: [" in repr(arch)


def test_darts_gradient_is_that_of_the_softmax():
    space = new_space()
    net, arch = Net(space), DARTS(space, ["width"]).double()
    arch_gradient(arch, loss_of(net, 1))
    assert all(w.grad is None for w in net.parameters())

    logits = arch.logits["width"].detach().clone().requires_grad_()
    space.mix({"width": logits.softmax(0)})
    (wanted,) = torch.autograd.grad(loss_of(net, 1)(), logits)
    torch.testing.assert_close(arch.logits["width"].grad, wanted)


def exact_unrolled(net, space, logits, rate):
    """Gradient of L_valid(w - rate dL_train/dw, alpha) by differentiating twice."""
    space.mix({"width": logits.softmax(0)})
    names = [n for n, _ in net.named_parameters()]
    grads = torch.autograd.grad(loss_of(net, 1)(), list(net.parameters()), create_graph=True)
    ahead = {
        n: w - rate * g for n, w, g in zip(names, net.parameters(), grads, strict=True)
    }  # fmt: skip
    x, y = batch(2)
    loss = F.mse_loss(torch.func.functional_call(net, ahead, (x,)), y)
    return torch.autograd.grad(loss, logits)[0]


def test_second_order_darts_against_double_backward():
    space = new_space()
    net, arch = Net(space), DARTS(space, ["width"], seed=5).double()
    logits = arch.logits["width"].detach().clone().requires_grad_()
    rate = 0.3
    exact = exact_unrolled(net, space, logits, rate)
    first = exact_unrolled(net, space, logits, 0.0)
    before = [w.detach().clone() for w in net.parameters()]
    arch_gradient(arch, loss_of(net, 2), loss_of(net, 1), list(net.parameters()), unroll=rate)
    got = arch.logits["width"].grad
    assert all(torch.equal(w, b) for w, b in zip(net.parameters(), before, strict=True))
    assert all(w.grad is None for w in net.parameters())
    error, order = (got - exact).norm() / exact.norm(), (first - exact).norm() / exact.norm()
    assert error < 1e-4 and order > 1e-2, (error, order)


def test_weights_come_back_if_a_loss_fails():
    space = new_space()
    net, arch = Net(space), DARTS(space).double()
    before = [w.detach().clone() for w in net.parameters()]

    def fail():
        raise RuntimeError("bad batch")

    with pytest.raises(RuntimeError, match="bad batch"):
        arch_gradient(arch, fail, loss_of(net, 1), list(net.parameters()), unroll=0.3)
    assert all(torch.equal(w, b) for w, b in zip(net.parameters(), before, strict=True))


def test_drnas_mean_is_the_dirichlets():
    space = SearchSpace(width=[1, 2, 3])
    arch = DrNAS(space)
    with torch.no_grad():
        arch.logits["width"].copy_(torch.tensor([1.0, -0.5, 0.3]))
    beta = torch.tensor([2.0, math.exp(-0.5), 1.3])
    draws = torch.stack([arch.weights()["width"].detach() for _ in range(4000)])
    mean, total = beta / beta.sum(), beta.sum()
    variance = mean * (1 - mean) / (total + 1)
    assert ((draws.mean(0) - mean).abs() < 4 * (variance / 4000).sqrt()).all()
    torch.testing.assert_close(draws.var(0), variance, rtol=0.15, atol=0)
    torch.testing.assert_close(torch.tensor(arch.probabilities()["width"]), mean)


def test_drnas_gradient_goes_through_the_draw():
    """Mean gradient of a linear loss equals the derivative of the Dirichlet's mean."""
    arch = DrNAS(SearchSpace(width=[1, 2, 3]), anchor=0.0)
    price = torch.tensor([1.0, 3.0, -2.0])
    with torch.no_grad():
        arch.logits["width"].copy_(torch.tensor([1.0, -0.5, 0.3]))
    count, grads = 3000, []
    for _ in range(count):
        arch.mix()
        arch.backward([price])
        grads.append(arch.logits["width"].grad)
        arch.logits["width"].grad = None
    grads = torch.stack(grads)
    logits = arch.logits["width"].detach().clone().requires_grad_()
    beta = F.elu(logits) + 1
    (wanted,) = torch.autograd.grad(beta / beta.sum() @ price, logits)
    assert ((grads.mean(0) - wanted).abs() < 4 * grads.std(0) / count**0.5).all()


def test_drnas_stays_finite():
    arch = DrNAS(SearchSpace(width=[1, 2, 3]))
    with torch.no_grad():
        arch.logits["width"].copy_(torch.tensor([-200.0, -200.0, 100.0]))
    for _ in range(200):
        alpha = arch.mix()["width"]
        arch.backward([torch.ones(3)])
        assert alpha.isfinite().all() and arch.logits["width"].grad.isfinite().all()
    arch.penalty().backward()
    assert arch.logits["width"].grad.isfinite().all()


def test_gdas_gradient_by_hand():
    """One-hot forward; d logits = J^T d alpha / tau, J that of the softmax with the noise."""
    space = new_space()
    net = Net(space)
    arch = GDAS(space, ["width"], tau=linear(4.0, 2.0), seed=2).double()
    arch.progress = 0.5  # tau 3
    arch_gradient(arch, loss_of(net, 1))

    generator = torch.Generator().manual_seed(2 * 1_000_003 + 1)
    noise = -torch.empty(4, dtype=torch.float64).exponential_(generator=generator).log()
    logits = arch.logits["width"].detach()
    soft = ((logits - logits.logsumexp(0) + noise) / 3).softmax(0)
    # d alpha: the loss of the mixture sum_k alpha_k Pad(W_k), built with masks
    alpha = F.one_hot(soft.argmax(), 4).double().requires_grad_()
    x, y = batch(1)
    sizes = torch.tensor([4, 8, 16, 32])
    one = (torch.arange(32) < sizes[:, None]).double()
    two = (torch.arange(64) < 2 * sizes[:, None]).double()
    first, second, last = net.first, net.second, net.last
    weight = first.weight * (alpha @ one)[:, None]
    h = F.linear(x, weight, first.bias * (alpha @ one)).tanh()
    weight = second.weight * torch.einsum("k,ko,ki->oi", alpha, two, one)
    h = F.linear(h, weight, second.bias * (alpha @ two)).tanh()
    loss = F.mse_loss(F.linear(h, last.weight * (alpha @ two), last.bias), y)
    (d_alpha,) = torch.autograd.grad(loss, alpha)
    jacobian = torch.diag(soft) - torch.outer(soft, soft)
    torch.testing.assert_close(arch.logits["width"].grad, jacobian @ d_alpha / 3)


def test_gdas_draws_by_its_probabilities():
    arch = GDAS(SearchSpace(width=[1, 2, 3]), tau=constant(1.0))
    with torch.no_grad():
        arch.logits["width"].copy_(torch.tensor([0.0, 1.0, -1.0]))
        draws = torch.stack([arch.weights()["width"] for _ in range(3000)])
    assert set(draws.flatten().tolist()) == {0.0, 1.0}
    p = torch.tensor([0.0, 1.0, -1.0]).softmax(0)
    assert ((draws.mean(0) - p).abs() < 4 * (p * (1 - p) / 3000).sqrt()).all()


@pytest.mark.parametrize("kind", [GDAS, SPOS])
def test_one_hot_draws_run_the_subnet(kind):
    """Without gradient the drawn subnet is active; it computes what the mixture does."""
    space = new_space()
    net, arch = Net(space), kind(space)
    x, _ = batch(0)
    for _ in range(5):
        drawn = arch.mix(grad=False)
        assert all(dim.alpha is None for dim in space.dims.values())
        for name, alpha in drawn.items():
            assert space.dims[name].value == space.dims[name].choices[int(alpha.argmax())]
        sliced = net(x)
        space.mix({name: alpha.double() for name, alpha in drawn.items()})
        torch.testing.assert_close(net(x), sliced)


def test_spos_draws_uniformly_and_finds_nothing():
    space = new_space()
    arch = SPOS(space)
    draws = torch.stack([arch.mix()["width"] for _ in range(2000)])
    assert ((draws.mean(0) - 0.25).abs() < 4 * (0.1875 / 2000) ** 0.5).all()
    with pytest.raises(TypeError, match=r"supernet.search"):
        arch.discretise()


def test_schedules():
    assert [constant(3.0)(p) for p in (0, 0.5, 1)] == [3, 3, 3]
    assert [linear(10, 0)(p) for p in (0, 0.5, 1)] == [10, 5, 0]
    assert cosine(4, 2)(0) == 4 and cosine(4, 2)(1) == 2
    assert cosine(4, 2)(0.5) == pytest.approx(3)
