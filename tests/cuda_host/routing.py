"""Runs the CUDA kernels of routing on the host; see the package."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cuda_host import _build

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # as RouteType counts
SCORES = ("sigmoid", "softmax", "sqrt_softplus")  # as RouteScore counts
PROCESSORS = 2


class Options(ctypes.Structure):
    """The options of a launch, as the entry points take them."""

    _integers = ("rows", "experts", "k", "groups", "topk_groups", "group_top", "score", "type")
    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_integers, "normalize")),
        ("scale", ctypes.c_double),
    ]


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    if tensor is None:
        return ctypes.c_void_p(None)
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return ctypes.c_void_p(tensor.data_ptr())


def _poisoned(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Memory in which an element no kernel wrote shows: NaN, or a number out of any range."""
    poison = float("nan") if dtype.is_floating_point else -(1 << 60)
    return torch.full(shape, poison, dtype=dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _run(options, scores, bias, padding, ids, gates, experts, processors):
    pairs = ids.numel()
    tables = [_poisoned(n) for n in (experts, experts + 1, pairs, pairs)]
    tensors = map(_address, (scores, bias, padding, ids, gates, *tables))
    function = _build.load("route").route_forward
    _build.call(function, ctypes.byref(options), *tensors, processors)
    return tables


def route(
    scores: Tensor,
    bias: Tensor | None,
    padding: Tensor | None,
    k: int,
    score_fn: str,
    groups: int,
    topk_groups: int,
    group_top: int,
    normalize: bool,
    scale: float,
    processors: int = PROCESSORS,
) -> tuple[Tensor, ...]:
    """Op ``route`` by the CUDA kernel, a launch for each of its two phases."""
    scores = scores.contiguous()
    rows, experts = scores.shape
    assert bias is None or (bias.dtype == _wide(scores.dtype) and bias.shape == (experts,))
    bias = None if bias is None else bias.contiguous()
    padding = None if padding is None else padding.contiguous()
    numbers = SCORES.index(score_fn), DTYPES.index(scores.dtype), normalize
    options = Options(rows, experts, k, groups, topk_groups, group_top, *numbers, scale)
    ids, gates = _poisoned(rows, k), _poisoned(rows, k, dtype=_wide(scores.dtype))
    tables = _run(options, scores, bias, padding, ids, gates, experts, processors)
    return ids, gates, *tables


def route_tables(
    experts: Tensor, padding: Tensor | None, num_experts: int, processors: int = PROCESSORS
) -> tuple[Tensor, ...]:
    """Op ``route_tables`` by the CUDA kernel."""
    experts = experts.contiguous()
    rows, k = experts.shape
    padding = None if padding is None else padding.contiguous()
    options = Options(rows, num_experts, k, 1, 1, 1, 0, 1, True, 1.0)
    return tuple(_run(options, None, None, padding, experts, None, num_experts, processors))


def route_grad(
    grad_gates: Tensor,
    scores: Tensor,
    experts: Tensor,
    padding: Tensor | None,
    score_fn: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Op ``route_grad`` by the CUDA kernel."""
    grad, scores, ids = grad_gates.contiguous(), scores.contiguous(), experts.contiguous()
    assert grad.dtype == _wide(scores.dtype) and grad.shape == ids.shape
    padding = None if padding is None else padding.contiguous()
    numbers = SCORES.index(score_fn), DTYPES.index(scores.dtype), normalize
    options = Options(*scores.shape, ids.shape[1], 1, 1, 1, *numbers, scale)
    to = _poisoned(*scores.shape, dtype=scores.dtype)
    tensors = map(_address, (grad, scores, padding, ids, to))
    _build.call(_build.load("route").route_backward, ctypes.byref(options), *tensors)
    return to
