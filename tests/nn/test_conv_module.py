"""Conv2d as a module: drop-in, taken over, exported, copied, compiled, in every format."""

import copy
import pickle

import pytest
import torch
from test_conv import IMAGE, compare, make, space_
from torch import nn
from torch.nn import functional as F
from weightshare.nn import Conv2d

OPTIONS = {
    "default": {},
    "stride": {"stride": 2, "padding": 1},
    "dilated": {"dilation": (2, 1), "padding": (2, 0), "bias": False},
    "groups": {"groups": 4},
    "depthwise": {"groups": 8, "padding": "same"},
    "valid": {"padding": "valid"},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect"},
    "circular_same": {"padding": "same", "padding_mode": "circular"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_is_a_drop_in_on_ints(options):
    torch.manual_seed(1)
    plain = nn.Conv2d(8, 16, 3, **options)
    torch.manual_seed(1)
    ours = Conv2d(8, 16, 3, **options)
    assert isinstance(ours, nn.Conv2d) and list(ours.state_dict()) == list(plain.state_dict())
    for x in (torch.randn(2, 8, 9, 9), torch.randn(8, 9, 9)):
        assert torch.equal(ours(x), plain(x))
    exported = ours.export()
    assert type(exported) is nn.Conv2d and repr(exported) == repr(plain)
    assert torch.equal(exported(x), plain(x))
    taken = Conv2d.from_conv2d(plain.eval())
    assert taken.weight is plain.weight and taken.bias is plain.bias and not taken.training
    assert torch.equal(taken(x), plain(x))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_follows_the_kernel(mode):
    """Sliced and mixed: the ring that a smaller kernel does not reach changes nothing."""
    space = space_()
    layer = Conv2d(4, 6, space["kernel"], padding=4, padding_mode=mode)
    x = torch.randn(2, 4, IMAGE, IMAGE)
    for number, size in enumerate((3, 5, 7)):
        space.activate({"kernel": size})
        exported = layer.export()
        assert exported.padding == (4 - (7 - size) // 2,) * 2
        y = layer(x)
        torch.testing.assert_close(y, exported(x))
        space.mix({"kernel": F.one_hot(torch.tensor(number), 3).float()})
        torch.testing.assert_close(layer(x), y)


def test_from_conv2d_on_dims():
    space = space_()
    plain = nn.Conv2d(24, 24, 7, padding=3, groups=24).eval()
    plain.weight.requires_grad_(False)
    wide = space["wide"]
    layer = Conv2d.from_conv2d(plain, wide, wide, space["kernel"], transforms=True)
    assert layer.weight is plain.weight and layer.bias is plain.bias and not layer.training
    x = torch.randn(2, 24, IMAGE, IMAGE)
    torch.testing.assert_close(layer(x), plain(x))
    space.activate({"wide": 8, "kernel": 3})
    exported = layer.export()
    assert not exported.weight.requires_grad and exported.bias.requires_grad
    assert not exported.training
    torch.testing.assert_close(exported(x[:, :8]), layer(x[:, :8]))


def test_export_shares_nothing_and_keeps_the_format():
    space = space_()
    space.activate({"wide": 12, "kernel": 5})
    layer = make("kernel", space, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    exported = layer.export()
    assert exported.weight.dtype == torch.bfloat16
    assert exported.weight.is_contiguous(memory_format=torch.channels_last)
    assert (exported.in_channels, exported.out_channels, exported.kernel_size) == (12, 10, (5, 5))
    before = exported.weight.clone()
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    assert torch.equal(exported.weight, before) and exported.bias.any()
    assert make("kernel", space).export().weight.is_contiguous()


def test_channels_last_images_stay_so():
    space = space_()
    space.activate({"wide": 12, "kernel": 3})
    for kind in ("point", "kernel", "depthwise"):
        layer = make(kind, space).to(memory_format=torch.channels_last)
        x = torch.randn(2, 12, 8, 8).to(memory_format=torch.channels_last)
        y = layer(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, layer.export()(x))
        y.sum().backward()
        assert layer.weight.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("transforms", [False, True])
def test_autocast_and_low_precision(transforms, mixed):
    space = space_()
    layer = make("depthwise", space, transforms=transforms)
    space.activate({"wide": 12, "kernel": 3})
    if mixed:
        space.mix({"kernel": torch.full((3,), 1 / 3)})
    x = torch.randn(2, 12, IMAGE, IMAGE)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad[:12].any()
    y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)


def test_copies_have_dims_of_their_own():
    space = space_()
    space.activate({"wide": 12, "kernel": 5})
    layer = make("depthwise", space, transforms=True)
    x = torch.randn(1, 12, 9, 9)
    wanted = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.weight is not layer.weight
        torch.testing.assert_close(other(x), wanted)
        next(d for d in other._joint.dims if d.name == "wide").set(8)
        assert other(x[:, :8]).shape[1] == 8 and layer(x).shape[1] == 12


def test_repr_shows_the_active_part():
    space = space_()
    space.activate({"wide": 12, "kernel": 5, "out": 6})
    assert "Conv2d(24, 10, kernel_size=(7, 7)" in repr(make("kernel", space))
    assert repr(make("kernel", space)).endswith("active=12->6, kernel 5)")
    assert repr(Conv2d(3, 4, 1)) == repr(nn.Conv2d(3, 4, 1))


def test_one_compiled_graph_serves_all_widths(traced):
    """Widths are symbols; each kernel size has a graph, as convolutions guard on theirs."""
    space = space_()
    net = nn.Sequential(make("depthwise", space), make("kernel", space))
    compiled = traced(net)
    after = []
    for wide in (8, 12, 24, 12):
        for kernel in (3, 5, 7):
            space.activate({"wide": wide, "kernel": kernel, "out": 6 if wide == 8 else 10})
            x = torch.randn(2, wide, 9, 9)
            torch.testing.assert_close(compiled(x), net(x))
        after.append(len(traced.graphs))
    assert after[0] <= 3 and after[-1] <= after[0] + 1, after


@pytest.mark.parametrize("transforms", [False, True])
def test_compiles_whole_with_gradients(transforms):
    space = space_()
    layer = make("depthwise", space, transforms=transforms)
    alpha = {name: torch.rand(3).softmax(0).requires_grad_() for name in ("wide", "kernel")}
    for mixed in (False, True):
        space.activate({"wide": 12, "kernel": 3})
        space.mix(alpha if mixed else None)
        x = torch.randn(2, 24 if mixed else 12, 9, 9)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        leaves = [*layer.parameters(), *(alpha.values() if mixed else ())]
        compare(compiled(x), layer(x), leaves, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
