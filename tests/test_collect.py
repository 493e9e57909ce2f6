"""The gradient collector: every way to run a backward pass gives what eager slicing gives."""

import contextlib
import copy

import pytest
import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from weightshare_kernels import _collect, accumulate_in_place, entangled_linear, sliced_linear
from weightshare_kernels.ops.entangled_linear.reference import pad_and_sum
from weightshare_kernels.ops.sliced_linear.cases import eager, pick

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT, IN, ROWS = 30, 20, 5
CHOICES = [[(12, 20), (30, 8)], [(7, 5), (20, 12), (30, 20)]]
SELECTIONS = {
    "prefix": [(30, 20), (17, 12), (30, 8), (4, 20)],
    "blocks": [([slice(0, 6), slice(10, 16), slice(20, 26)], 12), (slice(3, 20), slice(2, 20, 3))],
    "index": [(torch.tensor([4, 1, 29, 16]), None), (9, torch.tensor([19, 3, 5])), (30, 20)],
}


class State:
    """Fresh leaves of one run, in float64 so that equality is sharp."""

    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(3)

        def leaf(*shape):
            value = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return value.to(DEVICE, dtype).requires_grad_()

        self.x, self.w, self.b = leaf(ROWS, IN), leaf(OUT, IN), leaf(OUT)
        self.alpha = [leaf(len(choices)) for choices in CHOICES]
        self.leaves = [self.x, self.w, self.b, *self.alpha]

    def grads(self):
        return [leaf.grad for leaf in self.leaves]


def sliced_net(kind, layer):
    def net(s, w=None):
        w = s.w if w is None else w
        return [
            layer(pick(s.x, 1, i), w, s.b, out=o, in_=i).sin().sum() for o, i in SELECTIONS[kind]
        ]

    return net


def entangled_net(layer):
    def net(s, w=None):
        w = s.w if w is None else w
        pairs = zip(CHOICES, s.alpha, strict=True)
        return [layer(s.x, w, s.b, c, a).sin().sum() for c, a in pairs]

    return net


def mixed_net(slicing, entangling):
    """Slices, mixtures and uses that know nothing of the collector, all of one weight."""

    def net(s, w=None):
        w = s.w if w is None else w
        plain = [linear(s.x, w).sin().sum(), w.square().sum()]
        return [*sliced_net("prefix", slicing)(s, w), *plain, *entangled_net(entangling)(s, w)]

    return net


NETS = {kind: (sliced_net(kind, sliced_linear), sliced_net(kind, eager)) for kind in SELECTIONS}
NETS["entangled"] = entangled_net(entangled_linear), entangled_net(pad_and_sum)
NETS["mixed"] = mixed_net(sliced_linear, entangled_linear), mixed_net(eager, pad_and_sum)


def summed_loss(net, s):
    sum(net(s)).backward()
    return s.grads()


def backward_per_width(net, s):
    for loss in net(s):
        loss.backward()
    return s.grads()


def graph_per_width(net, s):
    for number in range(2):
        net(s)[number].backward()
    return s.grads()


def retained_three_times(net, s):
    loss = sum(net(s))
    for _ in range(3):
        loss.backward(retain_graph=True)
    return s.grads()


def two_living_graphs(net, s):
    first, second = sum(net(s)), net(s)[-1] * 2
    second.backward()
    first.backward()
    return s.grads()


def nested_backward(net, s):
    """A hook that runs a whole backward pass of its own inside the outer one."""
    inner = sum(net(s))
    losses = net(s)
    losses[-1].register_hook(lambda g: inner.backward())
    sum(losses).backward()
    return s.grads()


def grad_of_weight(net, s):
    return torch.autograd.grad(sum(net(s)), [s.w])


def grad_of_x(net, s):
    loss = sum(net(s))
    partial = torch.autograd.grad(loss, [s.x], retain_graph=True)
    assert s.w.grad is None and s.x.grad is None
    loss.backward()
    return [*partial, *s.grads()]


def grad_of_both(net, s):
    got = torch.autograd.grad(sum(net(s)), [s.w, s.x])
    assert s.w.grad is None and s.x.grad is None
    return got


