"""What the ops' Triton launchers share: launch configurations, precision, the launch itself."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

_CONFIGS = Path(__file__).parent / "configs"
_INTERPRETED = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Tile:
    """Launch configuration: tile of the result ``m x n``, step ``k``, and how it is run."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3
    split: int = 1  # programs that share one tile's sum; their parts are added in fixed order
    group: int = 8  # tiles of a column of programs that run together, for the L2 cache


@dataclass(frozen=True)
class Example:
    """One launch of real size, for compilation ahead of time and the static table.

    Attributes:
        name: op and shape.
        call: runs the launcher, on tensors of the meta device.
        flops: floating-point operations of the launch.
        bytes: least bytes it moves.
        bound: ``"matrix"`` where tensor cores do the work, ``"memory"`` where loads do.
    """

    name: str
    call: Callable[[], object]
    flops: int
    bytes: int
    bound: str


def tuned(kernel: str, like: Tensor) -> Tile | None:
    """Tile measured best on this GPU, from ``configs/<gpu>.json``, or None."""
    if like.device.type != "cuda":
        return None
    return _tuned_of(like.device).get((kernel, like.element_size()))


@functools.cache
def _tuned_of(device: torch.device) -> dict[tuple[str, int], Tile]:
    return _tuned(torch.cuda.get_device_name(device))


@functools.cache
def _tuned(gpu: str) -> dict[tuple[str, int], Tile]:
    path = _CONFIGS / f"{config_name(gpu)}.json"
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["tiles"]
    return {(row["kernel"], row["itemsize"]): Tile(**row["tile"]) for row in rows}


def config_name(gpu: str) -> str:
    """File name of a GPU's launch configurations."""
    return "".join(c if c.isalnum() else "_" for c in gpu.lower())


def interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter, on CPU tensors."""
    return _INTERPRETED


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(like: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; those of an H100 where there is none."""
    return _multiprocessors(like.device) if like.device.type == "cuda" else 132


assumed_capability = 90  # of the GPU that recorded launches are meant for, see _gpu_code


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def capability(like: Tensor) -> int:
    """Compute capability of the tensor's GPU, 90 for 9.0; an assumed one where there is none."""
    return _capability(like.device) if like.device.type == "cuda" else assumed_capability


def precision(like: Tensor) -> str:
    """``"tf32"`` where PyTorch's own products may use it, else ``"ieee"``."""
    if like.dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def sum_dtype(like: Tensor) -> torch.dtype:
    """Dtype in which a kernel sums: float64 for float64, else float32."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The same dtype in Triton's terms."""
    return tl.float64 if dtype == torch.float64 else tl.float32


_bounds: dict[int, tuple[weakref.ref, int, Tensor]] = {}


def bounds(classes: Tensor, count: int) -> Tensor:
    """First element of each block of an axis, ``[count + 1]``; classes ascend along the axis.

    Kept as long as the classes themselves, which ``_grid`` caches. Not kept during capture of a
    CUDA graph, whose memory holds values only once the graph has run.
    """
    hit = _bounds.get(id(classes))
    if hit is not None and hit[0]() is classes and hit[1] == count:
        return hit[2]
    steps = torch.arange(count + 1, device=classes.device, dtype=classes.dtype)
    found = torch.searchsorted(classes, steps, out_int32=True)
    if not (classes.is_cuda and torch.cuda.is_current_stream_capturing()):
        key = id(classes)
        _bounds[key] = (weakref.ref(classes, lambda _: _bounds.pop(key, None)), count, found)
    return found


recording: list[tuple] | None = None  # where launches go instead of running, see _gpu_code


def launch(kernel, programs: tuple[int, ...], arguments: tuple, tile: Tile) -> None:
    """Run a kernel on its tensors' device; no programs, no launch."""
    if not all(programs):
        return
    if recording is not None:
        recording.append((kernel, programs, arguments, tile))
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[programs](*arguments, num_warps=tile.warps, num_stages=tile.stages)
        return
    with torch.cuda.device(device):
        kernel[programs](*arguments, num_warps=tile.warps, num_stages=tile.stages)
