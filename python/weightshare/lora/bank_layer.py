"""Layers that a bank puts into a model, and the batch that they compute."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightshare_kernels import AdapterGroups, group_by_adapter
from weightshare_kernels.ops.shard_lora import infer, shard_lora_group

if TYPE_CHECKING:
    from weightshare.lora.bank import AdapterBank
    from weightshare.lora.bank_memory import Slab

# Layers of one parent that read the same input: one call serves them all.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)


class Batch:
    """Which adapter each sequence of a batch uses; rows are grouped once for each shape of input.

    Args:
        slots: of each sequence, -1 for none.
        kinds: projection types that any of these adapters changes.
        adapters: slots that the tables have.
        expand: rows of the model's batch for each sequence, side by side.
        lengths: tokens of each sequence, where sequences are packed one after another.
        device: of the model.
    """

    def __init__(
        self,
        slots: Sequence[int],
        kinds: frozenset[str],
        adapters: int,
        expand: int,
        lengths: Sequence[int] | None,
        device: torch.device,
    ):
        self.kinds, self.adapters = kinds, adapters
        self.sequences, self.expand = len(slots), expand
        ids = torch.tensor(slots, dtype=torch.int64)
        self.packed = lengths is not None
        if lengths is not None:
            ids = ids.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        elif expand != 1:
            ids = ids.repeat_interleave(expand)
        self.ids = ids.to(device)
        self._groups: dict[torch.Size, AdapterGroups] = {}

    def groups(self, shape: torch.Size) -> AdapterGroups:
        """Groups of the rows of an input ``[*shape, d]``; made once for all layers."""
        if torch.compiler.is_compiling():  # in the graph, where what is not used costs nothing
            return self._make(shape)
        found = self._groups.get(shape)
        if found is None:
            if len(self._groups) >= 8:  # prompts of ever new lengths
                self._groups.clear()
            with torch.inference_mode(False):  # kept for passes that may have gradients
                found = self._groups[shape] = self._make(shape)
        return found

    def _make(self, shape: torch.Size) -> AdapterGroups:
        count = self.ids.shape[0]
        if self.packed:
            if shape.numel() != count:
                raise ValueError(
                    f"batch: lengths add up to {count} tokens, but a layer's input "
                    f"{tuple(shape)} has {shape.numel()}"
                )
            return group_by_adapter(self.ids, self.adapters)
        ids = self.ids
        if shape[0] != count:
            if shape[0] != self.sequences:
                raise ValueError(self._wrong(shape))
            ids = ids[:: self.expand]  # an encoder, which runs before generate() makes more rows
        return group_by_adapter(ids, self.adapters, shape[1:].numel())

    def _wrong(self, shape: torch.Size) -> str:
        """Why rows cannot be told apart, and what to say."""
        rows, text = shape[0], f"batch: has {self.sequences} sequences"
        if self.expand != 1:
            text += f" of {self.expand} rows each"
        text += f", but a layer's input {tuple(shape)} has {rows} rows"
        if rows % self.sequences == 0:
            times = rows // self.sequences
            text += (
                f"; where generate() makes {times} rows of each sequence (num_beams, "
                f"num_return_sequences), open the batch with expand={times}"
            )
        return f"{text}; where it packs sequences, give the tokens of each as lengths="


class BankLinear(nn.Module):
    """A layer of the model together with the adapters of a bank.

    Attributes of the layer itself, such as ``weight``, are found here, too, and in state dicts it
    keeps its name.
    """

    def __init__(self, base: nn.Module, bank: AdapterBank, slab: Slab, layer: int):
        super().__init__()
        self.base, self.layer, self.training = base, layer, base.training
        self.bank, self.slab, self.kind = bank, slab, slab.target.name
        self.siblings: Siblings | None = None
        self.register_load_state_dict_pre_hook(_below)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own."""
        return self.base.state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, plus what the adapter of each row adds."""
        batch = self.bank.running
        if batch is None or self.kind not in batch.kinds:
            return self.base(x)
        if self.siblings is None:
            return adapted((self,), x, batch)[0]
        return self.siblings(self, x, batch)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)

    def extra_repr(self) -> str:
        """Which layer of its type this is."""
        return f"{self.kind}, layer={self.layer}"


def _below(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Names in a state dict that is loaded, from those of the layer to those below this module."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}base.{name.removeprefix(prefix)}"] = state.pop(name)


class Siblings:
    """Layers that read the same input: whichever is called first computes all.

    The others find their outputs when they are called with the very same tensor, unchanged. Where
    one turns out to be called with another (keys and values of cross-attention), each computes for
    itself from then on. Changes in place of tensors made in inference mode are not seen, which
    keep no count of them.
    """

    def __init__(self, members: Sequence[BankLinear]):
        self.members = tuple(members)
        self.shared = True
        self._x: Tensor | None = None
        self._state: tuple = ()
        self._outputs: dict[int, Tensor] = {}

    def __call__(self, member: BankLinear, x: Tensor, batch: Batch) -> Tensor:
        """Output of one of them."""
        if not self.shared:
            return adapted((member,), x, batch)[0]
        key, state = id(member), _state(x)
        if self._x is x and self._state == state and key in self._outputs:
            y = self._outputs.pop(key)
            if not self._outputs:
                self._x = None
            return y
        if self._outputs:
            self.shared = False
            self.forget()
            return adapted((member,), x, batch)[0]
        active = [m for m in self.members if m.kind in batch.kinds]
        outputs = dict(zip(map(id, active), adapted(active, x, batch), strict=True))
        y = outputs.pop(key)
        if outputs:
            self._x, self._state, self._outputs = x, state, outputs
        return y

    def forget(self) -> None:
        """Drop outputs that were not asked for."""
        self._x, self._outputs = None, {}


def _state(x: Tensor) -> tuple:
    """What outputs for x depend on that may change between two layers that are called with it."""
    if torch.compiler.is_compiling():
        return ()
    return torch.is_grad_enabled(), 0 if x.is_inference() else x._version


def adapted(layers: Sequence[BankLinear], x: Tensor, batch: Batch) -> list[Tensor]:
    """Outputs of layers that read x, each with its adapters."""
    bases = [layer.base(x) for layer in layers]
    if bases[0].dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(bases[0].dtype)
    parts = [(layer.slab.a, layer.slab.b, layer.layer) for layer in layers]
    pools = [a.pool for a, _, _ in parts], [b.pool for _, b, _ in parts]
    tables = [a.views[n] for a, _, n in parts], [b.views[n] for _, b, n in parts]
    groups, scales = batch.groups(x.shape[:-1]), layers[0].bank.memory.scales
    if torch.is_grad_enabled() or not _checked(x, bases, pools[0][0]):
        return shard_lora_group(x, bases, *pools, *tables, scales, adapters=groups)
    rows = [t if t.dim() == 2 else t.flatten(0, -2) for t in (x, *bases)]
    flat = (*rows[1:], *chain(*pools), *chain(*tables))
    ys = infer(rows[0], flat, groups, scales, 1.0, len(layers))
    return [y.view(base.shape) for y, base in zip(ys, bases, strict=True)]


def _checked(x: Tensor, bases: Sequence[Tensor], pool: Tensor) -> bool:
    """Whether what :func:`shard_lora_group` would check is known: it takes 20 us for each layer.

    Widths, devices and tables are those that the bank made, and the layers took x as it is.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
        and pool.dtype in (x.dtype, torch.float32)
        and x.dtype != torch.float64
        and x.device == pool.device
        and all(base.dtype == x.dtype for base in bases)
        and torch.autograd.forward_ad._current_level < 0
    )
