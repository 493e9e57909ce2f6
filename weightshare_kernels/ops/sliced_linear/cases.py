"""Inputs, shapes and baselines of :func:`sliced_linear`, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import math
from functools import partial

import torch
from torch import Tensor

from weightshare_kernels._cases import Case, Inputs, Maker, Workload, leaves
from weightshare_kernels._collect import accumulate_in_place
from weightshare_kernels.ops.sliced_linear import sliced_linear


def pick(tensor: Tensor, dim: int, spec) -> Tensor:
    """A selection in eager PyTorch, as peers write it."""
    if spec is None:
        return tensor
    if isinstance(spec, Tensor):
        return tensor[(slice(None),) * dim + (spec.long(),)]
    pieces = [spec] if isinstance(spec, slice | int) else spec
    pieces = [slice(p) if isinstance(p, int) else p for p in pieces]
    where = [(slice(None),) * dim + (p,) for p in pieces]
    return tensor[where[0]] if len(where) == 1 else torch.cat([tensor[w] for w in where], dim)


def picked(spec, size: int) -> int:
    """Number of elements that a selection takes of an axis."""
    return spec.shape[0] if isinstance(spec, Tensor) else pick(torch.empty(size), 0, spec).shape[0]


def eager(x, weight, bias=None, *, out=None, in_=None) -> Tensor:
    """Slice, then ``F.linear``: the definition of the op and its first baseline."""
    part = pick(pick(weight, 0, out), 1, in_)
    return torch.nn.functional.linear(x, part, None if bias is None else pick(bias, 0, out))


def _test_inputs(lead, size, out, in_, bias):
    def make(m: Maker) -> Inputs:
        rows = m.index(*out) if isinstance(out, tuple) else out
        cols = m.index(*in_) if isinstance(in_, tuple) else in_
        width = picked(cols, size[1])
        return {
            "x": m.randn(*lead, width),
            "weight": m.randn(*size, scale=width**-0.5 if width else 1.0),
            "bias": m.randn(size[0]) if bias else None,
            "out": rows,
            "in_": cols,
        }

    return make


_QKV = [slice(0, 24), slice(40, 64), slice(80, 104)]
_INTERLEAVED = [slice(0, 90, 3), slice(1, 90, 3), slice(2, 90, 3)]
_TESTS = {
    "full": ((3, 5), (33, 20), None, None, True),
    "prefix": ((3, 5), (65, 40), 37, 21, True),
    "prefix_many_rows": ((2, 67), (97, 80), 64, 50, False),
    "one_row": ((1,), (50, 70), 33, 64, True),
    "vector": ((), (50, 70), 33, 64, True),
    "span": ((7,), (60, 50), slice(10, 44), slice(5, 50), True),
    "qkv_blocks": ((2, 9), (120, 40), _QKV, 32, True),
    "qkv_blocks_many_rows": ((150,), (120, 40), _QKV, 32, True),
    "interleaved": ((6,), (120, 33), _INTERLEAVED, 30, True),
    "strided_cols": ((6,), (50, 64), 40, slice(0, 60, 4), True),
    "column_blocks": ((11,), (50, 96), 40, [slice(0, 20), slice(48, 70)], False),
    "index_rows": ((4, 3), (90, 50), (41, 90), None, True),
    "index_cols": ((13,), (40, 90), 31, (47, 90), True),
    "index_both": ((70,), (90, 80), (52, 90), (33, 80), True),
    "permutation": ((5,), (48, 48), (48, 48), (48, 48), True),
    "no_rows": ((0, 4), (20, 16), 8, 8, True),
    "no_out": ((3,), (20, 16), 0, 8, True),
    "no_in": ((3,), (20, 16), 8, 0, True),
    "no_in_index": ((3,), (20, 16), (5, 20), 0, True),
}

CASES = [
    Case(name, _test_inputs(*arguments), sliced_linear, eager) for name, arguments in _TESTS.items()
]


def _workload(call, inputs: Inputs) -> Workload:
    return Workload(lambda: call(**inputs), leaves(inputs))


def dense(inputs: Inputs) -> Workload:
    """The floor: a layer of the active size with weights of its own."""
    part = pick(pick(inputs["weight"], 0, inputs["out"]), 1, inputs["in_"])
    own = {"input": inputs["x"], "weight": part, "bias": inputs["bias"]}
    if inputs["bias"] is not None:
        own["bias"] = pick(inputs["bias"], 0, inputs["out"])
    own = {k: None if v is None else v.detach().clone().requires_grad_() for k, v in own.items()}
    return _workload(torch.nn.functional.linear, own)


def contiguous(inputs: Inputs) -> Workload:
    """Slice, copy, then ``F.linear``."""

    def call(x, weight, bias, out, in_):
        part = pick(pick(weight, 0, out), 1, in_).contiguous()
        return torch.nn.functional.linear(x, part, None if bias is None else pick(bias, 0, out))

    return _workload(call, inputs)


def masked(inputs: Inputs) -> Workload:
    """The whole layer with a mask on its outputs, inputs padded: what needs no slicing at all."""
    weight, out, in_ = inputs["weight"], inputs["out"], inputs["in_"]
    every = torch.arange(weight.shape[1], device=weight.device)
    cols = pick(every, 0, in_)
    mask = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
    mask[pick(torch.arange(weight.shape[0], device=weight.device), 0, out)] = 1

    def call(x, weight, bias, out, in_):
        wide = x.new_zeros(*x.shape[:-1], weight.shape[1]).index_copy(-1, cols, x)
        return torch.nn.functional.linear(wide, weight, bias) * mask

    return _workload(call, inputs)


def index_select(inputs: Inputs) -> Workload:
    """Gather with ``index_select``, whose backward is quicker than indexing's."""

    def call(x, weight, bias, out, in_):
        part = weight if out is None else weight.index_select(0, out)
        part = part if in_ is None else part.index_select(1, in_)
        return torch.nn.functional.linear(x, part, None if bias is None else pick(bias, 0, out))

    return _workload(call, inputs)


