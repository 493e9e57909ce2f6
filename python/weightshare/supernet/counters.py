"""What a subnet costs: parameters, operations, time."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from weightshare.supernet.supernet import Supernet


def count_parameters(supernet: Supernet, arch: Mapping[str, Any] | None = None) -> int:
    """Number of parameters of a subnet, a tied one counted once; no weight is copied.

    Args:
        supernet: whose subnets these are.
        arch: the active one if not given.
    """
    with _EqualByShape():
        subnet = _without_data(supernet).get_active_subnet(arch)
    return sum(parameter.numel() for parameter in subnet.parameters())


def count_flops(
    supernet: Supernet, inputs: Sequence[Tensor], arch: Mapping[str, Any] | None = None
) -> int:
    """Floating-point operations of one forward pass: two per multiplication and addition.

    Matrix products, attention and convolutions count, as in ``torch.utils.flop_counter``. The
    subnet is run once.

    Args:
        supernet: whose subnets these are.
        inputs: arguments of the model, on its device.
        arch: the active one if not given.
    """
    subnet = supernet.get_active_subnet(arch).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        subnet(*inputs)
    return counter.get_total_flops()


def latency(
    supernet: Supernet,
    inputs: Sequence[Tensor],
    arch: Mapping[str, Any] | None = None,
    *,
    repeats: int = 20,
    warmup: int = 3,
) -> float:
    """Median seconds of a forward pass of a subnet that stands alone, in evaluation mode.

    Args:
        supernet: whose subnets these are.
        inputs: arguments of the model, on its device.
        arch: the active one if not given.
        repeats: passes that are timed.
        warmup: passes before them.

    Raises:
        ValueError: ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected 1 or more, got {repeats}")
    subnet = supernet.get_active_subnet(arch).eval()
    with torch.inference_mode():
        for _ in range(warmup):
            _timed(subnet, inputs)
        return median(_timed(subnet, inputs) for _ in range(repeats))


def _timed(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    on_gpu = any(x.is_cuda for x in inputs)
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(*inputs)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _without_data(supernet: Supernet) -> Supernet:
    """A copy whose tensors have shapes but no memory."""
    module, space = supernet.module, supernet.space
    memo: dict[int, Any] = {id(dim.alpha): None for dim in space.dims.values()}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(Supernet(module, space), memo)


class _EqualByShape(TorchFunctionMode):
    """Tensors without data have no values to compare: parts of one weight differ by shape only."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.equal:
            return args[0].shape == args[1].shape
        return func(*args, **(kwargs or {}))
