"""Squeeze-and-excitation whose sizes are dims of a search space."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from weightshare.nn.conv import Conv2d
from weightshare.nn.elastic import Axis
from weightshare.sizes import Product


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate that sees the mean of all: sliced, or mixed.

    ``x * gate(expand(act(reduce(mean(x)))))``. State-dict keys are those of timm's
    ``SqueezeExcite``: ``conv_reduce`` and ``conv_expand``, 1x1 convolutions.

    Args:
        channels: a size, or an int where it is fixed.
        reduced: size between the two convolutions; by default a quarter of the channels, rounded
            to a multiple of 8 as MobileNetV3 does, so that it follows the active channels.
        act: makes the activation.
        gate: makes the gate; MobileNetV3 has ``nn.Hardsigmoid``.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        Input and output ``[N, channels, H, W]``: the active channels, all of them when mixed.

    Source: Squeeze-and-Excitation (Hu et al., 2018); elastic as in Once-for-All (2020).
    """

    conv_reduce: nn.Conv2d
    act1: nn.Module
    conv_expand: nn.Conv2d
    gate: nn.Module

    def __init__(
        self,
        channels: Axis,
        reduced: Axis | None = None,
        act: Callable[[], nn.Module] = nn.ReLU,
        gate: Callable[[], nn.Module] = nn.Sigmoid,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if reduced is None:
            reduced = Product((channels, 0.25), 8)
        self.conv_reduce = Conv2d(channels, reduced, 1, device=device, dtype=dtype)
        self.act1 = act()
        self.conv_expand = Conv2d(reduced, channels, 1, device=device, dtype=dtype)
        self.gate = gate()

    @classmethod
    def from_squeeze_excite(cls, module: nn.Module, channels: Axis, reduced: Axis) -> SqueezeExcite:
        """Make this module out of timm's, or another with the same four children.

        The parameters are taken over, not copied, and so are the activation and the gate;
        training mode is kept.

        Args:
            module: has ``conv_reduce``, ``act1``, ``conv_expand`` and ``gate``.
            channels: size of its input and output.
            reduced: size between its convolutions.

        Raises:
            TypeError: it has no such children.
            ValueError: the sizes do not fit its weights, or these are not of 1x1 convolutions.
        """
        children: dict[str, Any] = dict(module.named_children())
        missing = {"conv_reduce", "act1", "conv_expand", "gate"} - children.keys()
        if missing:
            raise TypeError(f"module: {type(module).__name__} has no {', '.join(sorted(missing))}")
        found = cls._of(
            Conv2d.from_conv2d(children["conv_reduce"], channels, reduced),
            children["act1"],
            Conv2d.from_conv2d(children["conv_expand"], reduced, channels),
            children["gate"],
        )
        for name in ("conv_reduce", "conv_expand"):
            shape = tuple(found.get_parameter(f"{name}.weight").shape)
            if shape[2:] != (1, 1):
                raise ValueError(f"module: {name} is no 1x1 convolution, its weight is {shape}")
        return found.train(module.training)

    @classmethod
    def _of(
        cls, conv_reduce: nn.Conv2d, act1: nn.Module, conv_expand: nn.Conv2d, gate: nn.Module
    ) -> SqueezeExcite:
        found = cls.__new__(cls)
        nn.Module.__init__(found)
        found.conv_reduce, found.act1 = conv_reduce, act1
        found.conv_expand, found.gate = conv_expand, gate
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of x ``[N, channels, H, W]``."""
        squeezed = self.act1(_pointwise(self.conv_reduce, x.mean((2, 3))))
        gate = self.gate(_pointwise(self.conv_expand, squeezed))
        return x * gate[:, :, None, None]

    def export(self) -> SqueezeExcite:
        """The active part as a module of the same kind, of plain convolutions of their own."""
        found = self._of(
            _alone(self.conv_reduce),
            copy.deepcopy(self.act1),
            _alone(self.conv_expand),
            copy.deepcopy(self.gate),
        )
        return found.train(self.training)


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution of ``[N, C]``: as a product, four times as fast as ``conv2d`` on a CPU."""
    weight, bias = conv.weight, conv.bias
    if isinstance(conv, Conv2d):
        weight, bias = conv.effective(x.shape[1])
    return F.linear(x, weight.flatten(1), bias)


def _alone(conv: nn.Conv2d) -> nn.Conv2d:
    """The active part as a plain convolution; one that is plain already is copied."""
    return conv.export() if isinstance(conv, Conv2d) else copy.deepcopy(conv)
