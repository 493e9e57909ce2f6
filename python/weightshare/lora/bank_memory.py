"""Memory of a bank: a slab of shards per projection type and side, and tables that name them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from weightshare.lora.bank_source import Adapter, Target, Weights


class CapacityError(RuntimeError):
    """The bank has no room for an adapter."""


@dataclass(frozen=True)
class Sizes:
    """What the tables of a bank are made for: ``[adapters, layers, rank, shards]``."""

    adapters: int
    rank: int
    shards: int

    def __post_init__(self) -> None:
        names = {"max_adapters": self.adapters, "max_rank": self.rank, "shards": self.shards}
        for name, size in names.items():
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name}: expected an integer, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")

    def rows(self, wanted: int | Mapping[str, int] | None, targets: Iterable[Target]):
        """Rows of each projection type's slab: those wanted, or as plain LoRAs need."""
        rows: dict[str, int] = {}
        for target in targets:
            count = wanted.get(target.name) if isinstance(wanted, Mapping) else wanted
            if wanted is None:
                count = self.adapters * len(target.paths) * self.rank * self.shards
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(
                    f"pool_shards: expected a number of rows for {target.name}, got {count!r}"
                )
            rows[target.name] = count
        return rows


@dataclass
class Resident:
    """An adapter in the bank: its slot in the tables and its rows, (A, B) by projection type."""

    slot: int
    rows: dict[str, tuple[Tensor, Tensor]]
    names: int = 0
    uses: int = 0  # by batches that run


