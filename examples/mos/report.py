"""What the study found, as a table, sentences and a picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev

from matplotlib.figure import Figure
from mos.model import LORA, METHODS, MOS, Method
from rich.table import Table
from scipy import stats

# Of the palette of Okabe and Ito, which the colour-blind can tell apart.
GREY, BLUE, ORANGE, GREEN, PURPLE = "#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLOURS = dict(zip([m.name for m in MOS], (PURPLE, ORANGE, GREEN, BLUE), strict=True))


def equal_parameters(method: Method) -> str:
    """The LoRA of as many parameters."""
    return Method(method.budget, method.budget).name


def equal_rank(method: Method) -> str:
    """The LoRA of the same rank, which has more parameters."""
    return Method(method.rank, method.rank).name


def bits(result: dict, name: str) -> list[list[float]]:
    """Bits per byte of a method, ``[seeds][plays]``."""
    return [list(row["bits"].values()) for row in result["runs"] if row["method"] == name]


def less(result: dict, name: str, other: str) -> list[list[float]]:
    """Bits per byte of one method minus another's, ``[seeds][plays]``."""
    pairs = zip(bits(result, name), bits(result, other), strict=True)
    return [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval, by Student's t; of one value no interval (nan)."""
    if len(values) < 2:
        return values[0], float("nan")
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean(values), half


def over_seeds(rows: list[list[float]]) -> tuple[float, float]:
    """Of the mean over plays: what other seeds would give, on these plays."""
    return interval([mean(row) for row in rows])


def over_plays(rows: list[list[float]]) -> tuple[float, float]:
    """Of the mean over seeds: what other plays would give."""
    return interval([mean(column) for column in zip(*rows, strict=True)])


def parameters(result: dict, name: str) -> int:
    return next(row["parameters"] for row in result["runs"] if row["method"] == name)


def table(result: dict) -> Table:
    options = result["settings"]
    chart = Table(
        title="Bits per byte on unseen parts of the plays",
        caption=f"Means of {options['plays']} plays and {options['seeds']} seeds, ± half a 95 % "
        "interval over seeds. Differences are of the same seed and play.",
    )
    for name in ("adapter", "parameters", "learning rate", "bits", "at equal parameters",
                 "at equal rank"):  # fmt: skip
        chart.add_column(name, justify="left" if name == "adapter" else "right")
    for method in (*LORA, *MOS):
        name = method.name
        cells = [told(over_seeds(bits(result, name)), "")]
        if method.shares:
            for other in (equal_parameters(method), equal_rank(method)):
                cells.append(told(over_seeds(less(result, name, other))))
        lr = next(row["lr"] for row in result["runs"] if row["method"] == name)
        chart.add_row(name, f"{parameters(result, name):,}", f"{lr:g}", *cells)
    return chart


def told(pair: tuple[float, float], sign: str = "+") -> str:
    return f"{pair[0]:{sign}.4f} ± {pair[1]:.4f}"


def verdict(rows: list[list[float]]) -> str:
    """A difference with its interval over seeds, its sign in plays, and what may be said."""
    centre, half = over_seeds(rows)
    plays = [mean(column) for column in zip(*rows, strict=True)]
    fewer = sum(value < 0 for value in plays)
    text = f"{told((centre, half))} (over plays ± {over_plays(rows)[1]:.4f}; fewer in {fewer} of "
    text += f"{len(plays)})"
    if len(rows) < 2:
        return f"{text}: one seed proves nothing"
    return text if abs(centre) > half else f"{text}: these seeds cannot tell it from 0"


def summary(result: dict) -> list[str]:
    """Findings as sentences."""
    base, served = result["base"], result["serving"]
    lines = [
        f"The pretrained model ({base['parameters']:,} parameters): {base['bits']:.3f} bits per "
        f"byte of unseen code, {base['plays']:.3f} of the plays without an adapter.",
    ]
    for method in MOS:
        for what, other in (
            ("equal parameters", equal_parameters(method)), ("equal rank", equal_rank(method)),
        ):  # fmt: skip
            change = verdict(less(result, method.name, other))
            lines.append(f"Bits per byte, {method.name} minus {other} ({what}): {change}.")
    for small, large in pairwise(LORA):
        change = verdict(less(result, large.name, small.name))
        lines.append(f"Bits per byte, {large.name} minus {small.name}: {change}.")
    rates = {name: median(values) for name, values in served["bytes_per_second"].items()}
    own = [row[n] for n, row in enumerate(served["crossed"])]
    others = [
        mean(value for m, value in enumerate(row) if m != n)
        for n, row in enumerate(served["crossed"])
    ]
    best = sum(min(row) == row[n] for n, row in enumerate(served["crossed"]))
    return [
        *lines,
        f"{served['adapters']} adapters in one batch: {rates['one batch']:.0f} bytes per second, "
        f"{served['ratio']['by turns']:.1f} times those of one adapter after the other and "
        f"{served['ratio']['no adapters']:.2f} times those of the model alone in one batch.",
        f"Memory: {served['resident_bytes']['slabs'] / 1e6:.1f} MB of shards and "
        f"{served['resident_bytes']['tables'] / 1e6:.1f} MB of tables for all adapters; the model "
        f"has {served['base_bytes'] / 1e6:.1f} MB.",
        f"A play under its own adapter: {mean(own):.3f} bits per byte; under another play's: "
        f"{mean(others):.3f}; its own is the best of {len(own)} for {best} of {len(own)} plays.",
    ]


def picture(result: dict, path: Path) -> None:
    """Bits over parameters; differences at equal parameters and at equal rank; throughput."""
    figure = Figure(figsize=(13.5, 7.6), layout="constrained", dpi=110)
    grid = figure.add_gridspec(2, 3, width_ratios=[1.45, 1, 1])
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    main_panel(figure.add_subplot(grid[:, 0]), result)
    difference_panel(figure.add_subplot(grid[0, 1]), result, equal_parameters)
    difference_panel(figure.add_subplot(grid[0, 2]), result, equal_rank)
    speed_panel(figure.add_subplot(grid[1, 1]), result)
    crossed_panel(figure, figure.add_subplot(grid[1, 2]), result)
    figure.savefig(path)


def main_panel(panel, result: dict) -> None:
    """Each seed as a dot, the means with their intervals over seeds."""
    x = [parameters(result, m.name) for m in LORA]
    pairs = [over_seeds(bits(result, m.name)) for m in LORA]
    panel.errorbar(
        x, [p[0] for p in pairs], [p[1] for p in pairs], color=GREY, marker="o", capsize=4,
        label="LoRA of rank r", zorder=2,
    )  # fmt: skip
    for method, at in zip(LORA, x, strict=True):
        panel.annotate(
            f"r = {method.rank}", (at, over_seeds(bits(result, method.name))[0]), xytext=(8, 6),
            textcoords="offset points", color=GREY,
        )  # fmt: skip
    beside: dict[int, int] = {}  # MoS points of a budget stand side by side, right of LoRA's
    for method in MOS:
        beside[method.budget] = beside.get(method.budget, 0) + 1
        centre, half = over_seeds(bits(result, method.name))
        panel.errorbar(
            parameters(result, method.name) * 1.07 ** beside[method.budget], centre, half,
            color=COLOURS[method.name], marker="D", markersize=7, capsize=4, linestyle="none",
            label=method.name,
            zorder=3,
        )  # fmt: skip
    options = result["settings"]
    panel.set(
        xscale="log", xlabel="trainable parameters of an adapter",
        ylabel="bits per byte on unseen parts of the play",
        title=f"Adapters for plays, on a model of {result['base']['parameters']:,} parameters\n"
        f"that knows Python (without adapter: {result['base']['plays']:.2f} bits)",
    )  # fmt: skip
    panel.set_xticks(x, [f"{value:,}" for value in x])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.margins(x=0.18)
    panel.legend(
        loc="upper right", fontsize=9.5, alignment="left", title="MoS e -> r: rank r with the\n"
        f"parameters of LoRA e (drawn\nbeside it). Mean of {options['plays']}\nplays, 95 % over "
        f"{options['seeds']} seeds",
    )  # fmt: skip


def difference_panel(panel, result: dict, partner) -> None:
    """Each play as a dot, the mean with its interval over seeds."""
    for at, method in enumerate(MOS):
        rows = less(result, method.name, partner(method))
        plays = [mean(column) for column in zip(*rows, strict=True)]
        colour = COLOURS[method.name]
        panel.scatter([at + 0.18] * len(plays), plays, s=14, color=colour, alpha=0.5)
        centre, half = over_seeds(rows)
        panel.errorbar(at - 0.1, centre, half, color=colour, marker="D", capsize=5, markersize=7)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_xticks(range(len(MOS)), [f"{m.name}\nagainst\n{partner(m)}" for m in MOS], fontsize=8)
    panel.set_xlim(-0.5, len(MOS) - 0.5)
    what = "equal parameters" if partner is equal_parameters else "equal rank"
    panel.set(ylabel="bits per byte, MoS minus LoRA", title=f"At {what}\n(below 0: MoS is better)")
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)


