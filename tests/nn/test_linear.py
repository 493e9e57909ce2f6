"""SlicedLinear and EntangledLinear: drop-in for nn.Linear, equal to eager slicing."""

import copy
import io
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weightshare.nn import EntangledLinear, Linear, SlicedLinear
from weightshare.sizes import Blocks, Interleaved, Size, dims_of, points
from weightshare.space import SearchSpace

from weightshare_kernels import sliced_linear

QKV = [slice(0, 8), slice(16, 24), slice(32, 40)]
SELECTIONS = {
    "all": (None, None),
    "prefix": (20, 9),
    "span": (slice(3, 31), slice(4, 20)),
    "strided": (slice(0, 48, 3), slice(1, 21, 2)),
    "blocks": (QKV, [slice(0, 4), slice(10, 14)]),
    "index": (torch.tensor([5, 0, 47, 13]), torch.tensor([23, 2, 7])),
    "int32_index": (torch.tensor([5, 0, 47], dtype=torch.int32), 24),
    "empty": (0, 24),
}


@pytest.fixture(params=SELECTIONS, name="selection")
def _selection(request):
    return SELECTIONS[request.param]


def pick(tensor, dim, spec):
    """A selection by indexing, independent of the library."""
    every = torch.arange(tensor.shape[dim])
    if isinstance(spec, torch.Tensor):
        index = spec.long()
    elif isinstance(spec, list):
        index = torch.cat([every[s] for s in spec])
    else:
        index = every[spec if isinstance(spec, slice) else slice(spec)]
    return tensor.index_select(dim, index)


def make(**options):
    torch.manual_seed(0)
    return SlicedLinear(24, 48, **options)


def test_is_a_drop_in():
    torch.manual_seed(1)
    plain = nn.Linear(24, 48)
    torch.manual_seed(1)
    ours = SlicedLinear(24, 48)
    assert isinstance(ours, nn.Linear)
    x = torch.randn(5, 24)
    assert torch.equal(ours.weight, plain.weight) and torch.equal(ours.bias, plain.bias)
    torch.testing.assert_close(ours(x), plain(x))
    assert list(ours.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        plain.weight.add_(1)
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours.weight, plain.weight)
    other = nn.Linear(24, 48)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.weight, ours.weight)
    assert SlicedLinear(3, 4, bias=False).bias is None


