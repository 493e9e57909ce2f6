"""Stand-alone copies of the active subnet of any model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from weightshare.nn.bound import active_value, cut, is_bound, unbind


class _Copies:
    """One export under way: nested calls share it, so that what is shared stays shared."""

    def __init__(self):
        self.memo: dict[int, Any] = {}  # id of an original -> its copy, as deepcopy keeps it
        self.ties: dict[int, list[tuple[nn.Module, str]]] = {}  # id of a parameter -> its copies
        self.fields: dict[tuple[int, str], tuple[Any, set[int]]] = {}  # what a config should say


_running: ContextVar[_Copies | None] = ContextVar("export", default=None)


def export(module: nn.Module) -> nn.Module:
    """Copy the active subnet of a model into plain modules that share nothing with it.

    Elastic layers become the PyTorch modules of their active size; everything else is copied as
    it is. Weights that were tied stay tied where their active parts are the same. Training mode,
    buffers, hooks and ``requires_grad`` are kept; whole weights are never copied on the way. A
    ``config`` as models of transformers have it gets the sizes of the subnet, but for fields in
    which its layers differ.

    Args:
        module: a model, part of one, or a single layer.

    Returns:
        The copy; no tensor and no object of it belongs to the supernet or its search space.

    Example::

        space.activate(arch)
        small = export(model)
        torch.save(small.state_dict(), path)
    """
    outer = _running.get()
    if outer is not None:
        return _copy(module, outer)
    copies = _Copies()
    token = _running.set(copies)
    try:
        result = _copy(module, copies)
    finally:
        _running.reset(token)
    _tie(copies)
    for config, name, value in _agreed(copies):
        setattr(config, name, value)
        kinds = getattr(config, "layer_types", None)
        if name == "num_hidden_layers" and isinstance(kinds, list):
            config.layer_types = kinds[:value]
    return result


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks of the one it replaces, beside its own."""
    for name, value in vars(old).items():
        if "hook" not in name or not value:
            continue
        if isinstance(value, dict):
            getattr(new, name).update(value)
        else:
            setattr(new, name, value)


def is_elastic(module: nn.Module) -> bool:
    """Whether a module exports itself: one of ``weightshare.nn``, ``.moe``, or a subclass."""
    return not is_bound(module) and any(
        "export" in vars(kind) and kind.__module__.startswith(("weightshare.nn", "weightshare.moe"))
        for kind in type(module).__mro__
    )


def _copy(module: nn.Module, copies: _Copies) -> nn.Module:
    if id(module) in copies.memo:
        return copies.memo[id(module)]
    if is_elastic(module):
        plain = module.export()  # type: ignore[operator]
        move_hooks(module, plain)
        for name, parameter in module._parameters.items():
            if parameter is not None and name in plain._parameters:
                copies.ties.setdefault(id(parameter), []).append((plain, name))
        copies.memo[id(module)] = plain
        return plain
    for part in _outside_elastic(module):
        if is_elastic(part):
            _copy(part, copies)
        elif is_bound(part):
            copies.memo.update(cut(part))
            bindings = vars(part)["_bindings"]
            copies.memo[id(bindings)] = bindings  # unbind drops it
    result = copy.deepcopy(module, copies.memo)
    for part in list(result.modules()):
        if is_bound(part):
            _note_config(part, copies)
            unbind(part)
    return result


def _outside_elastic(module: nn.Module) -> Iterator[nn.Module]:
    """A module and what it holds, down to elastic modules but not into them."""
    yield module
    if not is_elastic(module):
        for child in module.children():
            yield from _outside_elastic(child)


def _tie(copies: _Copies) -> None:
    for (first, name), *others in copies.ties.values():
        shared: Any = first._parameters[name]
        for owner, other in others:
            tensor: Any = owner._parameters[other]
            if tensor.shape == shared.shape and torch.equal(tensor, shared):
                owner._parameters[other] = shared


def _note_config(part: Any, copies: _Copies) -> None:
    for name, axis in part._bindings.config.items():
        _, values = copies.fields.setdefault((id(part.config), name), (part.config, set()))
        values.add(active_value(axis))


def _agreed(copies: _Copies) -> Iterator[tuple[Any, str, int]]:
    for (_, name), (config, values) in copies.fields.items():
        if len(values) == 1:
            yield config, name, *values
