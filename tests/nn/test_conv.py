"""Conv2d on dims: equal to convolutions sliced by hand, in every mode, and exportable."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weightshare.nn import Conv2d, SqueezeExcite
from weightshare.sizes import Blocks, points
from weightshare.space import SearchSpace

IMAGE = 11


def space_():
    return SearchSpace(wide=[8, 12, 24], out=[6, 10], kernel=[3, 5, 7], deep=[16, 24])


# One layer of each kind over the same dims.
LAYERS = {
    "point": lambda s, **o: Conv2d(s["wide"], s["out"], 1, **o),
    "kernel": lambda s, **o: Conv2d(s["wide"], s["out"], s["kernel"], padding="auto", **o),
    "strided": lambda s, **o: Conv2d(s["wide"], s["out"], s["kernel"], 2, 6, 2, **o),
    "same": lambda s, **o: Conv2d(s["wide"], 5, s["kernel"], padding="same", **o),
    "rectangle": lambda s, **o: Conv2d(3, s["out"], (5, 3), (2, 1), (2, 0), **o),
    "depthwise": lambda s, **o: Conv2d(
        s["wide"], s["wide"], s["kernel"], padding="auto", groups=s["wide"], **o
    ),
    "grouped": lambda s, **o: Conv2d(
        s["wide"], s["wide"], s["kernel"], padding="auto", groups=6, **o
    ),
    "multiplied": lambda s, **o: Conv2d(s["wide"], s["wide"] * 2, 3, groups=24, **o),
    "blocks": lambda s, **o: Conv2d(
        Blocks([s["out"], s["out"]], [10, 10]), 7, s["kernel"], padding="auto", **o
    ),
    "block_rows": lambda s, **o: Conv2d(5, Blocks([s["out"], 3], [10, 4]), 3, **o),
}


def make(kind, space, **options):
    torch.manual_seed(0)
    return LAYERS[kind](space, **options)


EVERY_KIND = pytest.mark.parametrize("kind", LAYERS)


def elements(axis, point=None):
    """Indices that a size selects, without the library's own selection code."""
    if isinstance(axis, int):
        return torch.arange(axis)
    chosen = axis.selection_at(point or {})
    spans = [slice(chosen)] if isinstance(chosen, int) else chosen
    return torch.cat([torch.arange(s.stop)[s] for s in spans])


def kernel_of(layer, weight, size):
    """The kernel of a size: the centre of the whole, or the chain of centres and matrices."""
    whole = weight.shape[-1]
    for large, small in itertools.pairwise((7, 5, 3) if layer.transforms else (whole, size)):
        if large > size:
            start = (large - small) // 2
            weight = weight[:, :, start : start + small, start : start + small]
            if layer.transforms:
                matrix = layer.get_parameter(f"{large}to{small}_matrix")
                weight = (weight.reshape(-1, small**2) @ matrix.T).reshape(weight.shape)
    return weight


