"""Gradient buffers on the CPU that stay warm from step to step.

A training step drops its gradients and allocates them again. For the sizes of a weight, malloc
returns the memory to the system in between, and touching it anew costs a page fault per 4 KB:
12 ms for a 38 MB buffer that takes 0.5 ms to fill once it is mapped. PyTorch caches device
memory for this reason, but not host memory; here freed buffers are kept for the next step, up to
``WEIGHTSHARE_GRAD_CACHE_MB``.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict, deque

import numpy as np
import torch
from torch import Tensor

from weightshare_kernels import _config

_SMALL = 1 << 18  # bytes; below this malloc keeps memory by itself
_ALIGN = 64
_LIMIT = _config.get_int("WEIGHTSHARE_GRAD_CACHE_MB") << 20
_NUMPY = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,  # numpy has none; the tensor is viewed as bfloat16
    torch.float16: np.float16,
}

_free: defaultdict[tuple, deque[np.ndarray]] = defaultdict(deque)
_leases: dict[int, weakref.ref] = {}
_kept = 0
_lock = threading.RLock()  # re-entered when a tensor dies inside it


def empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised tensor of the same shape, dtype and, if dense, strides; kept memory if any."""
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size < _SMALL or not tensor.is_contiguous():
        return torch.empty_like(tensor)
    lent = torch.from_numpy(_lease(tensor.shape, tensor.dtype, size))
    return lent.view(torch.bfloat16) if tensor.dtype == torch.bfloat16 else lent


def kept_bytes() -> int:
    """Bytes of freed gradient buffers kept for reuse."""
    return _kept


def release() -> None:
    """Give all kept buffers back to the system."""
    global _kept
    with _lock:
        _free.clear()
        _kept = 0


def _lease(shape: torch.Size, dtype: torch.dtype, size: int) -> np.ndarray:
    """A view of a block; when the last tensor on it dies, the block comes back."""
    global _kept
    kind = (shape, dtype)
    block = None
    with _lock:
        if _free[kind]:
            block = _free[kind].pop()
            _kept -= size
    if block is None:
        raw = np.empty(size + _ALIGN, dtype=np.uint8)  # numpy asks for huge pages above 4 MB
        lead = -raw.ctypes.data % _ALIGN
        block = raw[lead : lead + size].view(_NUMPY[dtype]).reshape(shape)
    lease = block[...]
    key = id(lease)
    _leases[key] = weakref.ref(lease, lambda _: _return(key, kind, size, block))
    return lease


def _return(key: int, kind: tuple, size: int, block: np.ndarray) -> None:
    global _kept
    with _lock:
        del _leases[key]
        if _kept + size <= _LIMIT:
            _free[kind].append(block)
            _kept += size
