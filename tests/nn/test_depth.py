"""Layers: prefix depth, skipped layers and mixed depth, equal to loops by hand."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from weightshare.export import export
from weightshare.nn import Linear
from weightshare.nn.depth import Layers, touch
from weightshare.space import PerLayer, SearchSpace

COUNT = 5


def make(kind=nn.ModuleList, **options):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4, dtype=torch.float64) for _ in range(COUNT)]
    space = SearchSpace(depth=[0, 2, 3, 5], keep=PerLayer([0, 1], COUNT))
    chosen = {"depth": space["depth"]} if not options.pop("skips", False) else {}
    modules = kind(layers) if kind is nn.ModuleList else kind(*layers)
    return space, layers, Layers(modules, **chosen, **options)


def x_of():
    return torch.randn(3, 4, dtype=torch.float64)


def outputs(layers, x):
    """h_0 .. h_L"""
    hidden = [x]
    for layer in layers:
        hidden.append(layer(hidden[-1]))
    return hidden


@pytest.mark.parametrize("depth", [0, 2, 3, 5])
def test_prefix_depth(depth):
    space, layers, container = make()
    space.activate({"depth": depth})
    x = x_of()
    hidden = outputs(layers, x)
    assert torch.equal(container(x), hidden[depth])
    y = x
    for layer in container:
        y = layer(y)
    assert torch.equal(y, hidden[depth])
    y = x
    for number in range(len(container)):
        y = container[number](y)
    assert torch.equal(y, hidden[depth])
    assert len(container[:COUNT]) == len(container) == depth
    assert [*container[1:]] == layers[1:depth]
    if depth:
        assert container[-1] is layers[depth - 1]
    with pytest.raises(IndexError):
        container[depth]


def test_state_dict_parameters_and_modules_are_those_of_all_layers():
    space, layers, container = make()
    plain = nn.ModuleList(layers)
    space.activate({"depth": 2})
    assert list(container.state_dict()) == list(plain.state_dict())
    assert [*container.parameters()] == [*plain.parameters()]
    assert [*container.children()] == layers
    assert not any(m.training for m in container.eval().modules())
    assert "(4): Linear" in repr(container) and "depth=" in repr(container)
    assert isinstance(container, nn.ModuleList)
    for other in (copy.deepcopy(container), pickle.loads(pickle.dumps(container))):
        x = x_of()
        assert len(other) == 2 and torch.equal(other(x), container(x))


def test_arbitrary_skip_and_depth_together():
    space, layers, _ = make()
    container = Layers(layers, space["depth"], skip=space["keep"])
    space.activate(space.arch({"depth": 3, "keep": [1, 0, 1, 1, 1]}))
    x = x_of()
    assert torch.equal(container(x), layers[2](layers[0](x)))
    assert [*container] == [layers[0], layers[2]] == container.active
    replaced = nn.Linear(4, 4, dtype=torch.float64)
    container[1] = replaced
    assert [*container.children()][2] is replaced and len([*container.children()]) == COUNT


def test_one_layer_may_occur_several_times():
    layer = nn.Linear(4, 4, dtype=torch.float64)
    container, x = Layers(nn.ModuleList([layer, layer, layer]), 2), x_of()
    assert torch.equal(container(x), layer(layer(x)))


def test_mixed_depth_mixes_outputs():
    space, layers, container = make()
    alpha = torch.rand(4, dtype=torch.float64, requires_grad=True)
    space.mix({"depth": alpha})
    x = x_of().requires_grad_()
    hidden = outputs(layers, x)
    wanted = sum(a * hidden[d] for a, d in zip(alpha, (0, 2, 3, 5), strict=True))
    y = container(x)
    torch.testing.assert_close(y, wanted)
    leaves, g = [x, alpha, *container.parameters()], torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True
    ):
        torch.testing.assert_close(a, b)
    one_hot = torch.tensor([0.0, 0, 1, 0], dtype=torch.float64)
    space.mix({"depth": one_hot})
    torch.testing.assert_close(container(x), hidden[3])


def test_mixed_skip_mixes_each_layer_with_its_input():
    space, layers, container = make(skips=True)
    container = Layers(layers, space["depth"], skip=space["keep"])
    space.activate(space.arch({"depth": 3, "keep": [1, 0, 1, 1, 1]}))
    alpha = torch.tensor([0.3, 0.7], dtype=torch.float64)
    mixed_depth = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    x = x_of()
    first = 0.3 * x + 0.7 * layers[0](x)
    third = layers[2](first)
    space.mix({"keep.0": alpha})
    torch.testing.assert_close(container(x), third)
    space.mix({"keep.0": alpha, "depth": mixed_depth})
    fifth = layers[4](layers[3](third))
    torch.testing.assert_close(container(x), 0.1 * x + 0.2 * first + 0.3 * third + 0.4 * fifth)


def test_a_loop_over_mixed_depth_is_refused():
    space, _, container = make()
    space.mix({"depth": torch.ones(4)})
    for loop in (lambda: [*container], lambda: container[0], lambda: container[:2]):
        with pytest.raises(RuntimeError, match=r"call the container instead, layers\(x\)"):
            loop()
    assert len(container) == len([*container.children()]) == COUNT
    space.mix(None)
    assert len([*container]) == COUNT


def test_arguments_go_to_every_layer():
    class Scale(nn.Module):
        def forward(self, x, factor, *, shift=0):
            return x * factor + shift

    space = SearchSpace(depth=[1, 2])
    container = Layers([Scale(), Scale()], space["depth"])
    assert container(torch.tensor(1.0), 3, shift=1) == 13
    space.mix({"depth": torch.tensor([0.5, 0.5])})
    assert container(torch.tensor(1.0), 3, shift=1) == 8.5


def test_mixed_depth_in_low_precision_and_skipped_gradients():
    space = SearchSpace(depth=[1, 2])
    container = Layers([nn.Linear(4, 4) for _ in range(3)], space["depth"]).bfloat16()
    space.mix({"depth": torch.tensor([0.5, 0.5])})
    y = container(torch.randn(2, 4).bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    *run, idle = container.children()
    assert idle.weight.grad is None and all(layer.weight.grad is not None for layer in run)


@pytest.mark.parametrize("mixed", [False, True])
def test_zero_grads_gives_every_parameter_one(mixed):
    space = SearchSpace(depth=[1, 2], keep=PerLayer([0, 1], 4))
    linears = [nn.Linear(4, 4) for _ in range(4)]
    container = Layers(linears, space["depth"], skip=space["keep"], zero_grads=True)
    linears[3].bias.requires_grad_(False)
    space.activate(space.arch({"keep": [1, 0, 1, 1]}))
    if mixed:
        space.mix({"depth": torch.tensor([0.5, 0.5])})
    x = torch.randn(2, 4)
    container(x).sum().backward()
    for number, layer in enumerate(linears):
        assert layer.weight.grad.shape == (4, 4)
        assert bool(layer.weight.grad.any()) == (number == 0)
    assert linears[3].bias.grad is None
    space.activate(space.arch({"depth": 2}))
    container(x).sum().backward()  # adds to the zeros
    assert linears[1].weight.grad.any()
    with torch.no_grad():
        assert torch.equal(container(x), linears[1](linears[0](x)))


def test_touch_changes_no_value_and_no_other_gradient():
    x, w = torch.randn(3, requires_grad=True), nn.Parameter(torch.randn(2, 2))
    y = touch(x * 2, [w])
    assert torch.equal(y, x * 2)
    gx, gw = torch.autograd.grad(y.sum(), [x, w])
    assert gx.eq(2).all() and gw.eq(0).all() and gw.shape == w.shape
    assert touch(x, []) is x


@pytest.mark.parametrize("zero_grads", [False, True])
def test_data_parallel_without_find_unused_parameters(tmp_path, zero_grads):
    """Its reducer refuses the second step unless every parameter got a gradient in the first."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        space = SearchSpace(depth=[1, 3])
        layers = Layers([nn.Linear(4, 4) for _ in range(3)], space["depth"], zero_grads=zero_grads)
        model = DistributedDataParallel(layers)
        space.activate({"depth": 1})
        model(torch.randn(2, 4)).sum().backward()
        if zero_grads:
            model(torch.randn(2, 4)).sum().backward()
            grads = [p.grad is not None and bool(p.grad.any()) for p in layers.parameters()]
            assert grads == [True, True, False, False, False, False]
        else:
            with pytest.raises(RuntimeError, match="find_unused_parameters"):
                model(torch.randn(2, 4))
    finally:
        torch.distributed.destroy_process_group()