def speed_panel(panel, result: dict) -> None:
    served = result["serving"]
    labels = {
        "by turns": "one adapter\nafter the other",
        "one batch": f"{served['adapters']} adapters\nin one batch",
        "no adapters": "same batch,\nno adapter",
    }
    for at, (name, colour) in enumerate(zip(labels, (GREY, ORANGE, "#BBBBBB"), strict=True)):
        value = median(served["bytes_per_second"][name])
        panel.bar(at, value, 0.6, color=colour)
        panel.annotate(
            f"{value:,.0f}", (at, value), xytext=(0, 3), textcoords="offset points", ha="center"
        )
    panel.set_xticks(range(len(labels)), labels.values(), fontsize=9)
    panel.set(ylabel="bytes generated per second", title=f"Serving ({served['method']})")
    panel.margins(y=0.15)
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)


def crossed_panel(figure, panel, result: dict) -> None:
    """Every play under the adapter of every other, against its own."""
    rows = result["serving"]["crossed"]
    more = [[value - row[n] for value in row] for n, row in enumerate(rows)]
    bound = max(abs(value) for row in more for value in row) or 1.0
    image = panel.imshow(more, cmap="PuOr_r", vmin=-bound, vmax=bound)
    names = [name.replace("_", " ")[:18] for name in result["runs"][0]["bits"]]
    panel.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set(xlabel="adapter of", title="Bits more than with its own adapter")
    figure.colorbar(image, ax=panel, shrink=0.8)


assert set(METHODS) >= {equal_parameters(m) for m in MOS} | {equal_rank(m) for m in MOS}
