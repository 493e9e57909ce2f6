"""Routing: the choice against brute force and other models' gates, its tables, its refusals."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from weightshare_kernels.ops.route import Routing, reference, route, routing_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCORE_FNS = ["sigmoid", "softmax", "sqrt_softplus"]
SETTINGS = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
NAN, INF = float("nan"), float("inf")


def logits(rows, experts, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(rows, experts, generator=generator, dtype=torch.float64)
    return value.to(DEVICE, dtype)


# ---- brute force --------------------------------------------------------------------------------


def best(values, k):
    """Positions of the k largest of a list, of equals the first; NaN is as -inf."""
    values = [-INF if math.isnan(v) else v for v in values]
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def choose(values, k, groups, topk_groups, group_top):
    """Experts of one token, from the list of its s + bias."""
    size = len(values) // groups
    values = [-INF if math.isnan(v) else v for v in values]
    totals = []
    for g in range(groups):
        part = torch.tensor(values[g * size : (g + 1) * size]).sort(descending=True).values
        total = part[0]
        for value in part[1:group_top]:
            total = total + value  # in the dtype of the scores, from the best on
        totals.append(total.item())
    allowed = sorted(best(totals, topk_groups)) if topk_groups < groups else range(groups)
    ids = [g * size + i for g in allowed for i in range(size)]
    return [ids[i] for i in best([values[i] for i in ids], k)]


def check_tables(routing, experts, padding=None):
    """Counts, offsets, permutation and inverse are a stable sort of the pairs by expert."""
    ids = routing.experts.tolist()
    k = routing.experts.shape[1]
    padded = [False] * len(ids) if padding is None else padding.tolist()
    bins = [
        experts if out or not 0 <= i < experts else i
        for row, out in zip(ids, padded, strict=True)
        for i in row
    ]
    order = sorted(range(len(bins)), key=lambda p: bins[p])
    assert routing.permutation.tolist() == order
    counts = [bins.count(e) for e in range(experts)]
    assert routing.counts.tolist() == counts
    assert routing.offsets.tolist() == [sum(counts[:e]) for e in range(experts + 1)]
    pairs = torch.arange(len(ids) * k, device=DEVICE)
    assert torch.equal(routing.permutation[routing.inverse], pairs)
    for tensor in routing[:1] + routing[2:]:
        assert tensor.dtype == torch.int64 and tensor.is_contiguous()


@st.composite
def problems(draw):
    """Logits of several kinds, and options that fit them."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    size = draw(st.sampled_from([1, 2, 5, 16, 33, 70, 200]))
    experts = groups * size
    topk_groups = draw(st.integers(1, groups))
    most = topk_groups * size
    k = draw(st.one_of(st.integers(1, min(most, 9)), st.integers(1, most)))
    group_score = "topk" if k % topk_groups == 0 and draw(st.booleans()) else "top2"
    dtype = draw(st.sampled_from(DTYPES))
    rows = draw(st.sampled_from([0, 1, 2, 9]))
    kind = draw(st.sampled_from(["random", "ties", "equal", "skewed", "broken"]))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, experts, generator=generator, dtype=torch.float64)
    bias = torch.randn(experts, generator=generator) * 0.1 if draw(st.booleans()) else None
    # Exact ties want equal logits and no bias. The levels are positive, as sigmoid(x) and
    # sigmoid(-x) would make different pairs of experts tie in all but rounding.
    if kind in ("ties", "equal"):
        level = torch.randint(0, 5 if kind == "ties" else 1, x.shape, generator=generator)
        x, bias = 0.37 * level + 0.11 * level**2, None
        dtype = torch.float32 if dtype == torch.float64 else dtype  # where PyTorch breaks ties
    elif kind == "skewed":
        x = x * 0.1 + torch.linspace(3, -3, experts, dtype=torch.float64)
    elif kind == "broken":
        for value in (NAN, INF, -INF):
            x[torch.rand(x.shape, generator=generator) < 0.15] = value
        x[: rows // 2] = draw(st.sampled_from([NAN, INF, -INF]))
    padding = torch.rand(rows, generator=generator) < 0.3 if draw(st.booleans()) else None
    options = {
        "score_fn": draw(st.sampled_from(SCORE_FNS)),
        "normalize": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5])),
        "bias": None if bias is None else bias.to(DEVICE),
        "padding_mask": None if padding is None else padding.to(DEVICE),
    }
    if groups > 1 or draw(st.booleans()):
        options |= {"groups": groups, "topk_groups": topk_groups, "group_score": group_score}
    return kind, x.to(DEVICE, dtype), k, options


