"""Inputs, shapes and baselines of :func:`sliced_weight`, for tests and benchmarks.

The benchmarks measure whole convolutions of the Once-for-All MobileNetV3 space (stages of 24, 40,
80, 112 and 160 channels, expansion 3, 4 or 6, kernels 3, 5 or 7): the convolution is PyTorch's,
what differs is how its weight is taken from the shared one. Sandwiches are the four parts of one
step; the last is a layer of the toy convolution space (channels to 256, kernels 3, 5 or 7).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from weightshare_kernels._cases import Case, Inputs, Maker, Workload
from weightshare_kernels.ops.sliced_linear.cases import pick
from weightshare_kernels.ops.sliced_weight import sliced_weight


def _call(weight: Tensor, selections) -> Tensor:
    return sliced_weight(weight, *selections)


def eager(weight: Tensor, selections) -> Tensor:
    """Plain slicing, spatial axes from the centre: the definition of the op."""
    for dim, spec in enumerate(selections):
        if dim >= 2 and isinstance(spec, int):
            start = (weight.shape[dim] - spec) // 2
            spec = slice(start, start + spec)
        weight = pick(weight, dim, spec)
    return weight


def _test_inputs(shape, selections):
    def make(m: Maker) -> Inputs:
        specs = [m.index(*s) if isinstance(s, tuple) else s for s in selections]
        return {"weight": m.randn(*shape), "selections": specs}

    return make


_BLOCKS = [slice(0, 3), slice(6, 9)]
_TESTS = {
    "whole": ((6, 4, 3, 3), (None, None)),
    "prefix": ((12, 10, 3, 3), (7, 5)),
    "kernel": ((12, 10, 7, 7), (7, 5, 3, 5)),
    "depthwise": ((40, 1, 5, 5), (24, None, 3, 3)),
    "vector": ((20,), (13,)),
    "span": ((12, 10, 3), (slice(2, 9), slice(5, 10))),
    "blocks": ((12, 10, 5, 5), (_BLOCKS, 4, 3, 3)),
    "column_blocks": ((8, 12, 3, 3), (5, _BLOCKS)),
    "index": ((12, 10, 5, 5), ((7, 12), None, 3, 3)),
    "index_both": ((12, 10, 5, 5), ((7, 12), (4, 10), 3, 3)),
    "strided": ((12, 10), (slice(0, 12, 3), _BLOCKS)),
    "five_axes": ((6, 5, 3, 3, 5), (4, 3, 1, 3, 3)),
    "nothing": ((6, 5, 3, 3), (0, 5)),
    "large_prefix": ((200, 150, 3, 3), (120, 71)),  # large enough to share a gradient buffer
    "large_index": ((200, 150, 3, 3), ((90, 200), (31, 150), 1, 3)),
}

CASES = [Case(name, _test_inputs(*spec), _call, eager) for name, spec in _TESTS.items()]


class Layer(NamedTuple):
    """A convolution of stride 1: its whole weight, and the input it sees."""

    shape: tuple[int, int, int, int]  # [O, I, k, k], I being 1 if depthwise
    pixels: int
    batch: int = 16

    @property
    def depthwise(self) -> bool:
        """Whether each channel has its own filter."""
        return self.shape[1] == 1

    def input(self, m: Maker, part) -> Tensor:
        """An image batch as wide as a part of the layer takes, channels last."""
        width = part[0] if self.depthwise else part[1]
        x = m.randn(self.batch, width, self.pixels, self.pixels).detach()
        return x.to(memory_format=torch.channels_last).requires_grad_(m.grad)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution itself, padded to keep the image's size."""
        groups = x.shape[1] if self.depthwise else 1
        return conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups)

    def flops(self, part) -> int:
        """Of one forward pass over a part."""
        return 2 * self.batch * self.pixels**2 * math.prod(part)


def _bench(name: str, layer: Layer, *parts: tuple[int, int, int, int], bars=None) -> Case:
    """One part of a layer, or the parts of a sandwich step, whose gradients are summed."""

    def inputs(m: Maker) -> Inputs:
        weight = m.randn(*layer.shape, scale=math.prod(layer.shape[1:]) ** -0.5)
        return {"weight": weight, **{f"x{n}": layer.input(m, part) for n, part in enumerate(parts)}}

    def step(slicing):
        def outputs(weight, **xs):
            pairs = zip(xs.values(), parts, strict=True)
            return [layer.convolve(x, slicing(weight, part)) for x, part in pairs]

        return outputs

    def call(slicing):
        return lambda **i: torch.cat([y.flatten() for y in step(slicing)(**i)])

    def work(slicing):
        return lambda i: Workload(lambda: step(slicing)(**i), list(i.values()))

    def alone(i: Inputs) -> Workload:
        """The floor: convolutions of the active sizes with weights of their own."""
        own = [eager(i["weight"], part).detach().clone().requires_grad_() for part in parts]
        xs = [x for key, x in i.items() if key != "weight"]
        pairs = list(zip(xs, own, strict=True))
        return Workload(lambda: [layer.convolve(x, w) for x, w in pairs], [*xs, *own])

    return Case(
        name,
        inputs,
        call(_call),
        call(eager),
        {
            "dense": alone,
            "eager": work(eager),
            "contiguous": work(lambda weight, part: eager(weight, part).contiguous()),
        },
        ours=work(_call),
        flops=sum(map(layer.flops, parts)),
        bars=bars or {},
        tier="bench",
    )


_STAGES = {24: 56, 40: 28, 80: 14, 112: 14, 160: 7}  # channels -> pixels a side
_WIDE, _NARROW = Layer((960, 1, 7, 7), 7), Layer((672, 1, 7, 7), 14)

CASES += [
    _bench("depthwise_960_7x7", _WIDE, (640, 1, 5, 5)),
    _bench("depthwise_672_14x14", _NARROW, (448, 1, 3, 3)),
    *[
        _bench(f"expand_{c}", Layer((6 * c, c, 1, 1), pixels), (4 * c, c, 1, 1))
        for c, pixels in _STAGES.items()
    ],
    *[
        _bench(f"project_{c}", Layer((c, 6 * c, 1, 1), pixels), (c, 4 * c, 1, 1))
        for c, pixels in _STAGES.items()
    ],
    _bench(
        "sandwich_depthwise_960_7x7",
        _WIDE._replace(batch=4),
        (960, 1, 7, 7), (640, 1, 5, 5), (640, 1, 3, 3), (480, 1, 3, 3),
    ),
    _bench(
        "sandwich_expand_160",
        Layer((960, 160, 1, 1), 7, 4),
        (960, 160, 1, 1), (640, 160, 1, 1), (640, 160, 1, 1), (480, 160, 1, 1),
    ),
    _bench(
        "sandwich_256_128_7x7",
        Layer((256, 128, 7, 7), 8, 4),
        (256, 128, 7, 7), (128, 64, 5, 5), (128, 128, 3, 3), (64, 64, 3, 3),
        bars={"eager": 1.0},
    ),
]  # fmt: skip
