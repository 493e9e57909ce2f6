"""Draws docs/images/shards.png: the pools of one projection type, and what three layers take.

``python docs/images/shards.py``; the numbers are those of a real ``ShardPlan``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor
from weightshare.lora import ShardPlan

PLAN = ShardPlan(r=3, equivalent_rank=2, private_rank=1, shards=2, layers=3, seed=1)
INK, LINE = "#1f2933", "#7b8794"
SHARED = {"A": "#9fd0de", "B": "#f2c5a0"}
OWN = ("#e4e7eb", "#cbd2d9", "#b3bcc5")  # of each layer
CELL, HEIGHT, GAP = 1.0, 0.62, 0.6  # of a shard; beside a pool


def color(side: str, shard: int) -> str:
    """A shared shard has its pool's color, a private one that of its layer."""
    own = shard - PLAN.pool_shards + PLAN.layers * PLAN.private_rank * PLAN.shards
    return SHARED[side] if own < 0 else OWN[own // (PLAN.private_rank * PLAN.shards)]


def cell(axes: Axes, side: str, x: float, y: float, shard: int, followed: int) -> None:
    """One shard with its number; that which lines follow has a frame."""
    edge = ("white", 1.5, 1) if shard != followed else (INK, 1.8, 2)
    kind = dict(zip(("edgecolor", "linewidth", "zorder"), edge, strict=True))
    axes.add_patch(plt.Rectangle((x, y), CELL, HEIGHT, facecolor=color(side, shard), **kind))
    text = {"ha": "center", "va": "center", "size": 9, "color": INK, "zorder": 3}
    axes.text(x + CELL / 2, y + HEIGHT / 2, str(shard), **text)


def half(axes: Axes, side: str, table: Tensor, left: float, pool: float, width: str) -> None:
    """A pool at height ``pool`` and below it the matrices of all layers, rows of shards."""
    text = {"color": INK, "va": "bottom"}
    title = f"pool of {side}: {PLAN.pool_shards} shards of {width}"
    axes.text(left, pool + HEIGHT + 0.6, title, size=10.5, **text)
    own = PLAN.private_rank * PLAN.shards
    shared = PLAN.pool_shards - PLAN.layers * own
    parts = [("for all layers", 0, shared)]
    parts += [(f"layer {n} only", shared + n * own, own) for n in range(PLAN.layers)]
    for name, first, count in parts:
        middle = left + (first + count / 2) * CELL
        axes.text(middle, pool + HEIGHT + 0.1, name, size=7.5, ha="center", **text)
    followed = int(table[0, 0, 0])
    for shard in range(PLAN.pool_shards):
        cell(axes, side, left + shard * CELL, pool, shard, followed)
    step = (PLAN.pool_shards - PLAN.shards) * CELL / (PLAN.layers - 1)
    for layer in range(PLAN.layers):
        x0 = left + layer * step
        for row, shards in enumerate(table[layer].tolist()):
            for piece, shard in enumerate(shards):
                x, y = x0 + piece * CELL, (PLAN.r - 1 - row) * HEIGHT
                cell(axes, side, x, y, shard, followed)
                if shard == followed:
                    start = left + (followed + 0.5) * CELL, pool
                    end = x + CELL / 2, PLAN.r * HEIGHT
                    line = {"arrowstyle": "-|>", "color": LINE, "linewidth": 1.1}
                    axes.annotate("", end, start, arrowprops=line)
        name = f"{side} of layer {layer}"
        axes.text(x0 + CELL, -0.15, name, size=9, color=INK, ha="center", va="top")


def main() -> None:
    """Draw both pools side by side."""
    figure, axes = plt.subplots(figsize=(10.8, 2.9), dpi=130)
    span = PLAN.pool_shards * CELL
    a, b = PLAN.tables()
    half(axes, "A", a, 0, 3.3, "d_in / 2")
    half(axes, "B", b, span + 2 * GAP, 3.3, "d_out / 2")
    axes.set_xlim(-0.1, 2 * span + 2 * GAP + 0.1)
    axes.set_ylim(-0.75, 5.1)
    axes.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
