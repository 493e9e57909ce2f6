"""Which subnets a training step runs.

Samplers hold no state: what they draw follows from their seed and the number of the step alone.
So every process of a group draws the same subnets without a word, and a resumed run goes on as
if it had never stopped; there is nothing to save. They draw from the allowed choices of the space
as they are at the time of the call.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from weightshare.sizes import Value
from weightshare.space import ArchConfig, SearchSpace

Accept = Callable[[ArchConfig], bool]


class Draw(NamedTuple):
    """A subnet, and how likely it was to be drawn."""

    arch: ArchConfig
    log_prob: float


class ArchSampler(Protocol):
    """Anything that says which subnets a step runs."""

    def sample(self, step: int) -> list[Draw]:
        """Subnets of a step, the same at every call and in every process."""
        ...


class UniformSampler:
    """Subnets drawn uniformly, each dim independently: single path, one-shot.

    Args:
        space: to draw from.
        count: subnets per step.
        seed: of all randomness.
        accept: a constraint, such as a limit on parameters: draws are repeated until it holds.
            The log-probabilities then lack the share of accepted subnets, a constant.
        tries: draws before giving up on one subnet.

    Source: SPOS (Guo et al., 2020, arXiv 1904.00420).
    """

    def __init__(
        self,
        space: SearchSpace,
        count: int = 1,
        *,
        seed: int = 0,
        accept: Accept | None = None,
        tries: int = 1000,
    ):
        _check_positive(count=count, tries=tries)
        self.space, self.count, self.seed = space, count, seed
        self.accept, self.tries = accept, tries

    def sample(self, step: int) -> list[Draw]:
        """Subnets of a step.

        Raises:
            ValueError: none of ``tries`` draws was accepted.
        """
        generator = _generator(self.seed, step)
        log_prob = -math.log(self.space.count)
        return [Draw(self._accepted(generator), log_prob) for _ in range(self.count)]

    def _accepted(self, generator: random.Random) -> ArchConfig:
        for _ in range(self.tries):
            arch = self.space.sample(generator)
            if self.accept is None or self.accept(arch):
                return arch
        raise ValueError(
            f"accept: refused {self.tries} subnets in a row; loosen it, narrow the space with "
            "SearchSpace.restrict, or raise tries"
        )


class FairSampler:
    """Subnets that use every choice of a dim equally often: strict fairness.

    The draws of all steps are numbered through. Of every block of K, for a dim of K choices, each
    takes another one, in an order shuffled anew for each block and dim; by itself a draw is
    uniform. There is no constraint to pass: refusing subnets would undo the fairness.

    Args:
        space: to draw from.
        count: subnets per step; if not given, the most choices of any dim, so that a step uses
            all choices of that dim once, as the paper does.
        seed: of all randomness.

    Source: FairNAS (Chu et al., 2021, arXiv 1907.01845).
    """

    def __init__(self, space: SearchSpace, count: int | None = None, *, seed: int = 0):
        if count is not None:
            _check_positive(count=count)
        self.space, self.count, self.seed = space, count, seed

    def sample(self, step: int) -> list[Draw]:
        """Subnets of a step."""
        dims = self.space.dims
        count = self.count or max((len(dim.allowed) for dim in dims.values()), default=1)
        log_prob = -math.log(self.space.count)
        draws = []
        for number in range(step * count, (step + 1) * count):
            values = {name: self._value(name, dim.allowed, number) for name, dim in dims.items()}
            draws.append(Draw(ArchConfig(values), log_prob))
        return draws

    def _value(self, name: str, allowed: Sequence[Value], number: int) -> Value:
        block, place = divmod(number, len(allowed))
        return _generator(self.seed, block, name).sample(allowed, len(allowed))[place]


class SandwichSampler:
    """The largest subnet, the smallest, and some random ones in between.

    Args:
        space: to draw from.
        random: random subnets per step, drawn by a :class:`UniformSampler`.
        seed: of all randomness.
        accept: a constraint on the random ones; largest and smallest are always there.
        tries: draws before giving up on one subnet.

    Source: Universally Slimmable Networks (Yu & Huang, 2019, arXiv 1903.05134).
    """

    def __init__(
        self,
        space: SearchSpace,
        random: int = 2,
        *,
        seed: int = 0,
        accept: Accept | None = None,
        tries: int = 1000,
    ):
        if random < 0:
            raise ValueError(f"random: expected 0 or more subnets, got {random}")
        self.space = space
        more = {"seed": seed, "accept": accept, "tries": tries}
        self._random = UniformSampler(space, random, **more) if random else None  # type: ignore[arg-type]

    def sample(self, step: int) -> list[Draw]:
        """Subnets of a step, the largest first.

        Raises:
            ValueError: a random subnet could not be had, see :class:`UniformSampler`.
        """
        ends = [Draw(self.space.largest(), 0.0), Draw(self.space.smallest(), 0.0)]
        return ends + (self._random.sample(step) if self._random else [])


def shrink(
    space: SearchSpace, phases: Mapping[int, Mapping[str, Sequence[Value]]], step: int
) -> None:
    """Progressive shrinking: allow what the phases up to a step allow.

    Args:
        space: to narrow.
        phases: first step of a phase -> field or dim -> its allowed choices from then on.
        step: the step that comes next. What no phase up to it names stays as it is.

    Raises:
        ValueError: a name or a choice is unknown.

    Source: Once-for-All (Cai et al., 2020, arXiv 1908.09791).

    Example::

        phases = {0: {"kernel": [7], "depth": [4]}, 1000: {"kernel": [3, 5, 7]},
                  2000: {"depth": [2, 3, 4]}}
        shrink(space, phases, step)
    """
    for start in sorted(phases):
        if start <= step:
            for name, choices in phases[start].items():
                space.restrict(name, choices)


def _generator(*key: object) -> random.Random:
    """A generator for a key: the same in all processes and releases of Python."""
    return random.Random("/".join(map(str, key)))


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
