"""SqueezeExcite on dims: equal to the module sliced by hand, mixed, and exportable."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weightshare.nn import Conv2d, SqueezeExcite
from weightshare.sizes import points
from weightshare.space import SearchSpace

KEYS = ["conv_reduce.weight", "conv_reduce.bias", "conv_expand.weight", "conv_expand.bias"]


def make(**options):
    space = SearchSpace(stem=[16, 24, 40], expand=[3, 4, 6])
    torch.manual_seed(0)
    wide = space["stem"] * space["expand"]
    return space, SqueezeExcite(wide, act=nn.SiLU, gate=nn.Hardsigmoid, **options)


def by_hand(module, x, weights):
    """Squeeze-and-excitation on ready-made weights."""
    w1, b1, w2, b2 = weights
    s = F.silu(F.conv2d(x.mean((2, 3), keepdim=True), w1, b1))
    return x * F.hardsigmoid(F.conv2d(s, w2, b2))


def cut(module, wide, reduced):
    w1, b1, w2, b2 = module.parameters()
    return w1[:reduced, :wide], b1[:reduced], w2[:wide, :reduced], b2[:wide]


def compare(ours, wanted, leaves):
    torch.testing.assert_close(ours, wanted)
    g = torch.randn_like(wanted)
    pairs = (torch.autograd.grad(y, leaves, g, retain_graph=True) for y in (ours, wanted))
    for got, want in zip(*pairs, strict=True):
        torch.testing.assert_close(got, want)


def test_every_subnet_equals_slicing_by_hand():
    space, module = make(dtype=torch.float64)
    assert list(module.state_dict()) == KEYS
    for point in points(space.dims.values()):
        space.activate({dim.name: value for dim, value in point.items()})
        wide = space["stem"].value * space["expand"].value
        x = torch.randn(2, wide, 5, 4, dtype=torch.float64, requires_grad=True)
        weights = cut(module, wide, module.conv_reduce.rows.value)
        compare(module(x), by_hand(module, x, weights), [x, *module.parameters()])


@pytest.mark.parametrize(
    ("channels", "reduced"), [(16, 8), (64, 16), (72, 24), (120, 32), (240, 64), (672, 168)]
)
def test_default_is_a_quarter_in_eights(channels, reduced):
    """The sizes of MobileNetV3; 72 would be 16 but must not lose more than a tenth."""
    assert SqueezeExcite(channels).conv_reduce.out_channels == reduced


def test_mixture_equals_pad_and_sum():
    space, module = make(dtype=torch.float64)
    logits = {d.name: torch.randn(3, dtype=torch.float64) for d in space.dims.values()}
    alpha = {name: a.requires_grad_().softmax(0) for name, a in logits.items()}
    space.mix(alpha)
    weights = [torch.zeros_like(p) for p in module.parameters()]
    for point in points(space.dims.values()):
        share = math.prod(alpha[d.name][d.index(v)] for d, v in point.items())
        wide = module.conv_reduce.cols.at(point)
        for n, part in enumerate(cut(module, wide, module.conv_reduce.rows.at(point))):
            pads = [
                p
                for size, full in zip(part.shape[::-1], weights[n].shape[::-1], strict=True)
                for p in (0, full - size)
            ]
            weights[n] = weights[n] + share * F.pad(part, pads)
    x = torch.randn(2, 240, 5, 4, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters(), *logits.values()]
    compare(module(x), by_hand(module, x, weights), leaves)


def test_export_is_the_same_module_on_plain_convolutions():
    space, module = make()
    space.activate({"stem": 24, "expand": 4})
    exported = module.eval().export()
    assert type(exported) is SqueezeExcite and not exported.training
    assert type(exported.conv_reduce) is nn.Conv2d and list(exported.state_dict()) == KEYS
    assert exported.conv_reduce.weight.shape == (24, 96, 1, 1)
    x = torch.randn(3, 96, 7, 7)
    wanted = module(x)
    torch.testing.assert_close(exported(x), wanted)
    torch.testing.assert_close(exported.export()(x), wanted)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    torch.testing.assert_close(exported(x), wanted)


class Plain(nn.Module):
    """A module with timm's four children."""

    def __init__(self, channels, reduced):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.act1 = nn.ReLU()
        self.conv_expand = nn.Conv2d(reduced, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x):
        s = self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        return x * self.gate(s)


def test_takes_over_a_module():
    space = SearchSpace(wide=[24, 48])
    plain = Plain(48, 12).eval()
    wide = space["wide"]
    ours = SqueezeExcite.from_squeeze_excite(plain, wide, wide * 0.25)
    assert [p is q for p, q in zip(ours.parameters(), plain.parameters(), strict=True)] == 4 * [
        True
    ]
    assert isinstance(ours.conv_reduce, Conv2d) and not ours.training
    x = torch.randn(2, 48, 5, 5)
    torch.testing.assert_close(ours(x), plain(x))
    plain.load_state_dict(ours.state_dict())
    space.activate({"wide": 24})
    assert ours.export().conv_reduce.weight.shape == (6, 24, 1, 1)
    with pytest.raises(TypeError, match=r"module: Linear has no act1, conv_expand, conv_reduce"):
        SqueezeExcite.from_squeeze_excite(nn.Linear(2, 2), wide, 12)
    with pytest.raises(ValueError, match=r"conv: its weight is \(12, 48, 1, 1\)"):
        SqueezeExcite.from_squeeze_excite(plain, wide, 10)
    plain.conv_expand = nn.Conv2d(12, 48, 3)
    with pytest.raises(ValueError, match=r"conv_expand is no 1x1 .* \(48, 12, 3, 3\)"):
        SqueezeExcite.from_squeeze_excite(plain, wide, 12)


def test_wrong_width_says_what_is_active():
    space, module = make()
    space.activate({"stem": 24, "expand": 4})
    with pytest.raises(ValueError, match="x: has 240 channels, but 96 of 240 are active"):
        module(torch.randn(1, 240, 3, 3))


def test_copies_autocast_and_memory_format():
    space, module = make()
    space.activate({"stem": 16, "expand": 3})
    x = torch.randn(2, 48, 6, 6).to(memory_format=torch.channels_last)
    wanted = module(x)
    assert wanted.is_contiguous(memory_format=torch.channels_last)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), wanted)
        assert other.conv_reduce.weight is not module.conv_reduce.weight
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    torch.testing.assert_close(y.float(), wanted, rtol=0.02, atol=0.02)
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_one_compiled_graph_serves_all_widths(traced):
    space, module = make()
    compiled = traced(module)
    for point in points(space.dims.values()):
        space.activate({dim.name: value for dim, value in point.items()})
        x = torch.randn(2, module.conv_reduce.cols.value, 4, 4)
        torch.testing.assert_close(compiled(x), module(x))
    assert len(traced.graphs) <= 2  # the whole width is contiguous
