"""Pictures of the cells of benchmarks/paper.py."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.paper_cases import ARRIVAL, DEADLINE

Cells = dict[tuple[str, str], dict[str, dict[int, dict[str, Any]]]]

COLORS = {
    "auto": "tab:red",
    "static": "tab:orange",
    "shared": "tab:olive",
    "paper": "tab:green",
    "chunked": "tab:blue",
    "prefill-first": "tab:purple",
    "disaggregated": "tab:brown",
}


def kind_of(way: str) -> str:
    return way.split()[0].rstrip(",")


def plot_goodput(cells: Cells, path: Path) -> None:
    """Goodput of every way over auto's, a row of points a workload; bars span the seeds."""
    shown = {key: ways for key, ways in cells.items() if "auto" in ways}
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(shown) + 1.6))
    for row, ways in enumerate(reversed(shown.values())):
        most = max(cell["requests"] for cell in ways["auto"].values())
        ours = {seed: cell["goodput"] for seed, cell in ways["auto"].items()}
        for way, rows in ways.items():
            kind = kind_of(way)
            values = [cell["goodput"] / ours[seed] for seed, cell in rows.items() if seed in ours]
            if values and not way.endswith((DEADLINE, ARRIVAL)):
                color, marker = COLORS.get(kind, "tab:gray"), "D" if kind == "auto" else "o"
                axes.plot([min(values), max(values)], [row, row], color=color, alpha=0.4)
                seen = min(cell["requests"] for cell in rows.values())
                fill = color if seen >= most else "none"
                axes.plot(
                    statistics.median(values), row, marker, color=color, markerfacecolor=fill, label=kind
                )
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_yticks(range(len(shown)), [f"{case}, {slo}" for case, slo in reversed(shown)], fontsize=8)
    axes.set(xlabel="goodput over auto's (further right is better; hollow: screened with fewer requests)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_curves(cells: Cells, path: Path) -> None:
    """Attainment (above) and mean latency (below) against rate, a column a workload with tight targets or
    the only ones; of each kind of way the best one by goodput."""
    shown = {key: ways for key, ways in cells.items() if "auto" in ways and key[1] != "loose"}
    if not shown:
        return
    figure, panels = pyplot.subplots(2, len(shown), figsize=(3.0 * len(shown), 5.2), squeeze=False)
    for column, ((case, _), ways) in enumerate(shown.items()):
        above, below = panels[0][column], panels[1][column]
        for kind, way in best_of_kinds(ways).items():
            look: dict[str, Any] = {"color": COLORS[kind], "label": kind, "markersize": 3}
            met, seconds = attainments(ways[way]), latencies(ways[way])
            above.plot(list(met), list(met.values()), ".-", linewidth=1, **look)
            below.plot(list(seconds), list(seconds.values()), ".-", linewidth=1, **look)
        above.axhline(0.9, color="gray", linewidth=0.6)
        above.set(ylim=(0.7, 1.01))
        above.set_title(case, fontsize=9)
        below.set(xlabel="requests per second", yscale="log")
    panels[0][0].set(ylabel="attainment")
    panels[1][0].set(ylabel="mean latency, s")
    panels[0][0].legend(fontsize=6, loc="lower left", framealpha=0.5)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def best_of_kinds(ways: dict[str, dict[int, dict[str, Any]]]) -> dict[str, str]:
    """Kind -> its way with the best median goodput among those with most requests; auto last, on top."""
    best: dict[str, tuple[int, float, str]] = {}
    for way, rows in ways.items():
        kind = kind_of(way)
        requests = min(cell["requests"] for cell in rows.values())
        found = (requests, statistics.median(cell["goodput"] for cell in rows.values()), way)
        if not way.endswith((DEADLINE, ARRIVAL)) and found > best.get(kind, (0, 0.0, "")):
            best[kind] = found
    return {kind: best[kind][2] for kind in sorted(best, key=lambda kind: kind == "auto")}


def attainments(rows: dict[int, dict[str, Any]]) -> dict[float, float]:
    """Rate -> attainment, of one seed, as far as its runs went to their end."""
    return {rate: met for rate, met, *_ in rows[min(rows)]["tried"]}


def latencies(rows: dict[int, dict[str, Any]]) -> dict[float, float]:
    """Rate -> mean latency, likewise."""
    return {rate: seconds for rate, _, seconds, *_ in rows[min(rows)]["tried"]}
