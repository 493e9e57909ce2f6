"""Inputs, shapes and baselines of the entangled linear ops, for tests and benchmarks."""

from __future__ import annotations

import torch

from weightshare_kernels._cases import Case, Inputs, Maker
from weightshare_kernels.ops.entangled_linear import (
    entangled_linear,
    entangled_linear_independent,
)
from weightshare_kernels.ops.entangled_linear.reference import pad_and_sum


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


_TESTS = {
    "coupled": ((3, 5), (48, 40), [(16, 20), (32, 20), (20, 40), (40, 40), (48, 33)]),
    "all_pairs": ((70,), (96, 64), grid_choices((32, 64, 96), (16, 48, 64))),
    "many_rows": ((150,), (80, 96), grid_choices((33, 80), (40, 96))),
    "one_choice": ((4,), (24, 16), [(24, 16)]),
    "short_of_full": ((9,), (40, 36), [(10, 8), (30, 24)]),
    "repeated_choice": ((2,), (20, 20), [(12, 12), (12, 12), (20, 8)]),
    "zero_size": ((2,), (20, 20), [(12, 0), (0, 12), (20, 20)]),
    "no_rows": ((0,), (20, 20), [(12, 12), (20, 20)]),
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
]
