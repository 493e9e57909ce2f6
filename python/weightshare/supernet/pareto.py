"""Pareto fronts, and their picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from weightshare.supernet.search import SearchResult


def pareto_front(values: Sequence[Sequence[float]], directions: Sequence[str]) -> list[int]:
    """Points that no other point beats: better in one value and worse in none.

    Args:
        values: one tuple per point, one number per direction.
        directions: ``"minimize"`` or ``"maximize"``, one per number.

    Returns:
        Their positions, in the order given; of equal points the first.
    """
    signs = [1 if d == "minimize" else -1 for d in directions]
    points = [tuple(s * v for s, v in zip(signs, p, strict=True)) for p in values]
    front: list[int] = []
    # In lexical order a point can only be beaten by an earlier one.
    for i in sorted(range(len(points)), key=points.__getitem__):
        if not any(all(a <= b for a, b in zip(points[j], points[i], strict=True)) for j in front):
            front.append(i)
    return sorted(front)


def pareto_plot(
    result: SearchResult,
    path: str | PathLike,
    *,
    labels: Sequence[str],
    axes: tuple[int, int] = (0, 1),
    references: Mapping[str, tuple[float, float]] | None = None,
    title: str = "",
) -> None:
    """Draw what a search found: every architecture, the front as a step, points to compare with.

    Args:
        result: of :func:`weightshare.supernet.search`, with two objectives or more.
        path: picture to write; its ending says the format.
        labels: name and unit of each objective, such as ``"parameters (millions)"``.
        axes: which objectives are x and y; the front is that of these two.
        references: name -> (x, y) of architectures to compare with.
        title: above the picture; how many were tried if not given.

    Raises:
        ValueError: the search has not that many objectives, or found nothing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(result.directions)
    if len(labels) != count or not all(0 <= axis < count for axis in axes):
        raise ValueError(f"the search has {count} objectives; got labels {labels}, axes {axes}")
    points = [tuple(t.values[a] for a in axes) for t in result.trials if t.values is not None]
    if not points:
        raise ValueError("the search found no feasible architecture")
    directions = [result.directions[axis] for axis in axes]
    front = sorted(points[i] for i in pareto_front(points, directions))
    (xs, ys), (front_x, front_y) = zip(*points, strict=True), zip(*front, strict=True)
    # Between two points of the front the worse value of y holds: what is known to be reachable.
    where: Literal["post", "pre"] = "post" if directions[0] == "minimize" else "pre"

    figure = Figure(figsize=(8, 5.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panel = figure.add_subplot()
    panel.scatter(xs, ys, s=18, color="#8a8a8a", alpha=0.45, label="tried")
    panel.step(front_x, front_y, where=where, color=_COLOUR, linewidth=1.5, zorder=2)
    panel.scatter(front_x, front_y, s=42, color=_COLOUR, zorder=3, label="Pareto front")
    for name, point in (references or {}).items():
        panel.scatter(*point, marker="*", s=170, color="#d1662b", edgecolor="white", zorder=4)
        panel.annotate(name, point, xytext=(7, 7), textcoords="offset points", zorder=5)
    panel.set(
        xlabel=labels[axes[0]],
        ylabel=labels[axes[1]],
        title=title or f"{len(points)} architectures, {len(front)} on the front",
    )
    panel.margins(0.1)  # room for the names of references
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(path)


_COLOUR = "#1f6fb4"
