"""Stand-alone copies of subnets, and foreign modules bound to a space."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weightshare.export import export, move_hooks
from weightshare.nn import Embedding, Linear
from weightshare.nn.bound import Quotient, bind
from weightshare.nn.depth import Layers
from weightshare.sizes import Blocks
from weightshare.space import SearchSpace


class Attention(nn.Module):
    """As another library would write it: reads its own attributes and parameters."""

    def __init__(self, embed=24, heads=3, head_dim=4, tokens=5):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, head_dim, heads * head_dim
        self.qkv = nn.Linear(embed, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, embed)
        self.pos = nn.Parameter(torch.randn(1, tokens, embed))
        self.register_buffer("mean", torch.zeros(embed))

    def forward(self, x):
        x = x + self.pos - self.mean
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        rows, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(y.reshape(rows, tokens, self.attn_dim))


def elastic_attention(space, **sizes):
    embed, heads = space["embed"], space["heads"]
    module = Attention(**sizes)
    rows = Blocks([heads * 4] * 3, [module.attn_dim] * 3)
    module.qkv = Linear.from_linear(module.qkv, embed, rows)
    module.proj = Linear.from_linear(module.proj, heads * 4, embed)
    axes = {"pos": (1, 5, embed), "mean": (embed,)}
    return bind(module, {"num_heads": heads, "attn_dim": heads * 4}, axes)


@pytest.fixture
def space():
    return SearchSpace(embed=[8, 16, 24], heads=[2, 3])


@pytest.fixture
def bound(space):
    torch.manual_seed(0)
    return elastic_attention(space)


def test_bound_is_the_module(bound, space):
    plain = Attention()
    plain.load_state_dict(bound.state_dict())
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(bound.eval()(x), plain.eval()(x))
    assert isinstance(bound, Attention) and type(bound).__name__ == "Attention"
    assert dict(bound.named_parameters())["pos"].shape == (1, 5, 24)
    space.activate({"embed": 16, "heads": 2})
    assert (bound.num_heads, bound.attn_dim, bound.pos.shape[-1]) == (2, 8, 16)
    with pytest.raises(TypeError, match="bound already"):
        bind(bound)


def test_bound_gradient_and_buffer_reach_the_whole(bound, space):
    space.activate(space.smallest())
    x = torch.randn(2, 5, 8)
    bound(x).sum().backward()
    grad = bound._parameters["pos"].grad
    assert grad[..., :8].abs().min() > 0 and not grad[..., 8:].any()
    mean = bound._buffers["mean"]
    torch.testing.assert_close(mean[:8], 0.1 * (x + bound.pos).detach().mean((0, 1)))
    assert not mean[8:].any()


def test_bound_mixture(bound, space):
    """A one-hot mixture is the subnet, padded with zeros."""
    bound.eval()
    x = torch.randn(2, 5, 8)
    space.activate({"embed": 8, "heads": 2})
    want = bound(x)
    alphas = {"embed": torch.tensor([1.0, 0, 0]), "heads": torch.tensor([1.0, 0])}
    for alpha in alphas.values():
        alpha.requires_grad_()
    space.mix(alphas)
    assert bound.num_heads == 3
    got = bound(F.pad(x, (0, 16)))
    torch.testing.assert_close(got[..., :8], want)
    assert not got[..., 8:].any()
    got.square().sum().backward()
    assert all(alpha.grad.abs().max() > 0 for alpha in alphas.values())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_bound_copies(bound, space, duplicate):
    """A copy has a space of its own: it stays at the sizes that were active."""
    space.activate(space.smallest())
    twin = duplicate(bound)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(twin.eval()(x), bound.eval()(x))
    assert type(twin) is type(bound)
    space.activate(space.largest())
    assert (twin.num_heads, bound.num_heads) == (2, 3)


def test_bind_checks(space):
    with pytest.raises(AttributeError, match="num_head"):
        bind(Attention(), {"num_head": space["heads"]})
    with pytest.raises(AttributeError, match="no parameter or buffer post"):
        bind(Attention(), {}, {"post": (1, 5, space["embed"])})
    with pytest.raises(ValueError, match=r"pos: has shape \(1, 5, 16\)"):
        bind(Attention(16), {}, {"pos": (1, 5, space["embed"])})


def test_quotient_of_a_mixture_is_that_of_the_wholes():
    space = SearchSpace(heads=[4, 8], kv=[2, 4])
    quotient = Quotient(space["heads"], space["kv"])
    space.activate({"heads": 4, "kv": 4})
    assert quotient.value == 1 and quotient.max == 2


@pytest.mark.parametrize("training", [True, False])
def test_export_of_bound(bound, space, training):
    space.activate({"embed": 16, "heads": 2})
    bound.train(training)
    small = export(bound)
    assert type(small) is Attention and type(small.qkv) is nn.Linear
    assert (small.num_heads, small.attn_dim, small.training) == (2, 8, training)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(small(x), bound(x))
    assert b"weightshare" not in pickle.dumps(small), "the copy refers to the supernet's code"


class Model(nn.Module):
    """Foreign code around elastic layers: tied table, a shared layer, a hook, a list of blocks."""

    def __init__(self, space):
        super().__init__()
        embed = space["embed"]
        table = nn.Embedding(50, 24)
        head = nn.Linear(24, 50, bias=False)
        head.weight = table.weight
        self.table = Embedding.from_embedding(table, embed)
        blocks = [elastic_attention(space) for _ in range(3)]
        self.blocks = Layers(nn.Sequential(*blocks), space["depth"])
        self.again = self.blocks[0]
        self.fixed = nn.Linear(7, 7)
        self.head = Linear.from_linear(head, embed, 50)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, tokens):
        return self.head(self.again(self.blocks(self.table(tokens))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    space = SearchSpace(embed=[8, 16, 24], heads=[2, 3], depth=[1, 2, 3])
    model = Model(space)
    space.activate({"embed": 16, "heads": 2, "depth": 2})
    return model.eval()


def test_export_of_a_model(model):
    tokens = torch.randint(50, (2, 5))
    small = export(model)
    torch.testing.assert_close(small(tokens), model(tokens))
    assert type(small.blocks) is nn.Sequential and len(small.blocks) == 2
    assert small.head.weight is small.table.weight, "tied weights stay tied"
    assert small.again is small.blocks[0], "a shared module stays shared"
    assert small.steps == 3 and not small.training
    for name, tensor in small.state_dict().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    ours = {p.data_ptr() for p in model.parameters()}
    assert not ours & {p.data_ptr() for p in small.parameters()}
    assert b"weightshare" not in pickle.dumps(small)


def test_checkpoint_of_an_export(model):
    tokens = torch.randint(50, (2, 5))
    small, file = export(model), io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(small)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(tokens), small(tokens))


def test_untied_where_the_active_parts_differ(model):
    model.table.embed = 24  # the table stays whole, the head does not
    model.table._bind(24)
    small = export(model)
    assert small.table.weight.shape == (50, 24) and small.head.weight.shape == (50, 16)


def test_hooks_are_kept(model):
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append("elastic"))
    model.fixed.register_forward_hook(lambda *_: calls.append("plain"))
    small = export(model)
    small(torch.randint(50, (1, 5)))
    small.fixed(torch.randn(1, 7))
    assert calls == ["elastic", "plain"]


def test_moved_hooks_stay_in_order():
    calls, old, new = [], nn.Linear(1, 1), nn.Linear(1, 1)
    new.register_forward_hook(lambda *_: calls.append("new"))
    old.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True)
    old.register_forward_hook(lambda *_: calls.append("old"))
    move_hooks(old, new)
    new(torch.randn(1, 1))
    assert calls == ["pre", "new", "old"]


def test_whole_weights_are_never_copied(model, monkeypatch):
    elastic = {id(model.table.weight), *(id(block.qkv.weight) for block in model.blocks)}
    copied, plain = [], nn.Parameter.__deepcopy__
    monkeypatch.setattr(
        nn.Parameter, "__deepcopy__", lambda p, memo: (copied.append(id(p)), plain(p, memo))[1]
    )
    export(model)
    assert id(model.fixed.weight) in copied and not elastic & set(copied)


def test_frozen_parameters_stay_frozen(model):
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in export(model).parameters())


def test_export_of_one_layer(space):
    layer = Linear(space["embed"], 5)
    space.activate(space.smallest())
    assert type(export(layer)) is nn.Linear and export(layer).in_features == 8


def test_subclass_of_an_elastic_layer(space):
    class Mine(Linear):
        pass

    assert type(export(nn.Sequential(Mine(space["embed"], 5)))[0]) is nn.Linear