@SETTINGS
@given(problems())
def test_against_brute_force(problem):
    kind, scores, k, options = problem
    experts = scores.shape[1]
    padding = options["padding_mask"]
    routing = route(scores, k, **options)
    check_tables(routing, experts, padding)
    s = reference.score(scores, options["score_fn"])
    choice = s if options["bias"] is None else s + options["bias"]
    groups, topk_groups = options.get("groups", 1), options.get("topk_groups", 1)
    size = experts // groups
    group_top = k // topk_groups if options.get("group_score") == "topk" else min(2, size)
    eps = torch.finfo(s.dtype).eps
    for t in range(scores.shape[0]):
        got = routing.experts[t].tolist()
        assert len(set(got)) == k and min(got) >= 0 and max(got) < experts
        if padding is not None and padding[t]:
            assert got == list(range(k)) and not routing.gates[t].any()
            continue
        with torch.device("cpu"):
            torch.set_default_dtype(s.dtype)
            try:
                wanted = choose(choice[t].tolist(), k, groups, topk_groups, group_top)
            finally:
                torch.set_default_dtype(torch.float32)
        if got != wanted:  # only where the two scores differ by how a score function rounds
            assert kind in ("random", "skewed", "broken")
            a, b = choice[t][got], choice[t][wanted]
            torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps, equal_nan=True)
    gates = reference.gates_of(
        s.gather(1, routing.experts), padding, options["normalize"], options["scale"]
    )
    assert routing.gates.dtype == s.dtype
    torch.testing.assert_close(routing.gates, gates, rtol=(16 + k) * eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("score_fn", SCORE_FNS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_rows_without_numbers(score_fn, value):
    """A row of one value, or of none, takes the first experts; a lone NaN is taken last."""
    scores = torch.full((3, 40), value, device=DEVICE)
    scores[1] = torch.linspace(2, -2, 40)
    scores[1, 5] = NAN
    for options in ({}, {"groups": 8, "topk_groups": 4}):
        routing = route(scores, 8, score_fn=score_fn, **options)
        assert routing.experts[0].tolist() == routing.experts[2].tolist() == list(range(8))
        check_tables(routing, 40)
        if score_fn != "softmax":  # where a NaN reaches the whole row
            assert routing.experts[1].tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
            assert torch.isfinite(routing.gates[1]).all()


@pytest.mark.parametrize("score_fn", SCORE_FNS)
def test_padding_sends_nothing(score_fn):
    """Whatever a padded row holds, its gates and gradients are zero, and it is not counted."""
    scores = logits(6, 12)
    scores[1], scores[4] = NAN, INF
    padding = torch.tensor([False, True, False, False, True, False], device=DEVICE)
    scores.requires_grad_()
    routing = route(scores, 3, score_fn=score_fn, padding_mask=padding)
    routing.gates.square().sum().backward()
    assert torch.isfinite(routing.gates).all() and torch.isfinite(scores.grad).all()
    assert not routing.gates[padding].any() and not scores.grad[padding].any()
    assert scores.grad[~padding].any(1).all()
    assert routing.counts.sum() == routing.offsets[-1] == 4 * 3
    assert routing.permutation[12:].tolist() == [3, 4, 5, 12, 13, 14]
    alone = route(scores.detach()[~padding], 3, score_fn=score_fn)
    assert torch.equal(alone.counts, routing.counts)
    assert torch.equal(alone.gates, routing.gates[~padding])


def test_saturated_scores():
    """Scores that over- and underflow choose, weigh and differentiate without a NaN."""
    scores = torch.tensor([[200.0, -200.0, 90.0, 0.0], [-200.0, -150.0, -110.0, -120.0]])
    for score_fn in SCORE_FNS:
        x = scores.to(DEVICE).requires_grad_()
        routing = route(x, 2, score_fn=score_fn)
        routing.gates.cos().sum().backward()
        assert torch.isfinite(routing.gates).all() and torch.isfinite(x.grad).all(), score_fn
    assert route(scores.to(DEVICE), 2).experts[0].tolist() == [0, 2]  # both are 1: lowest id


# ---- other models' gates ------------------------------------------------------------------------


def gate_logits(gate, rows=50):
    """Initialised gate, hidden states, and the logits that it makes of them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator) / 8)
    x = torch.randn(rows, gate.weight.shape[1], generator=generator)
    return x, x @ gate.weight.detach().t()


def assert_same_choice(routing, weights, experts):
    """Equal weights by expert, whatever the order in which a gate lists them."""

    def dense(ids, values):
        return values.new_zeros(ids.shape[0], 64).scatter(1, ids, values)

    torch.testing.assert_close(dense(routing.experts, routing.gates), dense(experts, weights))


def check_gate(gate, **options):
    """Choice, weights and their gradient against a transformers gate."""
    x, scores = gate_logits(gate)
    scores = scores.requires_grad_()
    routing = route(scores, gate.top_k, **options)
    _, weights, experts = gate(x)
    assert_same_choice(routing, weights.detach(), experts)
    check_tables(routing, scores.shape[1])
    weighing = torch.linspace(-1, 1, 64)
    (weights * weighing[experts]).sum().backward()
    (grad,) = torch.autograd.grad((routing.gates * weighing[routing.experts]).sum(), scores)
    torch.testing.assert_close(grad.t() @ x, gate.weight.grad, rtol=1e-4, atol=1e-6)


needs_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="the models run on the CPU")


@needs_cpu
@pytest.mark.parametrize("normalize", [True, False])
def test_deepseek_v3(normalize):
    models = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = models.DeepseekV3Config(
        hidden_size=64, n_routed_experts=32, num_experts_per_tok=8, n_group=8, topk_group=4,
        routed_scaling_factor=2.5, norm_topk_prob=normalize,
    )  # fmt: skip
    gate = models.DeepseekV3TopkRouter(config)
    gate.e_score_correction_bias.copy_(torch.linspace(0.2, -0.2, 32))
    bias = gate.e_score_correction_bias
    check_gate(gate, bias=bias, groups=8, topk_groups=4, normalize=normalize, scale=2.5)


@needs_cpu
@pytest.mark.parametrize("normalize", [True, False])
def test_qwen3_moe(normalize):
    models = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = models.Qwen3MoeConfig(
        hidden_size=64, num_experts=48, num_experts_per_tok=6, norm_topk_prob=normalize
    )
    gate = models.Qwen3MoeTopKRouter(config)
    check_gate(gate, score_fn="softmax", normalize=normalize)


@needs_cpu
def test_mixtral():
    models = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = models.MixtralConfig(hidden_size=64, num_local_experts=8, num_experts_per_tok=2)
    check_gate(models.MixtralTopKRouter(config), score_fn="softmax")


# ---- tables of a choice made elsewhere ----------------------------------------------------------


@SETTINGS
@given(
    st.integers(1, 40), st.integers(0, 30), st.integers(1, 9), st.booleans(), st.integers(0, 2**20)
)
def test_routing_of(experts, rows, k, pad, seed):
    """Any ids: repeated within a token, skewed, out of range."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts + 1, (rows, k), generator=generator)
    if seed % 3 == 0:
        ids = ids.clamp(0, 1)
    if rows and seed % 5 == 0:
        ids[0, 0], ids[-1, -1] = -(2**62), 2**62
    padding = (torch.rand(rows, generator=generator) < 0.3).to(DEVICE) if pad else None
    gates = torch.rand(rows, k, generator=generator).to(DEVICE)
    routing = routing_of(ids.to(DEVICE), gates, experts, padding)
    check_tables(routing, experts, padding)
    assert torch.equal(routing.experts.cpu(), ids)
    kept = gates if padding is None else gates * ~padding[:, None]
    assert torch.equal(routing.gates, kept)


def test_routing_of_agrees_with_route():
    padding = torch.arange(30, device=DEVICE) % 4 == 0
    routing = route(logits(30, 20), 3, padding_mask=padding)
    again = routing_of(routing.experts.int(), routing.gates.bfloat16(), 20, padding)
    assert again.gates.dtype == torch.float32
    for name in ("experts", "counts", "offsets", "permutation", "inverse"):
        assert torch.equal(getattr(routing, name), getattr(again, name)), name
    gates = routing.gates.clone().requires_grad_()
    routing_of(routing.experts, gates, 20, padding).gates.sum().backward()
    assert torch.equal(gates.grad, (~padding[:, None]).float().expand(30, 3))


# ---- refusals -----------------------------------------------------------------------------------

X, IDS = torch.zeros(5, 12), torch.zeros(5, 2, dtype=torch.int64)
GROUPS = {"groups": 4, "topk_groups": 2}
BAD = [
    (TypeError, "scores: expected a floating-point", {"scores": X.long()}),
    (TypeError, "scores: expected a tensor", {"scores": [[1.0]]}),
    (ValueError, "scores: expected 2 dimensions", {"scores": X[0]}),
    (ValueError, "k: 13 is outside 1..12", {"k": 13}),
    (ValueError, "k: 0 is outside", {"k": 0}),
    (TypeError, "k: expected an int", {"k": 2.0}),
    (TypeError, "k: expected an int", {"k": True}),
    (TypeError, "bias: is torch.bfloat16.*float32", {"bias": X[0].bfloat16()}),
    (TypeError, "bias: is torch.float16", {"bias": X[0].half()}),
    (TypeError, "bias: expected a floating-point", {"bias": X[0].long()}),
    (ValueError, "bias: has 11 elements", {"bias": X[0, 1:]}),
    (ValueError, "bias: expected 1 dimensions", {"bias": X}),
    (ValueError, "bias: is on meta", {"bias": X[0].to("meta")}),
    (TypeError, "padding_mask: expected a bool.*mask == 0", {"padding_mask": X[:, 0].long()}),
    (TypeError, "padding_mask: expected a bool", {"padding_mask": [True] * 5}),
    (ValueError, r"padding_mask: expected shape \(5,\)", {"padding_mask": X[:4, 0] > 0}),
    (ValueError, "padding_mask: expected shape", {"padding_mask": X > 0}),
    (ValueError, "padding_mask: is on meta", {"padding_mask": (X[:, 0] > 0).to("meta")}),
    (ValueError, "score_fn: expected one of sigmoid", {"score_fn": "relu"}),
    (ValueError, "group_score: expected one of top2", {"group_score": "max"}),
    (ValueError, "groups: 5 does not divide the 12", {"groups": 5, "topk_groups": 2}),
    (ValueError, "groups: 0 does not divide", {"groups": 0}),
    (TypeError, "groups: expected an int", {"groups": 2.0}),
    (ValueError, "topk_groups: is None, but there are 4", {"groups": 4}),
    (ValueError, "topk_groups: 5 is outside 1..4", {"groups": 4, "topk_groups": 5}),
    (ValueError, "topk_groups: 0 is outside", {"groups": 4, "topk_groups": 0}),
    (ValueError, "k: 7 is more than the 6 experts of 2 groups", {"k": 7, **GROUPS}),
    (ValueError, "k divisible by topk_groups", {"k": 3, "group_score": "topk", **GROUPS}),
    (ValueError, "scale: expected a finite", {"scale": INF}),
]  # fmt: skip
BAD_TABLES = [
    (TypeError, "experts: expected integer ids", {"experts": IDS.float()}),
    (TypeError, "experts: expected integer ids", {"experts": IDS.bool()}),
    (TypeError, "experts: expected a tensor", {"experts": [[0, 1]] * 5}),
    (ValueError, "experts: has shape", {"experts": IDS[:4]}),
    (ValueError, "experts: is on meta", {"experts": IDS.to("meta")}),
    (ValueError, "gates: expected 2 dimensions", {"gates": X[0]}),
    (TypeError, "gates: expected a floating-point", {"gates": IDS}),
    (ValueError, "num_experts: expected at least 1", {"num_experts": 0}),
    (TypeError, "num_experts: expected an int", {"num_experts": 3.0}),
    (TypeError, "padding_mask: expected a bool", {"padding_mask": IDS[:, 0]}),
]


def on_device(arguments):
    """Arguments on the device under test, but those that are meant to be elsewhere."""
    return {
        k: v.to(DEVICE) if torch.is_tensor(v) and v.device.type == "cpu" else v
        for k, v in arguments.items()
    }


@pytest.mark.parametrize(("error", "message", "changed"), BAD, ids=range(len(BAD)))
def test_route_refuses(error, message, changed):
    with pytest.raises(error, match=message):
        route(**on_device({"scores": X, "k": 2, **changed}))


@pytest.mark.parametrize(("error", "message", "changed"), BAD_TABLES, ids=range(len(BAD_TABLES)))
def test_routing_of_refuses(error, message, changed):
    good = {"experts": IDS, "gates": X[:, :2], "num_experts": 3}
    with pytest.raises(error, match=message):
        routing_of(**on_device({**good, **changed}))


# ---- how it runs --------------------------------------------------------------------------------


def outputs(scores, *arguments, **options):
    """Routing and the gradient of the scores."""
    scores = scores.detach().requires_grad_()
    routing = route(scores, *arguments, **options)
    (grad,) = torch.autograd.grad(routing.gates.square().sum(), scores)
    return *routing, grad


def assert_equal(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"groups": 8, "topk_groups": 3}], ids=["flat", "groups"])
def test_threads_do_not_show(options):
    scores, padding = logits(3000, 64), torch.arange(3000, device=DEVICE) % 7 == 0
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            results.append(outputs(scores, 6, padding_mask=padding, **options))
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        assert_equal(other, results[0])


