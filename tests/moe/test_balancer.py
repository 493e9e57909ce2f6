"""Steps of the balancer: rates, metrics, states, precision, and what it refuses."""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from weightshare.moe._counting import state
from weightshare.moe.balance import LoadBalancer, update_balance_bias_

sys.path.insert(0, str(Path(__file__).parent))

from balance_nets import EXPERTS, KINDS, TOKENS, Gate, K, Net, Ours, Theirs, pending, tokens


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def same(state, other):
    """Whether two states of a balancer are equal, bitwise."""
    return str(state) == str(other)


# -- Steps -------------------------------------------------------------------------------------


def mixture():
    """Both kinds, two numbers of experts, one layer without a bias and one never used."""
    layers = [Ours(), Theirs(), Theirs(4), Ours(4), Theirs()]
    layers[3].router.balance_bias = None
    model = nn.ModuleList(layers)
    model.append(Ours())
    return model, layers


@pytest.mark.parametrize("rule", ["sign", "inverse_sqrt"])
def test_one_step_updates_every_layer_as_the_rule_says(rule):
    model, used = mixture()
    balancer = LoadBalancer(model, rule=rule, rate=0.1)
    wanted = [None if layer.bias is None else layer.bias.clone() for layer in balancer._layers]
    for step in (1, 2, 3):
        for layer in used:
            layer(tokens())
        counts = {layer.name: layer.counts.clone() for layer in balancer._layers}
        balancer.step()
        for layer, bias in zip(balancer._layers, wanted, strict=True):
            if bias is not None:
                update_balance_bias_(bias, counts[layer.name], rule=rule, rate=0.1, step=step)
                assert torch.equal(layer.bias, bias)
    unused = model[-1].router
    assert not unused.balance_bias.any()
    assert all(b.any() for name, b in zip(balancer.names, wanted, strict=True) if name[0] in "014")
    violations = balancer.max_violation()
    assert violations.shape == (6,) and violations[balancer.names.index("5.router")] == 0
    assert (violations > 0).sum() == 5  # the layer without a bias is measured


