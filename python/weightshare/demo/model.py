"""The supernet: one set of weights for every width and depth of :class:`plain.Network`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightshare.demo.plain import Network
from weightshare.nn import EntangledLinear


class Subnet(NamedTuple):
    """One member of the search space."""

    width: int
    depth: int


class ElasticRMSNorm(nn.Module):
    """RMS normalisation over a prefix of the features, or over a mixture of prefixes.

    A slice is normalised by the statistics of the slice. A mixture is normalised by the mixture
    of those statistics, so that at a one-hot alpha it equals the slice.

    Args:
        features: size of the affine weight.
        sizes: K prefix sizes, for the mixture.
    """

    inside: Tensor  # [K, features]: 1 where prefix k covers the feature
    mean: Tensor  # [K, features]: the same over the size of the prefix

    def __init__(self, features: int, sizes: Sequence[int]):
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.ones(features))
        inside = torch.arange(features) < torch.tensor(sizes)[:, None]
        self.register_buffer("inside", inside.float(), persistent=False)
        self.register_buffer("mean", inside / torch.tensor(sizes)[:, None], persistent=False)

    def forward(self, x: Tensor, alpha: Tensor | None = None) -> Tensor:
        """Normalise ``[..., n]``, n <= features; with alpha ``[K]``, n = features."""
        if alpha is None:
            size = x.shape[-1]
            return F.rms_norm(x, (size,), self.weight[:size], self.eps)
        square = x.square() @ (alpha @ self.mean)
        scale = self.weight * (alpha @ self.inside)
        return x * (square + self.eps).rsqrt()[..., None] * scale

    def export(self, size: int) -> nn.RMSNorm:
        """The first ``size`` features as a plain module."""
        norm = nn.RMSNorm(size, eps=self.eps)
        norm.weight = nn.Parameter(self.weight.detach()[:size].clone())
        return norm


class EagerLinear(EntangledLinear):
    """The same layer as eager PyTorch slices it: the baseline of the timing."""

    def forward(self, x: Tensor, alpha: Tensor | None = None) -> Tensor:
        """``F.linear`` on views of the weight."""
        out, in_ = self.active
        bias = None if self.bias is None else self.bias[:out]
        return F.linear(x, self.weight[:out, :in_], bias)


class Supernet(nn.Module):
    """Every :class:`Network` of some widths and depths, in one set of weights.

    Args:
        features: size of the input.
        classes: size of the output.
        widths: sizes of the residual stream, ascending.
        depths: numbers of blocks, ascending.
        linear: class of the linear layers.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        widths: Sequence[int],
        depths: Sequence[int],
        linear: type[EntangledLinear] = EntangledLinear,
    ):
        super().__init__()
        self.features, self.classes = features, classes
        self.widths, self.depths = tuple(widths), tuple(depths)
        width = max(widths)
        square = [(w, w) for w in widths]
        self.stem = linear(features, width, choices=[(w, features) for w in widths])
        self.norms = nn.ModuleList(ElasticRMSNorm(width, widths) for _ in range(max(depths)))
        self.layers = nn.ModuleList(
            linear(width, width, choices=square) for _ in range(max(depths))
        )
        self.norm = ElasticRMSNorm(width, widths)
        self.head = linear(width, classes, choices=[(classes, w) for w in widths])
        self.set_active(self.largest)

    @property
    def blocks(self) -> list[tuple[ElasticRMSNorm, EntangledLinear]]:
        """Norm and layer of every block."""
        return list(zip(self.norms, self.layers, strict=True))  # type: ignore[arg-type]

    @property
    def subnets(self) -> list[Subnet]:
        """The whole search space, by depth, then width."""
        return [Subnet(w, d) for d in self.depths for w in self.widths]

    @property
    def smallest(self) -> Subnet:
        """The narrowest and shallowest subnet."""
        return Subnet(min(self.widths), min(self.depths))

    @property
    def largest(self) -> Subnet:
        """The subnet of all weights."""
        return Subnet(max(self.widths), max(self.depths))

    def set_active(self, subnet: Subnet) -> Supernet:
        """Make :meth:`forward` run one subnet; returns the supernet."""
        width, self.depth = subnet
        self.stem.set_active(out=width)
        for _, layer in self.blocks:
            layer.set_active(out=width, in_=width)
        self.head.set_active(out=self.classes, in_=width)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the active subnet."""
        x = self.stem(x)
        for norm, layer in self.blocks[: self.depth]:
            x = x + layer(norm(x)).relu()
        return self.head(self.norm(x))

    def mix(self, x: Tensor, width_alpha: Tensor, depth_alpha: Tensor) -> Tensor:
        """Logits of the mixture of all subnets.

        Widths are mixed in the weights, depths in the outputs of the blocks that may be last.

        Args:
            x: ``[..., features]``.
            width_alpha: ``[len(widths)]``, summing to 1.
            depth_alpha: ``[len(depths)]``, summing to 1.
        """
        x = self.stem(x, width_alpha)
        total = torch.zeros_like(x)
        for depth, (norm, layer) in enumerate(self.blocks, 1):
            x = x + layer(norm(x, width_alpha), width_alpha).relu()
            if depth in self.depths:
                total = total + depth_alpha[self.depths.index(depth)] * x
        return self.head(self.norm(total, width_alpha), width_alpha)

    def export(self, subnet: Subnet) -> Network:
        """Copy one subnet into plain modules with weights of their own."""
        self.set_active(subnet)
        network = Network(self.features, self.classes, *subnet)
        network.stem, network.head = self.stem.export(), self.head.export()
        network.norm = self.norm.export(subnet.width)
        for number, (norm, layer) in enumerate(self.blocks[: subnet.depth]):
            network.norms[number] = norm.export(subnet.width)
            network.layers[number] = layer.export()
        return network.train(self.training)

    def parameter_counts(self) -> Tensor:
        """Parameters of every subnet, ``[len(widths), len(depths)]``."""
        stem, head = self.features + 1, self.classes
        rows = [
            [w * (stem + 1 + head) + head + d * (w * w + 2 * w) for d in self.depths]
            for w in self.widths
        ]
        return torch.tensor(rows, dtype=torch.float32)
