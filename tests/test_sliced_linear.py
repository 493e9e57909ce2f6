"""sliced_linear where PyTorch's own product serves, as on a GPU; its cases are in test_ops.py."""

import sys

import pytest
import torch

from weightshare_kernels import sliced_linear
from weightshare_kernels._cases import Maker, leaves
from weightshare_kernels.ops.sliced_linear.cases import CASES, eager

op = sys.modules[sliced_linear.__module__]  # the package has a function of its name
SPANS = [
    case for case in CASES if case.tier == "test" and not case.name.startswith(("index", "perm"))
]


@pytest.fixture
def plain(monkeypatch):
    """Take that way on this device; lists the products that went another way."""
    others = []
    original = op._forward
    monkeypatch.setattr(
        op, "_plainly", lambda x, rows, cols: rows.index is None and cols.index is None
    )
    monkeypatch.setattr(op, "_forward", lambda *a: others.append(a) or original(*a))
    return others


def both(function, inputs):
    y = function(**inputs)
    g = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    return [y, *torch.autograd.grad(y, leaves(inputs), g, materialize_grads=True)]


@pytest.mark.parametrize("case", SPANS, ids=lambda case: case.name)
def test_by_pytorchs_product(case, plain):
    inputs = case.inputs(Maker(torch.float64))
    torch.testing.assert_close(both(case.call, inputs), both(eager, inputs))
    spans = [v is None or isinstance(v, int) or v in (slice(10, 44), slice(5, 50))
             for v in (inputs["out"], inputs["in_"])]  # fmt: skip
    assert bool(plain) != all(spans)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uses_share_a_buffer(plain, dtype):
    """Several slices of one weight in a pass; low precision is summed in fp32."""
    w = torch.randn(24, 20, dtype=dtype, requires_grad=True)
    xs = [torch.randn(5, n, dtype=dtype, requires_grad=True) for n in (20, 12, 7)]
    outs = (24, slice(3, 20), 9)
    g = [torch.randn(5, n, dtype=dtype) for n in (24, 17, 9)]
    results = []
    for function in (sliced_linear, eager):
        parts = zip(xs, outs, (20, 12, 7), strict=True)
        ys = [function(x, w, out=out, in_=in_) for x, out, in_ in parts]
        results.append(torch.autograd.grad(ys, [w, *xs], g))
    tolerance = {} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.02}
    torch.testing.assert_close(*results, **tolerance)
    assert not plain


def test_autocast(plain):
    w = torch.randn(24, 20, requires_grad=True)
    b = torch.randn(24, requires_grad=True)
    x = torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = sliced_linear(x, w, b, out=10, in_=12)
        wanted = torch.nn.functional.linear(x, w[:10, :12], b[:10])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted)
    dw, db = torch.autograd.grad(y.float().sum(), [w, b])
    assert dw.dtype == db.dtype == torch.float32 and dw.shape == w.shape
