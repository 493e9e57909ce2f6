"""torch.library.opcheck on every dispatcher op, with the tensors that the cases send it."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from weightshare_kernels import _register
from weightshare_kernels._cases import Maker, all_cases, leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The ops are wrapped in autograd.Function, not registered with autograd of their own, so that
# "test_autograd_registration" has nothing to look at.
CHECKS = ("test_schema", "test_faketensor")
PER_OP = 12


class Recorder(TorchDispatchMode):
    """Notes each call of one of our dispatcher ops, with copies of its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {name: {} for name in _register.OPS}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == _register.NAMESPACE:
            name = function._schema.name.split("::")[1]
            copies = tree_map_only(torch.Tensor, torch.clone, args)
            self.calls[name].setdefault(str([describe(a) for a in args]), copies)
        return function(*args, **(kwargs or {}))


def describe(argument):
    return tree_map_only(torch.Tensor, lambda tensor: tuple(tensor.shape), argument)


def record():
    """Calls of forward and backward of all cases, the plain ones and two slices in one graph."""
    recorder = Recorder()
    for cases in all_cases("test").values():
        for case in cases:
            inputs = case.inputs(Maker(torch.float32, DEVICE))
            with recorder:
                y = case.call(**inputs)
                z = case.call(**inputs)
                (y.sum() + z.sum()).backward()
                with torch.no_grad():
                    case.call(**inputs)
            assert all(leaf.grad is not None for leaf in leaves(inputs))
    return recorder.calls


CALLS = record()


def spread(calls):
    """At most PER_OP calls, evenly spaced, so that every kind of case is among them."""
    step = -(-len(calls) // PER_OP)
    return list(calls.values())[::step]


@pytest.mark.parametrize("name", _register.OPS)
def test_every_op_is_reached(name):
    assert len(CALLS[name]) >= 2


@pytest.mark.parametrize("name", _register.OPS)
def test_schema_and_fake(name):
    op = getattr(torch.ops.weightshare, name).default
    for arguments in spread(CALLS[name]):
        torch.library.opcheck(op, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("name", _register.OPS)
def test_aot_dispatch_dynamic(name):
    op = getattr(torch.ops.weightshare, name).default
    for arguments in spread(CALLS[name])[:4]:
        torch.library.opcheck(op, arguments, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", _register.OPS)
def test_sizes_are_symbolic(name):
    """No plain ``int`` in a schema: it would compile one graph per width."""
    assert not re.search(r"\bint\b", _register.OPS[name])
