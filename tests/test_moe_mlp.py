"""moe_mlp beyond its cases: what it saves, shared weights, widths, threads, compilers, errors."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightshare_kernels import _register, moe_mlp, route, routing_of
from weightshare_kernels.ops.moe_mlp import cases, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(tokens=20, d=16, f=12, experts=4, k=2, dtype=torch.float64, blocks=2, seed=0):
    """x, gate_up, down and a routing with gates that want a gradient."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        value = torch.randn(shape, generator=g, dtype=torch.float64)
        return value.to(DEVICE, dtype).requires_grad_()

    kind = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.randn(tokens, experts, generator=g, dtype=torch.float64).to(DEVICE, kind)
    routing = route(logits.requires_grad_(), k)
    return randn(tokens, d), randn(experts, blocks * f, d), randn(experts, d, f), routing, logits


def gradients(y, wanted, retain=True):
    ones = torch.ones_like(y)
    return torch.autograd.grad(y, wanted, ones, retain_graph=retain, materialize_grads=True)


# -- what is saved -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_saves_x_and_h_alone(dtype):
    tokens, d, f, k = 33, 24, 20, 3
    x, gate_up, down, routing, _ = problem(tokens, d, f, 5, k, dtype)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = moe_mlp(x, gate_up, down, routing)
    shared = [gate_up, down, *routing]  # parameters, and tables of 8 bytes per pair or expert
    for tensor in shared:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    size = dtype.itemsize
    assert sum(kept.values()) == size * (tokens * d + 2 * tokens * k * f)
    assert len(kept) == 2
    y.sum().backward()


def test_inference_saves_nothing():
    x, gate_up, down, routing, _ = problem()
    with torch.no_grad():
        assert moe_mlp(x, gate_up, down, routing).grad_fn is None
    with torch.inference_mode():
        y = moe_mlp(x, gate_up, down, routing)
    torch.testing.assert_close(y.clone(), moe_mlp(x, gate_up, down, routing).detach())


# -- gradients of some inputs alone, and of shared weights -----------------------------------------


@pytest.mark.parametrize("wanted", ["x", "gate_up", "down", "logits"])
def test_each_gradient_alone(wanted):
    x, gate_up, down, routing, logits = problem()
    tensors = {"x": x, "gate_up": gate_up, "down": down, "logits": logits}
    every = gradients(moe_mlp(x, gate_up, down, routing), list(tensors.values()))
    at = list(tensors).index(wanted)
    alone = {n: t if n == wanted else t.detach() for n, t in tensors.items()}
    y = moe_mlp(alone["x"], alone["gate_up"], alone["down"], route(alone["logits"], 2))
    torch.testing.assert_close(gradients(y, [alone[wanted]])[0], every[at])


def test_uses_of_one_weight_share_a_gradient():
    """Two widths of one set of experts in a pass: one gradient, its sum, hooks fired once."""
    x, gate_up, down, routing, _ = problem()
    calls = []
    down.register_hook(lambda grad: calls.append(grad))
    wide, narrow = (moe_mlp(x, gate_up, down, routing, width=w) for w in (12, 5))
    apart = [gradients(y, [gate_up, down]) for y in (wide, narrow)]
    calls.clear()
    together = gradients(wide.sum() + narrow.sum(), [gate_up, down])
    for got, a, b in zip(together, *apart, strict=True):
        torch.testing.assert_close(got, a + b)
    assert len(calls) == 1


def test_low_precision_uses_sum_in_fp32():
    x, gate_up, down, routing, _ = problem(dtype=torch.bfloat16)
    outputs = [moe_mlp(x, gate_up, down, routing, width=w) for w in (12, 7, 3)]
    exact = [t.detach().double().requires_grad_() for t in (x, gate_up, down)]
    wanted = [
        moe_mlp(*exact, routing._replace(gates=routing.gates.detach().double()), width=w)
        for w in (12, 7, 3)
    ]
    got = torch.autograd.grad(sum(y.sum() for y in outputs), [gate_up, down])
    want = torch.autograd.grad(sum(y.sum() for y in wanted), exact[1:])
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * w.abs().max()


