"""Runs the entangle kernels on memory that faults when read or written outside.

``python -m cuda_host.guarded SEED COUNT``: random shapes, alignments, classes of any value; every
tensor ends (or starts) at a page that may not be touched. Prints the number of cases that agreed
with the reference; dies of a fault where a kernel strays. Run by test_cuda_host.py.
"""

from __future__ import annotations

import ctypes
import math
import random
import sys

import torch

import cuda_host
from cuda_host import _build
from weightshare_kernels.ops.entangle import reference


def fenced(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy that ends, or starts, at a page no one may touch."""
    tensor = tensor.contiguous()
    place = _build.load("shim").fenced_copy
    place.restype = ctypes.c_void_p
    size = tensor.numel() * tensor.element_size()
    address = place(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(size), int(at_end))
    if not tensor.numel():
        return tensor
    memory = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def random_case(rng: random.Random) -> list[torch.Tensor]:
    """grad, weight, grid, rows, cols, inner; a third of the classes lie outside the grid."""
    dtype = rng.choice(cuda_host.DTYPES)
    shape = [
        rng.choice((1, 2, 3, 7, 16, 33)),
        rng.choice((1, 2, 5, 24, 130)),
        rng.choice((1, 1, 9, 49)),
    ]
    blocks = [rng.randint(1, 4) for _ in shape]
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grad, weight = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    grid = torch.randn(blocks, generator=generator).to(wide)
    wild = (-1, -(2**31), 2**31 - 1)
    classes = [
        torch.tensor(
            [
                rng.choice((*wild, n)) if rng.random() < 0.3 else rng.randrange(n)
                for _ in range(size)
            ],
            dtype=torch.int32,
        )
        for size, n in zip(shape, blocks, strict=True)
    ]
    return [grad, weight, grid, *classes]


def check(case: list[torch.Tensor], processors: int, at_end: bool) -> None:
    """Compare the kernels on fenced copies with the reference in float64."""
    limit = case[2].shape
    inside = [torch.where((c >= 0) & (c < n), c, n) for c, n in zip(case[3:], limit, strict=True)]
    exact = [t.double() for t in case[:3]]
    grad, *rest = [fenced(t, at_end) for t in case]
    out = cuda_host.entangle(*rest)
    dweight, dgrid = cuda_host.entangle_backward(grad, *rest, processors=processors)
    wanted = [
        reference.forward(*exact[1:], *inside),
        *reference.backward(*exact, *inside),
    ]
    # A product is rounded twice at most, and a sum of n terms grows like their magnitudes.
    worst = reference.block_sums((exact[0] * exact[1]).abs(), exact[2], inside)
    eps = torch.finfo(case[1].dtype).eps
    for got, want in ((out, wanted[0]), (dweight, wanted[1])):
        torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=1e-7 if eps > 1e-4 else 0)
    terms = math.log2(case[1].numel() + 2) + 8
    assert (
        (dgrid.double() - wanted[2]).abs() <= terms * torch.finfo(dgrid.dtype).eps * worst
    ).all()


def main() -> None:
    seed, count = map(int, sys.argv[1:])
    rng = random.Random(seed)
    for number in range(count):
        _build.load("shim").run_descending(number % 2)
        check(random_case(rng), processors=rng.choice((1, 3)), at_end=rng.random() < 0.7)
    print(count)


if __name__ == "__main__":
    main()
