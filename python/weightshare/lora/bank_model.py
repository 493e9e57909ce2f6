"""The layers of a model that a bank serves: found, described, wrapped and put back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from weightshare.lora.bank_layer import SIBLINGS, BankLinear, Siblings
from weightshare.lora.bank_source import Target

if TYPE_CHECKING:
    from weightshare.lora.bank import AdapterBank


def find(model: nn.Module, wanted: str | Sequence[str]) -> dict[str, nn.Module]:
    """Layers that match, by path, in the model's order."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(wanted, str):
            hit = re.fullmatch(wanted, path) is not None
        else:
            hit = any(path == name or path.endswith(f".{name}") for name in wanted)
        if isinstance(module, BankLinear):
            raise ValueError(f"model: {path} is served by a bank already; detach() that first")
        if hit:
            found[path] = module
    if not found:
        raise ValueError(f"target_modules: no layer of {type(model).__name__} matches {wanted!r}")
    return found


def targets_of(found: Mapping[str, nn.Module]) -> dict[str, Target]:
    """Projection types, by the last name of the layers' paths."""
    paths: dict[str, list[str]] = {}
    widths: dict[str, tuple[int, int]] = {}
    for path, module in found.items():
        kind, width = path.rpartition(".")[2], _widths(path, module)
        if widths.setdefault(kind, width) != width:
            raise ValueError(
                f"target_modules: {paths[kind][0]} is {widths[kind]} wide (in, out), but {path} is "
                f"{width}; layers of one name must be alike: give a regular expression for those "
                "of one part of the model"
            )
        paths.setdefault(kind, []).append(path)
    return {kind: Target(kind, tuple(paths[kind]), *widths[kind]) for kind in paths}


def _widths(path: str, module: nn.Module) -> tuple[int, int]:
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"target_modules: {path} belongs to an nn.MultiheadAttention, which reads its "
            "weight and never calls it; a bank cannot serve it"
        )
    for names in (("in_features", "out_features"), ("nx", "nf")):
        if all(isinstance(getattr(module, name, None), int) for name in names):
            return tuple(getattr(module, name) for name in names)  # type: ignore[return-value]
    raise TypeError(
        f"target_modules: {path} is a {type(module).__name__}, which has no in_features and "
        "out_features; a bank serves linear layers"
    )


def place(model: nn.Module, found: Mapping[str, nn.Module]) -> tuple[torch.device, torch.dtype]:
    """Where the layers are and the dtype they compute in; the model's, if they have no tensors."""
    places: dict[torch.device, str] = {}
    kinds = []
    bare = not any(True for m in found.values() for _ in chain(m.parameters(), m.buffers()))
    for path, module in ({"model": model} if bare else found).items():
        for tensor in chain(module.parameters(), module.buffers()):
            places.setdefault(tensor.device, path)
            kinds.append(tensor.dtype)
    if len(places) > 1:
        raise ValueError(
            "model: "
            + " but ".join(f"{path} is on {device}" for device, path in places.items())
            + "; a bank serves layers of one device"
        )
    known = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    quantised = any(not kind.is_floating_point or kind.itemsize < 2 for kind in kinds)
    kind = getattr(model, "dtype", None) if quantised else next(iter(kinds), None)
    return next(iter(places), torch.device("cpu")), kind if kind in known else torch.float32


def attach(model: nn.Module, found: Mapping[str, nn.Module], bank: AdapterBank) -> list[BankLinear]:
    """Put a layer of the bank around each that was found."""
    slabs = bank.memory.slabs
    numbers = {p: n for slab in slabs.values() for n, p in enumerate(slab.target.paths)}
    layers = {
        path: BankLinear(module, bank, slabs[path.rpartition(".")[2]], numbers[path])
        for path, module in found.items()
    }
    replace(model, {id(layer.base): layer for layer in layers.values()})
    parents = dict.fromkeys(path.rpartition(".")[0] for path in layers)
    for parent in parents:
        for names in SIBLINGS:
            members = [layers[p] for n in names if (p := f"{parent}.{n}".lstrip(".")) in layers]
            if len(members) > 1 and len({m.slab.target.d_in for m in members}) == 1:
                together = Siblings(members)
                for member in members:
                    member.siblings = together
    return list(layers.values())


def replace(model: nn.Module, others: Mapping[int, nn.Module]) -> None:
    """Put other modules in the places of some, by their ids, wherever they are."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in others and others[id(child)] is not parent:
                parent._modules[name] = others[id(child)]
