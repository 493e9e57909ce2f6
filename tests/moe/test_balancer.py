"""The balancer: what counts, when, for which layers, and what it keeps."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from weightshare.moe import MoE, Router
from weightshare.moe._counting import state
from weightshare.moe.balance import LoadBalancer, update_balance_bias_

EXPERTS, K, DIM, TOKENS = 6, 2, 8, 10


class Ours(nn.Module):
    """Our router; its gates scale the tokens, so that it takes part in the gradient."""

    def __init__(self, experts=EXPERTS):
        super().__init__()
        self.router = Router(DIM, experts, K)

    def forward(self, x):
        routing, _ = self.router(x)
        return x * routing.gates.sum(1, keepdim=True).to(x.dtype) + routing.gates[:, :1]


class Gate(nn.Module):
    """As transformers writes them."""

    def __init__(self, experts=EXPERTS):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, DIM))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(experts))

    def forward(self, x):
        scores = (x @ self.weight.to(x.dtype).T).sigmoid().float()
        chosen = (scores + self.e_score_correction_bias).topk(K, sorted=False).indices
        return scores, scores.gather(1, chosen), chosen


class Scaling(nn.Module):
    def forward(self, x, top_k_index, top_k_weights):
        return x * top_k_weights.sum(1, keepdim=True).to(x.dtype)


class Theirs(nn.Module):
    """A block with a bias that nothing updates; ``experts`` is a module, or a list of them."""

    def __init__(self, experts=EXPERTS, listed=False):
        super().__init__()
        self.gate, self.listed = Gate(experts), listed
        self.experts = nn.ModuleList([Scaling()]) if listed else Scaling()

    def forward(self, x):
        _, weights, chosen = self.gate(x)
        return (self.experts[0] if self.listed else self.experts)(x, chosen, weights)


class Net(nn.Module):
    """A linear layer before a layer with experts, checkpointed or not."""

    def __init__(self, layer, reentrant=None):
        super().__init__()
        self.linear, self.layer, self.reentrant = nn.Linear(DIM, DIM), layer, reentrant

    def body(self, x):
        return self.layer(self.linear(x)).tanh()

    def forward(self, x, attention_mask=None):
        shape, x = x.shape, x.flatten(0, -2)
        if self.reentrant is None:
            return self.body(x).view(shape)
        return checkpoint(self.body, x, use_reentrant=self.reentrant).view(shape)


KINDS = {
    "ours": Ours,
    "moe": lambda: MoE(DIM, 4, EXPERTS, K),
    "theirs": Theirs,
    "listed": lambda: Theirs(listed=True),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tokens(*shape):
    return torch.randn(*(shape or (TOKENS,)), DIM, requires_grad=True)


def pending(balancer):
    return [int(layer.counts.sum()) for layer in balancer._layers]


def same(state, other):
    """Whether two states of a balancer are equal, bitwise."""
    return str(state) == str(other)


# -- Counting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "new"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_forward_counts_once(kind, reentrant):
    model = Net(KINDS[kind](), reentrant)
    balancer = LoadBalancer(model)
    for number in (1, 2, 3):  # gradients accumulate
        model(tokens()).sum().backward()
        assert pending(balancer) == [number * TOKENS * K]
    model.eval()
    model(tokens())
    model.train()
    with balancer.paused():
        model(tokens()).sum().backward()
    assert pending(balancer) == [3 * TOKENS * K]
    with torch.no_grad():
        model(tokens())
    assert pending(balancer) == [4 * TOKENS * K]
    balancer.step()
    assert pending(balancer) == [0]


@pytest.mark.parametrize("where", ["around", "within"])
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "new"])
@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_compiled_forward_counts_once(kind, reentrant, where):
    """``around``: the checkpoint is within what is compiled; ``within``: the other way round."""
    torch._dynamo.reset()
    model = Net(KINDS[kind](), reentrant)
    balancer = LoadBalancer(model)
    options = dict(backend="aot_eager", fullgraph=True)
    run = torch.compile(model, **options) if where == "around" else model
    if where == "within":
        model.body = torch.compile(model.body, **options)
    for number in (1, 2, 3):
        run(tokens()).sum().backward()
        assert pending(balancer) == [number * TOKENS * K]
    balancer.step()
    assert any(layer.bias.any() for layer in balancer._layers)


def test_the_op_is_what_its_schema_says():
    total, counts = torch.zeros(4, dtype=torch.int64), torch.tensor([1, 0, 2, 5])
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.weightshare.count_.default, (total, counts), test_utils=checks)


def test_counting_is_what_the_choice_was():
    """Counts of the hook and of the router are those of the experts chosen."""
    layer = Theirs()
    balancer = LoadBalancer(layer)
    x = tokens()
    layer(x)
    chosen = layer.gate(x)[2]
    assert torch.equal(balancer._layers[0].counts, chosen.flatten().bincount(minlength=EXPERTS))


@pytest.mark.parametrize("positional", [False, True])
def test_padding_does_not_count(positional):
    model = Net(Theirs())
    balancer = LoadBalancer(model)
    x, mask = tokens(2, 5), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    model(x, mask) if positional else model(x, attention_mask=mask)
    assert pending(balancer) == [8 * K]
    chosen = model.layer.gate(model.linear(x).flatten(0, 1))[2][mask.flatten().bool()]
    assert torch.equal(balancer._layers[0].counts, chosen.flatten().bincount(minlength=EXPERTS))
    model(x)  # the mask of the pass before is forgotten
    model(x, attention_mask=torch.ones(2, 1, 5, 5))  # prepared elsewhere: says nothing
    assert pending(balancer) == [28 * K]
    with pytest.raises(RuntimeError):
        model(tokens(2, 5)[..., :3], attention_mask=mask)
    model.layer(tokens())
    assert pending(balancer) == [38 * K]


def test_a_copy_counts_for_itself():
    model = Net(Theirs())
    balancer = LoadBalancer(model)
    copy.deepcopy(model)(tokens())
    assert pending(balancer) == [0]


def test_removed_hooks_count_no_more():
    model = Net(Theirs())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with LoadBalancer(model).attach(optimizer) as balancer:
        model(tokens()).sum().backward()
    model(tokens())
    assert pending(balancer) == [TOKENS * K]
    optimizer.step()
    assert pending(balancer) == [TOKENS * K]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


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


def test_a_step_that_the_scaler_skips_is_none():
    model = Net(Ours())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
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
