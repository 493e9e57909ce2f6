"""What the study found, as a table, sentences and a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from balance.model import LOSSES, METHODS, RULES
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from rich.table import Table

# The palette of Okabe and Ito, which the colour-blind can tell apart, and strokes to help it.
STYLES = {
    "sign": ("#0072B2", "-", "o"), "proportional": ("#56B4E9", "--", "s"),
    "inverse": ("#E69F00", "-.", "^"), "inverse_sqrt": ("#009E73", (0, (5, 1)), "v"),
    "loss 0.001": ("#D55E00", ":", "D"), "loss 0.01": ("#CC79A7", (0, (1, 1)), "P"),
    "none": ("#000000", "-", "x"),
}  # fmt: skip


def of(result: dict, method: str) -> list[dict]:
    """Its runs, one a seed."""
    return [run for run in result["runs"] if run["method"] == method]


def average(result: dict, method: str, *path) -> float:
    """Mean over seeds of what lies at a path in each run."""
    values = []
    for value in of(result, method):
        for key in path:
            value = value[key]
        values.append(value)
    return mean(values)


def curve(result: dict, method: str, name: str) -> list[float]:
    """Mean over seeds of a curve."""
    return [mean(values) for values in zip(*(run[name] for run in of(result, method)), strict=True)]


def tail(result: dict, method: str, part: int) -> float:
    """MaxVio of single batches, mean of the last steps on code (part 0) or on prose (1)."""
    options = result["settings"]
    last = (options["steps"] + part * options["drift_steps"]) // options["thin"]
    first = last - max(options["tail"] // options["thin"], 1)
    return mean(curve(result, method, "violation")[first:last])


def against(result: dict, method: str, other: str, part: str = "code") -> list[float]:
    """Bits per byte more than another method from the same seed."""
    pairs = zip(of(result, method), of(result, other), strict=True)
    return [ours[part][0] - theirs[part][0] for ours, theirs in pairs]


def table(result: dict) -> Table:
    chart = Table(
        title="Balance and loss",
        caption=f"Mean of {result['settings']['seeds']} seed(s). Bits per byte and MaxVio on "
        "unseen files; MaxVio of single training batches at the end, and of all of them together; "
        "MaxVio on unseen prose before the first step on it.",
    )
    for name in ("text", "balanced by"):
        chart.add_column(name)
    for name in ("bits", "MaxVio", "batches", "together", "before"):
        chart.add_column(name, justify="right")
    for part, text in enumerate(("code", "prose")):
        for method in METHODS:
            before = f"{average(result, method, 'switch', 1):.2f}" if part else ""
            chart.add_row(
                text, method, f"{average(result, method, text, 0):.4f}",
                f"{average(result, method, text, 1):.2f}", f"{tail(result, method, part):.2f}",
                f"{average(result, method, 'settled', part):.3f}", before,
            )  # fmt: skip
        chart.add_section()
    return chart


def verdict(changes: list[float]) -> str:
    """Whether differences of the same seeds agree in sign."""
    each = ", ".join(f"{change:+.4f}" for change in changes)
    if len(changes) < 2:
        return f"{each} (one seed: proves nothing)"
    same = "all seeds agree" if min(changes) * max(changes) > 0 else "the seeds disagree"
    return f"{mean(changes):+.4f} ({each}; {same})"


def summary(result: dict) -> list[str]:
    """Findings as sentences."""
    rules = ", ".join(f"{name} {average(result, name, 'code', 1):.2f}" for name in METHODS)
    lines = [
        f"MaxVio over unseen code: {rules}.",
        f"Settled MaxVio of sign: {average(result, 'sign', 'settled', 0):.3f}, "
        f"of single batches {tail(result, 'sign', 0):.2f}: what is left there is the batch.",
    ]
    for other in (*LOSSES, "none"):
        for part in ("code", "prose"):
            change = verdict(against(result, "sign", other, part))
            lines.append(f"Bits per byte of {part}, sign minus {other}: {change}.")
    drift = ", ".join(
        f"{name} {average(result, name, 'switch', 1):.2f} -> {tail(result, name, 1):.2f}"
        for name in METHODS
    )
    lines.append(f"Drift, MaxVio right at the switch -> of batches at the end: {drift}.")
    point = result["fixed_point"]
    gaps = ", ".join(
        f"{name} {row['gap']:.1e} (b: {row['distance']:.1e})" for name, row in point["last"].items()
    )
    lines.append(f"Gap to the program's optimum, share of that of b = 0: {gaps}.")
    for name in RULES:
        rows = of(result, name)[0]["duals"]
        gap, noise, near, floor, alike = (
            mean(row[key] for row in rows)
            for key in ("gap", "gap_of_other_half", "distance",
                        "distance_of_other_half", "correlation")
        )  # fmt: skip
        lines.append(
            f"Bias from training by {name}: gap {gap:.1%} of that of b = 0 (other tokens' dual "
            f"{noise:.1%}), |b - b*| {near:.3f} ({floor:.3f}), correlation {alike:.3f}."
        )
    return lines


def picture(result: dict, path: Path) -> None:
    """Six panels: balance, loss, both; drift, fixed point, the bias and the dual."""
    figure = Figure(figsize=(15, 8.6), layout="constrained", dpi=100)
    panels = figure.subplots(2, 3)
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    balance_panel(panels[0, 0], result)
    loss_panel(panels[0, 1], result)
    trade_panel(panels[0, 2], result)
    drift_panel(panels[1, 0], result)
    point_panel(panels[1, 1], result)
    dual_panel(panels[1, 2], result)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
    handles = [
        Line2D([], [], color=colour, linestyle=stroke, marker=marker, label=method)
        for method, (colour, stroke, marker) in STYLES.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(METHODS), frameon=False,
        handlelength=3.5, fontsize=11,
    )  # fmt: skip
    figure.savefig(path)


def decades(axis) -> None:
    """Label 1, 2 and 5 of each decade as plain numbers; few of our ranges hold a whole one."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def draw(panel, x, y, method: str, **more) -> None:
    colour, stroke, _ = STYLES[method]
    panel.plot(x, y, color=colour, linestyle=stroke, linewidth=1.8, label=method, **more)


