"""Against code we did not write: other libraries' sliced and mixed weights, where installed.

``pip install --no-deps nni==3.0 whittle==0.6.0 litgpt==0.5.12`` and what their imports then ask
for; neither is needed by this library, and both pin versions that it does not.
"""

import importlib

import pytest
import torch

from weightshare_kernels import entangle, entangled_linear, sliced_linear


def peer(module):
    """The peer's module, or a skip that says what is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{module.split('.')[0]} cannot be imported: {error}")


@pytest.fixture
def nni():
    return peer("nni.nas.oneshot.pytorch.supermodule._operation_utils")


@pytest.fixture
def whittle():
    return peer("whittle.modules.linear")


def parameters(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]


def assert_same(ours, theirs, leaves):
    """Outputs and gradients agree."""
    torch.testing.assert_close(ours, theirs)
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    got = torch.autograd.grad(ours, leaves, g)
    torch.testing.assert_close(got, torch.autograd.grad(theirs, leaves, g))


def weighted(nni, sizes, alpha):
    return nni.MaybeWeighted(dict(zip(sizes, alpha, strict=True)))


def test_entangled_rows(nni):
    weight, alpha = parameters((12, 8), (3,))
    theirs = nni.Slicable(weight)[: weighted(nni, (4, 8, 12), alpha)]
    assert_same(entangle(weight, [(4, 8), (8, 8), (12, 8)], alpha), theirs, [weight, alpha])


def test_entangled_coupled_linear(nni):
    """The output size decides the input size, as embedding width and heads do."""
    x, weight, bias, alpha = parameters((5, 8), (12, 8), (12,), (3,))
    size = weighted(nni, (4, 8, 12), alpha)
    mixed = nni.Slicable(weight)[:size, : size // 2 + 1]
    theirs = torch.nn.functional.linear(x, mixed, nni.Slicable(bias)[:size])
    ours = entangled_linear(x, weight, bias, [(4, 3), (8, 5), (12, 7)], alpha)
    assert_same(ours, theirs, [x, weight, bias, alpha])


def test_entangled_centre_crop(nni):
    """Kernel sizes 3, 5 and 7 share the centre of one kernel."""
    weight, alpha = parameters((6, 4, 7, 7), (3,))
    size = weighted(nni, (3, 5, 7), alpha)
    start = (7 - size) // 2
    theirs = nni.Slicable(weight)[:, :, start : start + size, start : start + size]
    ours = entangle(weight, [(6, 4, k, k) for k in (3, 5, 7)], alpha)
    assert_same(ours, theirs, [weight, alpha])


@pytest.mark.parametrize(
    ("out", "in_"),
    [(7, 5), (12, 8), (None, 3), (torch.tensor([8, 0, 11]), torch.tensor([3, 1, 6, 2])), (9, None)],
)
def test_sliced_linear(whittle, out, in_):
    layer = whittle.Linear(8, 12, dtype=torch.float64)
    sizes = [12 if out is None else out, 8 if in_ is None else in_]
    tables = [s.tolist() if torch.is_tensor(s) else None for s in sizes]
    counts = [len(s) if torch.is_tensor(s) else s for s in sizes]
    layer.set_sub_network(counts[1], counts[0], tables[1], tables[0])
    (x,) = parameters((2, 5, counts[1]))
    ours = sliced_linear(x, layer.weight, layer.bias, out=out, in_=in_)
    assert_same(ours, layer(x), [x, layer.weight, layer.bias])
