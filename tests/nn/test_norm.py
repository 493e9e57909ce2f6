"""Elastic norms: equal to PyTorch's on slices by hand, mixtures to K padded norms summed."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weightshare.export import export
from weightshare.nn.norm import BatchNorm1d, BatchNorm2d, GroupNorm, LayerNorm, RMSNorm
from weightshare.sizes import Blocks
from weightshare.space import PerLayer, SearchSpace

D = (8, 12, 20)
KINDS = {
    "layer": LayerNorm,
    "layer_no_bias": partial(LayerNorm, bias=False, eps=1e-3),
    "layer_plain": partial(LayerNorm, elementwise_affine=False),
    "layer_max": partial(LayerNorm, statistics="max"),
    "rms": RMSNorm,
    "rms_plain": partial(RMSNorm, elementwise_affine=False, eps=1e-3),
    "rms_max": partial(RMSNorm, statistics="max"),
    "batch": BatchNorm2d,
    "batch_plain": partial(BatchNorm2d, affine=False, momentum=None),
    "batch_untracked": partial(BatchNorm2d, track_running_stats=False),
    "group": partial(GroupNorm, 5),
    "group_plain": partial(GroupNorm, 5, affine=False),
}
OVER_LAST = [kind for kind in KINDS if kind.startswith(("layer", "rms"))]


def make(kind, dtype=torch.float64):
    torch.manual_seed(0)
    space = SearchSpace(embed=list(D))
    norm = KINDS[kind](space["embed"], dtype=dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
        if kind == "batch":
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return space, norm


def x_of(kind, n, dtype=torch.float64):
    shape = (3, 4, n) if kind in OVER_LAST else (6, n, 2, 3)
    return (torch.randn(shape, dtype=dtype) * 2 + 1).requires_grad_()


def by_hand(kind, norm, x, n, training=True):
    """The norm in plain PyTorch, on weights cut by hand."""
    weight, bias = (
        None if p is None else p[:n] for p in (norm.weight, getattr(norm, "bias", None))
    )
    if kind.endswith("_max"):
        x = F.pad(x, (0, D[-1] - n))
        weight, bias = (None if p is None else F.pad(p, (0, D[-1] - n)) for p in (weight, bias))
    if kind.startswith("layer"):
        return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)[..., :n]
    if kind.startswith("rms"):
        return F.rms_norm(x, x.shape[-1:], weight, norm.eps)[..., :n]
    if kind.startswith("group"):
        return F.group_norm(x, n // 4, weight, bias, norm.eps)
    if training or norm.running_mean is None:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, norm.eps)
    running = norm.running_mean[:n].clone(), norm.running_var[:n].clone()
    return F.batch_norm(x, *running, weight, bias, False, 0.0, norm.eps)


def assert_same_gradients(got, wanted, leaves):
    g = torch.randn_like(wanted)
    ours = torch.autograd.grad(got, leaves, g)
    for a, b in zip(ours, torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture(params=KINDS, name="kind")
def _kind(request):
    return request.param


@pytest.mark.parametrize("n", D)
def test_slice_equals_pytorch_by_hand(kind, n):
    space, norm = make(kind)
    space.activate({"embed": n})
    x = x_of(kind, n)
    y, wanted = norm(x), by_hand(kind, norm, x, n)
    torch.testing.assert_close(y, wanted)
    assert_same_gradients(y, wanted, [x, *norm.parameters()])
    norm.eval()
    torch.testing.assert_close(norm(x), by_hand(kind, norm, x, n, training=False))


def test_mixture_equals_padded_norms_summed(kind):
    space, norm = make(kind)
    alpha = torch.randn(3, dtype=torch.float64).softmax(0).requires_grad_()
    space.mix({"embed": alpha})
    x = x_of(kind, D[-1])
    wanted = 0
    for a, n in zip(alpha.unbind(), D, strict=True):
        if kind.endswith("_max"):  # statistics over the whole x, whatever the choice
            part = by_hand(kind, norm, x, D[-1])[..., :n]
            wanted = wanted + a * F.pad(part, (0, D[-1] - n))
        elif kind in OVER_LAST:
            wanted = wanted + a * F.pad(by_hand(kind, norm, x[..., :n], n), (0, D[-1] - n))
        else:
            part = by_hand(kind, norm, x[:, :n], n)
            wanted = wanted + a * F.pad(part, (0, 0, 0, 0, 0, D[-1] - n))
    y = norm(x)
    torch.testing.assert_close(y, wanted)
    assert_same_gradients(y, wanted, [x, alpha, *norm.parameters()])


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("rows", [(), (0,), (2, 0), (3,)])
def test_mixture_of_any_leading_shape_and_derivatives(kind, rows):
    _, norm = make(kind)
    space = SearchSpace(a=[1, 2], b=[4, 6, 8])  # 8 twice, 20 (the width) never
    norm = KINDS[kind](space["a"] * space["b"], dtype=torch.float64)
    alphas = {n: torch.rand(len(d.choices), dtype=torch.float64) for n, d in space.dims.items()}

    def run(x, weight, *mix):
        space.mix(dict(zip(alphas, mix, strict=True)))
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    x = torch.randn(*rows, 16, dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (x, norm.weight.detach(), *alphas.values())]
    y, wanted = run(*inputs), 0
    for i, a in enumerate((1, 2)):
        for j, b in enumerate((4, 6, 8)):
            part = by_hand(kind, norm, x[..., : a * b], a * b)
            wanted = wanted + inputs[2][i] * inputs[3][j] * F.pad(part, (0, 16 - a * b))
    torch.testing.assert_close(y, wanted)
    assert torch.autograd.gradcheck(run, inputs)
    if 0 not in rows:
        assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_mixture_of_many_rows_goes_by_chunks(kind, monkeypatch):
    space, norm = make(kind)
    alpha = torch.rand(3, dtype=torch.float64, requires_grad=True)
    space.mix({"embed": alpha})
    x = x_of(kind, D[-1])
    leaves = [x, alpha, *norm.parameters()]

    def results():
        y = norm(x)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    wanted = results()
    monkeypatch.setattr("weightshare.nn._mixed_norm._CHUNK", 5 * D[-1])
    for got, want in zip(results(), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_partly_mixed_width_runs_at_full_width():
    space = SearchSpace(heads=[1, 2], size=[3, 4])
    norm = LayerNorm(space["heads"] * space["size"], dtype=torch.float64)
    space.activate({"heads": 2, "size": 3})
    space.mix({"heads": torch.tensor([0.25, 0.75])})
    x = torch.randn(5, 8, dtype=torch.float64)
    wanted = 0.25 * F.pad(F.layer_norm(x[:, :3], (3,)), (0, 5))
    wanted += 0.75 * F.pad(F.layer_norm(x[:, :6], (6,)), (0, 2))
    torch.testing.assert_close(norm(x), wanted)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_mixture_is_as_exact_as_pytorch(kind, mean):
    if kind == "rms" and mean:
        mean = mean / 1e2
    space, norm = make(kind, torch.float32)
    alpha = torch.tensor([0.2, 0.3, 0.5])
    space.mix({"embed": alpha})
    x = (torch.randn(64, D[-1]) + mean).requires_grad_()
    g = torch.randn(64, D[-1])

    def run(x, mixed):
        if mixed:
            return norm(x)
        parts = [by_hand(kind, norm, x[:, :n], n) for n in D]
        return sum(a * F.pad(p, (0, D[-1] - p.shape[1])) for a, p in zip(alpha, parts, strict=True))

    def results(x, mixed):
        y = run(x, mixed)
        return y.detach(), *torch.autograd.grad(y, [x, norm.weight], g.to(x.dtype))

    ours, torchs = results(x, True), results(x, False)
    norm.double()
    exact = results(x.detach().double().requires_grad_(), False)
    for a, b, e in zip(ours, torchs, exact, strict=True):
        assert (a - e).abs().max() <= 2 * (b - e).abs().max() + 1e-6 * e.abs().max()


def test_low_precision_keeps_statistics_in_float32():
    space, norm = make("layer", torch.bfloat16)
    x = (torch.randn(32, D[-1]) + 20).bfloat16().requires_grad_()
    alpha = torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    space.mix({"embed": alpha})
    y = norm(x)
    assert y.dtype == torch.bfloat16
    gx, gw, ga = torch.autograd.grad(y.float().square().sum(), [x, norm.weight, alpha])
    assert (gx.dtype, gw.dtype, ga.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    exact = norm.double()(x.detach().double())
    assert (y.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_mixture_saves_its_inputs_alone():
    space, norm = make("layer")
    space.mix({"embed": torch.ones(3, dtype=torch.float64, requires_grad=True)})
    x, saved = x_of("layer", D[-1]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm(x)
    assert sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr()) <= 3 * D[-1]


def test_export_is_plain_and_equal(kind):
    space, norm = make(kind)
    for n in D:
        space.activate({"embed": n})
        norm.train()(x_of(kind, n))
        plain = export(norm.eval())
        fixed = kind.endswith("_max") and n < D[-1]  # no plain norm computes that
        assert type(plain).__module__.startswith("weightshare" if fixed else "torch.nn")
        assert not plain.training
        x = x_of(kind, n)
        tight = {} if kind.endswith("_max") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(plain(x), norm(x), **tight)
        mine = {t.data_ptr() for t in norm.state_dict().values()}
        for name, tensor in plain.state_dict().items():
            assert tensor.shape in ((n,), ()) and tensor.data_ptr() not in mine, name
        assert len(pickle.dumps(plain.state_dict())) < 4000
    if hasattr(norm, "weight") and norm.weight is not None:
        norm.weight.requires_grad_(False)
        assert not norm.export().weight.requires_grad


PLAIN = {
    "from_layer_norm": (lambda: nn.LayerNorm(20, eps=1e-3, bias=False), LayerNorm),
    "from_rms_norm": (lambda: nn.RMSNorm(20), RMSNorm),
    "from_batch_norm": (lambda: nn.BatchNorm2d(20, momentum=0.3), BatchNorm2d),
    "from_group_norm": (lambda: nn.GroupNorm(5, 20), partial(GroupNorm, 5)),
}


@pytest.mark.parametrize("maker", PLAIN)
def test_takes_over_pytorchs_and_keeps_keys(maker):
    make_plain, kind = PLAIN[maker]
    space, plain = SearchSpace(embed=list(D)), make_plain().double().eval()
    norm = getattr(getattr(kind, "func", kind), maker)(plain, space["embed"])
    assert isinstance(norm, type(plain)) and not norm.training
    assert norm.weight is plain.weight and norm.eps == plain.eps
    assert list(norm.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 20, 3, 20, dtype=torch.float64)
    torch.testing.assert_close(norm(x), plain(x))
    torch.testing.assert_close(norm.train()(x), plain.train()(x))
    for name, buffer in plain.named_buffers():
        assert norm.get_buffer(name) is buffer
    space.activate({"embed": 8})
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert other.active_size == 8
        part = x[:, :8, :, :8]
        torch.testing.assert_close(other(part), norm(part))


def test_rms_norm_takes_over_norms_of_the_same_meaning():
    class LlamaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.randn(20)), 1e-4

    other = LlamaRMSNorm()
    norm = RMSNorm.from_rms_norm(other, SearchSpace(embed=list(D))["embed"])
    x = torch.randn(3, 20)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (20,), other.weight, 1e-4))
    with pytest.raises(TypeError, match=r"norm: expected an nn.RMSNorm, got Linear"):
        RMSNorm.from_rms_norm(nn.Linear(2, 2), 2)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_of_the_active_slice_alone_move(momentum):
    space = SearchSpace(embed=list(D))
    norm, plain = (
        BatchNorm1d(space["embed"], momentum=momentum),
        nn.BatchNorm1d(12, momentum=momentum),
    )
    space.activate({"embed": 12})
    for x in torch.randn(3, 6, 12, 5):
        torch.testing.assert_close(norm(x), plain(x))
    for name in ("running_mean", "running_var"):
        whole, part = norm.get_buffer(name), plain.get_buffer(name)
        torch.testing.assert_close(whole[:12], part)
        assert whole[12:].eq(whole[-1]).all() and whole[-1] in (0, 1)
    assert norm.num_batches_tracked == 3
    norm.reset_running_stats()
    assert norm.running_mean.eq(0).all()
    with pytest.raises(ValueError, match="expected 2D or 3D"):
        norm(torch.randn(2, 12, 3, 3))


@pytest.mark.parametrize("kind", [k for k in KINDS if "plain" not in k])
def test_one_graph_serves_all_widths(kind, traced):
    space = SearchSpace(embed=list(range(8, 48, 4)))
    make_norm = partial(GroupNorm, 11) if kind == "group" else KINDS[kind]
    norm = make_norm(space["embed"])
    compiled = traced(norm)
    for n in range(8, 48, 4):  # no other size of x: equal ones would count as one
        space.activate({"embed": n})
        x = x_of(kind, n, torch.float32).detach()
        torch.testing.assert_close(compiled(x), norm(x))
    assert len(traced.graphs) == 1


@pytest.mark.parametrize("kind", ["layer", "rms", "layer_max", "batch", "group"])
def test_mixture_compiles(kind):
    space, norm = make(kind, torch.float32)
    alpha = torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    space.mix({"embed": alpha})
    torch._dynamo.reset()
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    x = x_of(kind, D[-1], torch.float32)
    y, wanted = compiled(x), norm(x)
    torch.testing.assert_close(y, wanted)
    assert_same_gradients(y, wanted, [x, alpha, *norm.parameters()])
    torch._dynamo.reset()


def test_bad_norms_are_refused():
    space = SearchSpace(embed=[8, 12, 18], heads=PerLayer([1, 2], 1))
    embed = space["embed"]
    with pytest.raises(ValueError, match=r"size: embed=8 makes 8 channels, no multiple of 3"):
        GroupNorm(6, embed)
    with pytest.raises(ValueError, match="groups: 5 do not divide 18 channels"):
        GroupNorm(5, embed)
    with pytest.raises(TypeError, match="size: a norm takes a prefix"):
        LayerNorm(Blocks([embed, embed], [18, 18]))
    with pytest.raises(ValueError, match="statistics: expected 'slice' or 'max', got 'all'"):
        RMSNorm(embed, statistics="all")
    with pytest.raises(ValueError, match="statistics: over 4 elements, but size is 18"):
        LayerNorm(embed, statistics=4)
    with pytest.raises(ValueError, match="size: up to 18, but the norm has 20 channels"):
        LayerNorm.from_layer_norm(nn.LayerNorm(20), embed)
    with pytest.raises(ValueError, match=r"norm: is over 2 dimensions \(4, 18\)"):
        LayerNorm.from_layer_norm(nn.LayerNorm((4, 18)), embed)
    with pytest.raises(TypeError, match=r"norm: expected an nn.GroupNorm, got LayerNorm"):
        GroupNorm.from_group_norm(nn.LayerNorm(18), embed)
    norm = LayerNorm(embed)
    space.mix({"embed": torch.ones(3)})
    with pytest.raises(ValueError, match=r"x: last dimension is 8, but a mixture runs at .* 18"):
        norm(torch.randn(2, 8))


def test_a_batch_norm_that_does_more_is_refused():
    class BatchNormAct2d(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(TypeError, match="norm: BatchNormAct2d computes more than BatchNorm2d"):
        BatchNorm2d.from_batch_norm(BatchNormAct2d(4), 4)
    fixed = BatchNorm2d.from_batch_norm(nn.BatchNorm2d(4), 4)
    assert type(fixed.export()) is nn.BatchNorm2d
