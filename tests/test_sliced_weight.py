"""sliced_weight: one gradient buffer for all slices, in every way to run a backward pass."""

import sys

import pytest
import torch
from test_collect import SCENARIOS, SELECTIONS, State, sliced_net
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import conv2d, linear

from weightshare_kernels import _collect, accumulate_in_place, sliced_linear, sliced_weight
from weightshare_kernels.ops.sliced_linear.cases import eager as eager_linear
from weightshare_kernels.ops.sliced_weight.cases import eager

PARTS = [(12, 10, 7, 7), (7, 10, 5, 5), (12, 4, 3, 3), (5, 5, 7, 3)]


@pytest.fixture(autouse=True)
def _shared_whatever_the_size(monkeypatch):
    monkeypatch.setattr(sys.modules[sliced_weight.__module__], "_SMALL", 0)


def layer(x, weight, bias, *, out, in_):
    return linear(x, sliced_weight(weight, out, in_), sliced_weight(bias, out))


def weight(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def loss(w, slicing):
    return sum(slicing(w, part).sin().sum() for part in PARTS)


def ours(w, part):
    return sliced_weight(w, *part)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
@pytest.mark.parametrize("kind", SELECTIONS)
def test_equals_eager(kind, scenario, in_place):
    """The scenarios of the collector itself, with this op in the place of the sliced linear."""
    wanted = scenario(sliced_net(kind, eager_linear), State())
    if in_place:
        with accumulate_in_place():
            got = scenario(sliced_net(kind, layer), State())
    else:
        got = scenario(sliced_net(kind, layer), State())
    for a, b in zip(got, wanted, strict=True):
        if b is None:
            assert a is None or not a.any()
            continue
        assert a.shape == b.shape and a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_slices_share_one_buffer(monkeypatch):
    """Four slices, and the sliced linear beside them, make one full-size tensor together."""
    made = []
    original = _collect.empty_like
    monkeypatch.setattr(_collect, "empty_like", lambda *a: made.append(1) or original(*a))
    w = weight(30, 20)
    x = weight(3, 9, seed=1)
    parts = [(20, 9), (30, 5), (slice(3, 9), 20), (7, 7)]
    total = sum(sliced_weight(w, *part).sin().sum() for part in parts)
    (total + sliced_linear(x, w, out=12, in_=9).sin().sum()).backward()
    assert len(made) == 1
    wanted = sum(w[o if isinstance(o, slice) else slice(o), :i].sin().sum() for o, i in parts)
    wanted = wanted + linear(x, w[:12, :9]).sin().sum()
    torch.testing.assert_close(w.grad, torch.autograd.grad(wanted, w)[0])


def test_part_is_a_view_and_whole_is_the_weight():
    w = weight(12, 10, 7, 7)
    assert sliced_weight(w) is w and sliced_weight(w, 12, None, 7) is w
    part = sliced_weight(w, 7, 5, 3, 3)
    assert part.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()
    assert torch.equal(part, w[:7, :5, 2:5, 2:5])
    with pytest.raises(RuntimeError, match="inplace"):
        part.mul_(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_in_fp32(dtype):
    """Many small gradients onto a large one: a bf16 sum would lose them all."""
    w = weight(4, 4, dtype=dtype)
    total = 1024 * sliced_weight(w, 3).sum()
    for _ in range(64):
        total = total + sliced_weight(w, 3).sum()
    total.backward()
    assert w.grad.dtype == dtype and (w.grad[:3].float() == 1088).all() and not w.grad[3:].any()


def test_channels_last_and_permuted_weights():
    for change in (
        lambda w: w.to(memory_format=torch.channels_last),
        lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        w = change(weight(12, 10, 7, 7).detach()).requires_grad_()
        loss(w, ours).backward()
        assert w.grad.stride() == w.stride()
        torch.testing.assert_close(w.grad, torch.autograd.grad(loss(w, eager), w)[0])


def test_functorch_and_forward_mode():
    w = weight(12, 10, 7, 7).detach()
    tangent = weight(12, 10, 7, 7, seed=1).detach()
    got, wanted = (torch.func.grad(loss)(w, f) for f in (ours, eager))
    torch.testing.assert_close(got, wanted)
    got, wanted = (
        torch.func.jvp(lambda w, f=f: loss(w, f), (w,), (tangent,))[1] for f in (ours, eager)
    )
    torch.testing.assert_close(got, wanted)
    batch = torch.stack([w, tangent])
    got, wanted = (
        torch.func.vmap(torch.func.grad(lambda w, f=f: loss(w, f)))(batch) for f in (ours, eager)
    )
    torch.testing.assert_close(got, wanted)


def test_no_grad_inference_meta_and_subclass():
    w = weight(12, 10, 7, 7)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            part = sliced_weight(w, 7, 5, 3, 3)
            wanted = w[:7, :5, 2:5, 2:5]
        assert part.grad_fn is None and part.requires_grad == wanted.requires_grad
        assert torch.equal(part, wanted)
    meta = torch.empty(12, 10, 7, 7, device="meta", requires_grad=True)
    part = sliced_weight(meta, 7, [slice(0, 2), slice(5, 8)], 3, 3)
    part.sum().backward()
    assert part.shape == (7, 5, 3, 3) and meta.grad.shape == meta.shape

    class Marked(torch.Tensor):
        pass

    marked = weight(12, 10).detach().as_subclass(Marked).requires_grad_()
    (grad,) = torch.autograd.grad(sliced_weight(marked, 7, 5).sum(), marked)
    assert grad[:7, :5].eq(1).all() and grad.sum() == 35


@pytest.mark.parametrize("backward", [False, True])
def test_sixteen_parts_share_a_graph(backward):
    """At most one graph per kernel size (the convolution's own guards), whatever the widths."""

    def function(x, w, channels, kernel):
        part = sliced_weight(w, 2 * channels, channels, kernel, kernel)
        return conv2d(x, part, padding=(kernel - 1) // 2)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    after = []
    for number in range(16):
        channels, kernel = 3 + number // 2, 3 + 2 * (number % 3)
        x, w = weight(2, channels, 9, 9), weight(24, 12, 7, 7)
        with torch.set_grad_enabled(backward):
            y, wanted = compiled(x, w, channels, kernel), function(x, w, channels, kernel)
            torch.testing.assert_close(y, wanted)
            if backward:
                got = torch.autograd.grad(y.sin().sum(), (x, w))
                torch.testing.assert_close(got, torch.autograd.grad(wanted.sin().sum(), (x, w)))
        after.append(counter.frame_count)
    assert after[2] <= 3 and after[-1] == after[2], after
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((7, 5, 3, 3, 3), ValueError, "selections: 5 for a weight of 4 axes"),
        ((13,), ValueError, r"axis 0: prefix 13 is outside 0\.\.12"),
        ((None, -1), ValueError, r"axis 1: prefix -1"),
        ((None, None, 9), ValueError, r"axis 2: prefix 9 is outside 0\.\.7"),
        (("all",), TypeError, "axis 0: expected None, an int"),
        ((True,), TypeError, "axis 0: expected None, an int"),
        ((torch.tensor([1, 1]),), ValueError, "axis 0: 1 repeated indices"),
    ],
)
def test_bad_selections(arguments, error, message):
    with pytest.raises(error, match=message):
        sliced_weight(weight(12, 10, 7, 7), *arguments)


def test_bad_weight():
    with pytest.raises(TypeError, match="weight: expected a floating-point tensor"):
        sliced_weight(torch.ones(3, 3, dtype=torch.int64), 2)
    with pytest.raises(TypeError, match="weight: expected a tensor, got list"):
        sliced_weight([1.0], 1)
