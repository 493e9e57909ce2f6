"""Argument checks shared by the ops: what came, what was wanted, how to mend it."""

from __future__ import annotations

import torch
from torch import Tensor


def tensor(name: str, value, dims: int | None = None) -> None:
    """Require a floating-point tensor, of ``dims`` dimensions if given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if dims is not None and value.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(value.shape)}")


def same_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Require the device of another argument."""
    if value.device != like.device:
        raise ValueError(
            f"{name}: is on {value.device}, but {like_name} is on {like.device}; move one of them"
        )


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def same_kind(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Require the device, and outside autocast the dtype, of another argument."""
    same_device(name, value, like_name, like)
    cast = autocasting(like.device.type) and torch.float64 not in (value.dtype, like.dtype)
    if value.dtype != like.dtype and not cast:
        raise TypeError(
            f"{name}: is {value.dtype}, but {like_name} is {like.dtype}; convert one with .to()"
        )


def linear_arguments(x, weight, bias) -> None:
    """Check the tensors of a linear layer: x ``[..., in]``, weight ``[O, I]``, bias ``[O]``."""
    # The common case in one expression: it is on the path of every call.
    try:
        kind = (x.dtype, x.device)
        if (
            kind == (weight.dtype, weight.device)
            and x.is_floating_point()
            and x.dim() > 0
            and weight.dim() == 2
            and (
                bias is None
                or (kind == (bias.dtype, bias.device) and bias.shape == weight.shape[:1])
            )
        ):
            return
    except AttributeError:  # not a tensor: the checks below say which
        pass
    tensor("x", x)
    tensor("weight", weight, 2)
    if x.dim() == 0:
        raise ValueError("x: expected at least 1 dimension [..., in], got a scalar")
    same_kind("weight", weight, "x", x)
    if bias is not None:
        tensor("bias", bias, 1)
        same_kind("bias", bias, "x", x)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"bias: has {bias.shape[0]} elements, but weight has {weight.shape[0]} rows; "
                "pass the whole bias, it is selected together with the rows"
            )


def autocast(tensor: Tensor) -> Tensor:
    """Cast to autocast's dtype where autocast is on for the device, except float64."""
    if not torch._C._is_any_autocast_enabled():
        return tensor
    device = tensor.device.type
    if not autocasting(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


# Looked up, as the compiler cannot trace is_autocast_available before torch 2.12.
_AUTOCAST = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu", "privateuseone")
    if torch.amp.is_autocast_available(kind)
)


def has_autocast(device: str) -> bool:
    """Tell whether a device type has autocast (meta, for one, has none)."""
    return device in _AUTOCAST


def autocasting(device: str) -> bool:
    """Tell whether autocast is on for a device type."""
    return has_autocast(device) and torch.is_autocast_enabled(device)
