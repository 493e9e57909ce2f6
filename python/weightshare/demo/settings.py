"""What a run of the demo depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Settings of one run; two runs with equal settings give equal results.

    Attributes:
        seed: of initial weights, batches and random subnets.
        steps: optimizer steps of the shared network, and of each network trained alone.
        search_steps: steps of the architecture search.
        batch: images in a step.
        widths: of the search space, ascending.
        depths: of the search space, ascending.
        lr: largest learning rate of the weights.
        alpha_lr: learning rate of the architecture.
        cost: weight of the expected share of parameters (1 for the largest subnet) in the
            search's loss.
        entropy: weight of the entropy of alpha in the search's loss at the end; it starts at 0.
        rounds: times that each subnet and each training step is timed.
    """

    seed: int = 0
    steps: int = 1000
    search_steps: int = 600
    batch: int = 64
    widths: tuple[int, ...] = (32, 48, 64, 96, 128, 192, 256, 384, 512)
    depths: tuple[int, ...] = (1, 2, 3)
    lr: float = 2e-3
    alpha_lr: float = 0.02
    cost: float = 0.03
    entropy: float = 0.1
    rounds: int = 50

    def __post_init__(self):
        for name in ("steps", "search_steps", "batch", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: is {getattr(self, name)}, expected at least 1")

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, as they are after a round trip through a file."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
