"""The layers of a model that a load balancer looks after, ours and those of transformers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from weightshare.moe._counting import count_

# What transformers calls the bias. It is added to the scores and never updated there.
_BIASES = ("e_score_correction_bias", "expert_bias")
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class Layer:
    """One layer with experts: where its counts and its bias are.

    Attributes:
        name: of the module that holds the bias, within the model.
        holder: that module.
        attribute: name of the bias in it; the bias may be None, then it is only counted.
        kept: values of the bias after the last update ``[experts]``.
    """

    def __init__(self, name: str, holder: nn.Module, attribute: str):
        self.name, self.holder, self.attribute = name, holder, attribute
        self.kept: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """Tokens of each expert since the last step, ``[experts]`` int64."""
        return self.holder.expert_counts  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias, ``[experts]``, a view of the holder's; None if it has none.

        Raises:
            TypeError: if it was sharded.
        """
        bias = getattr(self.holder, self.attribute)
        if bias is None:
            return None
        if hasattr(bias, "full_tensor"):
            raise TypeError(
                f"{self.name}.{self.attribute}: is a sharded parameter; keep it whole, e.g. "
                "fully_shard(..., ignored_params={it})"
            )
        return bias.detach().view(-1)

    def keep_precision(self) -> bool:
        """Put a bias that ``.bfloat16()`` or ``.half()`` lowered back to float32, in place.

        Returns:
            Whether it was.
        """
        bias = getattr(self.holder, self.attribute)
        if bias is None or bias.dtype in (torch.float32, torch.float64):
            return False
        value = bias.detach().float()
        if self.kept is not None:
            # Unless something else was loaded since, the digits that were lost are known.
            kept = self.kept.to(bias.device).view(bias.shape)
            if torch.equal(kept.to(bias.dtype), bias):
                value = kept.float().clone()
        bias.data = value
        return True

    def remove(self) -> None:
        """Take hooks off."""


class HookedLayer(Layer):
    """A layer of transformers, counted by a hook where the choice of experts passes.

    That is an argument of the block's ``experts``, or an output of the gate where ``experts`` is
    a list of modules.
    """

    def __init__(self, name: str, holder: nn.Module, attribute: str, block: nn.Module, note: Note):
        super().__init__(name, holder, attribute)
        self.note = note
        bias = getattr(holder, attribute)
        # Not a buffer of the module: DistributedDataParallel would overwrite it with rank 0's.
        self.total = torch.zeros(bias.numel(), dtype=torch.int64, device=bias.device)
        experts: Any = block.experts
        if isinstance(experts, nn.ModuleList):
            gate = getattr(block, "gate", None) or getattr(block, "router", None) or holder
            self.handle = gate.register_forward_hook(self.after)
        else:
            self.handle = experts.register_forward_pre_hook(self.before, with_kwargs=True)

    @property
    def counts(self) -> Tensor:
        """Tokens of each expert since the last step, ``[experts]`` int64."""
        return self.total

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Pre-hook of ``experts``."""
        if module.training:
            self.count((*args, *kwargs.values()))

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Hook of a gate."""
        if module.training:
            self.count(output if isinstance(output, tuple) else (output,))

    @torch.no_grad()
    def count(self, values: tuple) -> None:
        """Count the experts chosen, which are the one integer tensor ``[tokens, k]`` there."""
        for value in values:
            if isinstance(value, Tensor) and value.dim() > 1 and not value.is_floating_point():
                chosen = value.detach().flatten(0, -2)
                break
        else:
            raise TypeError(
                f"{self.name}: found no integer tensor [tokens, k] of chosen experts among "
                f"{[type(value).__name__ for value in values]}; this block cannot be counted"
            )
        if self.total.device != chosen.device:  # the model was moved
            self.total = self.total.to(chosen.device)
        experts = self.total.shape[0]
        chosen = chosen.long()
        padding = self.note.padding
        if padding is not None and padding.numel() == chosen.shape[0]:
            chosen = chosen.masked_fill(padding.reshape(-1, 1), experts)
        counts = chosen.new_zeros(experts + 1)
        counts.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
        count_(self.total, counts[:experts])

    def remove(self) -> None:
        """Take the hook off."""
        self.handle.remove()


class Note:
    """Where the padding of the batch is: read off the ``attention_mask`` of the whole model.

    A mask that is not two-dimensional (a prepared one) says nothing about padding here.
    """

    def __init__(self, model: nn.Module, layers: list[Layer]):
        self.padding: Tensor | None = None
        self.layers = layers
        names = list(inspect.signature(model.forward).parameters)
        self.position = names.index("attention_mask") if "attention_mask" in names else None
        self.handles = (
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        )

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Pre-hook of the whole model."""
        mask = kwargs.get("attention_mask")
        if mask is None and self.position is not None and self.position < len(args):
            mask = args[self.position]
        self.padding = mask == 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
        keep_precision(self.layers)

    def after(self, *_: Any) -> None:
        """Hook of the whole model; also called when it raised."""
        self.padding = None

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def unwrap(model: nn.Module) -> nn.Module:
    """The model within ``torch.compile`` and DistributedDataParallel."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def keep_precision(layers: list[Layer]) -> None:
    """Put lowered biases back to float32, and say so."""
    lowered = [layer.name for layer in layers if layer.keep_precision()]
    if lowered:
        warnings.warn(
            f"balance: the bias of {lowered[0]} (and {len(lowered) - 1} more) was cast to less "
            "than float32, where it loses updates of 1e-3 once it reaches 0.5: put back to float32",
            stacklevel=3,
        )


def find(root: nn.Module) -> tuple[list[Layer], Callable[[], None]]:
    """The layers of a model, in the order of its modules, and what takes their hooks off.

    Raises:
        ValueError: if there is none, or one whose experts are not found.
    """
    layers: list[Layer] = []
    ours: set[int] = set()
    note = Note(root, layers)
    try:
        for name, module in root.named_modules():
            if isinstance(getattr(module, "expert_counts", None), Tensor):
                layers.append(Layer(plain(name), module, "balance_bias"))
                ours.add(id(getattr(module, "balance_bias", None)))
        for name, module in root.named_modules():
            for attribute in _BIASES:
                bias = module._buffers.get(attribute, module._parameters.get(attribute))
                if bias is not None and id(bias) not in ours:
                    block = _block(root, name)
                    layers.append(HookedLayer(plain(name), module, attribute, block, note))
        if not layers:
            raise ValueError(
                "model: found no layer to balance: neither a weightshare.moe.Router nor a module "
                f"with {' or '.join(_BIASES)}, as transformers' sigmoid gates have"
            )
    except Exception:
        _remove(note, layers)
        raise
    keep_precision(layers)
    return layers, lambda: _remove(note, layers)


def _remove(note: Note, layers: list[Layer]) -> None:
    note.remove()
    for layer in layers:
        layer.remove()


def _block(root: nn.Module, name: str) -> nn.Module:
    """The nearest module around a bias that holds ``experts``."""
    for path in _ancestors(name):
        module = root.get_submodule(path)
        if isinstance(getattr(module, "experts", None), nn.Module):
            return module
    raise ValueError(f"{name}: holds a bias for experts, but no module around it has `experts`")


def _ancestors(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def plain(name: str) -> str:
    """A module's name without the wrappers around it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
