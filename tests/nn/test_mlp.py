"""MLP and GatedMLP: equal to plain PyTorch on weights sliced or padded by hand."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weightshare.nn import MLP, GatedMLP
from weightshare.sizes import points
from weightshare.space import SearchSpace

D, RATIO = (8, 12, 20), (1.5, 2, 3)
HIDDEN = 60
KINDS = {
    "mlp": MLP,
    "mlp_no_bias": partial(MLP, bias=False, activation=F.relu),
    "gated": GatedMLP,
    "gated_bias": partial(GatedMLP, bias=True),
    "gated_separate": partial(GatedMLP, fused=False, activation=nn.GELU("tanh")),
}


@pytest.fixture(params=KINDS, name="made")
def _made(request):
    return make(request.param)


def make(kind):
    torch.manual_seed(0)
    space = SearchSpace(embed=list(D), ratio=list(RATIO))
    hidden = space["embed"] * space["ratio"]
    return space, KINDS[kind](space["embed"], hidden, dtype=torch.float64)


def values_of(space):
    for point in points(space.dims.values()):
        yield {dim.name: value for dim, value in point.items()}


def parts(block):
    """(weight, bias) of the layers, gate and up apart."""
    if not isinstance(block, GatedMLP):
        return [(m.weight, m.bias) for m in (block.fc1, block.fc2)]
    down = block.down_proj.weight, block.down_proj.bias
    if not block.fused:
        return [(m.weight, m.bias) for m in (block.gate_proj, block.up_proj)] + [down]
    weights = block.gate_up_proj.weight.split(HIDDEN)
    bias = block.gate_up_proj.bias
    return [*zip(weights, (None, None) if bias is None else bias.split(HIDDEN), strict=True), down]


def run(block, layers, x):
    """The block in plain PyTorch on these weights."""
    *first, last = (partial(F.linear, weight=w, bias=b) for w, b in layers)
    y = block.activation(first[0](x))
    return last(y * first[1](x) if len(first) == 2 else y)


def sizes(values):
    return values["embed"], int(values["embed"] * values["ratio"])


def cut(layers, embed, hidden):
    """Prefixes of every layer; the last has the axes the other way round."""
    found = []
    for number, (weight, bias) in enumerate(layers):
        out, in_ = (embed, hidden) if number == len(layers) - 1 else (hidden, embed)
        found.append((weight[:out, :in_], None if bias is None else bias[:out]))
    return found


def mixed(layers, space, alphas):
    """Every layer padded for every choice and summed."""
    sums = [[0.0, None if bias is None else 0.0] for _, bias in layers]
    for values in values_of(space):
        alpha = 1.0
        for name, value in values.items():
            alpha = alpha * alphas[name][space[name].index(value)]
        for total, (whole, _), (weight, bias) in zip(
            sums, layers, cut(layers, *sizes(values)), strict=True
        ):
            short = [w - n for w, n in zip(whole.shape, weight.shape, strict=True)]
            total[0] = total[0] + alpha * F.pad(weight, (0, short[1], 0, short[0]))
            if bias is not None:
                total[1] = total[1] + alpha * F.pad(bias, (0, short[0]))
    return sums


def same(got, want, leaves):
    """Outputs, and gradients under a fixed output gradient, agree."""
    torch.testing.assert_close(got, want)
    g = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(3))
    ours, theirs = (torch.autograd.grad(y, leaves, g, retain_graph=True) for y in (got, want))
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda m, n=number: f"gradient {n}: {m}")


def x_of(embed):
    return torch.randn(2, 5, embed, dtype=torch.float64, requires_grad=True)


def test_every_subnet_equals_plain_layers(made):
    space, block = made
    for values in values_of(space):
        space.activate(values)
        x = x_of(values["embed"])
        want = run(block, cut(parts(block), *sizes(values)), x)
        same(block(x), want, [x, *block.parameters()])


def test_mixture_equals_pad_and_sum(made):
    space, block = made
    logits = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in space.dims]
    # By logits: biases may be mixed by the alphas of the rows alone, the same where they sum to 1.
    alphas = {n: a.softmax(0) for n, a in zip(space.dims, logits, strict=True)}
    space.mix(alphas)
    x = x_of(max(D))
    want = run(block, mixed(parts(block), space, alphas), x)
    same(block(x), want, [x, *block.parameters(), *logits])


def test_export_is_plain_and_separate(made):
    space, block = made
    space.activate({"embed": 12, "ratio": 2})
    plain = block.eval().export()
    x = x_of(12)
    torch.testing.assert_close(plain(x), block(x))
    children = [type(m) for m in plain.children()]
    assert set(children) <= {nn.Linear, nn.GELU} and nn.Linear in children
    assert list(plain.state_dict()) == list(block.state_dict())
    assert not plain.training
    assert plain.activation is not block.activation or not isinstance(plain.activation, nn.Module)
    ours = {p.untyped_storage().data_ptr() for p in block.parameters()}
    assert not ours & {p.untyped_storage().data_ptr() for p in plain.parameters()}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("mlp", {"fc1", "fc2"}),
        ("gated", {"gate_up_proj", "down_proj"}),
        ("gated_separate", {"gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_keys_and_layers_taken_over(kind, names):
    _, source = make(kind)
    assert {k.split(".")[0] for k in source.state_dict()} == names
    linears = {n: getattr(source, n).export() for n in sorted(names)}
    for linear in linears.values():
        linear.eval()
    space = SearchSpace(embed=list(D), ratio=list(RATIO))
    options = {"fused": source.fused} if isinstance(source, GatedMLP) else {}
    hidden = space["embed"] * space["ratio"]
    block = type(source).from_linears(linears, space["embed"], hidden, **options)
    assert all(getattr(block, n).weight is linears[n].weight for n in names)
    assert not block.training
    space.activate({"embed": 8, "ratio": 2})
    assert block(torch.randn(3, 8, dtype=torch.float64)).shape == (3, 8)


def test_copies_and_pickles(made):
    space, block = made
    space.activate({"embed": 12, "ratio": 1.5})
    x = x_of(12)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        torch.testing.assert_close(other(x), block(x))


def test_few_graphs_serve_all_widths(made, traced):
    space, block = made
    compiled = traced(block)
    for values in values_of(space):
        space.activate(values)
        x = x_of(values["embed"])
        torch.testing.assert_close(compiled(x), block(x))
    assert len(traced.graphs) == 1


def test_ints_make_a_plain_block_and_dropout_drops():
    block = MLP(8, 16, F.relu, dropout=0.5)
    x = torch.randn(4, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    torch.testing.assert_close(block(x), block.fc2(F.relu(block.fc1(x))))
    assert block.export().dropout == 0.5


def test_bad_layers_are_refused():
    space = SearchSpace(hidden=[4, 8])
    with pytest.raises(ValueError, match="linears: expected fc1, fc2, got fc1"):
        MLP.from_linears({"fc1": nn.Linear(6, 8)}, 6, space["hidden"])
    linears = {"gate_up_proj": nn.Linear(6, 20, False), "down_proj": nn.Linear(10, 6, False)}
    with pytest.raises(ValueError, match=r"hidden: up to 8, but gate_up_proj has 20 rows, not 16"):
        GatedMLP.from_linears(linears, 6, space["hidden"])
    with pytest.raises(ValueError, match="out_features: up to 8"):
        MLP.from_linears({"fc1": nn.Linear(6, 4), "fc2": nn.Linear(4, 6)}, 6, space["hidden"])