def test_active_part_equals_eager_slicing(selection):
    layer = make()
    out, in_ = selection
    assert layer.set_active(out=out, in_=in_) is layer
    weight, bias = pick(pick(layer.weight, 0, out), 1, in_), pick(layer.bias, 0, out)
    assert (layer.active_out_features, layer.active_in_features) == tuple(weight.shape)
    x = torch.randn(2, 3, weight.shape[1], requires_grad=True)
    y, wanted = layer(x), F.linear(x, weight, bias)
    torch.testing.assert_close(y, wanted)
    g = torch.randn_like(wanted)
    leaves = [x, layer.weight, layer.bias]
    ours = torch.autograd.grad(y, leaves, g)
    for got, want in zip(ours, torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(got, want)


def same_path(x, linear, layer):
    """Exported weights through the kernel that the selection takes: a span, or an index table."""
    weight, bias, chosen = linear.weight, linear.bias, [None, None]
    for dim, axis in enumerate(layer._axes()):
        if axis.index is not None:  # reversed, and read through a table that reverses it again
            chosen[dim] = torch.arange(axis.length - 1, -1, -1)
            weight = weight.flip(dim)
            bias = bias if dim else bias.flip(0)
    return sliced_linear(x, weight, bias, out=chosen[0], in_=chosen[1])


def test_export_is_bitwise_and_separate(selection):
    layer = make().set_active(*selection).eval()
    layer.bias.requires_grad_(False)
    linear = layer.export()
    assert type(linear) is nn.Linear and not linear.training
    assert linear.weight.requires_grad and not linear.bias.requires_grad
    assert linear.weight.is_contiguous()
    assert (linear.out_features, linear.in_features) == tuple(linear.weight.shape)
    assert torch.equal(linear.weight, pick(pick(layer.weight, 0, selection[0]), 1, selection[1]))
    assert torch.equal(linear.bias, pick(layer.bias, 0, selection[0]))
    x = torch.randn(6, layer.active_in_features)
    assert torch.equal(layer(x), same_path(x, linear, layer))
    torch.testing.assert_close(linear(x), layer(x))
    before = linear.weight.clone()
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_export_keeps_dtype_and_frozen_weights(dtype):
    layer = make(bias=False, dtype=dtype).requires_grad_(False).set_active(7, 5)
    linear = layer.export()
    assert linear.weight.dtype == dtype and not linear.weight.requires_grad
    assert linear.bias is None and linear.training


def test_from_linear_takes_over_parameters():
    linear = nn.Linear(24, 48, dtype=torch.float64).eval()
    linear.weight.requires_grad_(False)
    for layer in (SlicedLinear.from_linear(linear), EntangledLinear.from_linear(linear)):
        assert layer.weight is linear.weight and layer.bias is linear.bias
        assert not layer.training
        x = torch.randn(3, 24, dtype=torch.float64)
        torch.testing.assert_close(layer(x), linear(x))
    assert SlicedLinear.from_linear(nn.Linear(3, 4, bias=False)).bias is None
    with pytest.raises(TypeError, match=r"linear: expected an nn.Linear, got Conv1d"):
        SlicedLinear.from_linear(nn.Conv1d(3, 3, 1))
    computed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    with pytest.raises(TypeError, match="remove_parametrizations"):
        SlicedLinear.from_linear(computed)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"out": 49}, ValueError, r"out: prefix 49 is outside 0\.\.48"),
        ({"in_": -1}, ValueError, r"in_: prefix -1 is outside 0\.\.24"),
        ({"out": slice(40, 50)}, ValueError, r"out: .* <= 48"),
        ({"in_": slice(9, 3)}, ValueError, r"in_: "),
        ({"out": torch.tensor([1, 1])}, ValueError, r"out: 1 repeated"),
        ({"out": torch.tensor([0, 48])}, ValueError, r"out: indices run from 0 to 48"),
        ({"out": torch.tensor([[0]])}, ValueError, r"out: .* 1-D"),
        ({"in_": torch.ones(24, dtype=torch.bool)}, TypeError, r"in_: .*nonzero"),
        ({"out": True}, TypeError, r"out: expected None, an int"),
        ({"out": 3.0}, TypeError, r"out: .* of type float"),
        ({"in_": "all"}, TypeError, r"in_: .* of type str"),
        ({"in_": [1, 2]}, TypeError, r"in_: expected None"),
    ],
)
def test_bad_selection_is_refused_at_once(arguments, error, message):
    layer = make().set_active(8, 8)
    with pytest.raises(error, match=message):
        layer.set_active(**arguments)
    assert layer.active == (8, 8)  # the selection in force stays


def test_wrong_input_width_names_the_selection():
    with pytest.raises(ValueError, match=r"x: last dimension is 24, but in_=9 selects 9 of 24"):
        make().set_active(20, 9)(torch.randn(2, 24))


def test_selection_is_not_the_callers():
    index, blocks = torch.tensor([3, 1]), [slice(0, 2), slice(4, 6)]
    layer = make().set_active(index, blocks)
    index[0] = 47
    blocks.append(slice(8, 9))
    assert layer.active.out.tolist() == [3, 1] and layer.active_in_features == 4


def test_selection_is_copied_but_not_state(selection):
    layer = make().set_active(*selection)
    x = torch.randn(3, layer.active_in_features)
    assert list(layer.state_dict()) == ["weight", "bias"]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    assert list(torch.load(buffer, weights_only=True)) == ["weight", "bias"]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.weight is not layer.weight
        assert torch.equal(other(x), layer(x))
        other.set_active()
        assert layer.active_out_features == pick(layer.weight, 0, selection[0]).shape[0]