def test_layouts():
    """Strided and expanded arguments, and a gradient that is expanded."""
    scores, bias = logits(20, 24), logits(1, 24, seed=1)[0]
    padding = torch.arange(20, device=DEVICE) % 3 == 0
    wanted = outputs(scores, 4, bias=bias, padding_mask=padding)
    wide = torch.full((40, 48), NAN, device=DEVICE)
    wide[::2, ::2] = scores
    apart = {"bias": bias.repeat_interleave(2)[::2], "padding_mask": padding[:, None].repeat(1, 2)}
    apart["padding_mask"] = apart["padding_mask"][:, 0]
    assert_equal(outputs(wide[::2, ::2], 4, **apart), wanted)
    assert_equal(outputs(scores.t().contiguous().t(), 4, bias=bias, padding_mask=padding), wanted)
    same = outputs(scores[:1].expand(20, 24), 4)
    assert_equal(same, outputs(scores[:1].expand(20, 24).contiguous(), 4))


def test_bias_gets_no_gradient():
    bias = torch.zeros(12, device=DEVICE, requires_grad=True)
    scores = logits(5, 12).requires_grad_()
    route(scores, 3, bias=bias, normalize=False).gates.sum().backward()
    assert bias.grad is None and scores.grad.any()
    doubled = route(scores.detach(), 3, bias=bias.double())
    assert doubled.gates.dtype == torch.float32 and not doubled.gates.requires_grad