def by_hand(layer, x, weight, bias, groups):
    """The layer on a ready-made weight, padded as its kernel needs."""
    padding = (3, 3) if layer.padding == "same" else layer.padding
    sides = zip(padding, layer.kernel_size, weight.shape[2:], layer.dilation, strict=True)
    pads = [p - (whole - side) // 2 * d for p, whole, side, d in sides]
    return F.conv2d(x, weight, bias, layer.stride, pads, layer.dilation, groups)


def sliced(layer, x):
    """The active part, gathered by index."""
    rows = elements(layer.rows)
    per_group = layer.in_channels // layer.groups
    cols = elements(layer.cols) if layer.groups == 1 else torch.arange(per_group)
    weight = kernel_of(layer, layer.weight[rows][:, cols], active(layer._axes[-1]))
    groups = 1 if layer.groups == 1 else x.shape[1] // per_group
    bias = None if layer.bias is None else layer.bias[rows]
    return by_hand(layer, x, weight, bias, groups)


def compare(ours, wanted, leaves, **tolerance):
    """Outputs and gradients agree."""
    torch.testing.assert_close(ours, wanted, **tolerance)
    g = torch.randn_like(wanted)
    kept = [leaf for leaf in leaves if leaf is not None]
    got, want = (
        torch.autograd.grad(y, kept, g, retain_graph=True, materialize_grads=True)
        for y in (ours, wanted)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def image(channels, dtype=torch.float64):
    return torch.randn(2, channels, IMAGE, IMAGE, dtype=dtype, requires_grad=True)


def active(axis):
    return axis if isinstance(axis, int) else axis.value


@pytest.mark.parametrize("bias", [True, False])
@EVERY_KIND
def test_every_subnet_equals_slicing_by_hand(kind, bias):
    space = space_()
    layer = make(kind, space, dtype=torch.float64, bias=bias)
    for point in points(layer._joint.dims):
        for dim, value in point.items():
            dim.set(value)
        x = image(active(layer.cols))
        y = layer(x)
        assert y.shape[1] == active(layer.rows)
        compare(y, sliced(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("kind", ["kernel", "depthwise", "same"])
def test_image_size_does_not_depend_on_the_kernel(kind):
    space = space_()
    layer = make(kind, space)
    for size in (3, 5, 7):
        space.activate({"kernel": size})
        assert layer(torch.randn(1, 24, IMAGE, IMAGE)).shape[2:] == (IMAGE, IMAGE)


@pytest.mark.parametrize("kind", ["kernel", "depthwise", "grouped"])
def test_transforms(kind):
    space = space_()
    layer = make(kind, space, dtype=torch.float64, transforms=True)
    plain = make(kind, space, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert list(layer.state_dict()) == ["weight", "bias", "7to5_matrix", "5to3_matrix"]
    for size in (3, 5, 7):  # the identity at first
        space.activate({"kernel": size})
        x = image(24)
        torch.testing.assert_close(layer(x), plain(x))
    for name, matrix in layer.named_parameters():
        if name.endswith("matrix"):
            nn.init.normal_(matrix)
    for _ in range(8):
        space.activate(space.sample())
        x = image(active(layer.cols))
        compare(layer(x), sliced(layer, x), [x, *layer.parameters()])
        torch.testing.assert_close(layer.export()(x), layer(x))
    mixed_equals_pad_and_sum(layer, space, ["wide", "kernel", "out"])
    mixed_equals_pad_and_sum(layer, space, ["wide"], kernel=3)
    mixed_equals_pad_and_sum(layer, space, ["kernel"], wide=12)


def is_mixed(axis):
    return not isinstance(axis, int) and axis.mixed


def mixed_equals_pad_and_sum(layer, space, names, **fixed):
    """Against the papers' sum of padded crops, over every combination of the mixed choices."""
    space.activate(fixed)
    dims = [d for d in layer._joint.dims if d.name in names]
    logits = {d.name: torch.randn(len(d.choices), dtype=torch.float64) for d in dims}
    alpha = {name: a.requires_grad_().softmax(0) for name, a in logits.items()}
    space.mix(alpha)
    rows, cols, *_, kernel = layer._axes
    shape = [a.max if is_mixed(a) else active(a) for a in layer._axes]
    weight, bias = torch.zeros(shape).double(), torch.zeros(shape[0]).double()
    for point in points(dims):
        share = math.prod(alpha[dim.name][dim.index(value)] for dim, value in point.items())
        size = kernel if isinstance(kernel, int) else int(kernel.at(point))
        chosen = elements(rows, point), elements(cols, point)
        part = kernel_of(layer, layer.weight[chosen[0]][:, chosen[1]], size)
        places = zip((rows, cols), chosen, strict=True)  # cut axes are numbered anew
        o, i = (at if is_mixed(axis) else torch.arange(len(at)) for axis, at in places)
        rim = (shape[-1] - part.shape[-1]) // 2
        padded = torch.zeros_like(weight).index_put((o[:, None], i), F.pad(part, [rim] * 4))
        weight = weight + share * padded
        bias = bias.index_add(0, o, share * layer.bias[chosen[0]])
    width = layer.cols.max if is_mixed(layer.cols) else active(layer.cols)
    x = image(width)
    groups = 1 if layer.groups == 1 else width // shape[1]
    wanted = by_hand(layer, x, weight, bias, groups)
    compare(layer(x), wanted, [x, *layer.parameters(), *logits.values()])
    space.mix(None)


@EVERY_KIND
def test_mixture_equals_pad_and_sum(kind):
    space = space_()
    layer = make(kind, space, dtype=torch.float64)
    names = [dim.name for dim in layer._joint.dims]
    mixed_equals_pad_and_sum(layer, space, names)
    smallest = space.smallest()
    for name in names:  # one dim alone; the others are cut to their active size
        rest = {n: smallest[n] for n in names if n != name}
        mixed_equals_pad_and_sum(layer, space, [name], **rest)


@pytest.mark.parametrize("transforms", [False, True])
def test_one_hot_mixture_is_the_subnet(transforms):
    space = space_()
    layer = make("depthwise", space, transforms=transforms, dtype=torch.float64)
    x = image(24)
    for wide, kernel in ((8, 3), (12, 7), (24, 5)):
        dims = {"wide": wide, "kernel": kernel}
        space.mix(
            {
                name: F.one_hot(torch.tensor(space[name].index(v)), 3).double()
                for name, v in dims.items()
            }
        )
        mixed = layer(x)
        space.activate(dims)
        torch.testing.assert_close(layer(x[:, :wide]), mixed[:, :wide])
        assert not mixed[:, wide:].any()


def test_mixture_saves_no_padded_copies():
    """Nine choices: the mixed weight for the convolution, and no more of its size."""
    space = SearchSpace(wide=[32, 48, 64], kernel=[3, 5, 7])
    layer = Conv2d(space["wide"], space["wide"], space["kernel"], padding="auto", bias=False)
    space.mix({name: torch.full((3,), 1 / 3).requires_grad_() for name in space})
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, 64, 7, 7)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    whole = layer.weight.nbytes
    assert whole <= sum(kept.values()) < 2.2 * whole + x.nbytes + y.nbytes


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda s: Conv2d(s["wide"], 8, s["kernel"]),
            ValueError,
            r"padding: is \(0, 0\), but a 3x3 kernel in the place of a 7x7 one .*\(2, 2\).*auto",
        ),
        (lambda s: Conv2d(3, 8, s["kernel"], padding="valid"), ValueError, "padding: is valid"),
        (lambda s: Conv2d(3, 8, s["kernel"], padding=3, dilation=2), ValueError, r"\(4, 4\)"),
        (lambda s: Conv2d(3, 8, s["wide"], padding="auto"), ValueError, "must be odd"),
        (
            lambda s: Conv2d(s["wide"], 24, 3, groups=24),
            ValueError,
            r"groups: 24 groups of 1 -> 1 channels; at {'wide': 8}",
        ),
        (lambda s: Conv2d(s["wide"], s["wide"], 3, groups=3), ValueError, "not the same whole"),
        (lambda s: Conv2d(s["wide"], s["deep"], 3, groups=24), ValueError, "groups: 24 groups"),
        (lambda s: Conv2d(3, 4, 3, transforms=True), ValueError, "transforms: kernel_size has one"),
        (lambda s: Conv2d.from_conv2d(nn.Linear(3, 4)), TypeError, "got Linear"),
        (lambda s: Conv2d.from_conv2d(Conv2d(s["wide"], 4, 3)), TypeError, "expected an nn.Conv2d"),
        (
            lambda s: Conv2d.from_conv2d(nn.Conv2d(20, 4, 3), s["wide"]),
            ValueError,
            r"conv: its weight is \(4, 20, 3, 3\), but the sizes make one of \(4, 24, 3, 3\)",
        ),
        (
            lambda s: Conv2d.from_conv2d(
                nn.utils.parametrizations.weight_norm(nn.Conv2d(24, 4, 3)), s["wide"]
            ),
            TypeError,
            "parametrization",
        ),
        (
            lambda s: s.activate({"wide": 8}) or Conv2d(s["wide"], 4, 1)(torch.ones(1, 24, 2, 2)),
            ValueError,
            "x: has 24 channels, but 8 of 24 are active",
        ),
    ],
)
def test_bad_input_says_what_fits(make, error, message):
    with pytest.raises(error, match=message):
        make(space_())


class InvertedResidual(nn.Module):
    """MobileNetV3's block: expand, depthwise, squeeze-and-excitation, project."""

    def __init__(self, stem, space):
        super().__init__()
        wide, kernel = stem * space["expand"], space["kernel"]
        self.wide = wide
        self.expand = Conv2d(stem, wide, 1, bias=False)
        self.depthwise = Conv2d(
            wide, wide, kernel, padding="auto", groups=wide, bias=False, transforms=True
        )
        self.squeeze = SqueezeExcite(wide, gate=nn.Hardsigmoid)
        self.project = Conv2d(wide, stem, 1, bias=False)
        for name, size in (("bn1", wide.max), ("bn2", wide.max), ("bn3", stem.max)):
            self.register_parameter(name, nn.Parameter(torch.rand(2, size)))

    def forward(self, x):
        y = F.hardswish(norm(self.expand(x), self.bn1))
        y = F.hardswish(norm(self.depthwise(y), self.bn2))
        return x + norm(self.project(self.squeeze(y)), self.bn3)


def norm(x, affine):
    weight, bias = affine[:, : x.shape[1]]
    return F.batch_norm(x, None, None, weight, bias, training=True)


def block_by_hand(block, x, wide, size):
    """The same with every weight cut by plain indexing."""
    stem, conv = x.shape[1], F.conv2d
    y = conv(x, block.expand.weight[:wide, :stem])
    y = F.hardswish(norm(y, block.bn1))
    kernel = kernel_of(block.depthwise, block.depthwise.weight[:wide], size)
    y = conv(y, kernel, padding=size // 2, groups=wide)
    y = F.hardswish(norm(y, block.bn2))
    reduced = max(8, (wide // 4 + 4) // 8 * 8)
    reduced += 8 * (reduced < 0.9 * wide / 4)
    first, second = block.squeeze.conv_reduce, block.squeeze.conv_expand
    s = y.mean((2, 3), keepdim=True)
    s = conv(s, first.weight[:reduced, :wide], first.bias[:reduced]).relu()
    s = conv(s, second.weight[:wide, :reduced], second.bias[:wide])
    y = y * F.hardsigmoid(s)
    return x + norm(conv(y, block.project.weight[:stem, :wide]), block.bn3)


def test_mobilenet_v3_block():
    """Random subnets, and a sandwich of them, against slicing by hand: outputs and gradients."""
    torch.manual_seed(0)
    space = SearchSpace(stem=[8, 16, 24], expand=[3, 4, 6], kernel=[3, 5, 7])
    block = InvertedResidual(space["stem"], space).double()
    nn.init.normal_(block.depthwise.get_parameter("7to5_matrix"), std=0.2)
    nn.init.normal_(block.depthwise.get_parameter("5to3_matrix"), std=0.2)
    ours, theirs = 0, 0
    for arch in (space.largest(), space.smallest(), *(space.sample() for _ in range(6))):
        space.activate(arch)
        x = image(arch["stem"])
        y = block(x)
        wanted = block_by_hand(block, x, arch["stem"] * arch["expand"], arch["kernel"])
        compare(y, wanted, [x, *block.parameters()])
        ours, theirs = ours + y.sin().sum(), theirs + wanted.sin().sum()
    compare(ours, theirs, list(block.parameters()))
    space.mix({n: torch.rand(3).double().softmax(0).requires_grad_() for n in space})
    block(image(24)).sum().backward()
    assert all(p.grad is not None for p in block.parameters())