def backward_to_inputs(net, s):
    loss = sum(net(s))
    loss.backward(inputs=[s.x], retain_graph=True)
    assert s.w.grad is None
    loss.backward(inputs=[s.w])
    return [s.x.grad, s.w.grad]


def into_existing_grad(net, s):
    s.w.grad = torch.ones_like(s.w)
    before = s.w.grad
    sum(net(s)).backward()
    assert s.w.grad is before
    return s.grads()


def kept_grad_is_not_overwritten(net, s):
    sum(net(s)).backward()
    first, value = s.w.grad, s.w.grad.clone()
    s.w.grad = None
    net(s)[0].backward()
    assert torch.equal(first, value)
    return s.grads()


def non_leaf_weight(net, s):
    w = s.w * 2
    w.retain_grad()
    sum(net(s, w)).backward()
    return [*s.grads(), w.grad]


def weight_is_a_view(net, s):
    sum(net(s, s.w.flip(0).t().contiguous().t())).backward()
    return s.grads()


def non_leaf_changed_between_uses(net, s):
    w = s.w * 2
    first = sum(net(s, w.clone()))
    living = sliced_linear(s.x.detach(), w, out=3) if net in OURS else linear(s.x.detach(), w[:3])
    w.mul_(3)
    (first + sum(net(s, w))).backward()
    assert living.shape == (ROWS, 3)
    return s.grads()


def double_backward(net, s):
    grads = torch.autograd.grad(sum(net(s)), [s.w, s.x], create_graph=True)
    sum(g.square().sum() for g in grads).backward()
    return s.grads()


def create_graph_then_plain(net, s):
    loss = sum(net(s))
    (gw,) = torch.autograd.grad(loss, [s.w], create_graph=True)
    loss.backward(retain_graph=True)
    gw.sum().backward()
    return s.grads()


def checkpointed(net, s):
    sum(checkpoint(lambda: sum(net(s)), use_reentrant=False) for _ in range(2)).backward()
    return s.grads()


def checkpointed_reentrant(net, s):
    def run(x):
        inner = copy.copy(s)
        inner.x = x
        return sum(net(inner))

    (checkpoint(run, s.x, use_reentrant=True) + sum(net(s))).backward()
    return s.grads()


def saved_on_cpu(net, s):
    with torch.autograd.graph.save_on_cpu():
        loss = sum(net(s))
    loss.backward()
    return s.grads()


def saved_as_copies(net, s):
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        loss = sum(net(s))
    with torch.no_grad():
        s.w.mul_(2)  # allowed: what was saved is a copy
    loss.backward()
    return s.grads()


