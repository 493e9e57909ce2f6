"""What a case is: inputs, a definition to check against, baselines, and the floor's numbers.

Each op's ``cases.py`` lists its cases; ``tests/test_ops.py`` and ``benchmarks/run.py`` walk them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


class Maker:
    """Makes a case's tensors: dtype, device and a seeded generator in one place."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0, grad: bool = True):
        self.dtype, self.device, self.grad = dtype, device, grad
        self.generator = torch.Generator().manual_seed(seed)
        # Large cases are drawn where they are used: on a GPU in milliseconds, not seconds.
        self._there = self.generator
        if torch.device(device).type == "cuda":
            self._there = torch.Generator(device).manual_seed(seed)

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal tensor of the case's dtype that requires grad."""
        value = torch.empty(shape, dtype=torch.float64, device=self.device)
        value.normal_(generator=self._there).mul_(scale)
        return value.to(dtype or self.dtype).requires_grad_(self.grad)

    def alpha(self, count: int) -> Tensor:
        """Softmax mixture coefficients, fp32 (fp64 in float64 cases)."""
        value = torch.randn(count, generator=self.generator, dtype=torch.float64).softmax(0)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return value.to(self.device, dtype).requires_grad_(self.grad)

    def index(self, count: int, size: int, ordered: bool = False) -> Tensor:
        """Random index set without repeats."""
        value = torch.randperm(size, generator=self.generator)[:count]
        return (value.sort().values if ordered else value).to(self.device)


@dataclass(frozen=True)
class Workload:
    """A closure to time, and the tensors whose gradients a backward pass fills."""

    forward: Callable[[], Tensor | list[Tensor]]
    leaves: list[Tensor]
    step: Callable[[], None] | None = None  # a whole training step, where it is not one backward


@dataclass(frozen=True)
class Case:
    """One workload of an op.

    Attributes:
        name: unique within the op.
        inputs: makes the keyword arguments of ``call`` and ``reference``.
        call: the public function.
        reference: its definition in plain differentiable PyTorch, float64-capable.
        baselines: name -> makes a :class:`Workload` from the inputs. The floor is ``dense``, a
            dense layer of the active size with weights of its own, or ``clone`` of the weight.
        ours: makes our :class:`Workload`; by default one call of ``call``.
        flops: floating-point operations of one forward pass.
        bytes: least bytes a forward pass moves, per element size.
        bars: ``baseline`` or ``baseline:phase`` -> least ratio baseline / ours that the project
            promises; ``saved`` -> most bytes saved for backward, ours / floor.
        tier: ``test`` (small, every dtype) or ``bench`` (real shapes).
    """

    name: str
    inputs: Callable[[Maker], Inputs]
    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    baselines: Mapping[str, Callable[[Inputs], Workload]] = field(default_factory=dict)
    ours: Callable[[Inputs], Workload] | None = None
    flops: int = 0
    bytes: Callable[[int], int] = lambda itemsize: 0
    bars: Mapping[str, float] = field(default_factory=dict)
    tier: str = "test"

    def workload(self, inputs: Inputs) -> Workload:
        """Our side of the benchmark."""
        if self.ours is not None:
            return self.ours(inputs)
        return Workload(lambda: self.call(**inputs), leaves(inputs))


def leaves(inputs: Inputs) -> list[Tensor]:
    """Inputs that want a gradient."""
    return [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]


def all_cases(tier: str | None = None) -> dict[str, list[Case]]:
    """Cases of every op, by op name."""
    import weightshare_kernels.ops as ops

    found = {}
    for module in pkgutil.iter_modules(ops.__path__):
        if module.ispkg:
            cases = importlib.import_module(f"{ops.__name__}.{module.name}.cases").CASES
            found[module.name] = [c for c in cases if tier in (None, c.tier)]
    return found
