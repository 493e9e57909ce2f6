"""Inputs, shapes and baselines of :func:`grouped_sliced_linear`, for tests and benchmarks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from weightshare_kernels._cases import Case, Inputs, Maker, Workload, leaves
from weightshare_kernels.ops.grouped_sliced_linear import grouped_sliced_linear
from weightshare_kernels.ops.sliced_linear import sliced_linear


def pieces(x, weight, bias, sizes, outs=None, ins=None, linear=None) -> list[Tensor]:
    """One linear layer per group on slices: what is written without the op."""
    found, start = [], 0
    for number, size in enumerate(sizes):
        out = weight.shape[0] if outs is None else outs[number]
        in_ = weight.shape[1] if ins is None else ins[number]
        rows = x[start : start + size, :in_]
        start += size
        if linear is not None:
            found.append(linear(rows, weight, bias, out=out, in_=in_))
            continue
        shift = None if bias is None else bias[:out]
        found.append(torch.nn.functional.linear(rows, weight[:out, :in_], shift))
    return found


def eager(x, weight, bias=None, *, sizes, outs=None, ins=None) -> Tensor:
    """The definition: the pieces, padded to one width and put together."""
    parts = pieces(x, weight, bias, sizes, outs, ins)
    width = max(part.shape[1] for part in parts)
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])


def _inputs(size, sizes, outs=None, ins=None, bias=True, columns=None):
    columns = columns or (size[1] if ins is None else max(ins))

    def make(m: Maker) -> Inputs:
        return {
            "x": m.randn(sum(sizes), columns),
            "weight": m.randn(*size, scale=max(size[1], 1) ** -0.5),
            "bias": m.randn(size[0]) if bias else None,
            "sizes": sizes,
            "outs": outs,
            "ins": ins,
        }

    return make


_TESTS = {
    "rows_of_8_widths": ((64, 40), [1] * 8, [8 * i for i in range(1, 9)]),
    "widest_first": ((65, 41), [3, 2, 4], [65, 33, 7]),
    "any_order": ((65, 41), [3, 2, 4, 1], [33, 65, 7, 33]),
    "ins_alone": ((33, 70), [2, 1, 3], None, [17, 70, 40]),
    "nested": ((48, 80), [2, 3, 2], [48, 24, 12], [80, 40, 20]),
    "crossed": ((48, 80), [2, 3, 2, 4], [48, 24, 12, 30], [20, 40, 80, 33]),
    "crossed_many_rows": ((48, 80), [22, 31, 0, 40], [48, 24, 12, 30], [20, 40, 80, 33]),
    "nested_many_rows": ((97, 80), [70, 64, 61, 5], [97, 64, 31, 33], [80, 50, 17, 80], False),
    "one_group": ((33, 20), [5], [21], [13]),
    "whole": ((33, 20), [2, 3]),
    "empty_groups": ((33, 20), [0, 3, 0, 2, 0], [33, 8, 20, 16, 0], [20, 5, 20, 20, 7]),
    "no_rows": ((20, 16), [0, 0], [8, 20], [4, 16]),
    "zero_widths": ((20, 16), [3, 2, 2], [0, 12, 9], [9, 0, 5]),
    "zero_widths_many_rows": ((20, 16), [33, 22, 12], [0, 12, 9], [9, 0, 5]),
    "no_outputs": ((20, 16), [3, 2], [0, 0], [4, 16]),
    "no_inputs": ((20, 16), [3, 2], [4, 20], [0, 0]),
    "wide_x": ((20, 16), [3, 2], [8, 20], [4, 16], True, 27),
    "narrow_x": ((20, 16), [3, 2], [8, 20], [4, 9]),
}

CASES = [
    Case(name, _inputs(*arguments), grouped_sliced_linear, eager)
    for name, arguments in _TESTS.items()
]


def _workload(call, inputs: Inputs) -> Workload:
    return Workload(lambda: call(**inputs), leaves(inputs))


def padded(x, weight, bias, sizes, outs, ins) -> Tensor:
    """Every row through the widest layer, zeros and a mask for the rest: no slicing at all."""
    count = torch.tensor(sizes, device=x.device)

    def mask(widths, full):
        widths = torch.tensor(widths or [full] * len(sizes), device=x.device)
        used = torch.arange(int(widths.max()), device=x.device) < widths[:, None]
        return used.to(x.dtype).repeat_interleave(count, 0, output_size=x.shape[0])

    rows, cols = mask(outs, weight.shape[0]), mask(ins, weight.shape[1])
    width, depth = rows.shape[1], cols.shape[1]
    shift = None if bias is None else bias[:width]
    return torch.nn.functional.linear(x[:, :depth] * cols, weight[:width, :depth], shift) * rows


def dense(inputs: Inputs) -> Workload:
    """The floor of the arithmetic: each group through a layer of its size, weights of its own."""
    x, weight, bias, sizes, outs, ins = inputs.values()
    layers, own = [], []
    for number, rows in enumerate(x.split(sizes)):
        out = weight.shape[0] if outs is None else outs[number]
        in_ = weight.shape[1] if ins is None else ins[number]
        parts = [rows[:, :in_], weight[:out, :in_]] + ([] if bias is None else [bias[:out]])
        parts = [t.detach().clone().requires_grad_() for t in parts]
        layers.append(partial(torch.nn.functional.linear, *parts))
        own += parts
    return Workload(lambda: [layer() for layer in layers], own)


def read(inputs: Inputs) -> Workload:
    """The floor of the memory: a sum over the weight, which reads it once."""
    weight = inputs["weight"]
    return Workload(lambda: weight.sum(), [weight])


BASELINES = {
    "loop": lambda inputs: _workload(pieces, inputs),
    "loop_sliced_linear": lambda inputs: _workload(partial(pieces, linear=sliced_linear), inputs),
    "padded": lambda inputs: _workload(padded, inputs),
}


def _bench(name, size, sizes, outs, ins, bars, bias=False) -> Case:
    used = list(zip(sizes, outs or [size[0]] * 9, ins or [size[1]] * 9, strict=False))
    area = max(outs or size[:1]) * max(ins or size[1:])
    serving = sum(sizes) <= 16
    return Case(
        name,
        _inputs(size, sizes, outs, ins, bias),
        grouped_sliced_linear,
        eager,
        {**BASELINES, **({"read": read} if serving else {"dense": dense})},
        flops=sum(2 * n * o * i for n, o, i in used),
        bytes=lambda itemsize: itemsize * (area + sum(n * (o + i) for n, o, i in used)),
        bars=bars,
        tier="bench",
    )


def _mlp(rows: int, bars) -> Case:
    """A parallel sandwich step: four AutoFormer-S blocks' layers in one pass, super 448 x 1792."""
    sizes, wide, narrow = [rows] * 4, [1792, 1344, 1120, 960], [448, 384, 320, 320]

    def inputs(m: Maker) -> Inputs:
        return {
            "x": m.randn(4 * rows, 448),
            "w1": m.randn(1792, 448, scale=448**-0.5),
            "b1": m.randn(1792),
            "w2": m.randn(448, 1792, scale=1792**-0.5),
            "b2": m.randn(448),
        }

    def ours(x, w1, b1, w2, b2):
        hidden = grouped_sliced_linear(x, w1, b1, sizes=sizes, outs=wide, ins=narrow)
        hidden = torch.relu(hidden)
        return grouped_sliced_linear(hidden, w2, b2, sizes=sizes, outs=narrow, ins=wide)

    def loop(x, w1, b1, w2, b2, linear=None):
        linear = linear or _linear
        found = []
        for part, o, i in zip(x.split(sizes), wide, narrow, strict=True):
            hidden = torch.relu(linear(part[:, :i], w1, b1, out=o, in_=i))
            found.append(linear(hidden, w2, b2, out=i, in_=o))
        return found

    def reference(**tensors):
        parts = loop(**tensors)
        return torch.cat([torch.nn.functional.pad(p, (0, 448 - p.shape[1])) for p in parts])

    return Case(
        f"sandwich_mlp_4_x_{rows}_rows",
        inputs,
        ours,
        reference,
        {
            "loop": lambda i: _workload(loop, i),
            "loop_sliced_linear": lambda i: _workload(partial(loop, linear=sliced_linear), i),
        },
        flops=sum(4 * rows * o * i for o, i in zip(wide, narrow, strict=True)),
        bytes=lambda itemsize: itemsize * 2 * (448 * 1792 + rows * (sum(wide) + sum(narrow))),
        bars=bars,
        tier="bench",
    )


