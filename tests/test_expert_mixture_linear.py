"""What is particular to the expert mixture: bad input, memory, paths, one graph for all widths."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from weightshare_kernels import _collect, _register, accumulate_in_place, expert_mixture_linear
from weightshare_kernels.ops.expert_mixture_linear.cases import sum_of_outputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNT, ROWS, COLS = 3, 12, 10
INDEX = torch.tensor([7, 1, 4], device=DEVICE)
NEURON_WISE = pytest.mark.parametrize("neuron_wise", [False, True], ids=["layer", "neuron"])


def tensors(
    tokens=5, count=COUNT, rows=ROWS, cols=COLS, neuron_wise=True, dtype=torch.float64, width=None
):
    """x, experts, bias and mix, all wanting gradients."""
    generator = torch.Generator().manual_seed(0)
    mix = (count, rows) if neuron_wise else (count,)
    shapes = [(tokens, width or cols), (count, rows, cols), (count, rows), mix]
    made = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    made[1] *= cols**-0.5
    return [t.to(DEVICE, dtype).requires_grad_() for t in made]


def oracle(x, experts, bias, mix, out=slice(None), in_=slice(None)):
    """Every expert's layer by itself, its outputs scaled and summed, all in float64."""
    y = 0
    for m in range(experts.shape[0]):
        factor = mix[m] if mix.dim() == 1 else mix[m][out]
        y = y + factor * (x @ experts[m][out][:, in_].t() + bias[m][out])
    return y


def close(got, wanted, dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
    scale = max(wanted.abs().max().item(), 1e-30)
    assert (got.double() - wanted).abs().max().item() / scale < tolerance


@NEURON_WISE
@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize(
    ("out", "in_"),
    [(None, None), (7, 6), (slice(2, 9), slice(1, 8)), (INDEX, [slice(0, 3), slice(6, 9)])],
    ids=["whole", "prefix", "span", "tables"],
)
def test_equals_the_sum_of_experts_outputs(neuron_wise, count, out, in_):
    every = torch.arange(ROWS), torch.arange(COLS)
    picked = [
        e[:s] if isinstance(s, int) else torch.cat([e[p] for p in s]) if isinstance(s, list)
        else e[s.cpu() if torch.is_tensor(s) else slice(None) if s is None else s]
        for e, s in zip(every, (out, in_), strict=True)
    ]  # fmt: skip
    rows, cols = (p.to(DEVICE) for p in picked)
    leaves = tensors(count=count, neuron_wise=neuron_wise, width=len(cols))
    y, wanted = expert_mixture_linear(*leaves, out=out, in_=in_), oracle(*leaves, rows, cols)
    close(y, wanted, torch.float64)
    g = torch.randn_like(y)
    got, exact = (torch.autograd.grad(v, leaves, g) for v in (y, wanted))
    for a, b in zip(got, exact, strict=True):
        close(a, b, torch.float64)


def interpreted():
    """Tell whether Triton's interpreter serves."""
    return _register.backend_of("expert_mixture_linear", "cpu") == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [9, 60, 300, 1100])
def test_sizes_of_many_tiles(dtype, tokens):
    """Several blocks along every axis, and both sides of each limit between kernel and library."""
    if interpreted():
        pytest.skip("large for the interpreter; the cases' sizes cover its tiles")
    leaves = tensors(tokens, 3, 471, 530, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y = expert_mixture_linear(*leaves, out=470)
    wanted = oracle(*exact, slice(0, 470))
    close(y, wanted, dtype)
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, g)
    for a, b in zip(got, torch.autograd.grad(wanted, exact, g.double()), strict=True):
        close(a, b, dtype)


def test_saves_no_mixed_weight():
    """x, the experts and the coefficients; nothing of the mixed weight's size."""
    leaves = tensors(tokens=8, rows=64, cols=48)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = expert_mixture_linear(*leaves, out=60, in_=None)
    own = {t.untyped_storage().data_ptr() for t in leaves}
    beyond = sum(size for at, size in saved.items() if at not in own)
    assert saved[leaves[1].untyped_storage().data_ptr()]
    assert beyond <= 4 * COUNT * 64 * 8  # mix and bias per row; the mixed weight has 60 x 48
    y.sum().backward()