def test_attached_to_an_optimizer():
    model = Net(Ours())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    balancer = LoadBalancer(model).attach(optimizer)
    for step in (1, 2):
        for _ in range(3):
            model(tokens()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert pending(balancer) == [0]
        assert balancer.state_dict()["step"] == step
    with pytest.raises(RuntimeError, match="steps last"):
        balancer.attach(torch.optim.SGD(model.parameters(), 0.1))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_none(fused):
    """The scaler calls a fused optimizer in any case, which finds out on the device."""
    model = Net(Ours())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    balancer = LoadBalancer(model).attach(optimizer)
    for factor in (float("inf"), 1.0):
        scaler.scale(model(tokens()).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        done = factor == 1.0
        assert balancer.state_dict()["step"] == done
        assert model.layer.router.balance_bias.any() == done
        assert pending(balancer) == [0 if done else TOKENS * K]
    assert balancer._last.sum() == 2 * TOKENS * K  # its tokens count in the next one


def test_counts_of_another_step_are_refused():
    model = Net(Ours())
    balancer = LoadBalancer(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="another step"):
            balancer.step()
        with balancer.paused():
            model(tokens())
    model.eval()
    model(tokens())
    with pytest.raises(RuntimeError, match=r"model\.train"):
        balancer.step()
    model.train()
    model(tokens())
    balancer.step()
    before = copy.deepcopy(balancer.state_dict())
    with pytest.raises(RuntimeError, match="attach"):
        balancer.step()
    assert same(balancer.state_dict(), before)


def test_nothing_is_read_back():
    """Meta tensors have no data: whatever needed a number of them would raise."""
    model = nn.ModuleList([Theirs().to("meta") for _ in range(2)])
    model.append(Ours().to("meta"))
    balancer = LoadBalancer(model, rule="inverse", until=3)
    for _ in range(2):
        for layer in model:
            layer(tokens().to("meta"))
        state.calls += 1  # the op has nothing to add on meta tensors, and does not run
        with balancer.paused():
            model[0](tokens().to("meta"))
        balancer.step()
    assert all(value.shape == (3,) for value in balancer.metrics().values())
    with pytest.raises(RuntimeError, match="another step"):
        balancer.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("reentrant", [None, False], ids=["plain", "new"])
def test_a_captured_step_is_an_eager_one(reentrant, monkeypatch):
    monkeypatch.setattr(state, "captured", False)
    found = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = Net(Theirs(), reentrant).cuda()
        balancer = LoadBalancer(model, rule="inverse_sqrt")
        x = tokens().detach().cuda()

        def train(model=model, balancer=balancer, x=x):
            model(x).sum().backward()
            balancer.step()

        run = train
        if captured:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), balancer.paused():
                for _ in range(3):
                    model(x).sum().backward()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                train()
            run = graph.replay
        for _ in range(3):
            run()
        found.append((balancer._layers[0].bias.tolist(), str(balancer.state_dict())))
    assert found[0] == found[1]
    assert state.captured


def test_rates_that_change():
    model = Net(Ours())
    rates = {1: 0.5, 2: 0.25, 3: 0}
    balancer = LoadBalancer(model, rate=rates.__getitem__, recentre=False)
    bias, moved = model.layer.router.balance_bias, []
    for _ in rates:
        before = bias.clone()
        model(tokens())
        balancer.step()
        moved.append((bias - before).abs().max().item())
        assert pending(balancer) == [0]
    assert moved == [0.5, 0.25, 0]
    with pytest.raises(ValueError, match="gave -1 for step 1"):
        model(tokens()), LoadBalancer(model, rate=lambda _: -1).step()


def test_until_and_tensor_rates_freeze():
    model = Net(Ours())
    rate = torch.tensor(0.5)
    balancer = LoadBalancer(model, rate=rate, recentre=False, until=2)
    bias, moved = model.layer.router.balance_bias, []
    for number in (0.5, 0.25, 0.25):
        rate.fill_(number)
        before = bias.clone()
        model(tokens())
        balancer.step()
        moved.append((bias - before).abs().max().item())
    assert moved == [0.5, 0.25, 0]


def test_metrics():
    layer = Theirs()
    balancer = LoadBalancer(layer)
    assert balancer.max_violation().tolist() == [0]
    total = torch.zeros(EXPERTS)
    for _ in range(2):
        x = tokens()
        counts = layer.gate(x)[2].flatten().bincount(minlength=EXPERTS)
        layer(x)
        balancer.step()
        total += counts
        found = balancer.metrics()
        assert found["max_violation"].item() == pytest.approx(counts.max() / counts.sum() * 6 - 1)
        wanted = total.max() / total.sum() * 6 - 1
        assert found["max_violation_global"].item() == pytest.approx(wanted)


def test_state_goes_on_where_it_was():
    torch.manual_seed(1)
    model, used = mixture()
    balancer = LoadBalancer(model, rule="inverse", rate=0.5)
    for layer in used:
        layer(tokens())
    balancer.step()
    used[1](tokens())
    other, _ = mixture()
    fresh = LoadBalancer(other, rule="inverse", rate=0.5)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(copy.deepcopy(balancer.state_dict()))
    assert pending(fresh) == pending(balancer) and sum(pending(fresh)) == TOKENS * K
    x = tokens()
    for net, balance in ((model, balancer), (other, fresh)):
        net[0](x)
        balance.step()
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert same(fresh.state_dict(), balancer.state_dict())
    with pytest.raises(ValueError, match="'sign'"):
        LoadBalancer(other).load_state_dict(balancer.state_dict())
    with pytest.raises(ValueError, match="of layers"):
        LoadBalancer(Ours(), rule="inverse").load_state_dict(balancer.state_dict())


# -- Precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lower", ["bfloat16", "half"])
@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_the_bias_keeps_float32(kind, lower):
    model = Net(KINDS[kind]())
    balancer = LoadBalancer(model, rate=0.001)
    (layer,) = balancer._layers
    layer.bias.copy_(torch.linspace(-0.9, 0.9, EXPERTS))
    model(tokens())
    balancer.step()
    exact = layer.bias.clone()
    assert not torch.equal(exact, getattr(exact, lower)().float())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        getattr(model, lower)()
        model(tokens().to(getattr(torch, lower)))
    assert len(said) == (kind == "theirs") and all("float32" in str(s.message) for s in said)
    assert torch.equal(layer.bias, exact)
    balancer.step()
    assert layer.bias.dtype == torch.float32 and not torch.equal(layer.bias, exact)
    saved = copy.deepcopy(model.state_dict())
    layer.bias.zero_()
    model.load_state_dict(saved)
    assert torch.equal(layer.bias, saved[f"{layer.name}.{layer.attribute}"])


def test_a_lowered_bias_that_was_loaded_since_is_taken_over():
    model = Theirs()
    balancer = LoadBalancer(model, recentre=False)
    model(tokens())
    balancer.step()
    loaded = torch.full((EXPERTS,), 0.5, dtype=torch.bfloat16)
    model.gate.e_score_correction_bias = nn.Buffer(loaded)
    with pytest.warns(UserWarning, match="cast to less"):
        model(tokens())
    balancer.step()
    bias = model.gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and (bias - 0.5).abs().max() < 0.01
    model.bfloat16()
    with pytest.warns(UserWarning, match="cast to less"):
        LoadBalancer(model)
    assert bias.dtype == torch.float32


# -- Bad input ---------------------------------------------------------------------------------


def test_bad_input():
    with pytest.raises(ValueError, match="found no layer"):
        LoadBalancer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="inverse_sqrt"):
        LoadBalancer(Ours(), rule="adam")
    with pytest.raises(ValueError, match="positive"):
        LoadBalancer(Ours(), rate=0.0)
    with pytest.raises(ValueError, match="no module around it"):
        LoadBalancer(Gate())
    layer = Theirs()
    with LoadBalancer(layer), pytest.raises(TypeError, match=r"gate: found no integer tensor"):
        layer.experts(tokens(), tokens(), tokens())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in layer.modules())