BASELINES = {
    "dense": dense,
    "eager": lambda inputs: _workload(eager, inputs),
    "contiguous": contiguous,
    "masked": masked,
}


def _bench(name, lead, size, out, in_, bars=None, bias=True, baselines=BASELINES) -> Case:
    def length(spec, full):
        return spec[0] if isinstance(spec, tuple) else picked(spec, full)

    o, i, rows = length(out, size[0]), length(in_, size[1]), math.prod(lead)
    return Case(
        name,
        _test_inputs(lead, size, out, in_, bias),
        sliced_linear,
        eager,
        baselines,
        flops=2 * rows * o * i,
        bytes=lambda itemsize: itemsize * (rows * (o + i) + o * i),
        bars=bars or {},
        tier="bench",
    )


def _blocks(used: int, full: int, count: int) -> list[slice]:
    """The first ``used`` rows of each of ``count`` blocks of ``full``."""
    return [slice(b * full, b * full + used) for b in range(count)]


# Ratios are baseline time / our time: dense 0.95 is "at most 1.05 x the dense layer".
_FLOOR = {"dense": 0.95, "eager": 1.0}


def _mlp(rows: int, bars) -> Case:
    """Two layers of a transformer block, AutoFormer-S sized: super 448 x 1792."""

    def inputs(m: Maker) -> Inputs:
        return {
            "x": m.randn(rows, 320),
            "w1": m.randn(1792, 448, scale=448**-0.5),
            "b1": m.randn(1792),
            "w2": m.randn(448, 1792, scale=1792**-0.5),
            "b2": m.randn(448),
        }

    def block(linear):
        def call(x, w1, b1, w2, b2):
            hidden = torch.relu(linear(x, w1, b1, out=1120, in_=320))
            return linear(hidden, w2, b2, out=320, in_=1120)

        return call

    def alone(i: Inputs) -> Workload:
        own = [i["x"], i["w1"][:1120, :320], i["b1"][:1120], i["w2"][:320, :1120], i["b2"][:320]]
        own = [t.detach().clone().requires_grad_() for t in own]
        x, w1, b1, w2, b2 = own
        linear = torch.nn.functional.linear
        return Workload(lambda: linear(torch.relu(linear(x, w1, b1)), w2, b2), own)

    return Case(
        f"mlp_{rows}_rows",
        inputs,
        block(sliced_linear),
        block(eager),
        {"dense": alone, "eager": lambda i: _workload(block(eager), i)},
        flops=2 * 2 * rows * 320 * 1120,
        bytes=lambda itemsize: itemsize * (2 * rows * (320 + 1120) + 2 * 320 * 1120),
        bars=bars,
        tier="bench",
    )


_WIDTHS = (1536, 1152, 768, 384)


