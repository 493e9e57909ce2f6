"""Cost of one op call at size 1, where nothing but overhead is measured.

``pytest benchmarks/test_micro.py``; the bar, 10 us over ``F.linear`` with gradients, is a test.
"""

import time

import pytest
import torch
from torch.nn.functional import linear

from weightshare_kernels import sliced_linear

CALLS = 50
BAR = 10e-6  # seconds


def f_linear(x, weight, bias):
    return linear(x, weight, bias)


def ours(x, weight, bias):
    return sliced_linear(x, weight, bias, out=1, in_=1)


def eager(x, weight, bias):
    return linear(x, weight[:1, :1], bias[:1])


CALLABLES = {"F.linear": f_linear, "eager_slice": eager, "sliced_linear": ours}


def tensors(grad):
    return [torch.randn(*s).requires_grad_(grad) for s in ((1, 1), (2, 2), (2,))]


def arguments_for(name, grad):
    """``F.linear`` gets a layer of the active size; the others slice theirs."""
    x, weight, bias = tensors(grad)
    if name != "F.linear":
        return x, weight, bias
    return x, *(p.detach()[:1].clone().requires_grad_(grad) for p in (weight[:, :1], bias))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.benchmark(group="forward, no gradient")
def test_inference(benchmark, name):
    arguments = arguments_for(name, False)
    with torch.no_grad():
        assert benchmark(CALLABLES[name], *arguments).shape == (1, 1)


@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.benchmark(group="forward, with gradient")
def test_forward(benchmark, name):
    arguments = arguments_for(name, True)
    assert benchmark(CALLABLES[name], *arguments).requires_grad


@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.benchmark(group="forward and backward")
def test_step(benchmark, name):
    arguments = arguments_for(name, True)
    g = torch.ones(1, 1)

    def step():
        for tensor in arguments:
            tensor.grad = None
        CALLABLES[name](*arguments).backward(g)

    benchmark(step)
    assert arguments[1].grad is not None


def seconds_per_call(name, arguments):
    start = time.perf_counter()
    for _ in range(CALLS):
        CALLABLES[name](*arguments)
    return (time.perf_counter() - start) / CALLS


def test_overhead_is_within_the_bar():
    """The least over interleaved rounds: other work on the machine only ever adds time."""
    sides = {name: arguments_for(name, True) for name in ("F.linear", "sliced_linear")}
    least = dict.fromkeys(sides, float("inf"))
    for _ in range(100):
        for name, arguments in sides.items():
            least[name] = min(least[name], seconds_per_call(name, arguments))
    overhead = least["sliced_linear"] - least["F.linear"]
    print(f"overhead of one call with gradients: {overhead * 1e6:.1f} us")
    assert overhead <= BAR