def test_export_keeps_the_kind_of_container():
    for kind in (nn.ModuleList, nn.Sequential):
        space, layers, container = make(kind)
        container.eval()
        space.activate({"depth": 3})
        plain = export(container)
        assert type(plain) is kind and len(plain) == 3 and not plain.training
        assert list(plain.state_dict())[-1] == "2.bias"
        assert plain[0] is not layers[0] and torch.equal(plain[2].weight, layers[2].weight)
    x = x_of()
    assert torch.equal(plain(x), container(x))
    listed = Layers(list(layers), space["depth"])  # a list has no kind: what can be called
    assert torch.equal(export(listed)(x), listed(x))
    space = SearchSpace(keep=PerLayer([0, 1], 2), width=[2, 4])
    named = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), b=Linear(4, space["width"])))
    container = Layers(named, skip=space["keep"])
    assert list(container.state_dict()) == list(named.state_dict())
    space.activate(space.arch({"keep": [0, 1], "width": 2}))
    plain = export(container)
    assert list(plain.state_dict()) == ["b.weight", "b.bias"] and type(plain.b) is nn.Linear
    x = torch.randn(3, 4)
    torch.testing.assert_close(plain(x), container(x))


@pytest.mark.parametrize("loop", [False, True])
def test_compiles_whole_once_per_depth(loop, traced):
    class Model(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            if not loop:
                return self.layers(x)
            for layer in self.layers[:COUNT]:
                x = layer(x)
            return x

    space = SearchSpace(depth=[1, 2], width=[4, 6, 8, 10])
    layers = Layers([Linear(space["width"], space["width"]) for _ in range(2)], space["depth"])
    model = Model(layers)
    compiled = traced(model)
    for _ in range(2):
        for depth in (1, 2):
            for width in (4, 6, 8, 10):
                space.activate({"depth": depth, "width": width})
                x = torch.randn(3, width)
                torch.testing.assert_close(compiled(x), model(x))
    assert len(traced.graphs) == 2


def test_mixed_depth_compiles():
    space, _, container = make()
    alpha = torch.rand(4, dtype=torch.float64, requires_grad=True)
    space.mix({"depth": alpha})
    torch._dynamo.reset()
    x = x_of()
    y = torch.compile(container, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, container(x))
    got, wanted = (torch.autograd.grad(out.sum(), alpha)[0] for out in (y, container(x)))
    torch.testing.assert_close(got, wanted)
    torch._dynamo.reset()


def test_bad_depths_are_refused():
    space = SearchSpace(
        depth=[1, 4], half=[0.5, 1], keep=PerLayer([0, 2], 3), one=PerLayer([0, 1], 2)
    )
    layers = [nn.Identity() for _ in range(3)]
    with pytest.raises(ValueError, match=r"depth: 4 is outside 0\.\.3, the number of layers"):
        Layers(layers, space["depth"])
    with pytest.raises(TypeError, match=r"depth: expected whole numbers of layers, got 0\.5"):
        Layers(layers, space["half"])
    with pytest.raises(ValueError, match=r"skip: keep\.0 has the choices"):
        Layers(layers, skip=space["keep"])
    with pytest.raises(ValueError, match="skip: 2 dims for 3 layers"):
        Layers(layers, skip=space["one"])
    with pytest.raises(TypeError, match="skip: expected a Dim for each layer"):
        Layers(layers, skip=[1, 0, 1])
    container = Layers(layers)
    for change in (lambda: container.append(nn.Identity()), lambda: container.pop(0)):
        with pytest.raises(TypeError, match="their number is fixed"):
            change()
