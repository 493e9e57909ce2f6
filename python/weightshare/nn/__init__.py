"""Modules that replace PyTorch's, layer for layer."""

from weightshare.nn.attention import QKV, MultiheadAttention
from weightshare.nn.conv import Conv2d
from weightshare.nn.depth import Layers, touch
from weightshare.nn.embedding import Embedding, TiedHead
from weightshare.nn.expert_mixture import ArchRouter, Encoding, ExpertMixtureLinear, encode
from weightshare.nn.linear import EntangledLinear, Linear, SlicedLinear
from weightshare.nn.mlp import MLP, GatedMLP
from weightshare.nn.norm import BatchNorm1d, BatchNorm2d, GroupNorm, LayerNorm, RMSNorm
from weightshare.nn.squeeze_excite import SqueezeExcite

__all__ = [
    "MLP",
    "QKV",
    "ArchRouter",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv2d",
    "Embedding",
    "Encoding",
    "EntangledLinear",
    "ExpertMixtureLinear",
    "GatedMLP",
    "GroupNorm",
    "LayerNorm",
    "Layers",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "SlicedLinear",
    "SqueezeExcite",
    "TiedHead",
    "encode",
    "touch",
]
