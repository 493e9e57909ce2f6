"""Inputs, shapes and baselines of the entangled linear ops, for tests and benchmarks."""

from __future__ import annotations

import math

import torch

from weightshare_kernels import _grid
from weightshare_kernels._cases import Case, Inputs, Maker, Workload, leaves
from weightshare_kernels.ops.entangled_linear import (
    entangled_linear,
    entangled_linear_independent,
)
from weightshare_kernels.ops.entangled_linear.reference import mix, pad_and_sum


def _inputs(lead, size, choices, bias=True):
    def make(m: Maker) -> Inputs:
        return {
            "x": m.randn(*lead, size[1]),
            "weight": m.randn(*size, scale=max(size[1], 1) ** -0.5),
            "bias": m.randn(size[0]) if bias else None,
            "choices": choices,
            "alpha": m.alpha(len(choices)),
        }

    return make


def grid_choices(outs, ins) -> list[tuple[int, int]]:
    """Every pair of an output and an input size."""
    return [(o, i) for o in outs for i in ins]


def _blocks(length: int) -> list[slice]:
    """A prefix of each of three blocks of 16."""
    return [slice(start, start + length) for start in (0, 16, 32)]


_TESTS = {
    "coupled": ((3, 5), (48, 40), [(16, 20), (32, 20), (20, 40), (40, 40), (48, 33)]),
    "all_pairs": ((70,), (96, 64), grid_choices((32, 64, 96), (16, 48, 64))),
    "many_rows": ((150,), (80, 96), grid_choices((33, 80), (40, 96))),
    "one_choice": ((4,), (24, 16), [(24, 16)]),
    "short_of_full": ((9,), (40, 36), [(10, 8), (30, 24)]),
    "repeated_choice": ((2,), (20, 20), [(12, 12), (12, 12), (20, 8)]),
    "zero_size": ((2,), (20, 20), [(12, 0), (0, 12), (20, 20)]),
    "no_rows": ((0,), (20, 20), [(12, 12), (20, 20)]),
    "fused_qkv": ((7,), (48, 20), [(_blocks(n), i) for n in (8, 16) for i in (12, 20)]),
    "interleaved": ((3,), (20, 48), [(12, [slice(i, 24, 3) for i in range(3)]), (20, 48)]),
    "no_bias": ((2, 2), (20, 20), [(12, 12), (20, 20)], False),
}


def independent_reference(x, weight, bias, outs, alpha_out, ins, alpha_in):
    """The outer product of both mixtures, padded and summed."""
    pairs = grid_choices(outs, ins)
    y = pad_and_sum(x, weight, None, pairs, torch.outer(alpha_out, alpha_in).flatten())
    if bias is None:
        return y
    ones = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    return y + pad_and_sum(ones, bias[:, None], None, [(o, 1) for o in outs], alpha_out)[0]


def _independent_inputs(lead, size, outs, ins, bias=True):
    def make(m: Maker) -> Inputs:
        return {
            "x": m.randn(*lead, size[1]),
            "weight": m.randn(*size, scale=size[1] ** -0.5),
            "bias": m.randn(size[0]) if bias else None,
            "outs": outs,
            "alpha_out": m.alpha(len(outs)),
            "ins": ins,
            "alpha_in": m.alpha(len(ins)),
        }

    return make


CASES = [
    Case(name, _inputs(*arguments), entangled_linear, pad_and_sum)
    for name, arguments in _TESTS.items()
] + [
    Case(
        "independent",
        _independent_inputs((3, 5), (48, 40), (16, 30, 48), (10, 40)),
        entangled_linear_independent,
        independent_reference,
    ),
    Case(
        "independent_short_of_full",
        _independent_inputs((30,), (48, 40), (16, 30), (10, 33), False),
        entangled_linear_independent,
        independent_reference,
    ),
    Case(
        "independent_fused_qkv",
        _independent_inputs((5,), (48, 40), [_blocks(8), _blocks(16)], (10, 40)),
        entangled_linear_independent,
        independent_reference,
    ),
]


def _workload(call, inputs: Inputs) -> Workload:
    return Workload(lambda: call(**inputs), leaves(inputs))


def dense(inputs: Inputs) -> Workload:
    """The floor: one linear layer of the largest choice's size, weights of its own."""
    own = [inputs[k].detach().clone().requires_grad_() for k in ("x", "weight", "bias")]
    return Workload(lambda: torch.nn.functional.linear(*own), own)


def materialised(inputs: Inputs) -> Workload:
    """``C * W`` by PyTorch from the grid, then ``F.linear``: the algebra without the kernel."""

    def call(x, weight, bias, choices, alpha):
        grid = _grid.make_grid(weight.shape, choices, alpha)
        factors = _grid.factors((grid.membership @ alpha).view(grid.shape), grid.classes)
        bias = mix(bias, [choice[:1] for choice in choices], alpha)
        return torch.nn.functional.linear(x, weight * factors.to(weight.dtype), bias)

    return _workload(call, inputs)


BASELINES = {
    "dense": dense,
    "pad_and_sum": lambda inputs: _workload(pad_and_sum, inputs),
    "materialised": materialised,
}


def _bench(name, lead, size, choices, bars) -> Case:
    rows = math.prod(lead)
    return Case(
        name,
        _inputs(lead, size, choices),
        entangled_linear,
        pad_and_sum,
        BASELINES,
        flops=2 * rows * size[0] * size[1],
        bytes=lambda itemsize: itemsize * (rows * sum(size) + size[0] * size[1]),
        bars=bars,
        tier="bench",
    )


_12_COUPLED = grid_choices((768, 1024, 1280, 1536), (512, 1024, 1536))
_NANOGPT_FC1 = [(ratio * d, d) for d in (384, 576, 768) for ratio in (2, 3, 4)]
_AUTOFORMER_T_FC1 = [(int(ratio * d), d) for d in (192, 216, 240) for ratio in (3.5, 4)]

CASES += [
    _bench(
        "12_choices_512_rows",
        (512,),
        (1536, 1536),
        _12_COUPLED,
        {"dense": 1 / 1.15, "pad_and_sum": 4.0, "saved": 1.01},
    ),
    _bench("nanogpt_fc1", (12, 224), (3072, 768), _NANOGPT_FC1, {"pad_and_sum": 1.0}),
    _bench("autoformer_t_fc1", (64, 197), (960, 240), _AUTOFORMER_T_FC1, {"pad_and_sum": 1.0}),
]
