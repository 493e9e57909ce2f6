"""Many adapters of one model in one memory: a batch may use another one in every row."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import NoReturn

import torch
from torch import nn

from weightshare.lora import bank_source
from weightshare.lora.bank_layer import Batch
from weightshare.lora.bank_memory import CapacityError, Memory, Resident, Sizes
from weightshare.lora.bank_model import attach, find, place, replace, targets_of
from weightshare.lora.bank_source import Source

__all__ = ["AdapterBank", "CapacityError", "ResidentBytes"]


@dataclass(frozen=True)
class ResidentBytes:
    """Memory of a bank, from :meth:`AdapterBank.resident_bytes`.

    Attributes:
        slabs: of the shards of all adapters, free rows included.
        tables: of index tables and scales, free slots included.
        adapters: name -> what this adapter takes of both; names of one adapter share it.
        used: what all adapters take, those included whose last batch has not ended.
    """

    slabs: int
    tables: int
    adapters: dict[str, int]
    used: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.slabs + self.tables


class AdapterBank:
    """Serves many adapters of one model: Mixtures of Shards and plain LoRAs, of any ranks.

    All adapters' shards lie in one slab per projection type and side; an int32 table
    ``[adapters, layers, r, l]`` names those of each matrix. One kernel call per group of layers
    serves all rows of a batch, whatever adapters they use. The layers are put into the model in
    place, around its own, which may be of any class, quantised ones included::

        bank = AdapterBank(model, ["q_proj", "v_proj"], max_adapters=64, max_rank=32, shards=8)
        bank.add("alice", "adapters/alice")
        with bank.batch(["alice", None, "bob"]):  # one per sequence
            model.generate(**inputs)

    Adapters may be added, swapped and removed by another thread while a batch runs; one batch
    runs at a time. Move the model where it is to serve before the bank is made.

    Args:
        model: with all targets on one device.
        target_modules: last names of the layers' paths (``"q_proj"``, ``"self_attn.q_proj"``), or
            a regular expression for whole paths. Layers of one last name are one projection type
            and must have the same widths.
        max_adapters: slots of the tables.
        max_rank: r of the tables. Adapters of lower rank leave rows of -1.
        shards: l, pieces of each vector: that of the adapters, or a multiple.
        pool_shards: rows of each slab, or a number by projection type. A Mixture of Shards takes
            ``equivalent_rank * layers * l`` of them, a plain LoRA ``r * layers * l``; None has
            room for ``max_adapters`` plain LoRAs of ``max_rank``.
        dtype: of the slabs, the model's by default; float32 serves layers of lower precision, too.

    Raises:
        TypeError: a layer is none, or sizes are no integers.
        ValueError: no layer matches, layers of a type differ, or sizes do not fit.

    Source: MoS (Wang et al., ICLR 2025, arXiv 2410.00938); batches of several adapters as in
    Punica (Chen et al., 2023, arXiv 2310.18547) and S-LoRA (Sheng et al., 2023, arXiv 2311.03285).
    """

    def __init__(
        self,
        model: nn.Module,
        target_modules: str | Sequence[str],
        *,
        max_adapters: int,
        max_rank: int,
        shards: int = 1,
        pool_shards: int | Mapping[str, int] | None = None,
        dtype: torch.dtype | None = None,
    ):
        sizes = Sizes(max_adapters, max_rank, shards)
        found = find(model, target_modules)
        targets = targets_of(found)
        self.device, kind = place(model, found)
        options = {"dtype": dtype or kind, "device": self.device}
        rows = sizes.rows(pool_shards, targets.values())
        self.memory = Memory(targets, rows, sizes, options)
        self.running: Batch | None = None
        self._names: dict[str, Resident] = {}
        self._leaving: list[Resident] = []  # without a name, until the batch that runs ends
        self._changing = threading.RLock()  # one change at a time, however long it loads
        self._state = threading.Lock()  # names, slots, free rows and uses: held for moments
        self._last: tuple[tuple, Batch] | None = None
        self._model: nn.Module | None = model
        self._layers = attach(model, found, self)
        self._siblings = {id(s): s for layer in self._layers if (s := layer.siblings)}.values()

    # -- What it holds --------------------------------------------------------------------------

    def add(self, name: str, source: Source, scale: float | None = None) -> None:
        """Load an adapter. It is there whole or, after an error, not at all.

        Args:
            name: what batches call it.
            source: a folder that PEFT saved, of a Mixture of Shards or of a LoRA; ``(config,
                tensors)`` of one; or the tensors of a Mixture of Shards alone, with a scale.
            scale: of the update, instead of the adapter's own alpha / r.

        Raises:
            ValueError: the name is taken, or the adapter is not of this model or bank.
            CapacityError: there is no room; says how much is wanted.
        """
        with self._changing:
            _check_name(name)
            if name in self._names:
                raise ValueError(f"adapter {name!r}: is in the bank already; swap() replaces it")
            self._point(name, self._load(name, source, scale))

    def remove(self, name: str) -> None:
        """Forget a name, and free the memory of its adapter unless that has another.

        Raises:
            LookupError: there is no such adapter.
            RuntimeError: the batch that runs uses it.
        """
        with self._changing, self._state:
            resident = self._known(name)
            if resident.uses and resident.names == 1:
                raise RuntimeError(
                    f"adapter {name!r}: the batch that runs uses it; end the batch before you "
                    "remove it, or swap() in another, which serves from the next batch on"
                )
            del self._names[name]
            self._drop(resident)

    def swap(self, name: str, source: Source, scale: float | None = None) -> None:
        """Load another adapter beside the one of this name, then let the name stand for it.

        Batches never see a half-written adapter: the one that runs computes with the old one to
        its end, which then frees it; the next has the new one. Until then both are resident.

        Args:
            name: of an adapter in the bank.
            source: as in :meth:`add`.
            scale: as in :meth:`add`.

        Raises:
            LookupError: there is no such adapter.
            ValueError: as in :meth:`add`; the old adapter stays.
            CapacityError: there is no room for both.
        """
        with self._changing:
            self._known(name)
            self._point(name, self._load(name, source, scale))

    def alias(self, name: str, of: str) -> None:
        """Let a name stand for a resident adapter, from the next batch on; nothing is copied.

        This swaps adapters that are resident: ``bank.alias("live", "candidate")``. If the name
        stood for another adapter and was its last, that one is freed as :meth:`swap` does.

        Args:
            name: a new name, or one that moves.
            of: any name of an adapter in the bank.

        Raises:
            LookupError: there is no such adapter.
        """
        with self._changing:
            _check_name(name)
            self._point(name, self._known(of))

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name.

        Raises:
            LookupError: there is no adapter of the old name.
            ValueError: the new name is taken.
        """
        with self._changing, self._state:
            _check_name(new)
            resident = self._known(old)
            if new in self._names:
                raise ValueError(f"adapter {new!r}: the name is taken; remove() it first")
            self._names[new] = resident
            del self._names[old]

    def grow(
        self,
        *,
        max_adapters: int | None = None,
        max_rank: int | None = None,
        pool_shards: int | Mapping[str, int] | None = None,
    ) -> None:
        """Move everything into larger tensors; what is not given stays as it is.

        Raises:
            ValueError: a size would shrink.
            RuntimeError: a batch runs.
        """
        with self._changing, self._state:
            old, slabs = self.memory.sizes, self.memory.slabs
            sizes = Sizes(
                old.adapters if max_adapters is None else max_adapters,
                old.rank if max_rank is None else max_rank,
                old.shards,
            )
            if self.running is not None:
                raise RuntimeError("grow: a batch runs, whose tables would move; end it first")
            rows = {name: slab.rows for name, slab in slabs.items()}
            if pool_shards is not None:
                wanted = pool_shards if isinstance(pool_shards, int) else rows | dict(pool_shards)
                rows = sizes.rows(wanted, [slab.target for slab in slabs.values()])
            self.memory.grow(rows, sizes)
            self._last = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of all adapters, in the order they came."""
        return tuple(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def resident_bytes(self) -> ResidentBytes:
        """Bytes that the bank holds on its device, and what each adapter takes of them."""
        with self._state:
            residents = {id(r): r for r in (*self._names.values(), *self._leaving)}
            each = {key: self.memory.bytes_of(r) for key, r in residents.items()}
            adapters = {name: each[id(r)] for name, r in self._names.items()}
            return ResidentBytes(*self.memory.bytes(), adapters, sum(each.values()))

    # -- Serving --------------------------------------------------------------------------------

    @contextmanager
    def batch(
        self,
        names: Sequence[str | None],
        *,
        expand: int = 1,
        lengths: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """Inside, the model computes each sequence with the adapter named for it.

        Names are looked up once, at the start. Where sequences come and go between steps, open
        a batch for each step: one of the same adapters as the last costs next to nothing.

        Args:
            names: of each sequence, in order; None for the model alone.
            expand: rows that ``generate`` makes of each sequence (beams, return sequences).
            lengths: tokens of each sequence, where they are packed one after another into one
                row, or a server flattens prompts and decoded tokens into one step.

        Raises:
            LookupError: a name is not in the bank.
            RuntimeError: another batch runs.
            ValueError: lengths are not one per name; and, by a layer, if its input has other rows
                than these.
        """
        with self._state:
            residents, made = self._open(names, expand, lengths)
            for resident in residents:
                resident.uses += 1
            self.running = made
        try:
            yield
        finally:
            with self._state:
                self.running = None
                for siblings in self._siblings:
                    siblings.forget()
                for resident in residents:
                    resident.uses -= 1
                for resident in [r for r in self._leaving if not r.uses]:
                    self._leaving.remove(resident)
                    self.memory.free(resident)

    def detach(self) -> None:
        """Give the model its own layers back; the bank serves no more.

        Raises:
            RuntimeError: a batch runs.
        """
        with self._changing, self._state:
            if self.running is not None:
                raise RuntimeError("detach: a batch runs; end it first")
            if self._model is not None:
                replace(self._model, {id(layer): layer.base for layer in self._layers})
            self._model = None

    def __reduce_ex__(self, protocol) -> NoReturn:
        raise TypeError("a bank cannot be copied or saved; detach() it from the model first")

    # -- Inside ---------------------------------------------------------------------------------

    def _open(self, names, expand, lengths) -> tuple[list[Resident], Batch]:
        """The adapters of a batch, each once, and the batch: the last one's, if it is the same."""
        if self._model is None:
            raise RuntimeError("batch: the bank was detached from its model; make another")
        if self.running is not None:
            raise RuntimeError(
                "batch: another batch runs; serve both in one batch, or one after the other"
            )
        if isinstance(names, str) or not names:
            raise ValueError(f"batch: expected a name or None per sequence, got {names!r}")
        if not isinstance(expand, int) or expand < 1 or (expand != 1 and lengths is not None):
            raise ValueError(f"batch: expand is {expand!r}; expected 1 or more, 1 with lengths")
        if lengths is not None and (len(lengths) != len(names) or min(lengths) < 0):
            raise ValueError(f"batch: {len(names)} sequences, but lengths are {lengths}")
        residents = [None if name is None else self._known(name) for name in names]
        slots = tuple(-1 if resident is None else resident.slot for resident in residents)
        used = {r.slot: r for r in residents if r is not None}
        kinds = frozenset(chain.from_iterable(r.rows for r in used.values()))
        key = slots, kinds, expand, None if lengths is None else tuple(lengths)
        if self._last is None or self._last[0] != key:
            adapters = self.memory.sizes.adapters
            made = Batch(slots, kinds, adapters, expand, lengths, self.device)
            self._last = key, made
        return list(used.values()), self._last[1]

    def _load(self, name: str, source: Source, scale: float | None) -> Resident:
        """An adapter in rows and a slot of its own, which no name stands for yet."""
        memory = self.memory
        targets = {kind: slab.target for kind, slab in memory.slabs.items()}
        adapter = bank_source.read(name, source, scale, targets, memory.sizes.shards)
        for kind, weights in adapter.weights.items():
            if weights.a_index.shape[1] > memory.sizes.rank:
                raise ValueError(
                    f"adapter {name!r}: {kind} has rank {weights.a_index.shape[1]}, above the "
                    f"bank's max_rank {memory.sizes.rank}; grow(max_rank=...) first"
                )
        with self._state:
            resident = memory.reserve(name, adapter.weights, len(self._leaving))
        try:
            memory.write(resident, adapter)
        except BaseException:
            with self._state:
                memory.free(resident)
            raise
        return resident

    def _point(self, name: str, resident: Resident) -> None:
        """Let a name stand for an adapter."""
        with self._state:
            old = self._names.get(name)
            if old is not resident:
                self._names[name] = resident
                resident.names += 1
                if old is not None:
                    self._drop(old)

    def _drop(self, resident: Resident) -> None:
        """An adapter has lost a name; without any it is freed, once no batch uses it."""
        resident.names -= 1
        if resident.names == 0 and resident.uses:
            self._leaving.append(resident)
        elif resident.names == 0:
            self.memory.free(resident)

    def _known(self, name: str) -> Resident:
        if name not in self._names:
            raise LookupError(
                f"adapter {name!r}: is not in the bank, which holds "
                f"{', '.join(map(repr, self._names)) or 'none'}; add() it first"
            )
        return self._names[name]


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")
