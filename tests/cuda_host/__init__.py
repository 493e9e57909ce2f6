"""Runs the CUDA kernels on the host, as implementations of the ops on CPU tensors.

The kernels of ``csrc/cuda`` are compiled by g++ under the headers in ``include/``, which run the
threads of a block as fibres and report broken barriers as exceptions.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cuda_host import _build

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PROCESSORS = 2  # multiprocessors the launchers plan for


class Arguments(ctypes.Structure):
    """Sizes of weight and grid and the class maps, as the entry points take them."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("size", "blocks", "rows", "cols", "inner")]


def _address(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return ctypes.c_void_p(tensor.data_ptr())


def _arguments(weight: Tensor, grid: Tensor, *classes: Tensor):
    """The struct the entry points take, and what it points to, to be kept alive."""
    assert all(c.dtype == torch.int32 for c in classes)
    assert [c.numel() for c in classes] == list(weight.shape)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    assert grid.dtype == wide and grid.dim() == 3
    size = (ctypes.c_int64 * 3)(*weight.shape)
    blocks = (ctypes.c_int64 * 3)(*grid.shape)
    pointers = [ctypes.addressof(size), ctypes.addressof(blocks), *(c.data_ptr() for c in classes)]
    return Arguments(*pointers), (size, blocks)


def poisoned(like: Tensor) -> Tensor:
    """Memory in which an element no kernel wrote shows up as NaN."""
    return torch.full_like(like, float("nan"), memory_format=torch.contiguous_format)


def entangle(weight: Tensor, grid: Tensor, rows: Tensor, cols: Tensor, inner: Tensor) -> Tensor:
    """Op ``entangle`` by the CUDA kernel."""
    grid = grid.contiguous()
    arguments, _keep = _arguments(weight, grid, rows, cols, inner)
    out = poisoned(weight)
    dtype = DTYPES.index(weight.dtype)
    function = _build.load("entangle").entangle
    _build.call(function, dtype, _address(weight), _address(grid), _address(out), arguments)
    return out


def entangle_backward(
    grad: Tensor,
    weight: Tensor,
    grid: Tensor,
    rows: Tensor,
    cols: Tensor,
    inner: Tensor,
    processors: int = PROCESSORS,
) -> tuple[Tensor, Tensor]:
    """Op ``entangle_backward`` by the CUDA kernels."""
    assert grad.shape == weight.shape and grad.dtype == weight.dtype
    grid = grid.contiguous()
    arguments, _keep = _arguments(weight, grid, rows, cols, inner)
    dweight, dgrid = poisoned(weight), poisoned(grid)
    dtype = DTYPES.index(weight.dtype)
    tensors = map(_address, (grad, weight, grid, dweight, dgrid))
    function = _build.load("entangle").entangle_backward
    _build.call(function, dtype, *tensors, arguments, processors)
    return dweight, dgrid


def register() -> None:
    """Make the CUDA kernels serve CPU tensors: ``pytest --backend cuda-host``."""
    from cuda_host import routing, sharding
    from weightshare_kernels import _register

    for name in ("entangle", "route", "shard_lora"):
        _build.load(name)
    routed = (routing.route, routing.route_grad, routing.route_tables)
    for function in (entangle, entangle_backward, *routed):
        _register.override(function.__name__, function, "CPU")
    _register.override("shard_lora_decode", sharding.decode, "CPU")
    _register.override("shard_lora", sharding.through(sharding.decode), "CPU")
