"""The demo's results: a table, a picture and a file."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

SHARED, ALONE = "#1f6fb4", "#d1662b"


def write(found: dict[str, Any], out: Path, console: Console) -> None:
    """Print the table and the summary; write ``demo.json`` and ``demo.png``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(found, indent=1) + "\n")
    picture(found, out / "demo.png")
    console.print(table(found))
    for line in summary(found):
        console.print(line, highlight=False, soft_wrap=True)
    files = ", ".join(
        str(out / name) for name in ("demo.json", "demo.png", "subnet.pt", "subnet.py")
    )
    console.print(f"\nWritten: {files}", highlight=False, soft_wrap=True)


def table(found: dict[str, Any]) -> Table:
    """Every subnet: accuracy in the shared weights and alone, size, latency."""
    size = found["latency_batch"]
    chart = Table(
        title=f"One network, {len(found['subnets'])} subnets",
        caption=f"test accuracy in %; median latency in us at batch {size}, 1 thread",
    )
    for name in ("depth", "width", "parameters", "shared", "alone", "gap", "sliced", "exported"):
        chart.add_column(name, justify="right")
    depth = None
    for row in found["subnets"]:
        if depth not in (None, row["depth"]):
            chart.add_section()
        depth = row["depth"]
        gap = 100 * (row["shared_test"] - row["alone_test"])
        chart.add_row(
            str(depth),
            str(row["width"]),
            f"{row['parameters']:,}",
            f"{100 * row['shared_test']:.1f}",
            f"{100 * row['alone_test']:.1f}",
            f"{gap:+.1f}",
            f"{row['sliced_us']:.0f}",
            f"{row['exported_us']:.0f}",
        )
    return chart


def summary(found: dict[str, Any]) -> list[str]:
    """What the run showed, in sentences."""
    rows, search, step = found["subnets"], found["search"], found["step"]
    seconds, settings = found["seconds"], found["settings"]
    shared, alone = (100 * mean(r[key] for r in rows) for key in ("shared_test", "alone_test"))
    stored, total = max(r["parameters"] for r in rows), sum(r["parameters"] for r in rows)
    return [
        f"Mean test accuracy of the {len(rows)} subnets: {shared:.1f} % in one set of weights, "
        f"{alone:.1f} % each alone ({found['images']['test']} test images, one seed).",
        f"Parameters kept: {stored:,} shared against {total:,} ({total / stored:.1f} x).",
        f"Training: {seconds['shared']:.0f} s once against {seconds['alone']:.0f} s for all. Each "
        f"network got {settings['steps']} optimizer steps on the same batches; a step of the "
        "shared one trains four subnets (largest, smallest, two random).",
        f"Search: width {search['width']}, depth {search['depth']} in {seconds['search']:.0f} s; "
        f"{search['parameters']:,} parameters, {100 * search['parameters_share']:.0f} % of the "
        f"largest. Test accuracy {100 * search['test']:.1f} % with the weights trained along, "
        f"{100 * search['shared_test']:.1f} % in the shared ones, "
        f"{100 * search['alone_test']:.1f} % alone. "
        f"Final alpha {search['confidence'][0]:.3f} (width), {search['confidence'][1]:.3f} "
        f"(depth); cost coefficient {search['cost_coefficient']}.",
        f"Exported and read back: equal outputs bit for bit; largest difference of a logit to the "
        f"sliced supernet {search['difference_to_sliced']:.1e}.",
        f"One training step of four subnets: {step['ours_us'] / 1e3:.2f} ms, in eager slicing "
        f"{step['eager_us'] / 1e3:.2f} ms: {step['ratio']:.2f} x in this run, at these small "
        "sizes.",
    ]


def picture(found: dict[str, Any], path: Path) -> None:
    """Accuracy over parameters, shared against alone; and alpha over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=[1.25, 1], height_ratios=[2, 1])
    figure.suptitle(
        f"One set of weights, {len(found['subnets'])} subnets (handwritten digits)", fontsize=14
    )
    _accuracy_panel(figure.add_subplot(grid[:, 0]), found)
    settings, search = found["settings"], found["search"]
    for row, (axis, sizes) in enumerate((("width", "widths"), ("depth", "depths"))):
        panel = figure.add_subplot(grid[row, 1])
        shares = [[step[row][k] for step in search["history"]] for k in range(len(settings[sizes]))]
        _alpha_panel(panel, axis, settings[sizes], shares, settings["search_steps"], search[axis])
    figure.savefig(path)


def _accuracy_panel(panel, found: dict[str, Any]) -> None:
    """One pair of points per subnet, joined by a line: the gap that sharing costs or gains."""
    for row in found["subnets"]:
        pair = [100 * row["shared_test"], 100 * row["alone_test"]]
        panel.plot([row["parameters"]] * 2, pair, color="#b8b8b8", linewidth=1.2, zorder=1)
    for depth, marker in zip(found["settings"]["depths"], "os^Dv", strict=False):
        rows = [r for r in found["subnets"] if r["depth"] == depth]
        for key, colour, label in (
            ("shared_test", SHARED, "shared weights"),
            ("alone_test", ALONE, "trained alone"),
        ):
            panel.scatter(
                [r["parameters"] for r in rows],
                [100 * r[key] for r in rows],
                marker=marker,
                color=colour,
                s=45,
                zorder=2,
                label=f"{label}, depth {depth}",
            )
    search = found["search"]
    panel.scatter(
        search["parameters"],
        100 * search["test"],
        marker="*",
        s=320,
        color="black",
        edgecolor="white",
        zorder=3,
        label=f"found: width {search['width']}, depth {search['depth']}",
    )
    count = found["images"]["test"]
    share = mean(r["shared_test"] for r in found["subnets"])
    error = 100 * (share * (1 - share) / count) ** 0.5
    panel.set(
        xscale="log",
        xlabel="active parameters",
        ylabel="test accuracy (%)",
        title=f"Each subnet on {count} test images (standard error {error:.1f})",
    )
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right", fontsize=9)


def _alpha_panel(panel, axis: str, sizes, shares, steps: int, chosen: int) -> None:
    from matplotlib import colormaps

    count = len(shares[0])
    where = [min(5 * i, steps - 1) for i in range(count)]
    colours = colormaps["viridis"]([k / max(len(sizes) - 1, 1) for k in range(len(sizes))])
    panel.stackplot(where, shares, labels=[str(size) for size in sizes], colors=colours)
    panel.set(
        xlim=(0, max(where[-1], 1)),
        ylim=(0, 1),
        ylabel="alpha",
        title=f"Search over {axis}: {chosen} found",
    )
    if axis == "depth":
        panel.set_xlabel("search step")
    handles, labels = panel.get_legend_handles_labels()
    panel.legend(
        handles[::-1],
        labels[::-1],
        title=axis,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        fontsize=9,
    )
