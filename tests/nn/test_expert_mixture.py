"""ExpertMixtureLinear and its router: equal to mixing and slicing by hand."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weightshare.export import export
from weightshare.nn.expert_mixture import ArchRouter, Encoding, ExpertMixtureLinear, encode
from weightshare.sizes import Blocks, Interleaved
from weightshare.space import PerLayer, SearchSpace

M, IN, OUT = 3, (4, 6, 8), (6, 8, 12)


def make(level="neuron", out=None, dtype=torch.float64, **options):
    torch.manual_seed(0)
    space = SearchSpace(hidden=list(IN), ffn=list(OUT), ratio=PerLayer([1, 2, 4], 2))
    out = (out or (lambda s: s["ffn"]))(space)
    router = ArchRouter(space, M, out, level, hidden=5, dtype=dtype)
    options = {"router": router, "noise": 0.5, "dtype": dtype, **options}
    return space, ExpertMixtureLinear(space["hidden"], out, M, **options)


def by_hand(layer, x, out, in_):
    """Router, mixture and slice in plain PyTorch; out and in_ are lists of indices."""
    router = layer.router
    code = layer.router.encoding.values.clone().to(x.dtype)
    hidden = F.relu(F.linear(code, router.fc1.weight, router.fc1.bias))
    logits = F.linear(hidden, router.fc2.weight, router.fc2.bias)
    if router.level == "layer":
        mix = logits.softmax(0)[:, None]
    else:
        mix = logits.view(M, -1)[:, out].softmax(0)
    weight = (mix[..., None] * layer.experts[:, out][:, :, in_]).sum(0)
    bias = None if layer.bias is None else (mix * layer.bias[:, out]).sum(0)
    return F.linear(x, weight, bias)


def check(space, layer, out, in_):
    x = torch.randn(5, len(in_), dtype=torch.float64, requires_grad=True)
    y, wanted = layer(x), by_hand(layer, x, out, in_)
    torch.testing.assert_close(y, wanted)
    leaves, g = [x, *layer.parameters()], torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True
    ):
        torch.testing.assert_close(a, b)
    plain = export(layer.eval())
    assert type(plain) is nn.Linear and not plain.training
    assert tuple(plain.weight.shape) == (len(out), len(in_))
    torch.testing.assert_close(plain(x), y)


@pytest.mark.parametrize("level", ["layer", "neuron"])
@pytest.mark.parametrize("bias", [True, False])
def test_slice_equals_mixing_by_hand(level, bias):
    space, layer = make(level, bias=bias)
    for in_, out in zip(IN, OUT, strict=True):
        space.activate(space.arch({"hidden": in_, "ffn": out, "ratio": [1, 4]}))
        check(space, layer, list(range(out)), list(range(in_)))


def test_blocks_and_fixed_rows():
    space, layer = make(out=lambda s: Blocks([s["ffn"], s["hidden"]], [12, 8]))
    space.activate(space.arch({"hidden": 6, "ffn": 8}))
    check(space, layer, [*range(8), *range(12, 18)], list(range(6)))
    space, layer = make(out=lambda s: 7)
    space.activate(space.arch({"hidden": 4}))
    check(space, layer, list(range(7)), list(range(4)))


def test_the_router_computes_active_rows_alone_and_follows_the_architecture():
    space, layer = make()
    seen = []
    for arch in (space.smallest(), space.arch({"ffn": 6}), space.arch({"ffn": 12})):
        space.activate(arch)
        mix = layer.router()
        assert mix.shape == (M, arch["ffn"])
        torch.testing.assert_close(mix.sum(0), torch.ones(arch["ffn"], dtype=mix.dtype))
        seen.append(mix)
    assert not torch.equal(seen[0], seen[1])


def test_encoding_is_one_ratio_per_field():
    space = SearchSpace(hidden=[384, 768], heads=[6, 12], ratio=PerLayer([1, 2, 4], 2), no=[0])
    assert encode(space).tolist() == [1, 1, 1, 0]
    space.activate(space.arch({"hidden": 384, "ratio": [1, 4]}))
    before = encode(space)
    assert before.tolist() == [0.5, 1, 0.625, 0]
    space.activate(space.largest())
    assert before.tolist() == [0.5, 1, 0.625, 0] and encode(space).tolist() == [1, 1, 1, 0]
    assert Encoding.of(space) is Encoding.of(space)
    assert Encoding.of(SearchSpace(a=[1, 2])) is not Encoding.of(space)
    with pytest.raises(ValueError, match="space: has no dimension"):
        Encoding.of(SearchSpace())


def test_gradients_are_of_the_architecture_that_ran():
    """Two subnets before one backward, as in a sandwich step."""
    space, layer = make()
    archs = [space.smallest(), space.largest()]
    x = torch.randn(5, 8, dtype=torch.float64)
    apart = [torch.zeros_like(p) for p in layer.parameters()]
    losses = []
    for arch in archs:
        space.activate(arch)
        losses.append(layer(x[:, : arch["hidden"]]).square().sum())
        loss = layer(x[:, : arch["hidden"]]).square().sum()
        for total, part in zip(
            apart, torch.autograd.grad(loss, [*layer.parameters()]), strict=True
        ):
            total += part
    sum(losses).backward()
    for parameter, wanted in zip(layer.parameters(), apart, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)


def test_mixture_from_outside():
    space = SearchSpace(ffn=[2, 4])
    layer = ExpertMixtureLinear(3, space["ffn"], 2, noise=1.0)
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match="mix: is None and there is no router"):
        layer(x)
    space.activate({"ffn": 2})
    for mix in (torch.tensor([0.25, 0.75]), torch.rand(2, 2)):
        each = [F.linear(x, e[:2], b[:2]) for e, b in zip(layer.experts, layer.bias, strict=True)]
        torch.testing.assert_close(layer(x, mix), mix[0] * each[0] + mix[1] * each[1])


def test_experts_start_around_one_linear():
    linear = nn.Linear(8, 12).eval()
    linear.bias.requires_grad_(False)
    space = SearchSpace(hidden=list(IN), ffn=list(OUT))
    router = ArchRouter(space, M, space["ffn"])
    layer = ExpertMixtureLinear.from_linear(linear, space["hidden"], space["ffn"], M, router)
    assert not layer.training and not layer.bias.requires_grad and layer.experts.requires_grad
    assert layer.experts.is_contiguous() and layer.experts.shape == (M, 12, 8)
    x = torch.randn(5, 8)
    torch.testing.assert_close(layer(x), linear(x))
    assert ExpertMixtureLinear.from_linear(nn.Linear(8, 12, False), 8, 12, 2).bias is None
    # The gradient of the router: none while the experts are equal, some where they are not.
    noisy = ExpertMixtureLinear(space["hidden"], space["ffn"], M, router=router)
    mean = noisy.experts.mean(0)
    assert 0.8 < (noisy.experts - mean).std() / mean.std() < 1.25
    apart = ExpertMixtureLinear.from_linear(linear, 8, 12, M, noise=0.5)
    torch.testing.assert_close(apart(x, torch.full((M,), 1 / M)), linear(x))
    for module, moves in ((layer, False), (noisy, True)):
        grads = torch.autograd.grad(module(x).square().sum(), [*router.parameters()])
        assert (max(g.abs().max() for g in grads) > 1e-4) == moves


def test_state_dict_copies_and_pickles():
    space, layer = make()
    assert list(layer.state_dict()) == [
        "experts", "bias", "router.fc1.weight", "router.fc1.bias", "router.fc2.weight",
        "router.fc2.bias",
    ]  # fmt: skip
    space.activate(space.smallest())
    x = torch.randn(2, 4, dtype=torch.float64)
    twins = copy.deepcopy((space, layer)), pickle.loads(pickle.dumps((space, layer)))
    for other_space, other in twins:
        torch.testing.assert_close(other(x), layer(x))
        other_space.activate(other_space.largest())  # follows its own space
        assert other.router().shape == (M, 12) and layer.router().shape == (M, 6)
        assert other.router.encoding.values.eq(1).all()
        assert not layer.router.encoding.values.eq(1).all()


@pytest.mark.parametrize("level", ["layer", "neuron"])
def test_one_graph_serves_all_architectures(level, traced):
    space = SearchSpace(hidden=[16, 24, 32, 40], ffn=[20, 28, 36, 44])
    router = ArchRouter(space, 2, space["ffn"], level, hidden=10)
    layer = ExpertMixtureLinear(space["hidden"], space["ffn"], 2, router=router, noise=1.0)
    compiled = traced(layer)
    for hidden in (16, 32, 24, 40):
        for ffn in (20, 44, 36):
            space.activate({"hidden": hidden, "ffn": ffn})
            x = torch.randn(7, hidden)
            torch.testing.assert_close(compiled(x), layer(x))
    assert (
        len(traced.graphs) <= 2
    )  # rows of all experts that are whole join into one span: another graph


def test_bad_layers_are_refused():
    space, layer = make()
    with pytest.raises(ValueError, match="router: mixes 3 experts, but the layer has 2"):
        ExpertMixtureLinear(4, 4, 2, router=layer.router)
    with pytest.raises(ValueError, match="experts: expected at least 1, got 0"):
        ExpertMixtureLinear(4, 4, 0)
    with pytest.raises(ValueError, match="experts: expected at least 1, got 0"):
        ArchRouter(space, 0, 4)
    with pytest.raises(ValueError, match="level: expected 'layer' or 'neuron', got 'row'"):
        ArchRouter(space, 2, 4, "row")
    with pytest.raises(TypeError, match="out_features: interleaved"):
        ArchRouter(space, 2, Interleaved(space["ffn"], 3))
    with pytest.raises(TypeError, match=r"linear: expected an nn\.Linear, got Identity"):
        ExpertMixtureLinear.from_linear(nn.Identity(), 4, 4, 2)
    with pytest.raises(ValueError, match="out_features: up to 12, but the layer has 13"):
        ExpertMixtureLinear.from_linear(nn.Linear(8, 13), 8, space["ffn"], 2)
    space.mix({"ffn": torch.ones(3)})
    with pytest.raises(RuntimeError, match="its sizes are mixed"):
        layer(torch.randn(2, 8, dtype=torch.float64))