def test_moves_between_devices_and_dtypes():
    layer = make().set_active(torch.tensor([4, 2]), 9).to(torch.float64)
    assert layer(torch.randn(2, 9, dtype=torch.float64)).dtype == torch.float64
    meta = SlicedLinear(24, 48, device="meta").set_active(torch.tensor([4, 2]), 9)
    assert meta.to_empty(device="cpu").active_out_features == 2


def test_repr_shows_the_active_part():
    assert repr(make()) == "SlicedLinear(in_features=24, out_features=48, bias=True)"
    text = repr(make().set_active(QKV, torch.tensor([1, 5])))
    assert text.endswith("out=[0:8, 16:24, 32:40] of 48, in_=2 indices of 24)")
    assert "out=20 of 48" in repr(make().set_active(20))
    assert "out=[::3] of 48" in repr(make().set_active(slice(None, None, 3)))


def test_sandwich_gradients_equal_eager_slicing():
    ours = nn.Sequential(make(), nn.ReLU(), SlicedLinear(48, 24))
    x, widths = torch.randn(32, 24), (48, 12, 30, 21)
    hooked = []
    ours[0].weight.register_hook(lambda grad: hooked.append(grad.shape))

    def losses(call):
        return sum(call(w).square().mean() for w in widths)

    def sliced(width):
        ours[0].set_active(out=width)
        ours[2].set_active(in_=width)
        return ours(x)

    def eager(width):
        first, second = ours[0], ours[2]
        hidden = F.linear(x, first.weight[:width], first.bias[:width]).relu()
        return F.linear(hidden, second.weight[:, :width], second.bias)

    parameters = list(ours.parameters())
    losses(sliced).backward()
    assert hooked == [(48, 24)]  # one gradient of the full shape for four subnets
    wanted = torch.autograd.grad(losses(eager), parameters)
    for parameter, want in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, want)


def test_ordinary_training_loop():
    """The loss of the last step, and with it its graph, lives on while the next one is made."""
    layer = make()
    twin = nn.Linear(24, 12)
    with torch.no_grad():
        twin.weight.copy_(layer.weight[:12])
        twin.bias.copy_(layer.bias[:12])
    layer.set_active(out=12)
    x = torch.randn(16, 24)
    for model in (layer, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(layer.weight[:12], twin.weight)
    assert torch.equal(layer.weight[12:], make().weight[12:])


def test_one_compiled_graph_serves_all_prefixes():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    layer = make()
    torch._dynamo.reset()
    with torch.compiler.config.patch(allow_unspec_int_on_nn_module=True):
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        for width in (24, 20, 16, 12, 9, 7, 5, 3):
            layer.set_active(out=2 * width, in_=width)
            x = torch.randn(4, width)
            torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) <= 3
    torch._dynamo.reset()


def test_compiles_with_an_index_selection():
    layer = make().set_active(torch.tensor([4, 2, 40]), slice(0, 24, 3))
    torch._dynamo.reset()
    x = torch.randn(4, 8)
    wanted = torch.autograd.grad(layer(x).sum(), layer.weight)[0]
    got = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, layer(x))
    torch.testing.assert_close(torch.autograd.grad(got.sum(), layer.weight)[0], wanted)
    torch._dynamo.reset()


CHOICES = [(16, 8), (48, 24), (30, 12)]


def entangled():
    torch.manual_seed(0)
    return EntangledLinear(24, 48, choices=CHOICES)