def test_integer_outputs_are_not_differentiable():
    routing = route(logits(5, 12).requires_grad_(), 3)
    assert isinstance(routing, Routing)
    assert [t.requires_grad for t in routing] == [False, True, False, False, False, False]


def test_autocast_leaves_it_alone():
    scores = logits(9, 12)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = outputs(scores, 3, score_fn="softmax")
    assert_equal(inside, outputs(scores, 3, score_fn="softmax"))


@pytest.mark.parametrize("score_fn", SCORE_FNS)
def test_compiled_once_for_all_batches(score_fn):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    bias = logits(1, 16, seed=5)[0]

    def function(scores, padding):
        routing = route(
            scores, 4, bias=bias, score_fn=score_fn, groups=4, topk_groups=2, padding_mask=padding
        )
        return *routing, *routing_of(routing.experts, routing.gates * 2, 16)

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for rows in (6, 9, 30):
        scores = logits(rows, 16, seed=rows)
        padding = torch.arange(rows, device=DEVICE) % 3 == 1
        results = []
        for run in (function, compiled):
            x = scores.clone().requires_grad_()
            found = run(x, padding)
            found[1].square().sum().backward()
            results.append([*found, x.grad])
        assert_equal(*results)
    assert counter.frame_count == 1
    # Where nothing asks for a gradient the compiler takes another path.
    assert_equal(compiled(scores, padding), function(scores, padding))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms():
    scores = logits(12, 16).view(3, 4, 16)

    def loss(x):
        return route(x, 2, groups=4, topk_groups=2).gates.cos().sum()

    wanted = scores.clone().requires_grad_()
    sum(map(loss, wanted)).backward()
    torch.testing.assert_close(torch.func.grad(loss)(scores[1]), wanted.grad[1])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(scores), wanted.grad)
    alone = [route(x, 2).experts for x in scores]
    assert_equal(torch.vmap(lambda x: route(x, 2).experts)(scores), alone)


