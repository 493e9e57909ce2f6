"""Runs the CUDA bindings on the host: stable-ABI tensors in, kernels under the shim.

What ``register`` of the package leaves out is tested here: conversions, checks, optional tensors
and launches as the GPU library makes them, compiled from the very files of ``csrc/bindings``.
"""

from __future__ import annotations

import torch

from cuda_host import _build, sharding

SOURCES = sorted((_build.ROOT / "csrc/bindings").glob("*_cuda.cu"))


def ops() -> list[str]:
    """Ops that have a CUDA binding."""
    return [source.stem.removesuffix("_cuda") for source in SOURCES]


def register() -> None:
    """Make the bindings serve CPU tensors: ``pytest --backend cuda-bindings``."""
    from weightshare_kernels import _register

    for source in SOURCES:
        torch.ops.load_library(str(_build.compiled_binding(source)))
    decode = torch.ops.weightshare.shard_lora_decode.default
    _register.override("shard_lora", sharding.through(decode), "CPU")