class Side:
    """The shards of A or of B. Any free rows serve, so that memory never fragments.

    ``table[adapter, layer]`` names the rows that make up a matrix: private ones and shared ones
    look alike. ``views`` are the tables of each layer.
    """

    def __init__(self, layers: int, width: int, rows: int, sizes: Sizes, options: dict):
        self.pool = torch.zeros(rows, width // sizes.shards, **options)
        self.free = torch.ones(rows, dtype=torch.bool)
        shape = (sizes.adapters, layers, sizes.rank, sizes.shards)
        self.table = torch.full(shape, -1, dtype=torch.int32, device=self.pool.device)
        self.views = self.table.unbind(1)

    def take(self, count: int) -> Tensor:
        """The first free rows, which are the caller's from now on."""
        rows = self.free.nonzero()[:count, 0]
        self.free[rows] = False
        return rows

    def write(self, slot: int, rows: Tensor, shards: Tensor, index: Tensor) -> None:
        """Put an adapter's shards into its rows and name them in its tables."""
        first, count = int(rows[0]) if len(rows) else 0, len(rows)
        if count and int(rows[-1]) - first == count - 1:
            self.pool[first : first + count].copy_(shards)
        elif count:
            self.pool[rows.to(self.pool.device)] = shards.to(self.pool)
        index, names = index.cpu(), rows.to(torch.int32)
        absolute = torch.full(self.table.shape[1:], -1, dtype=torch.int32)
        if count:
            named = torch.where(index < 0, -1, names[index.clamp(min=0).long()])
            absolute[:, : index.shape[1]] = named
        self.table[slot].copy_(absolute)

    def grown(self, rows: int, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
        """Pool, free rows and table of larger sizes, with all that is in these."""
        pool = self.pool.new_zeros(rows, self.pool.shape[1])
        pool[: len(self.pool)].copy_(self.pool)
        free = torch.ones(rows, dtype=torch.bool)
        free[: len(self.free)] = self.free
        old = self.table
        table = old.new_full((sizes.adapters, old.shape[1], sizes.rank, old.shape[3]), -1)
        table[: old.shape[0], :, : old.shape[2]].copy_(old)
        return pool, free, table

    def become(self, pool: Tensor, free: Tensor, table: Tensor) -> None:
        """Take over what :meth:`grown` made."""
        self.pool, self.free, self.table, self.views = pool, free, table, table.unbind(1)


class Slab:
    """Both sides of one projection type."""

    def __init__(self, target: Target, rows: int, sizes: Sizes, options: dict):
        for side, width in (("in", target.d_in), ("out", target.d_out)):
            if width % sizes.shards:
                raise ValueError(
                    f"shards must divide {side}_features of {target.name}: {width} / "
                    f"{sizes.shards} is not whole"
                )
        self.target, self.rows = target, rows
        widths = target.d_in, target.d_out
        self.a, self.b = [Side(len(target.paths), w, rows, sizes, options) for w in widths]
        self.sides = self.a, self.b

    def lacks(self, weights: Weights) -> str | None:
        """What there is no room for, in words; None if there is."""
        for name, side, shards in (("A", self.a, weights.a), ("B", self.b, weights.b)):
            free = int(side.free.sum())
            if len(shards) > free:
                return (
                    f"{self.target.name} needs {len(shards)} shards of {name}, and {free} of "
                    f"{self.rows} are free"
                )
        return None


class Memory:
    """Slabs, tables and scales. It has no lock: :meth:`write` apart, its caller holds one."""

    def __init__(self, targets: Mapping[str, Target], rows, sizes: Sizes, options: dict):
        self.sizes = sizes
        self.slots = list(range(sizes.adapters))  # free ones, a heap
        self.device: torch.device = options["device"]
        kind = torch.float64 if options["dtype"] == torch.float64 else torch.float32
        with torch.inference_mode(False), torch.no_grad():
            self.slabs = {n: Slab(t, rows[n], sizes, options) for n, t in targets.items()}
            self.scales = torch.zeros(sizes.adapters, dtype=kind, device=self.device)

    def reserve(self, name: str, wanted: Mapping[str, Weights], leaving: int) -> Resident:
        """Take a slot and rows for an adapter, all or none."""
        lack, cure = None, "pool_shards"
        if not self.slots:
            lack, cure = f"all {self.sizes.adapters} slots are taken", "max_adapters"
        for kind, weights in wanted.items():
            lack = lack or self.slabs[kind].lacks(weights)
        if lack is not None:
            waiting = f" ({leaving} swapped out wait for the batch that runs)" if leaving else ""
            raise CapacityError(
                f"adapter {name!r}: {lack}{waiting}; remove() an adapter, or grow({cure}=...). A "
                "swap holds the old one until the new one is there"
            )
        rows = {}
        for kind, weights in wanted.items():
            a, b = self.slabs[kind].sides
            rows[kind] = a.take(len(weights.a)), b.take(len(weights.b))
        return Resident(heapq.heappop(self.slots), rows)

    def free(self, resident: Resident) -> None:
        """Give back what :meth:`reserve` took."""
        for kind, rows in resident.rows.items():
            for side, part in zip(self.slabs[kind].sides, rows, strict=True):
                side.free[part] = True
        heapq.heappush(self.slots, resident.slot)

    def write(self, resident: Resident, adapter: Adapter) -> None:
        """Copy an adapter to where it was given room, and nobody reads before it has a name."""
        with self._alone():
            for kind, slab in self.slabs.items():
                weights = adapter.weights.get(kind)
                if weights is None:
                    for side in slab.sides:
                        side.table[resident.slot] = -1
                    continue
                a, b = resident.rows[kind]
                slab.a.write(resident.slot, a, weights.a, weights.a_index)
                slab.b.write(resident.slot, b, weights.b, weights.b_index)
            self.scales[resident.slot] = adapter.scale

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """For writing: on a GPU, kernels of batches that have ended may still read what was freed,
        and a batch on another stream may read what is written as soon as it has a name.
        """
        with torch.inference_mode(False), torch.no_grad():
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def grow(self, rows: Mapping[str, int], sizes: Sizes) -> None:
        """Move everything into larger tensors; after an error (no memory) all is as it was."""
        old = self.sizes
        smaller = sizes.adapters < old.adapters or sizes.rank < old.rank
        if smaller or any(rows[n] < slab.rows for n, slab in self.slabs.items()):
            raise ValueError("grow: a bank cannot shrink; make a smaller one")
        with self._alone():
            made = {
                name: [side.grown(rows[name], sizes) for side in slab.sides]
                for name, slab in self.slabs.items()
            }
            scales = self.scales.new_zeros(sizes.adapters)
            scales[: old.adapters].copy_(self.scales)
        for name, slab in self.slabs.items():
            slab.rows = rows[name]
            for side, tensors in zip(slab.sides, made[name], strict=True):
                side.become(*tensors)
        for slot in range(old.adapters, sizes.adapters):
            heapq.heappush(self.slots, slot)
        self.scales, self.sizes = scales, sizes

    def bytes(self) -> tuple[int, int]:
        """Of the slabs, and of tables and scales."""
        sides = [side for slab in self.slabs.values() for side in slab.sides]
        tables = self.scales.nbytes + sum(side.table.nbytes for side in sides)
        return sum(side.pool.nbytes for side in sides), tables

    def bytes_of(self, resident: Resident) -> int:
        """Of an adapter's rows, and its part of the tables."""
        total = self.bytes()[1] // self.sizes.adapters
        for kind, rows in resident.rows.items():
            for side, part in zip(self.slabs[kind].sides, rows, strict=True):
                total += len(part) * side.pool.shape[1] * side.pool.itemsize
        return total