def switch_line(panel, result: dict, text: bool = True) -> None:
    where = result["settings"]["steps"]
    panel.axvline(where, color="#777777", linewidth=1)
    if text:
        panel.annotate(
            "code | prose", (where, 1), xycoords=("data", "axes fraction"), xytext=(0, -12),
            textcoords="offset points", ha="center", fontsize=8, color="#555555",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip


def balance_panel(panel, result: dict) -> None:
    thin = result["settings"]["thin"]
    for method in METHODS:
        values = curve(result, method, "violation")
        draw(panel, [(n + 0.5) * thin for n in range(len(values))], values, method)
    panel.set(
        yscale="log", xlabel="step", ylabel="MaxVio, mean of layers",
        title="Imbalance of training batches",
    )  # fmt: skip
    decades(panel.yaxis)
    switch_line(panel, result)


def loss_panel(panel, result: dict) -> None:
    late = 0.0
    for method in METHODS:
        tests = [list(zip(*run["tests"], strict=True)) for run in of(result, method)]
        bits = [mean(values) for values in zip(*(test[1] for test in tests), strict=True)]
        draw(panel, tests[0][0], bits, method)
        late = max(late, *bits[1:])
    panel.set(
        xlabel="step", ylabel="bits per byte", ylim=(None, late * 1.02),
        title="Loss on unseen files of the text trained on",
    )  # fmt: skip
    switch_line(panel, result)


def trade_panel(panel, result: dict) -> None:
    for method in METHODS:
        colour, _, marker = STYLES[method]
        worse = against(result, method, "none")
        violations = [run["code"][1] for run in of(result, method)]
        panel.scatter(violations, worse, s=18, color=colour, marker=marker, alpha=0.5)
        panel.scatter(
            mean(violations), mean(worse), s=80, color=colour, marker=marker, zorder=3,
        )  # fmt: skip
    panel.axhline(0, color="#777777", linewidth=1)
    panel.set(
        xscale="log", xlabel="MaxVio over unseen code", ylabel="bits per byte more than none",
        title="Balance and loss on code (small: each seed)",
    )  # fmt: skip
    decades(panel.xaxis)


def drift_panel(panel, result: dict) -> None:
    options = result["settings"]
    thin, start = options["thin"], options["steps"]
    first = max(start // thin - 5, 0)
    for method in METHODS:
        values = curve(result, method, "violation")[first:]
        draw(panel, [(n + first + 0.5) * thin - start for n in range(len(values))], values, method)
    panel.axvline(0, color="#777777", linewidth=1)
    panel.set(
        yscale="log", xlabel="step after the switch to prose", ylabel="MaxVio, mean of layers",
        title="Drift: the same, nearer",
    )  # fmt: skip
    decades(panel.yaxis)


def point_panel(panel, result: dict) -> None:
    point = result["fixed_point"]
    for rule in RULES:
        draw(panel, point["steps"], point["curves"][rule]["gap"], rule)
    panel.set(
        xscale="log", yscale="log", xlabel="update, on the same tokens",
        ylabel="(D(b) - D*) / (D(0) - D*)",
        title="To the optimum of the linear program",
    )  # fmt: skip


def dual_panel(panel, result: dict) -> None:
    for rule in RULES:
        colour, _, marker = STYLES[rule]
        rows = of(result, rule)[0]["duals"]
        x, y = ([value for row in rows for value in row[key]] for key in ("dual", "bias"))
        panel.scatter(x, y, s=14, color=colour, marker=marker, alpha=0.6)
    panel.axline((0, 0), slope=1, color="#777777", linewidth=1)
    panel.set(
        xlabel="dual of the linear program", ylabel="bias that training arrived at",
        title="Bias and dual, every expert of all layers",
    )  # fmt: skip
