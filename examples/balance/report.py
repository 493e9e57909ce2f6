"""What the study found, as a table, sentences and a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from balance.model import LOSSES, METHODS, RULES
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from rich.table import Table
from scipy import stats

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
    """Mean of differences of the same seeds with its 95 % interval, by Student's t."""
    if len(changes) < 2:
        return f"{changes[0]:+.4f} (one seed: proves nothing)"
    half = float(stats.t.ppf(0.975, len(changes) - 1)) * stdev(changes) / len(changes) ** 0.5
    told = "" if abs(mean(changes)) > half else ", which these seeds cannot tell from 0"
    return f"{mean(changes):+.4f} ± {half:.4f}{told}"


def summary(result: dict) -> list[str]:
    """Findings as sentences."""
    violation = {name: average(result, name, "code", 1) for name in METHODS}
    others = ", ".join(f"{violation[name]:.2f}" for name in LOSSES)
    lines = [
        "MaxVio on unseen code: " + ", ".join(f"{n} {v:.2f}" for n, v in violation.items()) + ".",
        "Published, 1B parameters: MaxVio 0.04 by sign and 0.72 by loss, perplexity 9.50 and 9.56, "
        f"0.009 bits a token. MaxVio here: {violation['sign']:.2f} and {others}.",
        f"MaxVio of the last training batches by sign: {tail(result, 'sign', 0):.2f} each, "
        f"{average(result, 'sign', 'settled', 0):.3f} of all their tokens together.",
    ]
    pairs = [(name, "none", "code") for name in METHODS[:-1]]
    pairs += [(name, "loss 0.01", part) for name in RULES for part in ("code", "prose")]
    for name, other, part in pairs:
        change = verdict(against(result, name, other, part))
        lines.append(f"Bits per byte of {part}, {name} minus {other}: {change}.")
    drift = ", ".join(
        f"{name} {average(result, name, 'switch', 1):.2f} -> {tail(result, name, 1):.2f}"
        for name in METHODS
    )
    lines.append(f"Drift, MaxVio right at the switch -> of batches at the end: {drift}.")
    return lines + theory_summary(result)


def theory_summary(result: dict) -> list[str]:
    """Findings beside the linear program."""
    gaps = ", ".join(
        f"{name} {row['gap']:.1e} (b: {row['distance']:.1e})"
        for name, row in result["fixed_point"]["last"].items()
    )
    lines = [f"Gap to the program's optimum, share of that of b = 0: {gaps}."]
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


def switch_line(panel, result: dict, height: float) -> None:
    where = result["settings"]["steps"]
    panel.axvline(where, color="#777777", linewidth=1)
    panel.annotate(
        "code | prose", (where, height), xycoords=("data", "axes fraction"), ha="center",
        fontsize=9, color="#444444", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
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
    switch_line(panel, result, 0.94)


def loss_panel(panel, result: dict) -> None:
    """Differences: the curves themselves lie on one another."""

    def bits(run: dict) -> list[float]:
        return [test[1] for test in run["tests"]]

    base = of(result, "none")
    steps = [test[0] for test in base[0]["tests"]]
    for method in METHODS:
        more = [
            [a - b for a, b in zip(bits(run), bits(none), strict=True)]
            for run, none in zip(of(result, method), base, strict=True)
        ]
        draw(panel, steps, [mean(values) for values in zip(*more, strict=True)], method)
    levels = [mean(values) for values in zip(*map(bits, base), strict=True)]
    for number in range(1, len(steps), max(len(steps) // 4, 1)):
        panel.annotate(
            f"{levels[number]:.2f}", (steps[number], 0), xytext=(0, 4), ha="center", fontsize=9,
            textcoords="offset points",
        )  # fmt: skip
    panel.set(
        xlabel="step", ylabel="bits per byte more than none",
        title="Loss on unseen files (numbers: that of none)",
    )  # fmt: skip
    panel.margins(y=0.12)
    switch_line(panel, result, 0.03)


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
