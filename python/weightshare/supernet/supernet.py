"""A model, the space of its subnets, and which of them is active."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from weightshare import files
from weightshare.space import ArchConfig, SearchSpace
from weightshare.supernet.samplers import ArchSampler

FORMAT, VERSION = "weightshare-supernet", 1


class Supernet:
    """A model made of elastic modules, with the search space that says what of it is active.

    A handle, not a module: train and call ``model`` as ever. It may be wrapped (DDP,
    ``torch.compile``); checkpoints and subnets are those of the module inside.

    Args:
        model: whose sizes are dims of the space; or a wrapper around it.
        space: which of its subnets there are.

    Example::

        supernet = Supernet(model, space)
        arch = supernet.sample_active_subnet()
        y = supernet.model(x)  # runs that subnet
        small = supernet.get_active_subnet()  # plain PyTorch, weights of its own
    """

    def __init__(self, model: nn.Module, space: SearchSpace):
        self.model, self.space = model, space

    @property
    def module(self) -> nn.Module:
        """The model without wrappers around it."""
        module: Any = self.model
        while True:
            if isinstance(module, nn.parallel.DistributedDataParallel):
                module = module.module
            elif hasattr(module, "_orig_mod"):  # what torch.compile returns
                module = module._orig_mod
            else:
                return module

    def set_active_subnet(self, arch: Mapping[str, Any]) -> ArchConfig:
        """Make a subnet the active one; what is not named is the largest.

        Raises:
            ValueError: the architecture is not in the space; says which values are.
        """
        self.space.activate(arch)
        return self.space.active

    def sample_active_subnet(
        self, source: random.Random | ArchSampler | None = None, step: int = 0
    ) -> ArchConfig:
        """Draw a subnet and make it the active one.

        Args:
            source: a generator to draw uniformly with (Python's own one if there is none), or a
                sampler, whose first draw at ``step`` is taken.
            step: which step of the sampler.
        """
        if source is None or isinstance(source, random.Random):
            return self.set_active_subnet(self.space.sample(source))
        return self.set_active_subnet(source.sample(step)[0].arch)

    def get_active_subnet(self, arch: Mapping[str, Any] | None = None) -> nn.Module:
        """Copy a subnet into plain modules that share nothing with the supernet.

        Args:
            arch: which one; the active one if there is none. The active one stays active.

        Returns:
            A model with the same outputs. Its checkpoint holds nothing of the supernet.
        """
        from weightshare.export import export

        with self.space.restored():
            if arch is None:
                self.space.mix(None)
            else:
                self.space.activate(arch)
            return export(self.module)

    def save(self, path: str | os.PathLike) -> None:
        """Write the weights, the space and the active architecture; a crash leaves the old file.

        In a process group every rank calls it, as shards are gathered; rank 0 writes.
        """
        state = {
            name: value.full_tensor() if _is_shard(value) else value
            for name, value in self.module.state_dict().items()
        }
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return
        data = {"format": FORMAT, "version": VERSION, "space": self.space.to_dict()}
        files.save(path, {**data, "arch": dict(self.space.active), "model": state})

    def load(self, path: str | os.PathLike) -> None:
        """Take over the weights and the active architecture of a checkpoint.

        Raises:
            ValueError: the file is damaged, no checkpoint of a supernet, or of another space or
                model; names what differs and both values. Nothing has been changed then.
            OSError: it cannot be opened.
        """
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # torch.load raises many kinds, by how the file is broken
            why = type(error).__name__
            raise ValueError(f"{path} cannot be read, it is damaged ({why})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path} is no checkpoint of a supernet")
        if data["version"] != VERSION:
            raise ValueError(f"{path} has version {data['version']}, this release reads {VERSION}")
        self.space.check_same(data["space"])
        state = self.module.state_dict()
        _check_same_model(state, data["model"])
        if any(_is_shard(value) for value in state.values()):
            from torch.distributed.checkpoint import state_dict as shards

            options = shards.StateDictOptions(full_state_dict=True)
            shards.set_model_state_dict(self.module, data["model"], options=options)
        else:
            self.module.load_state_dict(data["model"])
        self.space.mix(None)
        for name, dim in self.space.dims.items():  # it may have been narrowed since
            dim.set(data["arch"][name])

    def __repr__(self) -> str:
        return f"Supernet({type(self.module).__name__}, {self.space})"


def _is_shard(value: Any) -> bool:
    return hasattr(value, "full_tensor")  # a DTensor, as FSDP2 leaves parameters


def _check_same_model(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for name in {**ours, **theirs}:
        if name not in ours or name not in theirs:
            lacking = "model" if name in theirs else "checkpoint"
            raise ValueError(f"checkpoint of another model: the {lacking} has no {name}")
        shapes = [tuple(getattr(s[name], "shape", ())) for s in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"checkpoint of another model: {name} is {shapes[0]} there and {shapes[1]} here"
            )