def _sandwich(name: str, per_width: bool, bars) -> Case:
    """A sandwich step: four widths of one layer, their gradients summed."""

    def inputs(m: Maker) -> Inputs:
        return {"x": m.randn(32, 1536), "weight": m.randn(1536, 1536, scale=1536**-0.5)}

    def call(linear):
        def outputs(x, weight):
            return torch.cat([linear(x[:, :w], weight, out=w, in_=w) for w in _WIDTHS], dim=1)

        return outputs

    def workload(linears, xs, leaves_, context=contextlib.nullcontext) -> Workload:
        grads = [torch.randn(32, w, dtype=xs[0].dtype, device=xs[0].device) for w in _WIDTHS]

        def step():
            if not per_width:
                torch.autograd.backward([f(x) for f, x in zip(linears, xs, strict=True)], grads)
                return
            with context():
                for f, x, g in zip(linears, xs, grads, strict=True):
                    f(x).backward(g)

        return Workload(lambda: [f(x) for f, x in zip(linears, xs, strict=True)], leaves_, step)

    def of(linear, context=contextlib.nullcontext):
        def make(i: Inputs) -> Workload:
            w = i["weight"]
            xs = [i["x"].detach()[:, :n].contiguous().requires_grad_() for n in _WIDTHS]
            linears = [partial(linear, weight=w, out=n, in_=n) for n in _WIDTHS]
            return workload(linears, xs, [*xs, w], context)

        return make

    def alone(i: Inputs) -> Workload:
        xs = [i["x"].detach()[:, :n].contiguous().requires_grad_() for n in _WIDTHS]
        ws = [i["weight"].detach()[:n, :n].clone().requires_grad_() for n in _WIDTHS]
        linears = [partial(torch.nn.functional.linear, weight=w) for w in ws]
        return workload(linears, xs, [*xs, *ws])

    return Case(
        name,
        inputs,
        call(sliced_linear),
        call(eager),
        {"dense": alone, "eager": of(eager)},
        ours=of(sliced_linear, accumulate_in_place if per_width else contextlib.nullcontext),
        flops=sum(2 * 32 * w * w for w in _WIDTHS),
        bytes=lambda itemsize: itemsize * sum(2 * 32 * w + w * w for w in _WIDTHS),
        bars=bars,
        tier="bench",
    )


_GATHERED = {**BASELINES, "index_select": index_select}
_NO_MASK = {k: v for k, v in BASELINES.items() if k != "masked"}

CASES += [
    _bench("autoformer_s_fc1", (64, 197), (1792, 448), 1344, 384, _FLOOR),
    _bench("autoformer_s_qkv", (64, 197), (1344, 448), _blocks(384, 448, 3), 384, _FLOOR),
    _bench("hat_fc1", (4096,), (3072, 640), 2048, 512, _FLOOR),
    _bench("hat_qkv", (4096,), (1536, 640), _blocks(256, 512, 3), 512, _FLOOR),
    *[
        _bench(f"matformer_{part}_of_8", (512,), (16384, 2048), 16384 * part // 8, None, _FLOOR)
        for part in (1, 2, 4, 8)
    ],
    _bench("matformer_1_of_8_decode", (1,), (16384, 2048), 2048, None, bias=False),
    _bench(
        "gated_gate_up_1_of_4",
        (64,),
        (2 * 14336, 4096),
        _blocks(3584, 14336, 2),
        None,
        {"eager": 1.0},
        False,
        _NO_MASK,
    ),
    _mlp(64, {"eager": 1.35, "dense": 1 / 1.07}),
    _mlp(197, {"eager": 1.35, "dense": 1 / 1.07}),
    _mlp(1576, {"eager": 1.0}),
    _sandwich("sandwich_32_rows", False, {"eager": 2.0}),
    _sandwich("sandwich_32_rows_backward_per_width", True, {"eager": 1.4}),
    *[
        _bench(name, (rows,), (3072, 3072), out, in_, {"eager": bar}, True, _GATHERED)
        for name, rows, out, in_, bar in (
            ("index_random_64_rows", 64, (1536, 3072), None, 1.7),
            ("index_sorted_64_rows", 64, (1536, 3072, True), None, 1.7),
            ("index_random_8_rows", 8, (1536, 3072), None, 3.0),
            ("index_columns_64_rows", 64, None, (1536, 3072), 1.0),
        )
    ],
]