def test_mixture_equals_pad_and_sum():
    layer, x = entangled(), torch.randn(2, 5, 24)
    alpha = torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    weight, bias = torch.zeros(48, 24), torch.zeros(48)
    for a, (out, in_) in zip(alpha, CHOICES, strict=True):
        weight = weight + a * F.pad(layer.weight[:out, :in_], (0, 24 - in_, 0, 48 - out))
        bias = bias + a * F.pad(layer.bias[:out], (0, 48 - out))
    wanted = F.linear(x, weight, bias)
    y = layer(x, alpha)
    torch.testing.assert_close(y, wanted)
    leaves = [layer.weight, layer.bias, alpha]
    g = torch.randn_like(y)
    pairs = zip(
        torch.autograd.grad(y, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True
    )
    for got, want in pairs:
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("number", range(len(CHOICES)))
def test_one_hot_alpha_equals_the_chosen_slice(number):
    layer, x = entangled(), torch.randn(5, 24)
    out, in_ = CHOICES[number]
    alpha = F.one_hot(torch.tensor(number), len(CHOICES)).float()
    mixed = layer(x, alpha)
    assert layer.set_choice(number).active == (out, in_)
    torch.testing.assert_close(layer(x[:, :in_]), mixed[:, :out])
    assert not mixed[:, out:].any()
    torch.testing.assert_close(layer.export()(x[:, :in_]), mixed[:, :out])


def test_entangled_is_a_drop_in_and_copies():
    layer = entangled()
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert copy.deepcopy(layer).choices == tuple(CHOICES)
    assert pickle.loads(pickle.dumps(layer)).set_choice(0).active == CHOICES[0]
    assert "choices=3" in repr(layer)
    alpha = torch.ones(1)
    whole = EntangledLinear(24, 48)
    torch.testing.assert_close(whole(x, alpha), F.linear(x, whole.weight, whole.bias))


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ([], ValueError, "choices: is empty"),
        (7, TypeError, "choices: expected a sequence"),
        ([(49, 8)], ValueError, r"choices\[0\]: out: is 49, outside 0\.\.48"),
        ([(8, 8), (8, 25)], ValueError, r"choices\[1\]: in: is 25, outside 0\.\.24"),
        ([(8,)], ValueError, r"choices\[0\]: expected \(out, in\)"),
        ([(8, 2.5)], TypeError, r"choices\[0\]: in: expected an int"),
    ],
)
def test_bad_choices(choices, error, message):
    with pytest.raises(error, match=message):
        EntangledLinear(24, 48, choices=choices)


def test_bad_alpha_and_choice():
    layer, x = entangled(), torch.randn(2, 24)
    with pytest.raises(ValueError, match=r"alpha: expected shape \(3,\), one per choice"):
        layer(x, torch.ones(2))
    with pytest.raises(TypeError, match="alpha: expected a floating-point tensor"):
        layer(x, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"number: is 3, outside 0\.\.2"):
        layer.set_choice(3)
    with pytest.raises(TypeError, match=r"number: expected an int"):
        layer.set_choice(torch.tensor(1))


def test_mixture_compiles_to_one_graph():
    layer, x = entangled(), torch.randn(2, 24)
    alpha = torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    wanted = layer(x, alpha)
    torch._dynamo.reset()
    got = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, alpha)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), alpha), torch.autograd.grad(wanted.sum(), alpha)
    )
    torch._dynamo.reset()


