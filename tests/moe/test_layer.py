"""Router, Experts and MoE: equal to their own export, a loop over experts in plain PyTorch."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from weightshare.moe import Experts, LoadBalancer, MoE, Router, plain
from weightshare.space import SearchSpace

D, F_, E, K = 24, 16, 8, 2
KINDS = {
    "plain": {},
    "shared": dict(shared_hidden=12),
    "shared_gate": dict(shared_hidden=12, shared_gate=True, score_fn="softmax", normalize=False),
    "groups": dict(groups=4, topk_groups=2, scale=2.5),
    "topk_groups": dict(groups=4, topk_groups=2, group_score="topk", score_fn="sqrt_softplus"),
    "relu2": dict(activation="relu2", shared_hidden=12, bias=False),
    "gelu": dict(activation="gelu"),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def make(kind="plain", k=K, dtype=torch.float32, **options):
    torch.manual_seed(0)
    moe = MoE(D, F_, E, k, **{**KINDS[kind], **options})
    with torch.no_grad():
        moe.router.weight.mul_(5)
        if moe.router.balance_bias is not None:
            moe.router.balance_bias.normal_(std=0.1)
    return moe.to(dtype)


def tokens(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def values_and_gradients(module, x, *args):
    x = x.detach().clone().requires_grad_()
    y = module(x, *args)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    grads = torch.autograd.grad(y, [x, *module.parameters()], g)
    return dict(zip(["output", "x", *dict(module.named_parameters())], [y, *grads], strict=True))


def error(got, wanted):
    """Largest deviation, relative to the largest wanted value."""
    if not got.numel():
        return 0.0
    return ((got.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


def check(moe, x, *args):
    """At most twice the error that the export has in the same dtype, against float64."""
    exact = values_and_gradients(moe.export().double(), x.double(), *args)
    theirs = values_and_gradients(moe.export(), x, *args)
    eps = torch.finfo(x.dtype).eps
    floor = eps if x.dtype != torch.float32 else 8 * eps  # as in test_ops.py: a few roundings
    for name, ours in values_and_gradients(moe, x, *args).items():
        if ours.shape != exact[name].shape:  # a whole parameter, of which the export has a part
            assert "experts" in name or "shared" in name
            continue
        assert ours.dtype == theirs[name].dtype == x.dtype
        allowed = max(2 * error(theirs[name], exact[name]), floor)
        assert error(ours, exact[name]) <= allowed, name


# -- Values --------------------------------------------------------------------------------------


@EVERY
def test_equals_its_export(kind):
    moe = make(kind)
    check(moe, tokens(2, 15))
    check(moe, tokens(3, 5), torch.rand(3, 5, generator=torch.Generator().manual_seed(3)) < 0.4)


def test_equals_its_export_in_bfloat16():
    """Where bfloat16 rounds a logit across a boundary the choice differs, from that of float64."""
    moe = make("shared", dtype=torch.bfloat16)
    x = tokens(200, dtype=torch.bfloat16)
    low, exact = moe.export().router(x)[0], moe.export().double().router(x.double())[0]
    check(moe, x[(low == exact).all(1)][:60])


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 4),
    groups=st.sampled_from([(1, None), (2, 1), (4, 2), (8, 4), (4, 4)]),
    group_score=st.sampled_from(["top2", "topk"]),
    score_fn=st.sampled_from(list(plain.SCORES)),
    activation=st.sampled_from(list(plain.ACTIVATIONS)),
    normalize=st.booleans(),
    bias=st.sampled_from(["none", "zero", "ties", "skew"]),
    count=st.sampled_from([0, 1, 2, 33]),
    inputs=st.sampled_from(["random", "equal", "zero"]),
    padded=st.booleans(),
    width=st.sampled_from([None, 1, 7, 16, [16, 0, 3, 16, 1, 8, 5, 2]]),
    seed=st.integers(0, 1000),
)
def test_every_kind_of_routing_equals_the_export(
    k, groups, group_score, score_fn, activation, normalize, bias, count, inputs, padded, width,
    seed,
):  # fmt: skip
    """Ties, skew to few experts, experts without tokens, any number of tokens and groups."""
    groups, topk_groups = groups
    if group_score == "topk" and topk_groups is not None and k % topk_groups:
        group_score = "top2"
    options = dict(groups=groups, topk_groups=topk_groups, group_score=group_score,
                   score_fn=score_fn, normalize=normalize, bias=bias != "none")  # fmt: skip
    size = E // groups * (topk_groups or 1)
    moe = make("plain", min(k, size), torch.float64, activation=activation, **options)
    moe.set_active(width)
    with torch.no_grad():
        if bias == "ties":
            moe.router.balance_bias.copy_(torch.tensor([0.5, 0.0] * (E // 2)))
        elif bias == "skew":
            moe.router.balance_bias.copy_(torch.arange(E) * 2.0)
        if inputs == "zero":
            moe.router.weight.zero_()
    x = tokens(count, seed=seed, dtype=torch.float64)
    if inputs == "equal":
        x = x[:1].expand(count, D)
    mask = torch.arange(count) % 3 == 1 if padded else None
    wanted = values_and_gradients(moe.export(), x, mask)
    for name, got in values_and_gradients(moe, x, mask).items():
        if got.shape == wanted[name].shape:
            torch.testing.assert_close(got, wanted[name], msg=name)
    with torch.no_grad():
        ours, theirs = moe.router(x, None)[0], moe.export().router(x)
    assert torch.equal(ours.experts, theirs[0])
    assert ours.counts.sum() == ours.experts.numel()


def test_against_attention_of_a_dense_layer():
    """All experts for everyone with even gates are their mean."""
    moe = make("plain", k=E)
    with torch.no_grad():
        moe.router.weight.zero_()
    x = tokens(7)
    gate, up = torch.einsum("efd,td->etf", moe.experts.gate_up, x).chunk(2, -1)
    each = torch.einsum("edf,etf->etd", moe.experts.down, F.silu(gate) * up)
    torch.testing.assert_close(moe(x), each.mean(0))


def test_return_routing():
    moe, x = make("groups"), tokens(3, 4)
    y, routing, logits = moe(x, return_routing=True)
    assert torch.equal(y, moe(x))
    assert routing.gates.shape == (12, K) and logits.shape == (12, E)
    torch.testing.assert_close(logits, x.view(12, D) @ moe.router.weight.t())
    torch.testing.assert_close(routing.gates.sum(1), torch.full((12,), 2.5))


# -- Elastic width -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shared", "relu2"])
@pytest.mark.parametrize("width", [5, [16, 3, 0, 1, 9, 16, 2, 4], "tensor"])
def test_width_is_cut_out_of_the_export(kind, width):
    moe, x = make(kind), tokens(40)
    if width == "tensor":
        width = torch.tensor([16, 3, 0, 1, 9, 16, 2, 4])
    assert moe.set_active(width) is moe
    check(moe, x)
    small = moe.export()
    widest = 5 if isinstance(width, int) else 16
    assert small.experts.down.shape == (E, D, widest)
    again = MoE(D, widest, E, K, **KINDS[kind])
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again(x), moe(x))
    assert "width=" in repr(moe.experts) and moe.set_active().experts.width is None


def test_widths_follow_the_weights():
    experts = Experts(E, D, F_).set_active(list(range(E)))
    for module in (experts.half(), experts.type(torch.bfloat16)):
        assert module.width.dtype == torch.int64 and module.width.tolist() == list(range(E))
    assert Router(D, E, K).type(torch.float16).expert_counts.dtype == torch.int64
    assert not experts.state_dict().keys() - {"gate_up", "down"}
    early = Experts(E, D, F_, device="meta").set_active(list(range(E)))  # before the weights
    for module in (experts.to("meta"), experts, early):
        module.to_empty(device="cpu")
        assert module.width.tolist() == list(range(E))


def test_unused_part_has_zero_gradient():
    moe = make().set_active(5)
    moe(tokens(30)).sum().backward()
    gate, up = moe.experts.gate_up.grad.chunk(2, 1)
    for used, rest in ((gate[:, :5], gate[:, 5:]), (up[:, :5], up[:, 5:])):
        assert used.abs().sum() > 0 and not rest.any()
    assert not moe.experts.down.grad[:, :, 5:].any()


def test_width_of_a_search_space():
    space = SearchSpace(ffn=[4, 16], shared=[6, 12])
    torch.manual_seed(0)
    moe, x = MoE(D, space["ffn"], E, K, shared_hidden=space["shared"]), tokens(9)
    whole = moe(x)
    space.activate({"ffn": 4, "shared": 6})
    check(moe, x)
    assert moe.export().experts.down.shape[2] == 4 and not torch.equal(moe(x), whole)
    with pytest.raises(TypeError, match=r"SearchSpace\.activate"):
        moe.set_active(4)


def test_experts_alone_export_as_a_drop_in():
    router, experts, x = make().router, make().experts.set_active(7), tokens(30)
    routing, _ = router(x, torch.arange(30) % 5 == 0)
    torch.testing.assert_close(experts.export()(x, routing), experts(x, routing))


def test_export_keeps_what_it_should():
    moe = make("shared_gate", dtype=torch.bfloat16).eval()
    moe.experts.down.requires_grad_(False)
    small = moe.export()
    assert list(small.state_dict()) == list(moe.state_dict())
    assert not small.training and not small.experts.down.requires_grad
    for (name, ours), theirs in zip(
        moe.state_dict().items(), small.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
        assert ours.data_ptr() != theirs.data_ptr()


def test_plain_needs_nothing_but_torch():
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('plain', {plain.__file__!r}); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "module.MoE(4, 3, 2, 1, shared_hidden=2); "
        "assert not any(name.startswith('weightshare') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- Router --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_balance_bias_stays_float32_bit_for_bit(cast):
    moe = make()
    exact = moe.router.balance_bias.clone()
    moe.to(torch.bfloat16) if cast == "to" else getattr(moe, cast)()
    bias = moe.router.balance_bias
    assert bias.dtype == torch.float32 and torch.equal(bias, exact)
    assert moe.router.weight.dtype != torch.float32
    assert bias is dict(moe.named_buffers())["router.balance_bias"]
    if cast != "double":
        assert moe(tokens(5).to(moe.router.weight.dtype)).isfinite().all()


def test_balance_bias_of_a_lower_checkpoint():
    moe = make()
    state = {name: value.bfloat16() for name, value in moe.state_dict().items()}
    assert "router.balance_bias" in state and "router.expert_counts" not in state
    for assign in (False, True):
        other = make().to("meta" if assign else "cpu")
        other.load_state_dict(state, assign=assign)
        bias = other.router.balance_bias
        assert bias.dtype == torch.float32 and bias.device.type == "cpu"
        torch.testing.assert_close(bias, state["router.balance_bias"].float())


def test_logits_are_float32_under_autocast():
    moe, x = make(), tokens(20)
    wanted = moe.router(x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        y, routing, logits = moe(x, return_routing=True)
    assert logits.dtype == routing.gates.dtype == torch.float32
    assert torch.equal(logits, wanted) and y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), moe(x), rtol=0.05, atol=0.02)


def test_counts_grow_in_training_alone_and_skip_padding():
    moe, x = make(), tokens(3, 4)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 2:] = True
    moe.eval()(x)
    assert not moe.router.expert_counts.any()
    moe.train()
    _, routing, _ = moe(x, mask, return_routing=True)
    assert torch.equal(moe.router.expert_counts, routing.counts)
    assert routing.counts.sum() == 6 * K
    moe(x)
    assert moe.router.expert_counts.sum() == 18 * K


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_once_and_changes_nothing(reentrant):
    moe, x = make("shared_gate"), tokens(20)
    wanted = values_and_gradients(moe, x)
    moe.router.expert_counts.zero_()
    leaf = x.clone().requires_grad_()
    y = checkpoint(moe, leaf, use_reentrant=reentrant)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(g)
    got = [y, leaf.grad, *[p.grad for p in moe.parameters()]]
    for (name, a), b in zip(wanted.items(), got, strict=True):
        assert torch.equal(a, b), name
    assert moe.router.expert_counts.sum() == 20 * K


def test_load_balancer_evens_the_load_out():
    moe, x = make("groups"), tokens(400)
    balancer = LoadBalancer(moe, rate=0.02)
    with torch.no_grad():
        for _ in range(60):
            moe(x)
            balancer.step()
            if balancer.metrics()["max_violation_global"].eq(balancer.max_violation()).all():
                first = balancer.max_violation()
    assert balancer.max_violation() < 0.3 * first
    assert not moe.router.expert_counts.any()


# -- Life of a module ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shared_gate", "relu2"])
def test_compiles_whole_and_counts(kind):
    moe = make(kind)
    torch._dynamo.reset()
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    for count in (12, 30):
        x = tokens(count)
        wanted = values_and_gradients(moe, x)
        moe.router.expert_counts.zero_()
        got = values_and_gradients(compiled, x)
        torch.testing.assert_close(list(got.values()), list(wanted.values()))
        assert moe.router.expert_counts.sum() == count * K
        moe.router.expert_counts.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), moe(x))
    torch._dynamo.reset()


def test_compiles_whole_for_inference(traced):
    moe = make("shared").eval()
    compiled = traced(moe)
    with torch.no_grad():
        for x in (tokens(20), tokens(7)):
            torch.testing.assert_close(compiled(x), moe(x))
    assert len(traced.graphs) == 1


def test_one_graph_for_all_widths(traced):
    moe, x = make(), tokens(20)
    compiled = traced(moe)
    for width in (4, 9, 15):
        moe.set_active(width)
        torch.testing.assert_close(compiled(x), moe(x))
    assert len(traced.graphs) == 1


def test_copies_and_pickles():
    moe, x = make("shared").set_active([3, 1, 2, 0, 16, 4, 4, 4]), tokens(5)
    moe(x)
    stream = io.BytesIO()
    torch.save(moe, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(moe),
        pickle.loads(pickle.dumps(moe)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(other(x), moe.eval()(x)) and moe.train()
        other(x)
        assert other.router.expert_counts.data_ptr() != moe.router.expert_counts.data_ptr()


def test_meta_device_then_reset():
    with torch.device("meta"):
        moe = MoE(D, F_, E, K, shared_hidden=12)
    on_meta = MoE(D, F_, E, K, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta for m in (moe, on_meta) for p in m.parameters())
    assert on_meta.router.balance_bias.dtype == torch.float32
    y = moe(torch.empty(2, 3, D, device="meta"))
    assert y.is_meta and y.shape == (2, 3, D)
    moe.to_empty(device="cpu")
    for module in moe.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not moe.router.balance_bias.any() and not moe.router.expert_counts.any()
    assert moe(tokens(2, 3)).isfinite().all()


def test_meta_device_then_checkpoint():
    """Counts are in no checkpoint: memory as it comes must not pass for tokens."""
    saved = make()
    with torch.device("meta"):
        moe = MoE(D, F_, E, K)
    moe(torch.empty(3, D, device="meta"))
    # Fresh memory is likely to be what was freed just before.
    for _ in range(20):
        torch.full((E,), 99, dtype=torch.int64)
    moe.to_empty(device="cpu").load_state_dict(saved.state_dict())
    assert not moe.router.expert_counts.any()
    moe(tokens(3))
    assert moe.router.expert_counts.sum() == 3 * K
    moe.to_empty(device="cpu")
    assert moe.router.expert_counts.sum() == 3 * K


def test_first_weights():
    """Experts as nn.Linear's; a router so small that choices are even at first."""
    torch.manual_seed(0)
    moe = MoE(256, 64, 16, 2)
    for weight in (moe.experts.gate_up, moe.experts.down):
        linear = nn.Linear(weight.shape[2], weight.shape[1]).weight
        assert abs(weight.std() / linear.std() - 1) < 0.05
    scores = moe.router(torch.randn(500, 256))[1].sigmoid()
    assert scores.std() < 0.1
    assert moe.router.weight.std() < 0.1**0.5 / 16


