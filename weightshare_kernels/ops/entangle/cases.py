"""Inputs, shapes and baselines of :func:`entangle`, for tests and benchmarks."""

from __future__ import annotations

import math

from weightshare_kernels._cases import Case, Inputs, Maker, Workload, leaves
from weightshare_kernels.ops.entangle import entangle
from weightshare_kernels.ops.entangle.reference import pad_and_sum


def _inputs(shape, choices):
    def make(m: Maker) -> Inputs:
        return {"weight": m.randn(*shape), "choices": choices, "alpha": m.alpha(len(choices))}

    return make


_TESTS = {
    "vector": ((70,), [(20,), (50,), (70,)]),
    "matrix": ((48, 37), [(16, 10), (48, 37), (33, 20)]),
    "conv": ((12, 10, 7, 7), [(6, 5, 3, 3), (12, 10, 5, 5), (8, 10, 7, 7), (12, 7, 7, 3)]),
    "depthwise": ((40, 1, 5, 5), [(16, 1, 3, 3), (40, 1, 5, 5), (24, 1, 5, 5)]),
    "conv1d_even": ((9, 8, 6), [(9, 8, 6), (4, 8, 3), (9, 2, 4)]),
    "short_of_full": ((20, 16, 5, 5), [(8, 8, 3, 3), (12, 10, 3, 3)]),
    "zero_size": ((12, 8), [(0, 8), (12, 8), (6, 0)]),
    "blocks": (
        (48, 20),
        [((slice(0, 8), slice(24, 32)), 20), (48, 12), ((slice(0, 20), slice(24, 44)), 8)],
    ),
    "empty": ((0, 8), [(0, 8), (0, 4)]),
}

CASES = [
    Case(name, _inputs(*arguments), entangle, pad_and_sum) for name, arguments in _TESTS.items()
]


def _clone(inputs: Inputs) -> Workload:
    """The floor of a pass that reads W once and writes as much: a clone."""
    weight = inputs["weight"]
    return Workload(weight.clone, [weight])


def _bench(name, shape, choices, bars) -> Case:
    return Case(
        name,
        _inputs(shape, choices),
        entangle,
        pad_and_sum,
        {
            "clone": _clone,
            "pad_and_sum": lambda i: Workload(lambda: pad_and_sum(**i), leaves(i)),
        },
        flops=math.prod(shape),
        bytes=lambda itemsize: 2 * itemsize * math.prod(shape),
        bars=bars,
        tier="bench",
    )


CASES += [
    _bench(
        "conv_256_256_7_7",
        (256, 256, 7, 7),
        [(w, w, k, k) for w in (64, 128, 256) for k in (3, 5, 7)],
        {"clone:forward": 0.5, "pad_and_sum": 25.0},
    ),
    _bench(
        "mobilenet_depthwise_960_7_7",
        (960, 1, 7, 7),
        [(w, 1, k, k) for w in (480, 640, 960) for k in (3, 5, 7)],
        {"pad_and_sum": 1.0},
    ),
    _bench(
        "nanogpt_embedding",
        (50304, 768),
        [(50304, d) for d in (384, 576, 768)],
        {"pad_and_sum": 1.0},
    ),
]
