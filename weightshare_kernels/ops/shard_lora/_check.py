"""Argument checks of shard_lora: what came, what was wanted, how to mend it."""

from __future__ import annotations

import torch
from torch import Tensor

from weightshare_kernels import _checks


def check(x, bases, a_pools, b_pools, a_indices, b_indices, scale) -> None:
    """Raise TypeError or ValueError, naming the argument, unless all fit together."""
    _checks.tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least 1 dimension [..., d_in], got a scalar")
    lists = {"base_outs": bases, "a_pools": a_pools, "b_pools": b_pools}
    lists |= {"a_indices": a_indices, "b_indices": b_indices}
    if not bases or len({len(values) for values in lists.values()}) != 1:
        counts = ", ".join(f"{name} {len(values)}" for name, values in lists.items())
        raise ValueError(f"expected one entry per target and at least one target, got {counts}")
    for target in range(len(bases)):
        a, b = a_indices[target], b_indices[target]
        if _fit(x, bases[target], a_pools[target], b_pools[target], a, b, a_indices[0]):
            continue
        at = f"[{target}]" if len(bases) > 1 else ""
        _check_side("a", at, x, a_pools[target], a, x.shape[-1], "x has")
        base = bases[target]
        wanted = None
        if base is not None:
            _checks.tensor(f"base_out{at}", base)
            _checks.same_kind(f"base_out{at}", base, "x", x)
            wanted = base.shape[-1] if base.dim() else 0
            if base.shape[:-1] != x.shape[:-1] or base.dim() == 0:
                raise ValueError(
                    f"base_out{at}: has shape {tuple(base.shape)}, but x has "
                    f"{tuple(x.shape)}; all dimensions but the last must agree"
                )
        _check_side("b", at, x, b_pools[target], b, wanted, "base_out has")
        if a.shape[:2] != b.shape[:2] or a.shape[0] != a_indices[0].shape[0]:
            raise ValueError(
                f"b_index{at}: has {tuple(b.shape[:2])} adapters and ranks, but a_index{at} has "
                f"{tuple(a.shape[:2])} (and the first target {a_indices[0].shape[0]} adapters)"
            )
    if isinstance(scale, Tensor):
        kind, shape = _checks.accumulate_dtype(x.dtype), a_indices[0].shape[:1]
        if scale.dtype != kind or scale.shape != shape:
            raise ValueError(
                f"scale: expected {kind} of shape {tuple(shape)}, one per adapter, got "
                f"{scale.dtype} {tuple(scale.shape)}"
            )
        _checks.same_device("scale", scale, "x", x)
    elif isinstance(scale, bool) or not isinstance(scale, float | int | torch.SymFloat):
        raise TypeError(f"scale: expected a number or a tensor, got {type(scale).__name__}")


def _fit(x, base, a_pool, b_pool, a, b, first) -> bool:
    """Tell the common case in one expression: it is on the path of every call."""
    try:
        kind, device = x.dtype, x.device
        return (
            kind == base.dtype == a_pool.dtype == b_pool.dtype
            and device == base.device == a_pool.device == b_pool.device == a.device == b.device
            and x.is_floating_point()
            and a.dtype == b.dtype == torch.int32
            and a_pool.dim() == b_pool.dim() == 2
            and a.dim() == b.dim() == 3
            and base.dim() == x.dim()
            and base.shape[:-1] == x.shape[:-1]
            and a.shape[2] * a_pool.shape[1] == x.shape[-1]
            and b.shape[2] * b_pool.shape[1] == base.shape[-1]
            and a.shape[:2] == b.shape[:2]
            and a.shape[0] == first.shape[0]
        )
    except AttributeError:  # not a tensor: the checks below say which
        return False


def _check_side(side: str, at: str, x: Tensor, pool, index, width, whose: str) -> None:
    """Check a pool with its index table; their rows must be ``width`` wide, if that is given."""
    name, table = f"{side}_pool{at}", f"{side}_index{at}"
    _checks.tensor(name, pool, 2)
    _checks.same_device(name, pool, "x", x)
    wide = pool.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
    if not wide:
        _checks.same_kind(name, pool, "x", x)
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{table}: expected a tensor of integers, got {kind}")
    if index.dtype != torch.int32:
        raise TypeError(f"{table}: expected int32, got {index.dtype}; make it with shard_index()")
    if index.dim() != 3:
        raise ValueError(
            f"{table}: expected [r, l] or [adapters, r, l], got shape {tuple(index.shape)}"
        )
    _checks.same_device(table, index, "x", x)
    if width is not None and index.shape[2] * pool.shape[1] != width:
        raise ValueError(
            f"{table}: {index.shape[2]} shards of {pool.shape[1]} make "
            f"{index.shape[2] * pool.shape[1]}, but {whose} {width} columns"
        )
