"""Grouped sliced linear: what the tests that walk all cases do not cover."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from weightshare_kernels import grouped_sliced_linear, sliced_linear
from weightshare_kernels.ops.grouped_sliced_linear.cases import eager, padded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT, IN = 24, 20
NAN = float("nan")


def tensors(rows, size=(OUT, IN), dtype=torch.float64, columns=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, columns or size[1]), size, size[:1]]
    made = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    return [t.to(DEVICE, dtype).requires_grad_() for t in made]


def gradients(y, leaves, seed=1):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    return torch.autograd.grad(y, leaves, g)


GOOD = {"sizes": [2, 1], "outs": [10, 24], "ins": [20, 7]}
T, V = TypeError, ValueError
BAD = [
    ("x", torch.randn(2, 3, IN), V, r"x: expected 2 dimensions .*\(2, 3, 20\)"),
    ("x", torch.randn(IN), V, r"x: expected 2 dimensions .*\(20,\)"),
    ("x", torch.randn(4, IN), V, "sizes: add up to 3, but x has 4 rows"),
    ("x", torch.randn(3, 19), V, r"ins\[0\]: 20 is outside 0\.\.19, the columns of x"),
    ("x", torch.ones(3, IN, dtype=torch.int32), T, "x: .*floating.*int32"),
    ("weight", torch.randn(OUT), V, "weight: .*2 dim"),
    ("weight", torch.randn(OUT, IN).double(), T, "weight: .*float64.*float32"),
    ("bias", torch.randn(10), V, "bias: .*10.*24"),
    ("sizes", None, T, "sizes: expected a sequence of ints, got NoneType"),
    ("sizes", 3, T, "sizes: expected a sequence of ints, got int"),
    ("sizes", "12", T, "sizes: expected a sequence of ints, got str"),
    ("sizes", torch.tensor([2, 1]), T, "sizes: expected a sequence of ints, got Tensor"),
    ("sizes", [], V, "sizes: is empty"),
    ("sizes", [2, 1.0], T, r"sizes\[1\]: expected an int, got 1\.0"),
    ("sizes", [4, -1], V, r"sizes\[1\]: -1 is negative"),
    ("sizes", [2, 2], V, "sizes: add up to 4, but x has 3 rows"),
    ("sizes", [2, 1, 0], V, "outs: has 2 widths, but sizes has 3 groups"),
    ("outs", 10, T, "outs: expected a sequence of ints, got int"),
    ("outs", [10, 25], V, r"outs\[1\]: 25 is outside 0\.\.24, the rows of the weight"),
    ("outs", [-1, 24], V, r"outs\[0\]: -1 is outside 0\.\.24"),
    ("outs", [True, 24], T, r"outs\[0\]: expected an int, got True"),
    ("outs", [10], V, "outs: has 1 widths, but sizes has 2 groups"),
    ("ins", [21, 7], V, r"ins\[0\]: 21 is outside 0\.\.20, the columns of the weight"),
    ("ins", [20, None], T, r"ins\[1\]: expected an int, got None"),
    ("ins", [20, 7, 7], V, "ins: has 3 widths, but sizes has 2 groups"),
]


@pytest.mark.parametrize(("argument", "value", "kind", "message"), BAD)
def test_refused(argument, value, kind, message):
    x, weight, bias = tensors(3, dtype=torch.float32)
    arguments = {"x": x, "weight": weight, "bias": bias, **GOOD}
    grouped_sliced_linear(**arguments).sum().backward()
    value = value.to(DEVICE) if isinstance(value, torch.Tensor) and argument != "sizes" else value
    with pytest.raises(kind, match=message) as caught:
        grouped_sliced_linear(**{**arguments, argument: value})
    assert caught.type is kind


def test_whole_input_must_fit():
    x, weight, _ = tensors(3, columns=IN + 1)
    with pytest.raises(ValueError, match="x: last dimension is 21, but weight has 20 columns"):
        grouped_sliced_linear(x, weight, sizes=[3])


@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_beyond_a_groups_widths_is_read(rows, dtype):
    """NaN in ignored inputs, weights that no group uses and ignored gradients changes nothing."""
    sizes, outs, ins = [rows, 2, rows], [16, 9, 21], [5, 17, 8]
    x, weight, bias = tensors(sum(sizes), dtype=dtype)
    clean = grouped_sliced_linear(x, weight, bias, sizes=sizes, outs=outs, ins=ins)
    g = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3)).to(clean)
    wanted = torch.autograd.grad(clean, (x, weight, bias), g)
    start = 0
    with torch.no_grad():
        weight[21:] = weight[:, 17:] = bias[21:] = NAN
        for size, out, in_ in zip(sizes, outs, ins, strict=True):
            x[start : start + size, in_:] = NAN
            g[start : start + size, out:] = NAN
            start += size
    y = grouped_sliced_linear(x, weight, bias, sizes=sizes, outs=outs, ins=ins)
    assert torch.equal(y, clean)
    for got, expected in zip(torch.autograd.grad(y, (x, weight, bias), g), wanted, strict=True):
        assert torch.equal(got, expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_groups_match_the_loop(data):
    rows, cols = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    count = data.draw(st.integers(1, 6))
    most = data.draw(st.sampled_from([1, 4, 40]))

    def several(least, largest):
        return data.draw(st.lists(st.integers(least, largest), min_size=count, max_size=count))

    sizes = several(0, most)
    outs = data.draw(st.sampled_from([None, several(0, rows)]))
    ins = data.draw(st.sampled_from([None, several(0, cols)]))
    groups = {"sizes": sizes, "outs": outs, "ins": ins}
    x, weight, bias = tensors(sum(sizes), (rows, cols), torch.float64)
    y = grouped_sliced_linear(x, weight, bias, **groups)
    wanted = eager(x, weight, bias, **groups)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(padded(x, weight, bias, **groups), wanted)
    got = gradients(y, (x, weight, bias))
    torch.testing.assert_close(got, gradients(wanted, (x, weight, bias)))


@pytest.mark.parametrize("rows", [1, 3, 30])
def test_order_of_groups_does_not_matter(rows):
    sizes, outs, ins = [rows] * 4, [24, 7, 16, 16], [9, 20, 20, 11]
    x, weight, bias = tensors(4 * rows, dtype=torch.float32)
    plain = grouped_sliced_linear(x, weight, bias, sizes=sizes, outs=outs, ins=ins)
    order = [2, 0, 3, 1]
    mixed = torch.cat([x.split(sizes)[g] for g in order])
    y = grouped_sliced_linear(
        mixed, weight, bias, sizes=sizes, outs=[outs[g] for g in order], ins=[ins[g] for g in order]
    )
    for place, g in enumerate(order):
        torch.testing.assert_close(y.split(sizes)[place], plain.split(sizes)[g])


def test_output_feeds_the_next_layer():
    """Two layers of mixed widths equal each subnet alone."""
    sizes, widths = [2, 3, 1], [24, 6, 15]
    x, up, bias = tensors(6)
    down = torch.randn(IN, OUT, dtype=torch.float64, device=DEVICE)
    hidden = grouped_sliced_linear(x, up, bias, sizes=sizes, outs=widths).relu()
    y = grouped_sliced_linear(hidden, down, sizes=sizes, ins=widths)
    for rows, got, n in zip(x.split(sizes), y.split(sizes), widths, strict=True):
        wanted = torch.relu(rows @ up[:n].t() + bias[:n]) @ down[:, :n].t()
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_very_many_rows(dtype):
    """Beyond the row limits of our own kernels, and with rows that are no neighbours."""
    groups = {"sizes": [700, 800, 900], "outs": [96, 32, 64], "ins": [36, 80, 56]}
    leaves = tensors(2400, (96, 80), dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    g = torch.randn(2400, 96, generator=torch.Generator().manual_seed(1)).to(leaves[0])

    def run(function, arguments):
        y = function(*arguments, **groups)
        return [y, *torch.autograd.grad(y, arguments, g.to(y))]

    # PyTorch's one product of all rows has sums as long as ours; the loop's are shorter.
    results = run(grouped_sliced_linear, leaves), run(padded, leaves), run(eager, exact)
    for ours, torchs, wanted in zip(*results, strict=True):
        errors = [((t.double() - wanted).abs().max() / wanted.abs().max()) for t in (ours, torchs)]
        assert errors[0] <= max(2 * errors[1], 8 * torch.finfo(dtype).eps)


def test_uses_share_one_gradient_buffer(monkeypatch):
    from weightshare_kernels import _collect

    made = []
    original = _collect.empty_like
    monkeypatch.setattr(_collect, "empty_like", lambda *a: made.append(1) or original(*a))
    x, weight, bias = tensors(5)
    groups = {"sizes": [3, 2], "outs": [24, 10], "ins": [20, 6]}

    def loss(grouped):
        return grouped(x, weight, bias, **groups).sin().sum() + sliced_linear(x, weight).cos().sum()

    got = torch.autograd.grad(loss(grouped_sliced_linear), (x, weight, bias))
    assert len(made) == 1
    torch.testing.assert_close(got, torch.autograd.grad(loss(eager), (x, weight, bias)))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_some_gradients(wanted):
    groups = {"sizes": [3, 2], "outs": [20, 10], "ins": [20, 6]}
    leaves = [t.requires_grad_(n in wanted) for n, t in enumerate(tensors(5))]
    used = [leaves[n] for n in wanted]
    got = gradients(grouped_sliced_linear(*leaves, **groups), used)
    torch.testing.assert_close(got, gradients(eager(*leaves, **groups), used))


@pytest.mark.parametrize("backward", [False, True])
def test_widths_share_a_graph(backward):
    """The first widths are compiled as constants, the second as symbols that serve the rest."""

    def function(x, w, b, sizes, outs, ins):
        return grouped_sliced_linear(x, w, b, sizes=sizes, outs=outs, ins=ins)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    after = []
    for number in range(10):
        leaves = tensors(20)
        sizes = [3 + number, 17 - number]
        outs, ins = [4 + 2 * number, 23 - 2 * number], [19 - number, 5 + number]
        with torch.set_grad_enabled(backward):
            y, wanted = compiled(*leaves, sizes, outs, ins), function(*leaves, sizes, outs, ins)
            torch.testing.assert_close(y, wanted)
            if backward:
                torch.testing.assert_close(gradients(y, leaves), gradients(wanted, leaves))
        after.append(counter.frame_count)
    torch._dynamo.reset()
    assert after[1] <= 2 and after[-1] == after[1], after


def test_inductor():
    torch._dynamo.reset()
    groups = {"sizes": [3, 4], "outs": [24, 10], "ins": [20, 6]}
    leaves = tensors(7, dtype=torch.float32)
    compiled = torch.compile(grouped_sliced_linear, fullgraph=True)
    y, wanted = compiled(*leaves, **groups), grouped_sliced_linear(*leaves, **groups)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(gradients(y, leaves), gradients(wanted, leaves))


GROUPS = {"sizes": [2, 1], "outs": [10, 24], "ins": [20, 7]}


def test_functorch():
    leaves = [t.detach() for t in tensors(3)]

    def gradient(f):
        return torch.func.grad(lambda *t: f(*t, **GROUPS).sin().sum(), (0, 1, 2))(*leaves)

    torch.testing.assert_close(gradient(grouped_sliced_linear), gradient(eager))


def test_vmap_is_right_or_refused():
    x, weight, bias = (t.detach() for t in tensors(3))
    xs = torch.stack([x, 2 * x])

    def run(f):
        per_sample = torch.func.grad(lambda w, x: f(x, w, bias, **GROUPS).sin().sum())
        return torch.func.vmap(per_sample, (None, 0))(weight, xs)

    try:
        got = run(grouped_sliced_linear)
    except RuntimeError as error:
        assert "vmap" in str(error)
        return
    torch.testing.assert_close(got, run(eager))


def test_meta_tensors():
    leaves = [t.detach().to("meta").requires_grad_() for t in tensors(3)]
    y = grouped_sliced_linear(*leaves, **GROUPS)
    y.sum().backward()
    assert y.is_meta and y.shape == (3, 24) and leaves[1].grad.shape == (OUT, IN)


def test_autocast():
    results = []
    for function in (grouped_sliced_linear, eager):
        leaves = tensors(3, dtype=torch.float32)
        with torch.autocast(DEVICE, torch.bfloat16):
            y = function(*leaves, **GROUPS)
        results.append([y, *torch.autograd.grad(y.float().sin().sum(), leaves)])
    exact = tensors(3, dtype=torch.float32)
    y = eager(*exact, **GROUPS)
    wanted = [y, *torch.autograd.grad(y.sin().sum(), exact)]
    for ours, torchs, e in zip(*results, wanted, strict=True):
        assert ours.dtype == torchs.dtype
        errors = [((v.double() - e).abs().max() / e.abs().max()).item() for v in (ours, torchs)]
        assert errors[0] <= max(2 * errors[1], 4 * torch.finfo(torch.bfloat16).eps)
