"""Against code we did not write: other libraries' sliced and mixed weights, where installed.

``make test`` installs them (constraints/peers.txt); this library needs none of them.
"""

import pytest
import torch
from peers import peer
from torch import nn
from weightshare.nn import Linear, MultiheadAttention
from weightshare.sizes import points
from weightshare.space import SearchSpace

from weightshare_kernels import entangle, entangled_linear, sliced_linear


@pytest.fixture
def nni():
    return peer("nni.nas.oneshot.pytorch.supermodule._operation_utils")


@pytest.fixture
def whittle():
    return peer("whittle.modules.linear")


@pytest.fixture
def modelopt():
    return peer("modelopt.torch.nas.registry")


def parameters(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]


def assert_same(ours, theirs, leaves):
    """Outputs and gradients agree."""
    torch.testing.assert_close(ours, theirs)
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    got = torch.autograd.grad(ours, leaves, g)
    torch.testing.assert_close(got, torch.autograd.grad(theirs, leaves, g))


def weighted(nni, sizes, alpha):
    return nni.MaybeWeighted(dict(zip(sizes, alpha, strict=True)))


def test_entangled_rows(nni):
    weight, alpha = parameters((12, 8), (3,))
    theirs = nni.Slicable(weight)[: weighted(nni, (4, 8, 12), alpha)]
    assert_same(entangle(weight, [(4, 8), (8, 8), (12, 8)], alpha), theirs, [weight, alpha])


def test_entangled_coupled_linear(nni):
    """The output size decides the input size, as embedding width and heads do."""
    x, weight, bias, alpha = parameters((5, 8), (12, 8), (12,), (3,))
    size = weighted(nni, (4, 8, 12), alpha)
    mixed = nni.Slicable(weight)[:size, : size // 2 + 1]
    theirs = torch.nn.functional.linear(x, mixed, nni.Slicable(bias)[:size])
    ours = entangled_linear(x, weight, bias, [(4, 3), (8, 5), (12, 7)], alpha)
    assert_same(ours, theirs, [x, weight, bias, alpha])


def test_entangled_centre_crop(nni):
    """Kernel sizes 3, 5 and 7 share the centre of one kernel."""
    weight, alpha = parameters((6, 4, 7, 7), (3,))
    size = weighted(nni, (3, 5, 7), alpha)
    start = (7 - size) // 2
    theirs = nni.Slicable(weight)[:, :, start : start + size, start : start + size]
    ours = entangle(weight, [(6, 4, k, k) for k in (3, 5, 7)], alpha)
    assert_same(ours, theirs, [weight, alpha])


@pytest.mark.parametrize(
    ("out", "in_"),
    [(7, 5), (12, 8), (None, 3), (torch.tensor([8, 0, 11]), torch.tensor([3, 1, 6, 2])), (9, None)],
)
def test_sliced_linear(whittle, out, in_):
    layer = whittle.Linear(8, 12, dtype=torch.float64)
    sizes = [12 if out is None else out, 8 if in_ is None else in_]
    tables = [s.tolist() if torch.is_tensor(s) else None for s in sizes]
    counts = [len(s) if torch.is_tensor(s) else s for s in sizes]
    layer.set_sub_network(counts[1], counts[0], tables[1], tables[0])
    (x,) = parameters((2, 5, counts[1]))
    ours = sliced_linear(x, layer.weight, layer.bias, out=out, in_=in_)
    assert_same(ours, layer(x), [x, layer.weight, layer.bias])


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_attention(whittle, heads, groups):
    """Multi-head, grouped-query and multi-query attention of every legal subnet."""
    config = peer("litgpt").Config(
        n_embd=24, n_head=heads, n_query_groups=groups, head_size=8, n_layer=1, bias=True,
        rotary_percentage=1.0, padded_vocab_size=8, norm_class_name="RMSNorm",
    )  # fmt: skip
    theirs = peer("whittle.models.gpt.blocks.causal_self_attention").CausalSelfAttention(config, 0)
    powers = (1, 2, 4)
    kv, share = ([n for n in powers if n <= most] for most in (groups, heads // groups))
    space = SearchSpace(embed=[12, 24], kv=kv, share=share)  # share: query heads of a key head
    ours = MultiheadAttention(space["embed"], space["kv"] * space["share"], 8, space["kv"])
    ours.load_state_dict(theirs.state_dict())
    cos, sin = torch.ones(1, 5, 8), torch.zeros(1, 5, 8)  # no rotation
    for point in points(space.dims.values()):
        arch = {dim.name: value for dim, value in point.items()}
        space.activate(arch)
        theirs.set_sub_network(arch["embed"], arch["kv"] * arch["share"], arch["kv"], 8)
        x = torch.randn(2, 5, arch["embed"])
        torch.testing.assert_close(ours(x, is_causal=True), theirs(x, cos, sin))


def test_dynamic_linear(modelopt):
    """A space sets both axes of a layer, as their hyperparameters do."""
    plain = nn.Linear(16, 12, dtype=torch.float64)
    space = SearchSpace(out=[3, 7, 12], in_=[4, 9, 16])
    ours = Linear.from_linear(plain, space["in_"], space["out"])
    weight, bias = plain.weight, plain.bias
    theirs = modelopt.DMRegistry.convert(plain)
    for out in space["out"].choices:
        for in_ in space["in_"].choices:
            theirs.out_features, theirs.in_features = out, in_
            space.activate({"out": out, "in_": in_})
            (x,) = parameters((5, in_))
            assert_same(ours(x), theirs(x), [x, weight, bias])
