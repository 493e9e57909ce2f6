"""Runs the CUDA kernel of shard_lora_decode on the host; see the package."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from cuda_host import _build
from weightshare_kernels.ops.shard_lora import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # as the entry point counts
PROCESSORS = 2
TARGETS = 4  # of a launch
PAD = 16  # ranks of a target are counted in so many


class Target(ctypes.Structure):
    """One target, as the entry point takes it."""

    _pointers = ("a_pool", "b_pool", "a_index", "b_index", "base", "y")
    _sizes = ("shards", "width", "parts", "stride")
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _pointers),
        *((f"{side}_{size}", ctypes.c_int64) for size in _sizes for side in "ab"),
        *((name, ctypes.c_int64) for name in ("d_out", "rank")),
    ]


class Call(ctypes.Structure):
    """What all targets share."""

    _integers = ("rows", "d_in", "adapters", "dtype", "wide_pools", "count", "processors")
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "ids", "scales", "h")),
        *((name, ctypes.c_int64) for name in _integers),
        ("scale", ctypes.c_double),
    ]


def _address(tensor: Tensor | None) -> int | None:
    assert tensor is None or (tensor.is_contiguous() and tensor.device.type == "cpu")
    return None if tensor is None else tensor.data_ptr()


def _poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory in which an element no kernel wrote shows as NaN."""
    return torch.full(shape, float("nan"), dtype=dtype)


def decode(
    x: Tensor,
    bases: list[Tensor],
    a_pools: list[Tensor],
    b_pools: list[Tensor],
    a_index: list[Tensor],
    b_index: list[Tensor],
    ids: Tensor | None,
    scales: Tensor | None,
    scale: float,
    processors: int = PROCESSORS,
) -> list[Tensor]:
    """Op ``shard_lora_decode`` by the CUDA kernel, a launch for each of its two phases."""
    lists = (bases, a_pools, b_pools, a_index, b_index)
    x, *rest = [t.contiguous() for t in (x, *(t for some in lists for t in some))]
    count, kind = len(bases), torch.promote_types(x.dtype, torch.float32)
    bases, a_pools, b_pools, a_index, b_index = [
        rest[i : i + count] for i in range(0, 5 * count, count)
    ]
    ids, scales = (None if t is None else t.contiguous() for t in (ids, scales))
    assert scales is None or scales.dtype == kind
    ys, targets = [_poisoned(*b.shape, dtype=b.dtype) for b in bases], []
    for base, a_pool, b_pool, a, b, y in zip(
        bases, a_pools, b_pools, a_index, b_index, ys, strict=True
    ):
        assert a_pool.dtype == b_pool.dtype == a_pools[0].dtype
        sizes = (a_pool.shape[0], b_pool.shape[0], a_pool.shape[1], b_pool.shape[1])
        sizes += (a.shape[2], b.shape[2], a.shape[1] * a.shape[2], b.shape[1] * b.shape[2])
        pointers = map(_address, (a_pool, b_pool, a, b, base, y))
        targets.append(Target(*pointers, *sizes, base.shape[1], a.shape[1]))
    function = _build.load("shard_lora").shard_lora_decode
    for first in range(0, count, TARGETS):
        some = targets[first : first + TARGETS]
        size = scratch(x.shape[0], sum(-(-t.rank // PAD) * PAD for t in some))
        h = _poisoned(size, dtype=kind)
        numbers = DTYPES.index(x.dtype), a_pools[0].dtype == torch.float32
        call = Call(
            *map(_address, (x, ids, scales, h)),
            *(*x.shape, a_index[0].shape[0], *numbers, len(some), processors),
            scale,
        )
        _build.call(function, ctypes.byref(call), (Target * len(some))(*some))
    return ys


def scratch(rows: int, ranks: int) -> int:
    """Elements of the kernel's scratch memory."""
    function = _build.load("shard_lora").shard_lora_scratch
    function.restype = ctypes.c_int64
    return function(ctypes.c_int64(rows), ctypes.c_int64(ranks))


def through(decode: Callable[..., list[Tensor]]) -> Callable[..., tuple[list[Tensor], Tensor]]:
    """Op ``shard_lora`` with outputs of a decode kernel, so that tests of the op reach that."""

    def forward(x, bases, a_pools, b_pools, a_index, b_index, offsets, permutation, scales, scale):
        tensors = x, bases, a_pools, b_pools, a_index, b_index
        _, h = reference.forward(*tensors, offsets, permutation, scales, scale)
        ids = None
        if offsets is not None:
            ids = torch.full((x.shape[0],), -1)
            for number, rows in reference.segments(a_index[0], x, offsets, permutation):
                ids[rows] = number
        return decode(*tensors, ids, scales, scale), h

    return forward