def test_every_parameter_gets_a_gradient():
    """Also of experts without tokens, so that DistributedDataParallel finds none unused."""
    moe = make("shared_gate")
    moe(tokens(1)).sum().backward()
    assert all(p.grad is not None for p in moe.parameters())
    assert set(dict(moe.named_buffers())) == {"router.balance_bias"}


def test_all_or_no_tokens_are_padding():
    moe = make("shared")
    x = tokens(2, 3)
    y = moe(x, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(y, moe.shared(x))
    assert not moe.router.expert_counts.any()
    assert moe(x[:0]).shape == (0, 3, D)


# -- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "words"),
    [
        ((D, F_, E, 9), {}, ValueError, "k"),
        ((D, F_, E, 0), {}, ValueError, "k"),
        ((D, F_, 0, 1), {}, ValueError, "num_experts: expected at least 1"),
        ((D, 0, E, 1), {}, ValueError, "hidden: expected at least 1"),
        ((2.5, F_, E, 1), {}, TypeError, "dim: expected an int"),
        ((D, F_, E, 2), dict(groups=3, topk_groups=1), ValueError, "groups"),
        ((D, F_, E, 2), dict(groups=4), ValueError, "topk_groups"),
        ((D, F_, E, 5), dict(groups=4, topk_groups=2), ValueError, "k"),
        ((D, F_, E, 2), dict(group_score="best"), ValueError, "group_score"),
        ((D, F_, E, 2), dict(score_fn="relu"), ValueError, "score_fn"),
        ((D, F_, E, 2), dict(activation="silu"), ValueError, "activation: 'silu'.*swiglu"),
        ((D, F_, E, 2), dict(shared_gate=True), ValueError, "shared_gate.*shared_hidden"),
        ((D, F_, E, 2), dict(shared_hidden=-1), ValueError, "shared_hidden"),
        ((D, F_, E, 2), dict(top_k=2), TypeError, "top_k"),
    ],
)
def test_bad_options_are_refused_when_made(arguments, options, kind, words):
    with pytest.raises(kind, match=words):
        MoE(*arguments, **options)


@pytest.mark.parametrize(
    ("width", "kind", "words"),
    [
        (17, ValueError, "17"),
        (-1, ValueError, "-1"),
        ([1, 2], ValueError, "2 widths"),
        ([1.5] * E, TypeError, "width"),
        (torch.ones(E), ValueError, "width"),
        ("wide", TypeError, "width"),
    ],
)
def test_bad_widths(width, kind, words):
    experts = Experts(E, D, F_).set_active(3)
    with pytest.raises(kind, match=words):
        experts.set_active(width)
    assert experts.width == 3


def test_bad_calls():
    moe = make()
    with pytest.raises(ValueError, match=r"padding_mask: expected shape \(2, 3\)"):
        moe(tokens(2, 3), torch.zeros(6, dtype=torch.bool))
    with pytest.raises((TypeError, ValueError), match="padding_mask"):
        moe(tokens(2, 3), torch.zeros(2, 3))
    with pytest.raises((ValueError, RuntimeError)):
        moe(torch.randn(4, D + 1))
    other = Router(D, E + 1, K)(tokens(3))[0]
    with pytest.raises(ValueError, match="routing: is over 9 experts"):
        moe.experts(tokens(3), other)