# -- widths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_width_is_a_slice(activation):
    blocks = 2 if activation == "swiglu" else 1
    x, gate_up, down, routing, _ = problem(blocks=blocks)
    y = moe_mlp(x, gate_up, down, routing, activation=activation, width=5)
    parts = [part[:, :5] for part in gate_up.chunk(blocks, 1)]
    sliced = moe_mlp(x, torch.cat(parts, 1), down[..., :5], routing, activation=activation)
    torch.testing.assert_close(y, sliced)
    got, want = (gradients(t, [gate_up, down]) for t in (y, sliced))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert not got[1][..., 5:].any()


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_widths_per_expert(kind):
    x, gate_up, down, routing, _ = problem()
    widths = [12, 0, 5, 7]
    mask = torch.arange(12, device=DEVICE) < torch.tensor(widths, device=DEVICE)[:, None]
    cut = gate_up * mask.repeat(1, 2)[..., None]
    want = moe_mlp(x, cut, down, routing)
    got = moe_mlp(x, gate_up, down, routing, width=kind(widths))
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(got, [x, gate_up]), gradients(want, [x, gate_up]), strict=True):
        torch.testing.assert_close(a, b)


# -- any routing ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_shapes(data):
    draw = data.draw
    experts = draw(st.integers(1, 6))
    k = draw(st.integers(1, experts))
    tokens = draw(st.sampled_from([0, 1, 3, 15, 16, 17, 64, 65, 90]))
    d, f = (draw(st.sampled_from([1, 2, 7, 16, 31, 50])) for _ in range(2))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    skew = draw(st.sampled_from([0.0, 4.0]))
    x, gate_up, down, _, _ = problem(tokens, d, f, experts, k, dtype, seed=draw(st.integers(0, 99)))
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(tokens, experts, generator=g) - skew * torch.arange(experts)
    chosen = scores.topk(k, dim=1).indices.to(DEVICE)
    padding = torch.rand(tokens, generator=g).to(DEVICE) < draw(st.sampled_from([0.0, 0.3]))
    gates = torch.rand(tokens, k, generator=g).to(DEVICE, x.dtype).float().requires_grad_()
    routing = routing_of(chosen, gates, experts, padding)
    y = moe_mlp(x, gate_up, down, routing)
    tables = routing.offsets, routing.permutation, None, f, "swiglu"
    wide = [t.detach().double().requires_grad_() for t in (x, gate_up, down, gates)]
    want, _ = reference.define(*wide, *tables)
    leaves = [x, gate_up, down, gates]
    low = [t.detach().requires_grad_() for t in leaves]
    torchs, _ = reference.define(*low, *tables)
    triples = zip(
        [y, *gradients(y, leaves)],
        [torchs, *gradients(torchs, low)],
        [want, *gradients(want, wide)],
        strict=True,
    )
    for ours, theirs, exact in triples:
        assert torch.isfinite(ours).all()
        if not exact.numel():
            continue
        scale = exact.abs().max().clamp_min(1e-30)
        error, allowed = ((t.double() - exact).abs().max() / scale for t in (ours, theirs))
        floor = {torch.bfloat16: 2, torch.float32: 16, torch.float64: 64}[dtype]
        assert error <= max(2 * allowed, floor * torch.finfo(dtype).eps)


