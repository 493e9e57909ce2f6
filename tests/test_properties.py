"""Random valid input equals the float64 definition; random invalid input raises, never crashes."""

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from weightshare_kernels import (
    _buffers,
    entangle,
    entangled_linear,
    entangled_linear_independent,
    sliced_linear,
)
from weightshare_kernels._cases import Maker, all_cases, leaves
from weightshare_kernels.ops.entangle.reference import pad_and_sum as mix
from weightshare_kernels.ops.entangled_linear.cases import independent_reference
from weightshare_kernels.ops.entangled_linear.reference import pad_and_sum
from weightshare_kernels.ops.sliced_linear.cases import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
SIZES = st.integers(0, 40)
LEADS = st.lists(st.integers(0, 5), max_size=3)
SETTINGS = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def randn(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return value.to(DEVICE, dtype).requires_grad_()


@st.composite
def slices(draw, size):
    start = draw(st.integers(0, size))
    return slice(start, draw(st.integers(start, size)), draw(st.integers(1, 4)))


@st.composite
def selections(draw, size):
    """Any valid selection of an axis and how many elements it has."""
    kind = draw(st.sampled_from(["none", "int", "slice", "slices", "index"]))
    if kind == "none":
        return None, size
    if kind == "int":
        spec = draw(st.integers(0, size))
        return spec, spec
    if kind == "slice":
        spec = draw(slices(size))
        return spec, len(range(size)[spec])
    if kind == "slices":
        edges = sorted(draw(st.lists(st.integers(0, size), max_size=6)))
        pieces = [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)]
        pieces = draw(st.permutations(pieces))
        return pieces, sum(p.stop - p.start for p in pieces)
    spec = draw(st.permutations(range(size)))[: draw(st.integers(0, size))]
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    return torch.tensor(spec, dtype=dtype, device=DEVICE), len(spec)


def choices(sizes):
    return st.lists(st.tuples(*(st.integers(0, s) for s in sizes)), min_size=1, max_size=5)


def results(function, tensors, others, magnitude=False):
    """Output and gradients, the output gradient fixed by its shape."""
    y = function(**tensors, **others)
    g = torch.linspace(0 if magnitude else -1, 1, y.numel(), dtype=torch.float64)
    g = torch.maximum(g, 1 - g).reshape(y.shape) if magnitude else g.reshape(y.shape)
    wanted = leaves(tensors)
    return [y, *torch.autograd.grad(y, wanted, g.to(y.device, y.dtype), materialize_grads=True)]


def check(ours, definition, tensors, others):
    """Ours against the definition in float64, within a few roundings of the terms summed.

    All ops are sums of products, so their definition on absolute values is the sum of the
    absolute terms: the scale on which a rounding counts, whatever cancels.
    """
    doubles = {k: v.detach().double().requires_grad_() for k, v in tensors.items()}
    sizes = {k: v.detach().abs().requires_grad_() for k, v in doubles.items()}
    got, exact = results(ours, tensors, others), results(definition, doubles, others)
    scales = results(definition, sizes, others, magnitude=True)
    lowest = max((torch.finfo(t.dtype) for t in tensors.values()), key=lambda f: f.eps)
    eps, smallest = lowest.eps, lowest.smallest_normal * lowest.eps
    for o, e, scale in zip(got, exact, scales, strict=True):
        assert o.shape == e.shape and torch.isfinite(o).all()
        assert ((o.double() - e).abs() <= 8 * (eps * scale + smallest)).all()


@SETTINGS
@given(st.data(), SIZES, SIZES, LEADS, DTYPES, st.booleans())
def test_sliced_linear(data, rows, cols, lead, dtype, bias):
    out, _ = data.draw(selections(rows))
    in_, width = data.draw(selections(cols))
    tensors = {
        "x": randn(1, *lead, width, dtype=dtype),
        "weight": randn(2, rows, cols, dtype=dtype),
        "bias": randn(3, rows, dtype=dtype) if bias else None,
    }
    tensors = {k: v for k, v in tensors.items() if v is not None}
    check(sliced_linear, definition_of_sliced, tensors, {"out": out, "in_": in_})


def definition_of_sliced(x, weight, bias=None, *, out, in_):
    """Eager slicing, also of nothing, which the papers' code does not meet."""

    def whole(spec):
        return [slice(0, 0)] if isinstance(spec, list) and not spec else spec

    return eager(x, weight, bias, out=whole(out), in_=whole(in_))


@SETTINGS
@given(st.data(), SIZES, SIZES, LEADS, DTYPES)
def test_entangled_linear(data, rows, cols, lead, dtype):
    chosen = data.draw(choices((rows, cols)))
    tensors = {
        "x": randn(1, *lead, cols, dtype=dtype),
        "weight": randn(2, rows, cols, dtype=dtype),
        "bias": randn(3, rows, dtype=dtype),
        "alpha": randn(4, len(chosen), dtype=max(dtype, torch.float32, key=lambda d: d.itemsize)),
    }
    check(entangled_linear, pad_and_sum, tensors, {"choices": chosen})


@SETTINGS
@given(st.data(), SIZES, SIZES, LEADS)
def test_entangled_linear_independent(data, rows, cols, lead):
    outs = data.draw(st.lists(st.integers(0, rows), min_size=1, max_size=4))
    ins = data.draw(st.lists(st.integers(0, cols), min_size=1, max_size=4))
    tensors = {
        "x": randn(1, *lead, cols),
        "weight": randn(2, rows, cols),
        "bias": randn(3, rows),
        "alpha_out": randn(4, len(outs)),
        "alpha_in": randn(5, len(ins)),
    }
    check(entangled_linear_independent, independent_reference, tensors, {"outs": outs, "ins": ins})


