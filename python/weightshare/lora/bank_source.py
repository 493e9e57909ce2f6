"""Adapters as a bank takes them: from Mixture-of-Shards folders, from PEFT's LoRA folders."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from weightshare_kernels.ops.shard_lora import shard_index

PARTS = ("a", "b", "a_index", "b_index")
Source = str | os.PathLike | tuple[Mapping[str, Any], Mapping[str, Tensor]] | Mapping[str, Tensor]


@dataclass(frozen=True)
class Target:
    """The layers of one projection type, in order, and their widths."""

    name: str
    paths: tuple[str, ...]
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Weights:
    """Shards ``[P, c]`` of one projection type, and tables ``[layers, r, l]`` that name them."""

    a: Tensor
    b: Tensor
    a_index: Tensor
    b_index: Tensor


@dataclass(frozen=True)
class Adapter:
    """What was read: weights by projection type, and the scale of them all."""

    weights: dict[str, Weights]
    scale: float


def read(
    name: str, source: Source, scale: float | None, targets: Mapping[str, Target], shards: int
) -> Adapter:
    """Read an adapter and bring it to the bank's shards.

    Args:
        name: of the adapter, for messages.
        source: a folder; what ``load_adapter`` makes of one; or the tensors of a Mixture of
            Shards, with a scale.
        scale: instead of the source's own.
        targets: what the bank serves.
        shards: l of the bank; a multiple of the source's.

    Raises:
        TypeError: the source is nothing of that.
        ValueError: it does not fit the model or the bank; the message says in what.
        FileNotFoundError: the folder lacks a file.
    """
    if isinstance(source, str | os.PathLike):
        from weightshare.lora.tuner.files import load_adapter

        source = load_adapter(source)
    if isinstance(source, Mapping):
        source = {"peft_type": "MOS"}, source
    if not isinstance(source, tuple) or len(source) != 2:
        raise TypeError(
            f"adapter {name!r}: expected a folder, (config, tensors) or tensors by name, got "
            f"{type(source).__name__}"
        )
    config, tensors = source
    kind = str(config.get("peft_type", "")).rpartition(".")[2].upper()
    if kind not in _READERS:
        raise ValueError(
            f"adapter {name!r}: is of type {kind or 'none'}; a bank serves {' and '.join(_READERS)}"
        )
    weights, own = _READERS[kind](name, config, tensors, targets)
    scale = own if scale is None else float(scale)
    if scale is None or not math.isfinite(scale):
        raise ValueError(
            f"adapter {name!r}: has scale {scale}; pass scale=alpha / r, which tensors alone do "
            "not say"
        )
    return Adapter(
        {kind: _cut(name, targets[kind], part, shards) for kind, part in weights.items()}, scale
    )


def _mos(name: str, config, tensors, targets) -> tuple[dict[str, Weights], float | None]:
    """The pool format: ``TYPE.a``, ``TYPE.b``, ``TYPE.a_index`` and ``TYPE.b_index``."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, part = key.rpartition(".")
        if part not in PARTS or not kind:
            raise ValueError(
                f"adapter {name!r}: has a tensor {key!r}; a bank serves TYPE.a, TYPE.b, "
                "TYPE.a_index and TYPE.b_index of projection types alone (no modules_to_save)"
            )
        found.setdefault(kind, {})[part] = tensor
    weights = {}
    for kind, parts in found.items():
        if kind not in targets:
            _unknown(name, kind, config, targets)
        if missing := [part for part in PARTS if part not in parts]:
            raise ValueError(f"adapter {name!r}: {kind} lacks {', '.join(missing)}")
        weights[kind] = _spread(Weights(**parts), targets[kind], config)
    if "alpha" not in config:
        return weights, None
    return weights, _number(name, config, "alpha") / _number(name, config, "r", 1)


def _number(name: str, config, key: str, least: float = -math.inf) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        raise ValueError(
            f"adapter {name!r}: its configuration has {key} = {value!r}, which is no "
            + ("number" if least == -math.inf else f"number of at least {least}")
        )
    return value


def _spread(weights: Weights, target: Target, config) -> Weights:
    """Tables of all layers of an adapter that was made for some; the others' name no shards."""
    numbers = config.get("layers_to_transform")
    if numbers is None:
        return weights
    numbers = [numbers] if isinstance(numbers, int) else numbers
    lists = config.get("layers_pattern") or [r"[^.]*"]
    lists = "|".join([lists] if isinstance(lists, str) else lists)
    found = [re.match(rf"(?:.*\.)?(?:{lists})\.(\d+)\.", path) for path in target.paths]
    mine = torch.tensor([m is not None and int(m[1]) in numbers for m in found])
    tables = weights.a_index, weights.b_index
    if any(t.dim() != 3 or t.shape[0] != int(mine.sum()) for t in tables):
        return weights  # refused by what comes next
    a, b = [t.new_full((len(mine), *t.shape[1:]), -1) for t in tables]
    a[mine], b[mine] = tables
    return Weights(weights.a, weights.b, a, b)


_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LORA_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")


