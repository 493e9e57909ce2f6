"""What a search found, as a table, a sentence and a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.table import Table
from weightshare.supernet import SearchSpace


def table(rows: list[dict]) -> Table:
    chart = Table(title="Trained from scratch", caption="loss in nats per byte, unseen files")
    for name in ("shape", "embed", "depth", "heads", "ratio", "parameters", "loss", "spread"):
        chart.add_column(name, justify="left" if name == "shape" else "right")
    for row in rows:
        arch, loss = row["arch"], row["loss"]
        heads, ratio = (
            " ".join(str(arch[f"{name}.{i}"]) for i in range(arch["depth"]))
            for name in ("heads", "ratio")
        )
        spread = f"{stdev(loss):.3f}" if len(loss) > 1 else "-"
        chart.add_row(
            row["name"], str(arch["embed"]), str(arch["depth"]), heads, ratio,
            f"{row['parameters']:,}", f"{mean(loss):.3f}", spread,
        )  # fmt: skip
    return chart


def summary(rows: list[dict]) -> str:
    """What came out, in a sentence."""
    by_kind: dict[str, list[dict]] = {"found": [], "random": [], "largest": []}
    for row in rows:
        by_kind[row["name"].split()[0]].append(row)
    (found,), (largest,) = by_kind["found"], by_kind["largest"]
    others = [mean(row["loss"]) for row in by_kind["random"]]
    ours = mean(found["loss"])
    return (
        f"The found shape has {ours:.3f} nats per byte. {len(others)} random shapes of about as "
        f"many parameters have {mean(others):.3f} on average, from {min(others):.3f} to "
        f"{max(others):.3f}; {sum(ours < other for other in others)} of them are worse. The "
        f"largest shape, {largest['parameters'] / found['parameters']:.1f} times the size, has "
        f"{mean(largest['loss']):.3f}. Seeds: {len(found['loss'])}."
    )


def picture(rows: list[dict], history: list[dict], space: SearchSpace, path: Path) -> None:
    """Losses over parameters; the mixture weights of width and depth over the search."""
    figure = Figure(figsize=(11, 5), layout="constrained", dpi=120)
    grid = figure.add_gridspec(2, 2, width_ratios=[1.2, 1])
    panel = figure.add_subplot(grid[:, 0])
    styles = {"found": ("#d1662b", "*"), "random": ("#1f6fb4", "o"), "largest": ("#555555", "s")}
    for row in rows:
        kind = row["name"].split()[0]
        colour, marker = styles[kind]
        size, loss = row["parameters"] / 1000, row["loss"]
        panel.scatter([size] * len(loss), loss, s=14, color=colour, alpha=0.5)
        panel.scatter(
            size, mean(loss), s=200 if kind == "found" else 60, color=colour, marker=marker,
            label=kind if row["name"] in ("found", "random 1", "largest") else None, zorder=3,
        )  # fmt: skip
    panel.set(
        xlabel="parameters (thousands)", ylabel="loss (nats per byte)",
        title="Each shape trained from scratch\n(large: mean, small: each seed)",
    )  # fmt: skip
    panel.grid(alpha=0.3)
    panel.legend()
    for number, name in enumerate(("embed", "depth")):
        panel = figure.add_subplot(grid[number, 1])
        shares = list(zip(*(step[name] for step in history), strict=True))
        labels = [str(choice) for choice in space[name].choices]
        colours = colormaps["viridis"]([k / max(len(shares) - 1, 1) for k in range(len(shares))])
        panel.stackplot(range(len(history)), shares, labels=labels, colors=colours)
        panel.set(ylim=(0, 1), xlim=(0, len(history) - 1), ylabel=f"mean alpha of {name}")
        handles, labels = panel.get_legend_handles_labels()
        panel.legend(
            handles[::-1], labels[::-1], title=name, loc="center left", bbox_to_anchor=(1.01, 0.5)
        )
    panel.set_xlabel("search step")
    figure.savefig(path)
