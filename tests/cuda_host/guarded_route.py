"""Runs the routing kernels on memory that faults when read or written outside.

``python -m cuda_host.guarded_route SEED COUNT``: random sizes and options, with every tensor, given
or made, at a page that may not be touched. Prints the number of cases that agreed with the
reference; dies of a fault where a kernel strays. Run by test_cuda_host.py.
"""

from __future__ import annotations

import random
import sys

import torch

from cuda_host import _build, routing
from cuda_host.guarded import fenced
from weightshare_kernels.ops.route import reference


def random_case(rng: random.Random) -> tuple:
    """Arguments of the op ``route``; ties are exact, or the logits float64."""
    groups, size = rng.choice((1, 1, 2, 3, 8)), rng.choice((1, 2, 7, 16, 33, 90))
    rows, experts = rng.choice((0, 1, 2, 5, 40, 150)), groups * size
    topk_groups = rng.randint(1, groups)
    k = rng.randint(1, min(topk_groups * size, rng.choice((4, 40, 80))))
    dtype = rng.choice(routing.DTYPES)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    scores = torch.randn(rows, experts, generator=generator, dtype=torch.float64)
    if dtype != torch.float64:
        scores = (scores.abs() * 2).floor() * 0.37
    elif rows:
        scores[0] = float("nan")
    bias = padding = None
    if dtype == torch.float64 and rng.random() < 0.5:
        bias = torch.randn(experts, generator=generator, dtype=torch.float64)
    if rng.random() < 0.5:
        padding = torch.rand(rows, generator=generator) < 0.3
    options = rng.choice(routing.SCORES), groups, topk_groups, rng.randint(1, min(size, 3))
    return scores.to(dtype), bias, padding, k, *options, rng.random() < 0.5, 1.5


def check(rng: random.Random, place) -> None:
    """Compare the kernels on fenced copies with the reference."""
    case = random_case(rng)
    scores, bias, padding = (None if t is None else place(t) for t in case[:3])
    got = routing.route(scores, bias, padding, *case[3:], processors=rng.choice((1, 3)))
    wanted = reference.forward(*case)
    assert all(
        torch.equal(a, b) for a, b in zip(got[:1] + got[2:], wanted[:1] + wanted[2:], strict=True)
    )
    near = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(got[1], wanted[1], **near)
    grad = torch.randn(got[1].shape, dtype=got[1].dtype)
    options = case[4], *case[8:]
    dscores = routing.route_grad(place(grad), scores, place(got[0]), padding, *options)
    want = reference.backward(grad, case[0], got[0], case[2], *options)
    near["rtol"] = max(near["rtol"], 2 * torch.finfo(scores.dtype).eps)
    torch.testing.assert_close(dscores, want, **near)
    ids = torch.randint(-2, scores.shape[1] + 2, got[0].shape)
    tables = routing.route_tables(place(ids), padding, scores.shape[1])
    wanted_tables = reference.tables(ids, case[2], scores.shape[1])
    assert all(torch.equal(a, b) for a, b in zip(tables, wanted_tables, strict=True))
    wild = torch.full_like(got[0], 1 << 62)  # what they give does not matter
    routing.route_grad(place(grad), scores, place(wild), padding, *options)


def main() -> None:
    seed, count = map(int, sys.argv[1:])
    rng = random.Random(seed)
    torch.manual_seed(seed)
    made = routing._poisoned
    for number in range(count):
        at_end = rng.random() < 0.7

        def place(tensor: torch.Tensor, at_end: bool = at_end) -> torch.Tensor:
            return fenced(tensor, at_end)

        routing._poisoned = lambda *shape, place=place, **kind: place(made(*shape, **kind))
        _build.load("route").run_descending(number % 2)
        check(rng, place)
    print(count)


if __name__ == "__main__":
    main()
