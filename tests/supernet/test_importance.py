"""Sorting by importance: what is permuted, that it is right, and what is left alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weightshare.nn import Linear
from weightshare.nn.attention import MultiheadAttention
from weightshare.nn.bound import bind
from weightshare.nn.conv import Conv2d
from weightshare.nn.embedding import Embedding, TiedHead
from weightshare.nn.mlp import MLP, GatedMLP
from weightshare.nn.norm import BatchNorm2d, GroupNorm, LayerNorm
from weightshare.space import PerLayer, SearchSpace
from weightshare.supernet import Supernet, sort_by_importance


def randomised(model):
    torch.manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 1.0)
            if isinstance(tensor, nn.Parameter):
                tensor.data *= torch.randn_like(tensor).sign()
    return model.double().eval()


def changed(model, space, x, keep="largest"):
    """Sort; require the same outputs of the largest subnet; say what was permuted."""
    supernet = Supernet(randomised(model), space)
    before, state = model(x), {n: t.clone() for n, t in model.state_dict().items()}
    sizes = {s.module: s.size.max for s in sort_by_importance(supernet, keep)}
    torch.testing.assert_close(model(x), before)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, state[n])}
    return sizes, moved


class Block(nn.Module):
    def __init__(self, embed, hidden, heads, mlp=MLP, fused=True, kv_heads=None, layout="blocks"):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(embed), LayerNorm(embed)
        self.attn = MultiheadAttention(embed, heads, 4, kv_heads, fused=fused, layout=layout)
        self.mlp = mlp(embed, hidden) if mlp is MLP else mlp(embed, hidden, fused=fused)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TestTransformers:
    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("mlp", [MLP, GatedMLP])
    def test_heads_and_hidden_units(self, mlp, fused):
        space = SearchSpace(ratio=[1, 2], heads=[2, 4])
        heads, hidden = space["heads"], space["ratio"] * 12
        blocks = nn.Sequential(*[Block(12, hidden, heads, mlp, fused) for _ in range(2)])
        sizes, moved = changed(blocks, space, torch.randn(2, 5, 12, dtype=torch.float64))
        assert sizes == {f"{i}.{name}": n for i in "01" for name, n in [("attn", 16), ("mlp", 24)]}
        left = {n for n in blocks.state_dict() if "norm" in n or n.endswith("proj.bias")}
        left |= {n for n in blocks.state_dict() if n.endswith("fc2.bias")}
        assert moved >= set(blocks.state_dict()) - left
        assert not [n for n in moved if "norm" in n]

    def test_the_stream_itself(self):
        space = SearchSpace(embed=[8, 16], ratio=PerLayer([1, 2], 2), heads=[2, 4])
        embed, heads = space["embed"], space["heads"]

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.tokens = Embedding(11, embed)
                self.place = nn.Parameter(torch.zeros(1, 5, 16))
                layers = [Block(embed, r * embed, heads) for r in space["ratio"]]
                self.layers = nn.Sequential(*layers)
                self.norm = LayerNorm(embed)
                self.head = TiedHead(self.tokens)

            def forward(self, x):
                return self.head(self.norm(self.layers(self.tokens(x) + self.place)))

        x = torch.randint(11, (2, 5))
        sizes, moved = changed(Model(), space, x)  # place is not known to be on the stream
        assert "" not in sizes and len(sizes) == 4 and "place" not in moved
        model = bind(Model(), parameters={"place": (1, 5, embed)})
        sizes, moved = changed(model, space, x)
        assert sizes[""] == 16 and len(sizes) == 5
        assert {"place", "tokens.weight", "norm.weight", "layers.0.norm1.bias"} <= moved

    @pytest.mark.parametrize(
        "kv_heads, layout", [(2, "blocks"), (1, "blocks"), (None, "interleaved")]
    )
    def test_heads_in_an_order_stay(self, kv_heads, layout):
        space = SearchSpace(ratio=[1, 2], heads=[2, 4])
        block = Block(8, space["ratio"] * 8, space["heads"], kv_heads=kv_heads, layout=layout)
        sizes, _ = changed(block, space, torch.randn(2, 5, 8, dtype=torch.float64))
        assert sizes == {"mlp": 16}

    @pytest.mark.parametrize("elastic_kv", [True, False])
    def test_grouped_heads_of_layers_that_lie_flat(self, elastic_kv):
        space = SearchSpace(heads=[2, 4], kv=[1, 2])
        width, kv = space["heads"] * 4, space["kv"] * 4 if elastic_kv else 8

        class Flat(nn.Module):
            def __init__(self):
                super().__init__()
                make = Linear if elastic_kv else (lambda i, o: nn.Linear(i, o))
                self.q, self.k, self.v = Linear(8, width), make(8, kv), make(8, kv)
                self.o = Linear(width, 8)

            def forward(self, x):
                q, k, v = (
                    f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v)
                )
                y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
                return self.o(y.transpose(1, 2).flatten(2))

        sizes, moved = changed(Flat(), space, torch.randn(2, 5, 8, dtype=torch.float64))
        assert sizes == {} and not moved


class Residual(nn.Module):
    """An inverted residual block, with squeeze-excite."""

    def __init__(self, width, mid, norm=BatchNorm2d):
        super().__init__()
        self.expand, self.bn1 = Conv2d(width, mid, 1), norm(mid)
        self.depthwise, self.bn2 = Conv2d(mid, mid, 3, padding="auto", groups=mid), norm(mid)
        self.reduce, self.excite = Conv2d(mid, 4, 1), Conv2d(4, mid, 1)
        self.project, self.bn3 = Conv2d(mid, width, 1), BatchNorm2d(width)

    def forward(self, x):
        y = F.relu(self.bn2(self.depthwise(F.relu(self.bn1(self.expand(x))))))
        scale = self.excite(F.relu(self.reduce(y.mean((2, 3), keepdim=True))))
        return x + self.bn3(self.project(y * scale.sigmoid()))


class TestConvolutions:
    def test_channels_inside_a_block(self):
        space = SearchSpace(expand=PerLayer([3, 4, 6], 2))
        blocks = nn.Sequential(*[Residual(6, (e * 6).rounded(4)) for e in space["expand"]])
        sizes, moved = changed(blocks, space, torch.randn(2, 6, 5, 5, dtype=torch.float64))
        assert sizes == {"0": 36, "1": 36}
        assert {"0.bn1.running_var", "0.depthwise.weight", "0.excite.bias"} <= moved
        assert not [n for n in moved if "bn3" in n or "project.bias" in n]

    @pytest.mark.parametrize("known", [True, False])
    def test_norms_of_other_libraries(self, known):
        space = SearchSpace(expand=[2, 4])
        mid = space["expand"] * 6
        names = ("weight", "bias", "running_mean", "running_var")

        def norm(size):
            layer = nn.BatchNorm2d(size.max)
            return bind(layer, parameters={n: (size,) for n in names}) if known else layer

        model = Residual(6, mid, norm)
        sizes, moved = changed(model, space, torch.randn(2, 6, 5, 5, dtype=torch.float64))
        assert sizes == ({"": 24} if known else {})
        assert ("bn1.running_var" in moved) == known

    def test_a_group_norm_keeps_its_channels(self):
        space = SearchSpace(expand=[2, 4])
        mid = space["expand"] * 6
        model = Residual(6, mid, lambda size: GroupNorm(4, size, affine=False))
        sizes, moved = changed(model, space, torch.randn(2, 6, 5, 5, dtype=torch.float64))
        assert sizes == {} and not moved


class Chain(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b, self.c = Linear(5, width), Linear(width, width), Linear(width, 2)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class TestOrder:
    def test_the_most_important_come_first(self):
        space = SearchSpace(width=[2, 4])
        model = nn.Sequential(Linear(3, space["width"]), nn.ReLU(), Linear(space["width"], 1))
        with torch.no_grad():
            model[2].weight.copy_(torch.tensor([[0.5, -3.0, 1.0, 2.0]]))
        (done,) = sort_by_importance(Supernet(model, space))
        assert done.order.tolist() == [1, 3, 2, 0]
        assert model[2].weight.tolist() == [[-3.0, 2.0, 1.0, 0.5]]

    def test_heads_move_whole(self):
        space = SearchSpace(heads=[1, 3])
        model = MultiheadAttention(6, space["heads"], 2)
        with torch.no_grad():
            model.proj.weight.copy_(torch.tensor([1.0, 9, 4, 4, 9, 8]).expand(6, 6))
            rows = model.qkv.bias.copy_(torch.arange(18.0)).clone()
        (done,) = sort_by_importance(Supernet(model, space))
        assert done.order.tolist() == [2, 0, 1]
        wanted = torch.tensor([4, 5, 0, 1, 2, 3])
        assert torch.equal(model.qkv.bias, rows[torch.cat([wanted, wanted + 6, wanted + 12])])

    def test_a_chain_of_layers_of_one_width(self):
        space = SearchSpace(width=[4, 7])
        x = torch.randn(3, 5, dtype=torch.float64)
        sizes, moved = changed(Chain(space["width"]), space, x)
        assert sizes == {"": 7} and moved == {
            "a.weight",
            "a.bias",
            "b.weight",
            "b.bias",
            "c.weight",
        }

    def test_all_allowed_subnets_can_be_kept(self):
        space = SearchSpace(width=[2, 4, 6, 9])
        space.restrict("width", [4, 9])
        model, x = randomised(Chain(space["width"])), torch.randn(3, 5, dtype=torch.float64)

        def outputs():
            found = {}
            for width in (4, 9):
                space.activate({"width": width})
                found[width] = model(x)
            return found

        before = outputs()
        (done,) = sort_by_importance(Supernet(model, space), keep="allowed")
        torch.testing.assert_close(outputs(), before)
        assert done.order.tolist() != list(range(9))
        assert set(done.order[:4].tolist()) == set(range(4))
        again = sort_by_importance(Supernet(model, space), keep="allowed")[0].order
        assert again.tolist() == list(range(9))
        with pytest.raises(ValueError, match="keep: expected 'largest' or 'allowed'"):
            sort_by_importance(Supernet(model, space), keep="all")

    def test_tied_modules_are_permuted_once(self):
        space = SearchSpace(hidden=[4, 8])
        mlp = MLP(5, space["hidden"])
        model = nn.Sequential(mlp, nn.Sequential(mlp))
        other = MLP(5, space["hidden"])
        other.fc1.weight, other.fc1.bias = mlp.fc1.weight, mlp.fc1.bias
        x = torch.randn(3, 5, dtype=torch.float64)
        assert changed(model, space, x)[0] == {"0": 8}
        # A weight that two modules share, whose others they do not: permuting one breaks the other.
        assert changed(nn.Sequential(mlp, other), space, x) == ({}, set())