def _linear(x, weight, bias, *, out, in_) -> Tensor:
    return torch.nn.functional.linear(x, weight[:out, :in_], bias[:out])


_EIGHTHS = [2048 * part for part in range(1, 9)]
_MATFORMER = [16384, 8192, 4096, 2048]
_SQUARE = [1536, 1152, 768, 384]
_SERVING = {"loop:forward": 4.0}
_FORWARD = {"loop:forward": 1.0}
_SANDWICH = {"loop": 1.0, "loop_sliced_linear": 1.0}

CASES += [
    _bench("serving_8_widths_up", (16384, 2048), [1] * 8, _EIGHTHS, None, _SERVING),
    _bench("serving_8_widths_down", (2048, 16384), [1] * 8, None, _EIGHTHS, _FORWARD),
    *[
        _bench(
            f"matformer_4_widths_x_{rows}",
            (16384, 2048),
            [rows] * 4,
            _MATFORMER,
            None,
            _FORWARD,
        )
        for rows in (1, 16)
    ],
    _bench(
        "gemma3n_2_widths_up", (16384, 2048), [2, 2], [8192, 16384], None, {"loop:forward": 1.0}
    ),
    _bench("gemma3n_2_widths_down", (2048, 16384), [2, 2], None, [8192, 16384], _FORWARD),
    *[
        _bench(f"sandwich_square_4_x_{rows}", (1536, 1536), [rows] * 4, _SQUARE, _SQUARE, _SANDWICH)
        for rows in (64, 200)
    ],
    *[_mlp(rows, _SANDWICH) for rows in (64, 197)],
]
