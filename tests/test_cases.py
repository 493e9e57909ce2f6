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

from weightshare_kernels._cases import Maker, all_cases

CASES = [
    pytest.param(case, id=f"{op}-{case.name}")
    for op, cases in all_cases().items()
    for case in cases
]
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
