"""The ops under functorch, forward mode, autocast, inference mode, fake and meta tensors."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from weightshare_kernels import (
    entangle,
    entangled_linear,
    entangled_linear_independent,
    sliced_linear,
)
from weightshare_kernels.ops.entangle.reference import pad_and_sum as mix
from weightshare_kernels.ops.entangled_linear.reference import pad_and_sum
from weightshare_kernels.ops.sliced_linear.cases import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = [slice(0, 4), slice(8, 12)]
INDEX = torch.tensor([7, 1, 4], device=DEVICE)
CHOICES = [(4, 10), (12, 6)]


def tensors(dtype=torch.float64, device=DEVICE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 10), (12, 10), (12,), (2,)]
    return [
        torch.randn(*s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes
    ]


# name -> ours and the definition, as functions of (x, weight, bias, alpha)
OPS = {
    "prefix": tuple(lambda x, w, b, a, f=f: f(x, w, b, out=5) for f in (sliced_linear, eager)),
    "blocks": tuple(lambda x, w, b, a, f=f: f(x, w, b, out=BLOCKS) for f in (sliced_linear, eager)),
    "index": tuple(lambda x, w, b, a, f=f: f(x, w, b, out=INDEX) for f in (sliced_linear, eager)),
    "entangled": tuple(
        lambda x, w, b, a, f=f: f(x, w, b, CHOICES, a) for f in (entangled_linear, pad_and_sum)
    ),
    "entangle": tuple(lambda x, w, b, a, f=f: x @ f(w, CHOICES, a).t() for f in (entangle, mix)),
}
EVERY_OP = pytest.mark.parametrize("name", OPS)


def clear_caches():
    from weightshare_kernels import _grid, _select

    _grid._cache.clear()
    _select._spans.clear()
    _select._tables.clear()


@EVERY_OP
def test_functorch_grad(name):
    ours, theirs = OPS[name]
    got = torch.func.grad(lambda *t: ours(*t).sin().sum(), (0, 1, 3))(*tensors())
    wanted = torch.func.grad(lambda *t: theirs(*t).sin().sum(), (0, 1, 3))(*tensors())
    torch.testing.assert_close(got, wanted)


@EVERY_OP
def test_functorch_vmap_is_right_or_refused(name):
    """Per-sample gradients: equal to eager, or a clear error, never a wrong number."""
    ours, theirs = OPS[name]
    x, w, b, a = tensors()
    xs = torch.stack([x, 2 * x])

    def run(f):
        per_sample = torch.func.grad(lambda w, x: f(x, w, b, a).sin().sum())
        return torch.func.vmap(per_sample, (None, 0))(w, xs)

    try:
        got = run(ours)
    except RuntimeError as error:
        assert "vmap" in str(error)
        return
    torch.testing.assert_close(got, run(theirs))


@EVERY_OP
def test_forward_mode_is_right_or_refused(name):
    ours, theirs = OPS[name]
    primals = tuple(tensors())
    tangents = tuple(tensors(seed=1))
    try:
        got = torch.func.jvp(ours, primals, tangents)[1]
    except NotImplementedError as error:
        assert "jvp" in str(error)
        return
    torch.testing.assert_close(got, torch.func.jvp(theirs, primals, tangents)[1])


@EVERY_OP
def test_first_call_in_inference_mode_spoils_nothing(name):
    """What a cache keeps from an inference-mode call must serve training later."""
    clear_caches()
    ours, theirs = OPS[name]
    leaves = [t.requires_grad_() for t in tensors()]
    with torch.inference_mode():
        torch.testing.assert_close(ours(*leaves), theirs(*leaves))
    got = torch.autograd.grad(ours(*leaves).sum(), leaves[:2], create_graph=True)
    wanted = torch.autograd.grad(theirs(*leaves).sum(), leaves[:2], create_graph=True)
    torch.testing.assert_close(got, wanted)
    loss = sum(g.square().sum() for g in got)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, leaves[:2]))


def test_index_tensor_made_in_inference_mode():
    x, w, _, _ = tensors()
    w.requires_grad_()
    with torch.inference_mode():
        index = torch.tensor([3, 0, 9], device=DEVICE)
        inside = sliced_linear(x, w, out=index)
    outside = sliced_linear(x, w, out=index)
    outside.sum().backward()
    torch.testing.assert_close(outside, x @ w[[3, 0, 9]].t())
    torch.testing.assert_close(inside, outside.detach())
    assert w.grad[[0, 3, 9]].any(dim=1).all()


@EVERY_OP
def test_fake_tensors_do_not_enter_the_caches(name):
    clear_caches()
    ours, theirs = OPS[name]
    if name != "index":  # its table is a real tensor, made outside
        with FakeTensorMode():
            fake = ours(*[torch.empty(t.shape, dtype=t.dtype) for t in tensors(device="cpu")])
        assert fake.shape == theirs(*tensors()).shape
    torch.testing.assert_close(ours(*tensors()), theirs(*tensors()))
    if name != "index":
        with FakeTensorMode():  # now the caches hold real tables
            ours(*[torch.empty(t.shape, dtype=t.dtype) for t in tensors(device="cpu")])


@pytest.mark.parametrize("name", ["prefix", "blocks", "entangled", "entangle"])
def test_meta_tensors(name):
    """Shapes without data, as used to count parameters and FLOPs before weights are loaded."""
    ours, theirs = OPS[name]
    meta = [t.to("meta").requires_grad_() for t in tensors()]
    y = ours(*meta)
    y.sum().backward()
    assert y.is_meta and y.shape == theirs(*tensors()).shape
    assert meta[1].grad.shape == meta[1].shape


@EVERY_OP
def test_autocast(name):
    """Output in autocast's dtype, gradients in the parameters', close to eager under autocast."""
    ours, theirs = OPS[name]
    results = []
    for function in (ours, theirs):
        leaves = [t.requires_grad_() for t in tensors(torch.float32)]
        with torch.autocast(DEVICE, torch.bfloat16):
            y = function(*leaves)
        used = leaves[:2] if name in ("prefix", "blocks", "index") else [*leaves[:2], leaves[3]]
        results.append([y, *torch.autograd.grad(y.float().sin().sum(), used)])
    exact = [t.requires_grad_() for t in tensors()]
    y = theirs(*exact)
    used = exact[:2] if name in ("prefix", "blocks", "index") else [*exact[:2], exact[3]]
    wanted = [y, *torch.autograd.grad(y.sin().sum(), used)]
    for o, t, e in zip(*results, wanted, strict=True):
        assert o.dtype == t.dtype
        scale = e.abs().max()
        error, torchs = ((v.double() - e).abs().max() / scale for v in (o, t))
        assert error <= max(2 * torchs, 4 * torch.finfo(torch.bfloat16).eps)


def test_autocast_leaves_float64_alone():
    x, w, b, a = tensors()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert sliced_linear(x, w, b, out=5).dtype == torch.float64
        assert entangled_linear(x, w, b, CHOICES, a).dtype == torch.float64
        with pytest.raises(TypeError, match=r"weight: .*float32.*float64"):
            sliced_linear(x, w.float(), out=5)


def test_autocast_shares_one_gradient(monkeypatch):
    """Slices used under autocast meet in one buffer, as they do without it."""
    from weightshare_kernels import _collect

    made = []
    original = _collect.empty_like
    monkeypatch.setattr(_collect, "empty_like", lambda *a: made.append(1) or original(*a))
    x, w, _, _ = tensors(torch.float32)
    w.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = sum(sliced_linear(x, w, out=n).float().sum() for n in (12, 8, 4))
    loss.backward()
    assert len(made) == 1
    wanted = sum(eager(x, w, out=n).sum() for n in (12, 8, 4))
    torch.testing.assert_close(w.grad, torch.autograd.grad(wanted, w)[0], rtol=0.02, atol=0.02)


def test_tensor_subclass():
    class Marked(torch.Tensor):
        pass

    x, w, b, a = tensors()
    marked = w.as_subclass(Marked).requires_grad_()
    for function in (lambda w: sliced_linear(x, w, b, out=5), lambda w: entangle(w, CHOICES, a)):
        (got,) = torch.autograd.grad(function(marked).sum(), marked)
        plain = w.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(function(plain).sum(), plain)
        torch.testing.assert_close(got.as_subclass(torch.Tensor), wanted)


def test_export_keeps_the_op():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(tensors()[1])

        def forward(self, x):
            return sliced_linear(x, self.weight, out=INDEX)  # a prefix is a plain product on GPUs

    layer, x = Layer(), tensors()[0]
    program = torch.export.export(layer, (x,))
    assert "weightshare.sliced_linear" in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_independent_matches_coupled_under_autocast():
    x, w, b, _ = tensors(torch.float32)
    u, v = torch.tensor([0.3, 0.7], device=DEVICE), torch.tensor([0.6, 0.4], device=DEVICE)
    pairs = [(o, i) for o in (5, 12) for i in (4, 10)]
    with torch.autocast(DEVICE, torch.bfloat16):
        got = entangled_linear_independent(x, w, b, (5, 12), u, (4, 10), v)
    wanted = entangled_linear(x, w, b, pairs, torch.outer(u, v).flatten())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05)
