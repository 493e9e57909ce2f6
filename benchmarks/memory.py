"""What a workload keeps and takes: bytes saved for backward, and the peak of a step."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch
from graphs import outputs_of
from torch import Tensor

from weightshare_kernels._cases import Workload


def saved_bytes(work: Workload) -> tuple[int, int]:
    """Bytes kept for backward after one forward pass: all storages, and those not of a leaf.

    Each storage counts once and whole, whatever views of it are saved.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = outputs_of(work)
    del outputs
    own = {leaf.untyped_storage().data_ptr() for leaf in work.leaves}
    return sum(kept.values()), sum(size for at, size in kept.items() if at not in own)


def peak_bytes(step: Callable[[], object], device: str) -> int | None:
    """Most memory one step adds: the allocator's peak on a GPU, the resident set's on Linux."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError):
        return None
    before = resident("VmRSS")
    step()
    return max(0, resident("VmHWM") - before)


def resident(entry: str) -> int:
    """One entry of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{entry}:\s+(\d+) kB", text)[1])
