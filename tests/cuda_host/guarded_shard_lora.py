"""Runs the kernel of shard_lora_decode on memory that faults when read or written outside.

``python -m cuda_host.guarded_shard_lora SEED COUNT``: random sizes, ids and tables of any values,
with every tensor, given or made, at a page that may not be touched. Prints the number of cases that
agreed with the definition in float64; dies of a fault where the kernel strays.
"""

from __future__ import annotations

import random
import sys

import torch
from torch import Tensor

from cuda_host import _build, sharding
from cuda_host.guarded import fenced
from weightshare_kernels.ops.shard_lora import reference

WILD = (-1, -(2**31), 2**31 - 1)


def _table(rng: random.Random, shards: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers of shards, an eighth of them of none."""
    size = torch.Size(shape).numel()
    values = [
        rng.choice((*WILD, shards)) if not shards or rng.random() < 0.125 else rng.randrange(shards)
        for _ in range(size)
    ]
    return torch.tensor(values, dtype=torch.int32).view(shape)


def random_case(rng: random.Random) -> list:
    """Arguments of the op."""
    dtype = rng.choice(sharding.DTYPES)
    wide = dtype.itemsize == 2 and rng.random() < 0.3
    pool_dtype = torch.float32 if wide else dtype
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))

    def randn(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(kind)

    rows, adapters = rng.choice((0, 1, 2, 5, 40, 300)), rng.choice((1, 1, 2, 3, 40))
    even = rng.random() < 0.6
    sizes = (8, 16, 40, 128) if even else (1, 3, 8, 21, 40)
    d_in, lists = rng.choice((1, 2, 4)) * rng.choice(sizes), [[], [], [], [], []]
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        rank, lb = rng.choice((0, 1, 3, 4, 9, 17, 40)), rng.choice((1, 3))
        la = rng.choice([parts for parts in (1, 2, 4) if d_in % parts == 0])
        ca, cb, shards = d_in // la, rng.choice(sizes), [rng.choice((0, 1, 7, 50)) for _ in "ab"]
        pools = [randn(n, c, kind=pool_dtype) for n, c in zip(shards, (ca, cb), strict=True)]
        tables = [
            _table(rng, n, (adapters, rank, parts))
            for n, parts in zip(shards, (la, lb), strict=True)
        ]
        for to, tensor in zip(lists, (randn(rows, lb * cb), *pools, *tables), strict=True):
            to.append(tensor)
    ids = scales = None
    if adapters > 1 or rng.random() < 0.5:
        few = rng.choice((adapters, 2))
        some = [rng.choice((*WILD, 1 << 62, adapters)) for _ in range(rows)]
        picked = [i if rng.random() < 0.2 else rng.randrange(min(few, adapters)) for i in some]
        ids = torch.tensor(picked, dtype=torch.int64)
    if rng.random() < 0.5:
        scales = randn(adapters, kind=torch.promote_types(dtype, torch.float32))
    return [randn(rows, d_in), *lists, ids, scales, 0.5]


def _map(function, value):
    if isinstance(value, list):
        return [_map(function, v) for v in value]
    return function(value) if isinstance(value, Tensor) else value


def check(case: list, processors: int, place) -> None:
    """Compare the kernel on fenced copies with the definition in float64."""
    got = sharding.decode(*_map(place, case), processors=processors)
    exact = _map(lambda t: t.double() if t.is_floating_point() else t, case)
    wanted = reference.decode(*exact)
    largest = reference.decode(*_map(lambda t: t.abs() if t.is_floating_point() else t, exact))
    kind = torch.float64 if case[0].dtype == torch.float64 else torch.float32
    for y, want, most in zip(got, wanted, largest, strict=True):
        rounding = torch.finfo(y.dtype).eps * want.abs() + 40 * torch.finfo(kind).eps * most
        assert ((y.double() - want).abs() <= rounding).all()


def main() -> None:
    seed, count = map(int, sys.argv[1:])
    rng = random.Random(seed)
    made = sharding._poisoned
    for number in range(count):
        at_end = rng.random() < 0.7

        def place(tensor: Tensor, at_end: bool = at_end) -> Tensor:
            return fenced(tensor, at_end)

        sharding._poisoned = lambda *shape, place=place, **kind: place(made(*shape, **kind))
        _build.load("shard_lora").run_descending(number % 2)
        check(random_case(rng), rng.choice((1, 3)), place)
    print(count)


if __name__ == "__main__":
    main()