# -- threads, instruction sets, compilers --------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda", reason="threads are the CPU's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(dtype):
    x, gate_up, down, routing, logits = problem(90, 160, 100, 5, 2, dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = moe_mlp(x, gate_up, down, routing)
            wanted = [x, gate_up, down, logits]
            grads = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
            found.append([y, *grads])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


SCRIPT = """
import torch
from test_moe_mlp import problem, gradients
from weightshare_kernels import moe_mlp
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for tokens in (3, 50):
        x, gate_up, down, routing, logits = problem(tokens, 70, 36, 3, 2, dtype)
        y = moe_mlp(x, gate_up, down, routing)
        wide = [t.detach().double().requires_grad_() for t in (x, gate_up, down)]
        exact = moe_mlp(*wide, routing._replace(gates=routing.gates.detach().double()))
        pairs = zip([y, *gradients(y, [x, gate_up, down])], [exact, *gradients(exact, wide)])
        for a, b in pairs:
            error = (a.double() - b).abs().max() / b.abs().max()
            assert error < 8 * torch.finfo(dtype).eps, (dtype, tokens, error)
print("good")
"""


@pytest.mark.skipif(
    _register.backend_of("moe_mlp", "cpu") != "cpu", reason="instruction sets of the CPU library"
)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_instruction_sets(isa):
    """Every set that this processor has; a lower one is what an older processor takes."""
    here = os.path.dirname(__file__)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"WEIGHTSHARE_ISA": isa, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=here,
    )
    assert done.stdout.strip() == "good", done.stderr


