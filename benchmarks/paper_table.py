"""The cells of benchmarks/paper.py as tables in Markdown, and pictures.

python -m benchmarks.paper_table --cells benchmarks/results/paper.jsonl --out docs/results-paper.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.paper import read_cells

# Request rate at 90% attainment of semi-PD over each, as published (mean over its models and data sets).
PUBLISHED = {"prefill-first": 1.72, "best chunked": 1.55, "disaggregated, 2 devices": 1.62, "shared": 1.11}

COLORS = {
    "auto": "tab:red",
    "static": "tab:orange",
    "shared": "tab:olive",
    "paper": "tab:green",
    "chunked": "tab:blue",
    "prefill-first": "tab:purple",
}


def grouped(path: Path) -> dict[tuple[str, str], dict[str, list[dict[str, Any]]]]:
    """(case, slo) -> way -> its cells, one a seed."""
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in read_cells(path).values():
        found[row["case"], row["slo"]][row["way"]].append(row)
    return found


def goodput(rows: list[dict[str, Any]]) -> float:
    return statistics.mean(row["goodput"] for row in rows)


def latency(rows: list[dict[str, Any]], index: int) -> float:
    return statistics.mean(row["curve"][index]["e2e_mean_s"] for row in rows)


def case_table(ways: dict[str, list[dict[str, Any]]]) -> list[str]:
    """One line a policy: goodput, auto over it, mean latency at both rates."""
    ours = goodput(ways["auto"]) if "auto" in ways else float("nan")
    rates = [point["rate"] for point in next(iter(ways.values()))[0]["curve"]]
    heads = " | ".join(f"mean latency at {rate:.3g}/s" for rate in rates)
    lines = [f"| policy | goodput, req/s | auto over it | {heads} |", "|---|---|---|" + "---|" * len(rates)]
    for way, rows in sorted(ways.items(), key=lambda item: -goodput(item[1])):
        rate = goodput(rows)
        times = " | ".join(f"{latency(rows, index):.2f} s" for index in range(len(rates)))
        ratio = f"{ours / rate:.2f}" if rate else "-"
        name = f"**{way}**" if way == "auto" else way
        lines.append(f"| {name} | {rate:.2f} | {ratio} | {times} |")
    return lines


def ratios(cells: dict[tuple[str, str], dict[str, list[dict[str, Any]]]]) -> list[str]:
    """auto and the best static split over each baseline, beside the published ratios."""
    lines = [
        "| workload | over prefill-first | over best chunked | over disaggregation on 2 devices "
        "| over shared | over the best fixed way |",
        "|---|---|---|---|---|---|",
    ]
    for (case, slo), ways in cells.items():
        if "auto" not in ways:
            continue
        ours = goodput(ways["auto"])
        others = {way: goodput(rows) for way, rows in ways.items() if way != "auto"}
        chunked = [rate for way, rate in others.items() if way.startswith("chunked")]
        entries = (
            others.get("prefill-first"),
            max(chunked, default=None),
            others.get("disaggregated, 2 devices"),
            others.get("shared"),
            max(others.values(), default=None),
        )
        cells_text = " | ".join(f"{ours / entry:.2f}" if entry else "-" for entry in entries)
        lines.append(f"| {case}, {slo} | {cells_text} |")
    published = " | ".join(f"{PUBLISHED[key]:.2f}" for key in PUBLISHED)
    lines.append(f"| published (semi-PD, mean) | {published} | - |")
    return lines


def plot(cells: dict[tuple[str, str], dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Goodput of every policy over auto's, one row of points a workload."""
    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(cells) + 1.5))
    names = []
    for row, ((case, slo), ways) in enumerate(reversed(cells.items())):
        names.append(f"{case}, {slo}")
        ours = goodput(ways["auto"]) if "auto" in ways else float("nan")
        for way, rows in ways.items():
            kind = way.split()[0].rstrip(",")
            color = COLORS.get(kind, "tab:gray")
            axes.plot(goodput(rows) / ours, row, "D" if kind == "auto" else "o", color=color, label=kind)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=8, loc="lower left")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="goodput over auto's (further right is better)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=Path, default=Path("benchmarks/results/paper.jsonl"))
    parser.add_argument("--out", type=Path, help="Markdown file; the picture goes beside it")
    options = parser.parse_args()
    cells = grouped(options.cells)
    lines = ["### Goodput of auto over the others", "", *ratios(cells), ""]
    for (case, slo), ways in cells.items():
        lines += [f"### {case}, {slo}", "", *case_table(ways), ""]
    text = "\n".join(lines)
    if options.out:
        options.out.write_text(text)
        plot(cells, options.out.with_suffix(".png"))
    print(text)
    print(json.dumps({"benchmark": "paper_table", "cases": len(cells)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