@SETTINGS
@given(st.data(), st.lists(st.integers(0, 9), min_size=1, max_size=5), DTYPES)
def test_entangle(data, shape, dtype):
    chosen = data.draw(choices(shape))
    alpha = randn(4, len(chosen), dtype=max(dtype, torch.float32, key=lambda d: d.itemsize))
    tensors = {"weight": randn(2, *shape, dtype=dtype), "alpha": alpha}
    check(entangle, mix, tensors, {"choices": chosen})


@SETTINGS
@given(st.data(), st.integers(1, 24), st.integers(1, 24))
def test_gradients_of_many_uses_add_up(data, rows, cols):
    """Any number of slices of one weight in one graph: the sum of their gradients."""
    specs = [
        (data.draw(selections(rows))[0], data.draw(selections(cols)))
        for _ in range(data.draw(st.integers(1, 5)))
    ]
    w = randn(2, rows, cols)
    total = {}
    for layer in (sliced_linear, definition_of_sliced):
        losses = [
            layer(randn(n, 3, width), w, out=out, in_=in_).sin().sum()
            for n, (out, (in_, width)) in enumerate(specs)
        ]
        total[layer] = torch.autograd.grad(sum(losses), w)[0]
    torch.testing.assert_close(*total.values())


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 60), st.integers(), st.floats(), st.text(max_size=3),
    st.builds(slice, *[st.one_of(st.none(), st.integers(-5, 60), st.floats())] * 3),
    st.lists(st.builds(slice, st.integers(-5, 40), st.integers(-5, 60)), max_size=4),
    st.lists(st.one_of(st.integers(-3, 50), st.none()), max_size=4),
    st.lists(st.integers(-3, 40), max_size=9).map(lambda v: torch.tensor(v, device=DEVICE)),
    st.lists(st.integers(-3, 40), max_size=9).map(lambda v: torch.tensor(v).long().to(DEVICE)),
    st.sampled_from([torch.bool, torch.float32, torch.int16]).map(lambda d: torch.ones(3, dtype=d)),
    st.builds(lambda *s: torch.randn(*s), st.integers(0, 20), st.integers(0, 20)),
    st.lists(st.tuples(st.integers(-2, 30), st.integers(-2, 30)), max_size=4),
    st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=3),
)  # fmt: skip


def good_arguments():
    linear = {"x": randn(1, 3, 10), "weight": randn(2, 12, 10), "bias": randn(3, 12)}
    return {
        sliced_linear: {**linear, "out": 5, "in_": None},
        entangled_linear: {**linear, "choices": [(4, 10), (12, 6)], "alpha": randn(4, 2)},
        entangled_linear_independent: {
            **linear, "outs": [4, 12], "alpha_out": randn(4, 2),
            "ins": [10], "alpha_in": randn(5, 1),
        },
        entangle: {"weight": randn(2, 6, 4), "choices": [(6, 4), (3, 2)], "alpha": randn(4, 2)},
    }  # fmt: skip


@settings(SETTINGS, max_examples=250)
@given(st.data(), ANYTHING)
@example(None, slice(0, 3.0))
def test_invalid_input_raises(data, value):
    """One argument replaced by anything at all: a result, or TypeError or ValueError naming one."""
    for op, arguments in good_arguments().items():
        every = list(arguments)
        names = every if data is None else [data.draw(st.sampled_from(every))]
        for name in names:
            changed = {**arguments, name: value}
            try:
                y = op(**changed)
            except (TypeError, ValueError) as error:
                assert any(str(error).startswith(known.rstrip("s")) for known in arguments), error
            else:
                assert torch.isfinite(y).all()


@contextlib.contextmanager
def poisoned_memory(monkeypatch):
    """Fill what torch and numpy leave uninitialised with NaN (every bit set)."""
    import numpy

    def empty(*arguments, **options):
        value = original(*arguments, **options)
        value.view(numpy.uint8).fill(0xFF)
        return value

    original = numpy.empty
    _buffers.release()  # kept buffers are not made anew
    mode = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with monkeypatch.context() as patch:
        patch.setattr(_buffers.np, "empty", empty)
        yield
    torch.use_deterministic_algorithms(mode)
    torch.utils.deterministic.fill_uninitialized_memory = filling


CASES = [
    pytest.param(case, id=f"{op}-{case.name}")
    for op, cases in all_cases("test").items()
    for case in cases
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_everything_is_written(case, dtype, monkeypatch):
    inputs = case.inputs(Maker(dtype, DEVICE))
    with poisoned_memory(monkeypatch):
        assert torch.empty(3).isnan().all()
        y = case.call(**inputs)
        grads = torch.autograd.grad(y.float().sum(), leaves(inputs), materialize_grads=True)
    for value in (y, *grads):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("out", [2100, 1000, slice(700, 1900), slice(0, 2100, 7)], ids=str)
def test_large_buffers_are_written(out, monkeypatch):
    """Large gradient buffers on the CPU come from numpy."""
    w, x = randn(0, 2100, 2100, dtype=torch.float32), randn(1, 2, 1500, dtype=torch.float32)
    assert w.nbytes > _buffers._SMALL
    with poisoned_memory(monkeypatch):
        assert DEVICE != "cpu" or _buffers.empty_like(w).isnan().all()
        y = sliced_linear(x, w, out=out, in_=slice(300, 1800))
        (got,) = torch.autograd.grad(y.sum(), w)
    wanted = torch.autograd.grad(eager(x, w, out=out, in_=slice(300, 1800)).sum(), w)[0]
    torch.testing.assert_close(got, wanted)
