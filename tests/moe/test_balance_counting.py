"""Each forward pass counts once, recomputed, compiled or padded; evaluation does not count."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from weightshare.moe.balance import LoadBalancer

sys.path.insert(0, str(Path(__file__).parent))

from balance_nets import EXPERTS, KINDS, TOKENS, K, Net, Theirs, pending, tokens


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


def test_padding_that_our_layer_is_told_does_not_count():
    layer = KINDS["moe"]()
    balancer = LoadBalancer(layer)
    mask = torch.tensor([[False] * 5, [True, True, False, False, False]])
    layer(tokens(2, 5), padding_mask=mask)
    assert pending(balancer) == [8 * K]


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