@pytest.mark.parametrize("width", [None, 7])
def test_compiled_equals_eager(width):
    torch._dynamo.reset()
    x, gate_up, down, _, logits = problem(dtype=torch.float32)

    def layer(x, gate_up, down, logits):
        return moe_mlp(x, gate_up, down, route(logits, 2), width=width)

    fast = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (20, 13):
        wanted = [x[:tokens].detach().requires_grad_(), gate_up, down]
        wanted.append(logits[:tokens].detach().requires_grad_())
        got, want = fast(*wanted), layer(*wanted)
        torch.testing.assert_close(got, want)
        for a, b in zip(*[gradients(t, wanted, False) for t in (got, want)], strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(fast(*wanted), layer(*wanted))
    torch._dynamo.reset()


def test_autocast_keeps_the_weights_gradients_dtype():
    x, gate_up, down, routing, _ = problem(dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = moe_mlp(x, gate_up, down, routing)
    assert y.dtype == torch.bfloat16
    got = gradients(y, [x, gate_up, down])
    assert all(g.dtype == torch.float32 for g in got)
    want = gradients(moe_mlp(x, gate_up, down, routing), [x, gate_up, down])
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 0.05 * b.abs().max()


def test_autocast_of_another_low_precision():
    """Weights in fp16 under autocast to bf16: gradients in fp16, of the right values."""
    x, gate_up, down, routing, _ = problem(dtype=torch.float16)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = moe_mlp(x, gate_up, down, routing)
    got = gradients(y, [x, gate_up, down])
    want = gradients(moe_mlp(x, gate_up, down, routing), [x, gate_up, down])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float16
        assert (a - b).abs().max() < 0.05 * b.abs().max()


@pytest.mark.parametrize("tokens", [3, 40])
def test_repeated_weights(tokens):
    """Weights of stride 0: every expert, and every line of one, is the same memory."""
    x, gate_up, down, routing, _ = problem(tokens)
    alike = gate_up[0, 0].expand_as(gate_up), down[0, 0].expand_as(down)
    want = moe_mlp(x, *[w.clone() for w in alike], routing)
    torch.testing.assert_close(moe_mlp(x, *alike, routing), want)


@pytest.mark.parametrize("size", [{"f": 0}, {"d": 0}])
def test_no_hidden_units_or_features(size):
    x, gate_up, down, routing, logits = problem(**size)
    y = moe_mlp(x, gate_up, down, routing)
    assert y.shape == x.shape and not y.any()
    assert not any(g.any() for g in gradients(y, [x, gate_up, down, logits]))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_hidden_units_far_from_zero(activation):
    """A pre-activation of any size gives what PyTorch gives, and so does its gradient."""
    values = torch.tensor([-1e38, -1e4, -95.0, -60.0, 60.0, 1e4, 1e15], device=DEVICE)
    x = values[:, None].clone().requires_grad_()
    up = torch.ones(1, 2 if activation == "swiglu" else 1, 1, device=DEVICE)
    routing = routing_of(*[torch.full((7, 1), v, device=DEVICE) for v in (0, 1.0)], 1)
    y = moe_mlp(x, up, torch.ones(1, 1, 1, device=DEVICE), routing, activation=activation)
    z = values[:, None].clone().requires_grad_()
    want = reference.activate(torch.cat([z] * up.shape[1], 1), activation)
    # exp(-60) as a GPU has it, by a power of two, is exact to 60 roundings of the exponent.
    rtol = 60 * torch.finfo(torch.float32).eps if DEVICE == "cuda" else 1e-6
    torch.testing.assert_close(y, want, rtol=rtol, atol=1e-30)
    torch.testing.assert_close(gradients(y, [x]), gradients(want, [z]), rtol=1e-5, atol=1e-30)


def test_function_transforms():
    """vmap over tokens, and per-sample gradients of a weight."""
    _, gate_up, down, routing, _ = problem()
    weights = [gate_up.detach(), down.detach()]
    routing = routing._replace(gates=routing.gates.detach())
    x = torch.randn(3, 20, 16, dtype=torch.float64, device=DEVICE)

    def loss(gate_up, x):
        return moe_mlp(x, gate_up, weights[1], routing).sin().sum()

    layer = torch.func.vmap(lambda x: moe_mlp(x, *weights, routing))
    torch.testing.assert_close(layer(x), torch.stack([moe_mlp(a, *weights, routing) for a in x]))
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights[0], x)
    for sample, grad in zip(x, grads, strict=True):
        torch.testing.assert_close(grad, torch.func.grad(loss)(weights[0], sample))


@pytest.mark.parametrize("activation", reference.GATED)
def test_nan_stays(activation):
    """A NaN shows in its token's output and gradient, and nowhere else."""
    x, gate_up, down, routing, _ = problem(blocks=2 if activation == "swiglu" else 1)
    with torch.no_grad():
        x[3] = torch.nan
    y = moe_mlp(x, gate_up, down, routing, activation=activation)
    (dx,) = torch.autograd.grad(y.sum(), x)
    token = torch.arange(20, device=DEVICE) == 3
    for got in (y, dx):
        assert torch.equal(got.isnan().all(1), token) and torch.equal(got.isnan().any(1), token)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_padding_is_exactly_zero(dtype):
    """Also where gates are of less precision than everything else."""
    x, gate_up, down, routing, _ = problem(dtype=dtype)
    gates = routing.gates.detach().bfloat16().requires_grad_()
    padding = torch.ones(20, dtype=torch.bool, device=DEVICE)
    tables = routing_of(routing.experts, gates.detach(), down.shape[0], padding)
    y = moe_mlp(x, gate_up, down, tables._replace(gates=gates))
    for zero in (y, *torch.autograd.grad(y.sum(), (x, gate_up, down, gates))):
        assert not zero.any()


def test_leading_dimensions():
    x, gate_up, down, routing, _ = problem()
    y = moe_mlp(x.view(4, 5, 16), gate_up, down, routing)
    assert torch.equal(y.view(20, 16), moe_mlp(x, gate_up, down, routing))


def test_outputs_are_written_whole():
    """No output of either pass is memory that nothing wrote: repeated on poisoned allocations."""
    x, gate_up, down, _, logits = problem(dtype=torch.float32)
    padding = torch.arange(20, device=DEVICE) % 4 == 0
    routing = route(logits, 2, padding_mask=padding)
    for _ in range(3):
        poison = [torch.full((n,), float("nan"), device=DEVICE) for n in (320, 480, 1536, 768)]
        del poison
        y = moe_mlp(x, gate_up, down, routing, width=[12, 3, 0, 7])
        assert all(torch.isfinite(t).all() for t in (y, *gradients(y, [x, gate_up, down, logits])))
        assert not y[padding].any()


# -- bad input ----------------------------------------------------------------------------------


def changed(**changes):
    x, gate_up, down, routing, _ = problem()
    named = {"x": x, "gate_up": gate_up, "down": down, "routing": routing}
    return named | {k: v(named) if callable(v) else v for k, v in changes.items()}


BAD = [
    ({"activation": "silu"}, ValueError, "activation: 'silu'.*swiglu"),
    ({"x": lambda a: a["x"].long()}, TypeError, "x: .*floating.*int64"),
    ({"x": lambda a: a["x"][:, :-1]}, ValueError, "x: last dimension is 15.*take 16"),
    ({"x": torch.tensor(1.0, dtype=torch.float64)}, ValueError, "x: .*scalar"),
    ({"x": lambda a: a["x"].float()}, TypeError, "gate_up: is torch.float64, but x is"),
    ({"gate_up": lambda a: a["gate_up"].transpose(1, 2)}, ValueError, "gate_up: .*shape"),
    ({"gate_up": lambda a: a["gate_up"][:, :12]}, ValueError, "gate_up: .*swiglu.*below"),
    ({"activation": "gelu"}, ValueError, "gate_up: .*gelu"),
    ({"down": lambda a: a["down"][0]}, ValueError, "down: expected 3 dimensions"),
    ({"down": lambda a: a["down"].to("meta")}, ValueError, "down: is on meta"),
    ({"routing": None}, TypeError, "routing: expected a Routing.*NoneType"),
    ({"x": lambda a: a["x"][:7]}, ValueError, "routing: .*7 tokens"),
    (
        {
            "routing": lambda a: routing_of(
                torch.zeros(20, 2, dtype=torch.long), torch.ones(20, 2), 9
            )
        },
        ValueError,
        "routing: is over 9 experts.*have 4",
    ),
    (
        {"routing": lambda a: a["routing"]._replace(permutation=torch.zeros(3, dtype=torch.long))},
        ValueError,
        "routing.permutation: .*40",
    ),
    (
        {"routing": lambda a: a["routing"]._replace(offsets=a["routing"].offsets.int())},
        TypeError,
        "routing.offsets: expected int64",
    ),
    ({"width": 13}, ValueError, "width: 13 is outside 0..12"),
    ({"width": -1}, ValueError, "width: -1 is outside"),
    ({"width": 2.0}, TypeError, "width: .*float"),
    ({"width": [1, 2]}, ValueError, "width: has 2 widths.*4 experts"),
    ({"width": [1, 2, 3, 40]}, ValueError, r"width\[3\]: 40"),
    ({"width": [1, 2, 3, 4.0]}, TypeError, r"width\[3\]: .*int"),
    ({"width": torch.ones(4)}, ValueError, "width: expected integers"),
]


@pytest.mark.skipif(DEVICE == "cuda", reason="arguments are made on the CPU")
@pytest.mark.parametrize(("changes", "kind", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(changes, kind, message):
    with pytest.raises(kind, match=message):
        moe_mlp(**changed(**changes))


@pytest.mark.skipif(
    DEVICE == "cuda" or _register.backend_of("moe_mlp", "cpu") != "cpu",
    reason="checks of the CPU library; a GPU's tables are not read by the host",
)
@pytest.mark.parametrize("table", ["permutation", "offsets"])
def test_tables_that_lead_outside_are_refused(table):
    x, gate_up, down, routing, _ = problem()
    bad = getattr(routing, table).clone()
    bad[1] = 10**6
    with pytest.raises(RuntimeError, match=table):
        moe_mlp(x, gate_up, down, routing._replace(**{table: bad}))


def test_cases_cover_every_activation():
    used = {
        case.inputs(cases.Maker(torch.float32)).get("activation", "swiglu")
        for case in cases.CASES
        if case.tier == "test"
    }
    assert used == set(reference.GATED)
