"""Draws docs/images/benchmarks.png and fills the README's table from benchmarks/results.

``python benchmarks/plot.py``; the README is edited only between its two benchmark markers.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
EAGER = ("eager", "pad_and_sum", "gathered", "peft", "peft_loop")  # what people write today, by op
INK, GRID, OURS, FLOOR, SLOWER = "#1f2933", "#d9dee3", "#2a7f9e", "#9fb3c1", "#c8553d"
LEAST = 0.25  # a bar shorter than this is cut; its number is printed beside it all the same


@dataclass(frozen=True)
class Row:
    """One workload on one machine; ratios are baseline time / our time, forward and backward.

    On a GPU these are its own times, from CUDA graphs, see graphs.py.
    """

    op: str
    case: str
    ms: float
    eager: float | None
    floor: float | None
    bars: dict[str, dict]

    @property
    def label(self) -> str:
        """The case's name as words."""
        return self.case.replace("_", " ")


def read(folder: Path) -> list[Row]:
    """All rows of one machine, in the order of the files."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        for case, record in json.loads(path.read_text())["cases"].items():
            ms, ratios = times(record)
            pairs = {name: r["both"] for name, r in ratios.items()}
            floor = record["floor"]
            if floor in ratios and not floor.startswith("dense"):  # of the forward pass only
                pairs[floor] = ratios[floor]["forward"]
            eager = next((pairs[name] for name in EAGER if name in pairs), None)
            rows.append(Row(path.stem, case, ms, eager, pairs.get(floor), record["bars"]))
    return rows


def times(record: dict) -> tuple[float, dict[str, dict[str, float]]]:
    """Our ms and each baseline's ratios by phase: on a GPU its own, where they were captured."""
    graph = record.get("graph", {})
    if "ours" in graph.get("variants", {}):
        return graph["variants"]["ours"]["both"]["median"], graph["ratios"]
    plain = {
        name: {phase: ratio["of_medians"] for phase, ratio in phases.items()}
        for name, phases in record["ratios"].items()
    }
    return record["variants"]["ours"]["both"]["median"], plain


def note(folder: Path) -> str:
    """Machine, threads, torch version and dates, in one line."""
    found = [
        record["environment"]
        for path in folder.glob("*.json")
        for record in json.loads(path.read_text())["cases"].values()
    ]
    dates = sorted({e["date"] for e in found})
    threads = "/".join(str(t) for t in sorted({e["threads"] for e in found}))
    torches = ", ".join(sorted({e["torch"] for e in found}))
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{folder.name}, {threads} threads, torch {torches}, {span}"


def draw(machines: dict[str, list[Row]], notes: dict[str, str], path: Path) -> None:
    """One panel per machine: bars of both ratios for every workload, on a log axis."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK})
    counts = [len(rows) + len({r.op for r in rows}) for rows in machines.values()]
    figure, axes = plt.subplots(
        len(machines), 1, squeeze=False, figsize=(9, sum(0.36 * c + 1.3 for c in counts)),
        gridspec_kw={"height_ratios": counts},
    )  # fmt: skip
    for axis, (name, rows) in zip(axes[:, 0], machines.items(), strict=True):
        panel(axis, rows, notes[name])
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)
    plt.close(figure)


def panel(axis, rows: list[Row], title: str) -> None:
    """Fill one axis."""
    ticks, labels, at, last = [], [], 0.0, None
    highest = max(r.eager or 1 for r in rows)
    for row in rows:
        if row.op != last:
            ticks.append(at)
            labels.append(row.op)
            last, at = row.op, at + 0.9
        for ratio, shift, colour in ((row.eager, -0.18, OURS), (row.floor, 0.2, FLOOR)):
            if ratio is None:
                continue
            slower = colour == OURS and ratio < 1
            shown = max(ratio, LEAST)
            axis.barh(at + shift, shown - 1, 0.36, left=1, color=SLOWER if slower else colour)
            axis.text(max(ratio, 1) * 1.03, at + shift, f"{ratio:.2f}", va="center", fontsize=7.5)
        ticks.append(at)
        labels.append(row.label)
        at += 1
    right = max(4, highest * 1.6)
    axis.set(xscale="log", xlim=(LEAST, right), ylim=(at - 0.4, -0.5), yticks=ticks)
    heads = {row.op for row in rows}
    for text, label in zip(axis.set_yticklabels(labels), labels, strict=True):
        text.set_weight("bold" if label in heads else "normal")
    axis.set_xticks([t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if t < right])
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g} x")
    axis.xaxis.set_minor_locator(plt.NullLocator())
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.grid(axis="x", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, colors=INK)
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)
    axis.set_title(f"How many times longer than ours, forward and backward\n{title}",
                   loc="left", fontsize=9.5)  # fmt: skip
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (OURS, FLOOR)]
    names = ["PyTorch as people write it", "floor: dense layer of the active size"]
    axis.legend(handles, names, loc="upper left", bbox_to_anchor=(0, -0.7 / (at + 1)), ncol=2,
                frameon=False, fontsize=8.5, borderaxespad=0)  # fmt: skip


def table(rows: list[Row], title: str) -> list[str]:
    """Markdown of one machine."""

    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}x"

    lines = [
        title,
        "",
        "| op | workload | ours, ms | PyTorch eager / ours | floor / ours | promised |",
        "|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        bars = ", ".join(
            f"{name} {v['got']:.2f} ({'met' if v['met'] else '**missed**'}, {v['wanted']:.2f})"
            for name, v in row.bars.items()
        )
        numbers = f"{row.ms:.3g} | {ratio(row.eager)} | {ratio(row.floor)}"
        lines.append(f"| `{row.op}` | {row.label} | {numbers} | {bars} |")
    return lines


def fill(readme: Path, lines: list[str]) -> None:
    """Replace what stands between the markers; ValueError where they are missing."""
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme.name}: expected one {BEGIN} and after it one {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    temporary = readme.with_name(f".{readme.name}.tmp")
    temporary.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]))
    temporary.replace(readme)


def main(argv: list[str] | None = None) -> int:
    """Draw the picture and fill the table; 1 if there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="benchmarks/plot.py", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "benchmarks.png")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(argv)
    folders = [p for p in sorted(options.results.glob("*")) if list(p.glob("*.json"))]
    if not folders:
        print("no results to draw; run benchmarks/run.py first")
        return 1
    machines = {p.name: read(p) for p in folders}
    notes = {p.name: note(p) for p in folders}
    draw(machines, notes, options.image)
    fill(
        options.readme,
        [x for n, rows in machines.items() for x in ["", *table(rows, notes[n])]][1:],
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
