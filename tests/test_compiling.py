"""one_graph: torch.compile takes active sizes as variables and everything else as constant."""

import random

import pytest
import torch
from torch import nn
from weightshare import SearchSpace, one_graph
from weightshare.nn import MLP, GatedMLP, LayerNorm, MultiheadAttention, RMSNorm, SlicedLinear


class Block(nn.Module):
    def __init__(self, space, norm, mlp):
        super().__init__()
        embed = space["embed"]
        self.norm1, self.norm2 = norm(embed), norm(embed)
        self.attn = MultiheadAttention(embed, space["heads"], 8)
        self.mlp = mlp(embed, embed * space["ratio"])

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("parts", [(LayerNorm, MLP), (RMSNorm, GatedMLP)], ids=["vit", "llama"])
def test_one_graph_serves_all_subnets_of_a_block(parts, traced):
    space = SearchSpace(embed=[24, 32, 40], heads=[2, 3, 4], ratio=[1.5, 2, 3])
    torch.manual_seed(0)
    block = Block(space, *parts)
    compiled = traced(block)
    for seed in range(20):
        space.activate(space.sample(random.Random(seed)))
        x = torch.randn(2, 5, space["embed"].value)
        torch.testing.assert_close(compiled(x), block(x))
    assert len(traced.graphs) == 1
    code = traced.graphs[0].code
    assert "floordiv" not in code, "a symbolic division: head sizes should be constants"


def test_layers_with_set_active(traced):
    layer = SlicedLinear(16, 12)
    compiled = traced(layer)
    for out, in_ in ((5, 7), (12, 16), (3, 8), (11, 4)):
        layer.set_active(out=out, in_=in_)
        x = torch.randn(3, in_)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(traced.graphs) == 1


def test_calling_it_again_changes_nothing_and_other_sources_stay():
    with torch.compiler.config.patch(dynamic_sources="L['other']"):
        one_graph()
        once = torch.compiler.config.dynamic_sources
        one_graph()
        assert torch.compiler.config.dynamic_sources == once
        assert once.split(",")[0] == "L['other']"