def _lora(name: str, config, tensors, targets) -> tuple[dict[str, Weights], float]:
    """PEFT's LoRA: a vector is a shard, and no layer shares any."""
    for flag in ("alora_invocation_tokens", "use_qalora"):
        if config.get(flag):
            raise ValueError(f"adapter {name!r}: has {flag}, which a bank does not serve")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"adapter {name!r}: was begun with init_lora_weights={start!r}, which changes the base "
            "model's weights, too; convert it to a plain LoRA with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _LORA_KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"adapter {name!r}: has a tensor {key!r}; a bank serves LoRA's A and B alone (no "
                "DoRA, no biases, no modules_to_save, no embeddings)"
            )
        if match[2] in found.setdefault(match[1], {}):
            raise ValueError(
                f"adapter {name!r}: has two {match[2]} for {match[1]}, the second is {key!r}; give "
                "the tensors of one adapter"
            )
        found[match[1]][match[2]] = tensor
    places = {p: (kind, n) for kind, t in targets.items() for n, p in enumerate(t.paths)}
    _number(name, config, "lora_alpha")
    scale = _lora_scale(config, "", int(_number(name, config, "r", 1)))
    by_kind: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for path, pair in found.items():
        if path not in places:
            _unknown(name, path, config, targets)
        if len(pair) != 2:
            raise ValueError(f"adapter {name!r}: {path} has {', '.join(pair)} of A and B alone")
        kind, number = places[path]
        a, b = pair["A"], pair["B"].t()
        ratio = _lora_scale(config, path, a.shape[0]) / scale
        by_kind.setdefault(kind, {})[number] = (a, b if ratio == 1 else b.float() * ratio)
    return {
        kind: _stack(name, targets[kind], matrices) for kind, matrices in by_kind.items()
    }, scale


def _lora_scale(config, path: str, rank: int) -> float:
    """PEFT's: alpha over r or its root, where a module may have numbers of its own."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if path and re.fullmatch(rf"(.*\.)?({pattern})", path):
            alpha = value
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _stack(name: str, target: Target, matrices: dict[int, tuple[Tensor, Tensor]]) -> Weights:
    """Matrices ``[r, d]`` of some layers one upon another, of ranks of their own."""
    for number, (a, b) in matrices.items():
        if a.shape[0] != b.shape[0]:
            raise ValueError(
                f"adapter {name!r}: {target.paths[number]} has rank {a.shape[0]} in A but "
                f"{b.shape[0]} in B"
            )
    ranks = [matrices[n][0].shape[0] if n in matrices else 0 for n in range(len(target.paths))]
    index = torch.full((len(ranks), max(ranks), 1), -1, dtype=torch.int32)
    first = 0
    for number, rank in enumerate(ranks):
        index[number, :rank, 0] = torch.arange(first, first + rank, dtype=torch.int32)
        first += rank
    a, b = [torch.cat([matrices[n][side] for n in sorted(matrices)]) for side in (0, 1)]
    return Weights(a, b, index, index)


_READERS: dict[str, Any] = {"MOS": _mos, "LORA": _lora}


def _unknown(name: str, what: str, config, targets) -> NoReturn:
    base = config.get("base_model_name_or_path")
    raise ValueError(
        f"adapter {name!r}: has weights for {what!r}, which is no target of this bank (they are "
        f"{', '.join(targets)}); make the bank with it among target_modules"
        + (f", if the adapter, made for {base!r}, is of this model at all" if base else "")
    )


def _cut(name: str, target: Target, weights: Weights, shards: int) -> Weights:
    """Check the shards of one type against the model, and cut them to the bank's size."""
    sides = []
    for side, width in (("a", target.d_in), ("b", target.d_out)):
        pool, index = getattr(weights, side), getattr(weights, f"{side}_index")
        label = f"adapter {name!r}: {target.name}.{side}"
        if pool.dim() != 2 or not pool.is_floating_point():
            raise ValueError(f"{label}: expected shards [P, c], got {pool.dtype} {pool.shape}")
        index = shard_index(index, pool.shape[0], f"{label}_index")
        if index.dim() != 3 or index.shape[0] != len(target.paths):
            raise ValueError(
                f"{label}_index: has shape {tuple(index.shape)}, but the model has "
                f"{len(target.paths)} layers {target.name}: expected [{len(target.paths)}, r, l]; "
                "is it an adapter of another base model?"
            )
        pieces = index.shape[2]
        if pieces * pool.shape[1] != width:
            raise ValueError(
                f"{label}: {pieces} shards of {pool.shape[1]} make {pieces * pool.shape[1]}, but "
                f"the model's {target.name} is {width} wide there; is it an adapter of another "
                "base model?"
            )
        if shards % pieces:
            raise ValueError(
                f"{label}: has {pieces} shards per vector, which does not divide the bank's "
                f"{shards}; make the bank with shards={pieces} or a multiple"
            )
        sides.append((pool, index, shards // pieces))
    (a, a_index, a_times), (b, b_index, b_times) = sides
    if a_index.shape[1] != b_index.shape[1]:
        raise ValueError(
            f"adapter {name!r}: {target.name} has rank {a_index.shape[1]} in A, but "
            f"{b_index.shape[1]} in B"
        )
    return Weights(
        *(_finer(pool, times) for pool, times in ((a, a_times), (b, b_times))),
        *(_names(index, times) for index, times in ((a_index, a_times), (b_index, b_times))),
    )


def _finer(pool: Tensor, times: int) -> Tensor:
    return pool.reshape(pool.shape[0] * times, pool.shape[1] // times)


def _names(index: Tensor, times: int) -> Tensor:
    """The table of a pool whose shards were cut into ``times`` each."""
    finer = index[..., None] * times + torch.arange(times, dtype=torch.int32, device=index.device)
    return torch.where(index[..., None] < 0, -1, finer).flatten(2)