def test_slices_share_one_buffer_zero_outside(monkeypatch):
    """Memory that nobody wrote is NaN here, so that it shows in the gradient."""
    made = []

    def poisoned(tensor):
        made.append(torch.full_like(tensor, float("nan")))
        return made[-1]

    monkeypatch.setattr(_collect, "empty_like", poisoned)
    for selections in ([(7, 6), (4, 3)], [(slice(2, 9), slice(1, 8))], [(INDEX, 6), (5, 9)]):
        made.clear()
        x, experts, bias, mix = tensors()
        wide = {"out": 12, "in_": 10}
        uses = [{"out": o, "in_": i} for o, i in selections]
        for call in (uses, [*uses, wide]):
            experts.grad = None
            made.clear()
            total = 0
            for use in call:
                cols = use["in_"] if isinstance(use["in_"], int) else 7
                y = expert_mixture_linear(x[:, :cols], experts, bias, mix, **use)
                total = total + y.square().sum()
            total.backward()
            assert len(made) == 1
            wanted = 0
            for use in call:
                cols = use["in_"] if isinstance(use["in_"], int) else 7
                y = sum_of_outputs(x[:, :cols], experts, bias, mix, **use)
                wanted = wanted + y.square().sum()
            (exact,) = torch.autograd.grad(wanted, experts)
            torch.testing.assert_close(experts.grad, exact)


def test_gradients_accumulate_in_place():
    x, experts, bias, mix = tensors()
    with accumulate_in_place():
        for width in (12, 7, 4):
            expert_mixture_linear(x, experts, bias, mix, out=width).square().sum().backward()
    wanted = sum(
        sum_of_outputs(x, experts, bias, mix, out=width).square().sum() for width in (12, 7, 4)
    )
    for leaf, exact in zip(
        (x, experts, bias, mix), torch.autograd.grad(wanted, (x, experts, bias, mix)), strict=True
    ):
        torch.testing.assert_close(leaf.grad, exact)


@pytest.mark.parametrize("wanted", range(4), ids=["x", "experts", "bias", "mix"])
def test_one_gradient_alone(wanted):
    """A frozen tensor gets no gradient, and the others' stay the same."""
    leaves = tensors()
    every = torch.autograd.grad(expert_mixture_linear(*leaves, out=7).sin().sum(), leaves)
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number == wanted)
    expert_mixture_linear(*leaves, out=7).sin().sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [n == wanted for n in range(4)]
    torch.testing.assert_close(leaves[wanted].grad, every[wanted])


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@NEURON_WISE
@pytest.mark.parametrize("out", [None, 7, slice(2, 9), INDEX], ids=["all", "int", "span", "table"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole(neuron_wise, out):
    def call(*leaves):
        return expert_mixture_linear(*leaves, out=out).square().sum()

    leaves = tensors(neuron_wise=neuron_wise, dtype=torch.float32)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, wanted = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, call))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
def test_many_widths_share_a_graph():
    """The first width is compiled as a constant, the second as a symbol that serves the rest."""

    def call(x, experts, bias, mix, out, in_):
        return expert_mixture_linear(x[:, :in_], experts, bias, mix, out=out, in_=in_)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for number in range(12):
        leaves = tensors(rows=48, cols=40, dtype=torch.float32)
        sizes = 8 + 3 * number, 39 - 2 * number
        got, wanted = (
            torch.autograd.grad(f(*leaves, *sizes).square().sum(), leaves) for f in (compiled, call)
        )
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


@NEURON_WISE
def test_transforms(neuron_wise):
    """Function transforms give what eager autograd gives."""
    leaves = [t.detach() for t in tensors(neuron_wise=neuron_wise)]

    def loss(f):
        return lambda x, w, b, m: f(x, w, b, m, out=7).sin().sum()

    got, wanted = (
        torch.func.grad(loss(f), (0, 1, 2, 3))(*leaves)
        for f in (expert_mixture_linear, sum_of_outputs)
    )
    torch.testing.assert_close(got, wanted)
    x, w, b, m = leaves
    xs = torch.stack([x, 2 * x])
    per_sample = [
        torch.func.vmap(torch.func.grad(loss(f), 1), (0, None, None, None))(xs, w, b, m)
        for f in (expert_mixture_linear, sum_of_outputs)
    ]
    torch.testing.assert_close(*per_sample)


