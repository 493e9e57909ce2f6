"""Inputs, shapes and baselines of :func:`expert_mixture_linear`, for tests and benchmarks."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from weightshare_kernels._cases import Case, Inputs, Maker, Workload, leaves
from weightshare_kernels.ops.expert_mixture_linear import expert_mixture_linear
from weightshare_kernels.ops.sliced_linear.cases import pick, picked


def materialised(x, experts, bias, mix, *, out=None, in_=None) -> Tensor:
    """Sum the scaled slices, then ``F.linear``: the definition of the op and its first baseline."""
    experts = pick(pick(experts, 1, out), 2, in_)
    mix = mix[:, None] if mix.dim() == 1 else pick(mix, 1, out)
    weight = (mix[:, :, None] * experts).sum(0).to(x.dtype)
    if bias is not None:
        bias = (mix * pick(bias, 1, out)).sum(0).to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def einsum(x, experts, bias, mix, *, out=None, in_=None) -> Tensor:
    """The same, the sum left to ``einsum``."""
    experts = pick(pick(experts, 1, out), 2, in_)
    mix = mix.to(x.dtype)
    layer_wise = mix.dim() == 1
    mix = mix if layer_wise else pick(mix, 1, out)
    weight = torch.einsum("m,moi->oi" if layer_wise else "mo,moi->oi", mix, experts)
    bias = torch.einsum("m,mo->o" if layer_wise else "mo,mo->o", mix, pick(bias, 1, out))
    return torch.nn.functional.linear(x, weight, bias)


def sum_of_outputs(x, experts, bias, mix, *, out=None, in_=None) -> Tensor:
    """Every expert's own layer, outputs scaled and summed: M products instead of one."""
    mix = (mix[:, None] if mix.dim() == 1 else pick(mix, 1, out)).to(x.dtype)

    def output(m: int) -> Tensor:
        part = pick(pick(experts[m], 0, out), 1, in_)
        shift = None if bias is None else pick(bias[m], 0, out)
        return mix[m] * torch.nn.functional.linear(x, part, shift)

    return reduce(torch.add, map(output, range(len(experts))))


def _inputs(lead, size, neuron_wise, out=None, in_=None, bias=True):
    count, height, width = size

    def make(m: Maker) -> Inputs:
        rows = m.index(*out) if isinstance(out, tuple) else out
        cols = m.index(*in_) if isinstance(in_, tuple) else in_
        active = picked(cols, width)
        sums = torch.float64 if m.dtype == torch.float64 else torch.float32
        return {
            "x": m.randn(*lead, active),
            "experts": m.randn(count, height, width, scale=max(active, 1) ** -0.5),
            "bias": m.randn(count, height) if bias else None,
            "mix": m.randn(count, height, dtype=sums) if neuron_wise else m.alpha(count),
            "out": rows,
            "in_": cols,
        }

    return make


_QKV = [slice(0, 24), slice(40, 64), slice(80, 104)]
_TESTS = {
    "layer_wise": ((3, 5), (2, 33, 20), False),
    "neuron_wise": ((3, 5), (2, 33, 20), True),
    "one_expert": ((6,), (1, 20, 24), True),
    "three_experts": ((60,), (3, 65, 40), True, 37, 21),
    "six_experts": ((2, 35), (6, 97, 80), False, 64, 50),
    "many_rows": ((1, 1100), (2, 40, 33), True, 37, 21),
    "one_row": ((1,), (2, 50, 70), True, 33, 64),
    "vector": ((), (3, 50, 70), True, 33, 64),
    "span": ((7,), (2, 60, 50), True, slice(10, 44), slice(5, 50), False),
    "qkv_blocks": ((2, 9), (3, 120, 40), True, _QKV, 32),
    "interleaved": ((6,), (2, 40, 33), False, [slice(0, 30, 3), slice(1, 30, 3)], 30),
    "index_rows": ((12,), (2, 90, 50), True, (41, 90)),
    "index_cols": ((13,), (2, 40, 90), True, 31, (47, 90)),
    "index_both": ((70,), (3, 90, 80), False, (52, 90), (33, 80)),
    "no_rows": ((0, 4), (2, 20, 16), True, 8, 8),
    "no_out": ((3,), (2, 20, 16), True, 0, 8),
    "no_in": ((3,), (2, 20, 16), True, 8, 0),
}

CASES = [
    Case(name, _inputs(*arguments), expert_mixture_linear, materialised)
    for name, arguments in _TESTS.items()
]


def dense(inputs: Inputs) -> Workload:
    """The floor: one layer of the active size with weights of its own."""
    part = pick(pick(inputs["experts"][0], 0, inputs["out"]), 1, inputs["in_"])
    bias = pick(inputs["bias"][0], 0, inputs["out"])
    own = [t.detach().clone().requires_grad_() for t in (inputs["x"], part, bias)]
    return Workload(lambda: torch.nn.functional.linear(*own), own)


def _baseline(call):
    return lambda inputs: Workload(lambda: call(**inputs), leaves(inputs))


BASELINES = {
    "dense": dense,
    "materialised": _baseline(materialised),
    "einsum": _baseline(einsum),
    "sum_of_outputs": _baseline(sum_of_outputs),
}


def _bench(name, rows, size, neuron_wise, out=None, in_=None, bars=None) -> Case:
    count, height, width = size
    o, i = out or height, in_ or width
    # All that may be saved: x, the experts, and mix and bias with a row's worth to spare. The mixed
    # weight would add o * i.
    saved = (rows * i + count * height * width + 4 * count * height) / (rows * i + o * i)
    return Case(
        name,
        _inputs((rows,), size, neuron_wise, out, in_),
        expert_mixture_linear,
        materialised,
        BASELINES,
        flops=2 * rows * o * i,
        bytes=lambda itemsize: itemsize * (rows * (o + i) + count * o * i),
        bars={**(bars or {}), "saved": saved},
        tier="bench",
    )


# Ratios are baseline time / our time: dense 1 / 1.3 is "at most 1.3 x one dense layer".
_BAR = {"dense": 1 / 1.3, "materialised": 1.0}

CASES += [
    _bench("bert_fc1_neuron_wise_512_rows", 512, (2, 3072, 768), True, bars=_BAR),
    _bench("bert_fc1_layer_wise_512_rows", 512, (2, 3072, 768), False, bars=_BAR),
    _bench("bert_fc1_sliced_512_rows", 512, (2, 3072, 768), True, 1536, 384),
    _bench("bert_fc1_neuron_wise_4096_rows", 4096, (2, 3072, 768), True),
    _bench("bert_fc1_neuron_wise_8_rows", 8, (2, 3072, 768), True),
    _bench("mt_fc1_2_experts_512_rows", 512, (2, 3072, 640), True),
    _bench("mt_fc1_6_experts_512_rows", 512, (6, 3072, 640), True),
]
