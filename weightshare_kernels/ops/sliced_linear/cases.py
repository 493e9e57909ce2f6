"""Inputs, shapes and baselines of :func:`sliced_linear`, for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from weightshare_kernels._cases import Case, Inputs, Maker
from weightshare_kernels.ops.sliced_linear import sliced_linear


def pick(tensor: Tensor, dim: int, spec) -> Tensor:
    """A selection in eager PyTorch, as peers write it."""
    if spec is None:
        return tensor
    if isinstance(spec, Tensor):
        return tensor.index_select(dim, spec.long())
    pieces = [spec] if isinstance(spec, slice | int) else spec
    pieces = [slice(p) if isinstance(p, int) else p for p in pieces]
    where = [(slice(None),) * dim + (p,) for p in pieces]
    return tensor[where[0]] if len(where) == 1 else torch.cat([tensor[w] for w in where], dim)


def eager(x, weight, bias=None, *, out=None, in_=None) -> Tensor:
    """Slice, then ``F.linear``: the definition of the op and its first baseline."""
    part = pick(pick(weight, 0, out), 1, in_)
    return torch.nn.functional.linear(x, part, None if bias is None else pick(bias, 0, out))


def _test_inputs(lead, size, out, in_, bias):
    def make(m: Maker) -> Inputs:
        rows = m.index(*out) if isinstance(out, tuple) else out
        cols = m.index(*in_) if isinstance(in_, tuple) else in_
        width = pick(torch.empty(1, size[1]), 1, cols).shape[1]
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
    Case(name, _test_inputs(*arguments), sliced_linear, eager)
    for name, arguments in _TESTS.items()
]