class TestLinear:
    """A linear layer bound to a search space."""

    @pytest.fixture
    def space(self):
        return SearchSpace(embed=[8, 16, 24], ratio=[1, 2], heads=[1, 2, 3])

    def layers(self, space):
        torch.manual_seed(0)
        embed, heads = space["embed"], space["heads"]
        kind = dict(dtype=torch.float64)
        return {
            "fc1": Linear(embed, embed * space["ratio"], **kind),
            "qkv": Linear(embed, Blocks([heads * 4] * 3, [12] * 3), **kind),
            "interleaved": Linear(embed, Interleaved(heads * 4, 3), bias=False, **kind),
            "proj": Linear(heads * 4, embed, **kind),
            "head": Linear(embed, 10, **kind),
        }

    @pytest.mark.parametrize("name", ["fc1", "qkv", "interleaved", "proj", "head"])
    def test_follows_the_active_subnet_and_exports_it(self, space, name):
        layer = self.layers(space)[name]
        for seed in range(4):
            space.activate(space.sample(random.Random(seed)))
            plain = layer.export()
            x = torch.randn(3, layer.active_in_features, dtype=torch.float64)
            torch.testing.assert_close(layer(x), plain(x))
            assert type(plain) is nn.Linear
            assert plain.out_features == layer.active_out_features == layer(x).shape[-1]
            out, in_ = layer.active
            rows = list(out) if isinstance(out, tuple) else out
            assert torch.equal(plain.weight, pick(pick(layer.weight, 0, rows), 1, in_))

    @pytest.mark.parametrize("mixed", [("embed", "ratio", "heads"), ("embed",), ("heads", "ratio")])
    @pytest.mark.parametrize("name", ["fc1", "qkv", "interleaved", "proj", "head"])
    def test_mixture_is_the_padded_sum_of_all_choices(self, space, name, mixed):
        layer = self.layers(space)[name]
        space.activate(space.arch(embed=16, heads=2))
        logits = {
            n: torch.randn(len(space[n].choices), dtype=torch.float64, requires_grad=True)
            for n in mixed
        }
        alphas = {n: value.softmax(0) for n, value in logits.items()}
        space.mix(alphas)
        weight, bias = 0, 0
        for point in points([space[n] for n in mixed]):
            rows, cols = (
                pick(torch.arange(size), 0, part if not isinstance(part, tuple) else list(part))
                for size, part in (
                    (axis.max, axis.selection_at(point))
                    if isinstance(axis, Size)
                    else (axis, slice(None))
                    for axis in (layer.rows, layer.cols)
                )
            )
            factor = torch.stack([alphas[d.name][d.index(v)] for d, v in point.items()]).prod()
            mask = torch.zeros_like(layer.weight)
            mask[rows[:, None], cols] = 1
            weight = weight + factor * mask * layer.weight
            if layer.bias is not None:
                bias = bias + factor * mask[:, cols[0]] * layer.bias
        # An axis that is not mixed keeps its active width.
        width = layer.cols.value if not layer.cols.mixed else layer.in_features
        x = torch.randn(3, width, dtype=torch.float64)
        wanted = F.pad(x, (0, layer.in_features - width)) @ weight.t() + bias
        if isinstance(layer.rows, Size) and not layer.rows.mixed:
            out = layer.rows.selection
            wanted = pick(wanted, 1, list(out) if isinstance(out, tuple) else out)
        torch.testing.assert_close(layer(x), wanted)
        used = [logits[n] for n in mixed if space[n] in dims_of(layer.rows, layer.cols)]
        leaves, g = [layer.weight, *used], torch.randn_like(wanted)
        if not used:
            return
        ours = torch.autograd.grad(layer(x), leaves, g, retain_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(wanted, leaves, g))

    def test_takes_over_a_linear_and_its_parameters(self, space):
        plain = nn.Linear(30, 24).eval()
        layer = Linear.from_linear(plain, space["embed"], space["heads"] * 8)
        assert layer.weight is plain.weight and not layer.training
        space.activate(space.smallest())
        assert layer(torch.randn(2, 8)).shape == (2, 8)
        with pytest.raises(ValueError, match=r"in_features: up to 24, but the layer has 16"):
            Linear.from_linear(nn.Linear(16, 24), space["embed"], 24)

    def test_the_space_says_what_is_active(self, space):
        layer = Linear(space["embed"], 10)
        with pytest.raises(TypeError, match=r"use SearchSpace\.activate"):
            layer.set_active(out=3)
        twin, twin_space = copy.deepcopy((layer, space))
        twin_space.activate(twin_space.smallest())
        assert (layer.active_in_features, twin.active_in_features) == (24, 8)

    def test_one_graph_serves_all_subnets(self, space, traced):
        model = self.layers(space)["qkv"]
        compiled = traced(model)
        for seed in range(12):
            space.activate(space.sample(random.Random(seed)))
            x = torch.randn(5, space["embed"].value, dtype=torch.float64)
            torch.testing.assert_close(compiled(x), model(x))
        assert len(traced.graphs) == 1
