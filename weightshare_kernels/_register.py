"""Define, implement and describe an op: the only place that touches ``torch.library``.

The schema lives here, in Python; native libraries only add implementations, so either may be
loaded first, and the PyTorch reference serves wherever no kernel is registered.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable

import torch
from torch.autograd import Function

from weightshare_kernels import _config, _loader  # noqa: F401  (loads the native libraries)

NAMESPACE = "weightshare"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)


OPS: dict[str, str] = {}  # name -> schema
_triton_serves: set[tuple[str, str]] = set()  # (op, dispatch key)


def define(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    triton: str | None = None,
    adapt: Callable[[Callable], Callable] = lambda function: function,
):
    """Register an op and return its bound overload.

    Args:
        schema: the signature, sizes that vary between subnets declared ``SymInt``.
        reference: slow, obvious PyTorch; serves every device that has no kernel.
        fake: the same signature on meta tensors; returns outputs without data.
        triton: ``"module:function"`` with the reference's signature, imported only when used.
        adapt: turns a function of the reference's signature into one of the schema's, where
            native code takes on what PyTorch code is better given ready-made.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, adapt(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    OPS[name] = schema
    if triton is not None and (key := _triton_key(name)) is not None:
        module, function = triton.split(":")
        override(name, adapt(getattr(importlib.import_module(module), function)), key)
        _triton_serves.add((name, key))
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def override(name: str, function: Callable, key: str) -> None:
    """Make ``function`` the implementation of an op under one dispatch key."""
    _LIBRARY.impl(name, function, key, allow_override=True)


def lean(function: type[Function]) -> Callable:
    """``function.apply`` without its reflection on default arguments: 17 us a call, not 47.

    For plain eager calls alone: tracing and functorch transforms need the full ``apply``.
    """
    return super(Function, function).apply  # type: ignore[misc]


def has_kernel(name: str, key: str) -> bool:
    """Tell whether the op has an implementation of its own under a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


# As torch.compiler.assume_constant_result does, which would import the compiler here.
has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _triton_key(name: str) -> str | None:
    """Dispatch key that Triton should serve for this op here, or None."""
    backend = _config.get("WEIGHTSHARE_BACKEND")
    if backend not in ("auto", "triton") or importlib.util.find_spec("triton") is None:
        return None
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "CPU" if backend == "triton" else None
    if torch.version.cuda is None or has_kernel(name, "CUDA"):
        return None
    return "CUDA"


def backend_of(name: str, device_type: str) -> str:
    """Name of the backend that serves an op on a device: for ``info`` and for tests."""
    key = device_type.upper()
    if not has_kernel(name, key):
        return "reference"
    if (name, key) in _triton_serves:
        return "triton"
    return "cuda" if key == "CUDA" else "cpu"
