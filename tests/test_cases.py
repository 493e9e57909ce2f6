"""The cases themselves, checked without the devices they are meant for."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightshare_kernels._cases import Maker, all_cases, leaves


def listed(tier=None):
    """Cases as parameters."""
    by_op = all_cases(tier).items()
    return [pytest.param(case, id=f"{op}-{case.name}") for op, cases in by_op for case in cases]


CASES, TESTS = listed(), listed("test")
DEVICE = "lazy:0"  # one whose tensors can be faked in any build of PyTorch
OF_VALUES = (DataDependentOutputException, DynamicOutputShapeException)  # fake tensors have none


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, copies between them excepted."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t) and t.dim()]
        devices = {t.device.type for t in found}
        if len(devices) > 1 and "copy" not in function.__name__:
            raise AssertionError(f"{function} meets tensors on {' and '.join(sorted(devices))}")
        return function(*args, **(kwargs or {}))


class NoAtomics(TorchDispatchMode):
    """Refuses floating-point sums that a GPU makes by atomics, in an order that varies."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0].rstrip("_")
        if name in ("index_add", "scatter_add", "scatter_reduce", "index_reduce"):
            target, dim, index = args[:3]
            ordered = index.sort(dim if index.dim() > 1 else 0).values
            along = dim if index.dim() > 1 else 0
            repeats = (ordered.diff(dim=along) == 0).any() if index.numel() else False
            if target.is_floating_point() and repeats:
                raise AssertionError(f"{name} adds to an element more than once")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", TESTS)
def test_gradients_of_gradients_repeat(case):
    """The differentiable backward passes, too, give the same bits twice on any device."""
    inputs = case.inputs(Maker(torch.float64))
    values = leaves(inputs)
    with NoAtomics():
        y = case.call(**inputs)
        g = torch.ones_like(y, requires_grad=True)
        first = torch.autograd.grad(y, values, g, create_graph=True, materialize_grads=True)
        total = sum(part.square().sum() for part in first)
        torch.autograd.grad(total, [*values, g], allow_unused=True)


@pytest.mark.parametrize("case", CASES)
def test_everything_is_on_one_device(case):
    """No tensor of a case, its definition or its baselines is left on the CPU."""
    with FakeTensorMode(), OneDevice():
        maker = Maker(torch.float32)
        maker.device = DEVICE
        inputs = case.inputs(maker)
        for name, value in inputs.items():
            on = {str(t.device) for t in tree_leaves(value) if torch.is_tensor(t)}
            assert on <= {DEVICE}, name
        works = [lambda: case.reference(**inputs), lambda: case.call(**inputs)]
        works += [lambda make=make: make(inputs).forward() for make in case.baselines.values()]
        for work in works:
            with contextlib.suppress(*OF_VALUES):
                work()