def test_without_data():
    """On meta and fake tensors, where reading a value on the host would raise."""
    options = {"groups": 4, "topk_groups": 2}
    routing = route(torch.empty(7, 16, device="meta", dtype=torch.bfloat16), 3, **options)
    shapes = [(7, 3), (7, 3), (16,), (17,), (21,), (21,)]
    assert [tuple(t.shape) for t in routing] == shapes
    assert all(t.device.type == "meta" for t in routing)
    assert routing.gates.dtype == torch.float32
    with FakeTensorMode():
        scores = torch.empty(7, 16, requires_grad=True)
        padding = torch.empty(7, dtype=torch.bool)
        routing = route(scores, 3, padding_mask=padding, **options)
        routing.gates.sum().backward()
        assert [tuple(t.shape) for t in routing] == shapes and scores.grad.shape == (7, 16)
        tables = routing_of(routing.experts, routing.gates.detach(), 16)
        assert [tuple(t.shape) for t in tables] == shapes


def test_ids_of_no_expert_stay_in_bounds():
    """The op itself, past the public function's checks."""
    ids = torch.full((4, 2), 99, device=DEVICE)
    counts, offsets, permutation, _ = torch.ops.weightshare.route_tables(ids, None, 8)
    assert not counts.any() and not offsets.any() and permutation.tolist() == list(range(8))
