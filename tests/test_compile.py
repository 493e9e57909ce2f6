"""torch.compile: whole graphs, the same numbers, and one graph for all widths."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from weightshare_kernels import (
    entangle,
    entangled_linear,
    entangled_linear_independent,
    sliced_linear,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT, IN = 48, 40
BLOCKS = [slice(0, 8), slice(16, 24), slice(32, 40)]
INDEX = torch.tensor([5, 40, 11, 30, 2], device=DEVICE)
CHOICES = [(16, 40), (48, 24), (32, 32)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, IN), (OUT, IN), (OUT,), (3,), (2,)]
    return [torch.randn(*s, generator=generator).to(DEVICE).requires_grad_() for s in shapes]


def several_slices(x, w, b, a, c):
    """A sandwich step: four slices of one weight, and a mixture of it, in one graph."""
    wide = sliced_linear(x, w, b).square().sum()
    narrow = sliced_linear(x[:, :20], w, b, out=30, in_=20).sin().sum()
    blocks = sliced_linear(x, w, b, out=BLOCKS).cos().sum()
    index = sliced_linear(x, w, b, out=INDEX).square().sum()
    return wide + narrow + blocks + index + entangled_linear(x, w, b, CHOICES, a).sin().sum()


FUNCTIONS = {
    "prefix": lambda x, w, b, a, c: sliced_linear(x[:, :17], w, b, out=33, in_=17),
    "span": lambda x, w, b, a, c: sliced_linear(x, w, None, out=slice(10, 31)),
    "blocks": lambda x, w, b, a, c: sliced_linear(x, w, b, out=BLOCKS),
    "index": lambda x, w, b, a, c: sliced_linear(x, w, b, out=INDEX),
    "entangled": lambda x, w, b, a, c: entangled_linear(x, w, b, CHOICES, a),
    "independent": lambda x, w, b, a, c: entangled_linear_independent(
        x, w, b, (16, 32, 48), a, (20, 40), c
    ),
    "entangle": lambda x, w, b, a, c: entangle(w, CHOICES, a),
    "several_slices": several_slices,
}


def values_and_gradients(function):
    arguments = tensors()
    y = function(*arguments)
    y.square().sum().backward()
    return [y.detach(), *[t.grad for t in arguments]]


def assert_equal_to_eager(function, backend):
    got = values_and_gradients(torch.compile(function, fullgraph=True, backend=backend))
    for a, b in zip(got, values_and_gradients(function), strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_aot_eager(name):
    assert_equal_to_eager(FUNCTIONS[name], "aot_eager")


@pytest.mark.parametrize("name", ["prefix", "several_slices"])
def test_inductor(name):
    assert_equal_to_eager(FUNCTIONS[name], "inductor")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", ["prefix", "span", "blocks"])
def test_sixteen_widths_share_a_graph(kind, backward):
    """The first width is compiled as a constant, the second as a symbol that serves the rest."""

    def function(x, w, b, out, in_):
        selections = {"prefix": out, "span": slice(2, out)}
        rows = selections.get(kind, [slice(0, out // 2), slice(24, 24 + out // 2)])
        return sliced_linear(x[:, :in_], w, b, out=rows, in_=in_)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    after = []
    for number in range(16):
        out, in_ = 8 + 2 * number, 37 - 2 * number
        x, w, b, *_ = tensors()
        with torch.set_grad_enabled(backward):
            y, wanted = compiled(x, w, b, out, in_), function(x, w, b, out, in_)
            torch.testing.assert_close(y, wanted)
            if backward:
                got = torch.autograd.grad(y.square().sum(), (x, w, b))
                eager = torch.autograd.grad(wanted.square().sum(), (x, w, b))
                torch.testing.assert_close(got, eager, rtol=1e-4, atol=1e-4)
        after.append(counter.frame_count)
    assert after[1] <= 2 and after[-1] == after[1], after


def test_widths_of_a_module_share_a_graph():
    """Depth and width of a small network change from step to step."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = torch.nn.Linear(IN, OUT, device=DEVICE)
            self.second = torch.nn.Linear(OUT, 4, device=DEVICE)

        def forward(self, x, width):
            h = sliced_linear(x, self.first.weight, self.first.bias, out=width).relu()
            return sliced_linear(h, self.second.weight, self.second.bias, in_=width)

    net, x = Net(), tensors()[0].detach()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for number in range(16):
        optimizer.zero_grad()
        y = compiled(x, 10 + 2 * number)
        torch.testing.assert_close(y, net(x, 10 + 2 * number), rtol=1e-4, atol=1e-4)
        y.square().sum().backward()
        optimizer.step()
    assert counter.frame_count <= 2


def test_dynamic_batch_and_width():
    compiled = torch.compile(sliced_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, width in ((3, 9), (5, 17), (11, 30)):
        _, w, b, *_ = tensors()
        x = torch.randn(rows, IN, device=DEVICE)
        torch.testing.assert_close(compiled(x, w, b, out=width), sliced_linear(x, w, b, out=width))


def test_index_tables_of_many_sizes():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, w, index: sliced_linear(x, w, out=index), fullgraph=True, backend=counter
    )
    x, w, *_ = tensors()
    for size in range(4, 20):
        index = torch.randperm(OUT, device=DEVICE)[:size]
        torch.testing.assert_close(compiled(x, w, index), x @ w[index].t())
    assert counter.frame_count <= 2


def test_compiled_refuses_what_eager_refuses():
    x, w, *_ = tensors()
    compiled = torch.compile(sliced_linear, backend="aot_eager")
    with pytest.raises(Exception, match="prefix 49"):
        compiled(x, w, out=49)


def test_large_weights_compile():
    """Weights whose gradient buffers are kept between steps: tracing must not meet the pool."""
    x, w = (torch.randn(4, 512, requires_grad=True), torch.randn(512, 512, requires_grad=True))
    alpha = torch.tensor([0.3, 0.7], requires_grad=True)

    def call(x, w, alpha):
        y = entangled_linear(x, w, None, [(256, 512), (512, 256)], alpha)
        return (y * sliced_linear(x, w, out=512)).sum()

    traced = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(traced(x, w, alpha), (x, w, alpha))
    for a, b in zip(got, torch.autograd.grad(call(x, w, alpha), (x, w, alpha)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