def optimizer_steps_keeping_losses(net, s):
    """The last loss lives while the next graph is made, as in every training loop."""
    optimizer = torch.optim.SGD(s.leaves, lr=0.01, momentum=0.9)
    losses = []
    for _ in range(3):
        losses.append(sum(net(s)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return [*losses, s.w, s.x]


def data_swapped(net, s):
    living = sum(net(s))
    s.w.data = s.w.data.flip(0).contiguous()
    sum(net(s)).backward()
    return [*s.grads(), living]


def anomaly_mode(net, s):
    with torch.autograd.detect_anomaly(check_nan=True):
        sum(net(s)).backward()
    return s.grads()


def parametrized(net, s):
    class Doubled(torch.nn.Module):
        def forward(self, w):
            return w * 2

    module = torch.nn.Linear(IN, OUT, bias=False, dtype=s.w.dtype, device=DEVICE)
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    module.load_state_dict({"parametrizations.weight.original": s.w.detach()})
    with torch.nn.utils.parametrize.cached():
        sum(net(s, module.weight)).backward()
    return [module.parametrizations.weight.original.grad, s.x.grad]


def frozen_weight(net, s):
    s.w.requires_grad_(False)
    (gx,) = torch.autograd.grad(sum(n for n in net(s) if n.requires_grad), [s.x])
    return [gx]


SCENARIOS = [
    summed_loss, backward_per_width, graph_per_width, retained_three_times, two_living_graphs,
    nested_backward, grad_of_weight, grad_of_x, grad_of_both, backward_to_inputs,
    into_existing_grad, kept_grad_is_not_overwritten, non_leaf_weight, weight_is_a_view,
    non_leaf_changed_between_uses, double_backward, create_graph_then_plain, checkpointed,
    checkpointed_reentrant, saved_on_cpu, saved_as_copies,
    optimizer_steps_keeping_losses, data_swapped, anomaly_mode, parametrized, frozen_weight,
]  # fmt: skip
OURS = [ours for ours, _ in NETS.values()]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("context", [contextlib.nullcontext, accumulate_in_place])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
@pytest.mark.parametrize("kind", NETS)
def test_equals_eager(kind, scenario, context):
    ours, theirs = NETS[kind]
    if kind == "mixed" and scenario is graph_per_width:
        ours, theirs = (lambda s, n=n: n(s)[3:] for n in (ours, theirs))
    wanted = scenario(theirs, State())
    with context():
        got = scenario(ours, State())
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        if b is None:
            assert a is None or not a.any()
            continue
        assert a.shape == b.shape and a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("context", [contextlib.nullcontext, accumulate_in_place])
def test_hooks_fire_once_with_the_whole_gradient(context):
    s, seen = State(), []
    s.w.register_hook(lambda g: seen.append(("tensor", g.clone())))
    s.w.register_post_accumulate_grad_hook(lambda w: seen.append(("post", w.grad.clone())))
    with context():
        sum(NETS["prefix"][0](s)).backward()
    wanted = State()
    sum(NETS["prefix"][1](wanted)).backward()
    assert [name for name, _ in seen] == ["tensor", "post"]
    for _, gradient in seen:
        torch.testing.assert_close(gradient, wanted.w.grad)


def test_hook_may_replace_the_gradient():
    s = State()
    s.w.register_hook(lambda g: g * 0 + 7)
    with accumulate_in_place():
        sum(NETS["prefix"][0](s)).backward()
    assert (s.w.grad == 7).all()


def test_weight_changed_before_backward_raises():
    s = State()
    loss = sum(NETS["prefix"][0](s))
    with torch.no_grad():
        s.w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weight_may_change_where_eager_allows_it():
    """Only dx needs the weight: a first layer's x wants no gradient, so nothing is stale."""
    s = State()
    loss = sliced_linear(s.x.detach(), s.w, out=9).sum()
    with torch.no_grad():
        s.w.mul_(2)
    loss.backward()
    assert s.w.grad[:9].any() and not s.w.grad[9:].any()


def test_deepcopy_and_state_after_backward():
    s = State()
    module = torch.nn.Linear(IN, OUT, dtype=torch.float64, device=DEVICE)
    loss = sliced_linear(s.x, module.weight, module.bias, out=9).sum()
    twin = copy.deepcopy(module)
    sliced_linear(s.x, twin.weight, twin.bias, out=4).sum().backward()
    assert module.weight.grad is None and not twin.weight.grad[4:].any()
    loss.backward()
    assert module.weight.grad[:9].any() and not module.weight.grad[9:].any()


def test_in_place_context_leaves_no_trace():
    with contextlib.suppress(KeyError), accumulate_in_place(), accumulate_in_place():
        raise KeyError
    assert _collect._in_place == 0
    with accumulate_in_place():
        with accumulate_in_place():
            pass
        s = State()
        s.w.grad = before = torch.ones_like(s.w)
        NETS["prefix"][0](s)[0].backward()
        assert s.w.grad is before


def test_in_place_leaves_grad_alone_in_autograd_grad():
    s = State()
    s.w.grad = torch.ones_like(s.w)
    with accumulate_in_place():
        torch.autograd.grad(sum(NETS["prefix"][0](s)), [s.w, s.x])
        torch.autograd.grad(sum(NETS["prefix"][0](s)), [s.x])
    assert (s.w.grad == 1).all()


@pytest.mark.parametrize("uses", [2, 3, 4])
def test_the_root_of_a_pass_is_a_use(uses):
    """Layers that share a weight, the last of them without a loss behind it."""

    def chain(layer):
        s = State()
        y = s.x
        for _ in range(uses):
            y = layer(y, s.w)
        g = torch.arange(y.numel(), device=DEVICE, dtype=y.dtype).view_as(y)
        return torch.autograd.grad(y, [s.x, s.w], g)

    ours = chain(lambda y, w: sliced_linear(y, w, out=IN))
    theirs = chain(lambda y, w: linear(y, w[:IN]))
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted)