def test_autocast():
    """Output in autocast's dtype, gradients in the parameters', close to the exact ones."""
    leaves = tensors(dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = expert_mixture_linear(*leaves, out=7)
    assert y.dtype == torch.bfloat16
    got = torch.autograd.grad(y.float().square().sum(), leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = torch.autograd.grad(oracle(*exact, slice(0, 7)).square().sum(), exact)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        close(a, b, torch.bfloat16)


def test_meta_tensors():
    meta = [t.detach().to("meta").requires_grad_() for t in tensors()]
    y = expert_mixture_linear(*meta, out=7)
    y.sum().backward()
    assert y.is_meta and y.shape == (5, 7)
    assert meta[1].grad.shape == (COUNT, ROWS, COLS)


T, V = TypeError, ValueError
META = torch.device("meta")
TABLE = [
    ("x", [[1.0] * COLS], T, "x: .*tensor.*list"),
    ("x", torch.ones(3, COLS, dtype=torch.int64), T, "x: .*floating.*int64"),
    ("x", torch.tensor(1.0), V, "x: .*scalar"),
    ("x", torch.randn(3, COLS + 1), V, "x: .*11.*10"),
    ("x", torch.randn(3, COLS, dtype=torch.float64), T, "experts: .*float32.*x.*float64"),
    ("x", torch.randn(3, COLS, device=META), V, "experts: .*cpu.*x.*meta"),
    ("experts", None, T, "experts: .*NoneType"),
    ("experts", torch.randn(ROWS, COLS), V, r"experts: .*3 dimensions.*\(12, 10\)"),
    ("experts", torch.randn(0, ROWS, COLS), V, "experts: .*no expert"),
    ("experts", torch.ones(COUNT, ROWS, COLS).int(), T, "experts: .*floating.*int32"),
    ("experts", torch.randn(COUNT, ROWS, COLS).half(), T, "experts: .*float16.*float32"),
    ("experts", torch.randn(COUNT, ROWS, COLS, device=META), V, "experts: .*meta.*cpu"),
    ("experts", torch.randn(2, ROWS, COLS), V, r"mix: .*\(2,\).*\(2, 12\).*\(3, 12\)"),
    ("bias", 0.0, T, "bias: .*float"),
    ("bias", torch.randn(ROWS), V, r"bias: .*2 dim.*\(12,\)"),
    ("bias", torch.randn(COUNT, 5), V, r"bias: .*\(3, 12\).*\(3, 5\)"),
    ("bias", torch.randn(COUNT, ROWS).double(), T, "bias: .*float64.*float32"),
    ("bias", torch.randn(COUNT, ROWS, device=META), V, "bias: .*meta.*cpu"),
    ("mix", [0.5, 0.3, 0.2], T, "mix: .*tensor.*list"),
    ("mix", torch.ones(COUNT).int(), T, "mix: .*floating.*int32"),
    ("mix", torch.randn(COUNT + 1), V, r"mix: .*\(3,\).*\(4,\)"),
    ("mix", torch.randn(ROWS, COUNT), V, r"mix: .*\(3, 12\).*\(12, 3\)"),
    ("mix", torch.randn(COUNT, 5), V, r"mix: .*\(3, 12\).*\(3, 5\)"),
    ("mix", torch.tensor(0.5), V, r"mix: .*\(\)"),
    ("mix", torch.randn(COUNT, device=META), V, "mix: .*meta.*cpu"),
    ("out", 13, V, r"out: prefix 13 .*0\.\.12"),
    ("out", torch.tensor([0, 12]), V, r"out: .*0\.\.11"),
    ("out", torch.tensor([3, 3]), V, "out: 1 repeated"),
    ("out", 3.5, T, "out: .*float"),
    ("in_", 11, V, r"in_: prefix 11 .*0\.\.10"),
    ("in_", 9, V, "x: .*10.*in_=9.*9 of 10"),
]


def good():
    shapes = {
        "x": (3, COLS),
        "experts": (COUNT, ROWS, COLS),
        "bias": (COUNT, ROWS),
        "mix": (COUNT, ROWS),
    }
    made = {k: torch.randn(*s, requires_grad=True) for k, s in shapes.items()}
    return {**made, "out": 5, "in_": None}


@pytest.mark.parametrize(("argument", "value", "kind", "message"), TABLE)
def test_refused(argument, value, kind, message):
    arguments = {**good(), argument: value}
    with pytest.raises(kind, match=message) as caught:
        expert_mixture_linear(**arguments)
    assert caught.type is kind
    assert all(v.grad is None for v in arguments.values() if torch.is_tensor(v))


def test_kernels_refuse_what_does_not_fit():
    """The dispatcher ops check what reaches memory, whoever calls them."""
    if DEVICE != "cpu" or interpreted():
        pytest.skip("checks of the native library")
    x, experts, _, mix = (t.detach() for t in tensors(dtype=torch.float32))
    ops = torch.ops.weightshare
    bad = torch.tensor([0, ROWS])
    with pytest.raises((RuntimeError, IndexError), match=r"0\.\.11|out of (bounds|range)"):
        ops.expert_mixture_linear(x, experts, None, mix[:, :2].contiguous(), bad, None)
    with pytest.raises(RuntimeError):
        ops.expert_mixture_linear(x, experts, None, mix[:, :2].contiguous(), None, None)
    with pytest.raises(RuntimeError):
        g, part = torch.randn(5, 7), experts[:, :7]
        ops.expert_mixture_linear_grad_weight_(
            torch.zeros_like(experts), g, x, part, mix[:, :7].contiguous(), None, None, 6, 0, False
        )
