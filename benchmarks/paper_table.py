"""The cells of benchmarks/paper.py as tables in Markdown, and pictures beside them.

Figures are medians over the seeds, with the least and the most in brackets; ratios are taken seed by seed,
on the same requests. The best of several ways is the one with the best median over all seeds of the
workload, chosen in hindsight for each workload (and, for latencies, for each rate).

    python -m benchmarks.paper_table --cells benchmarks/results/paper.jsonl --out docs/results-paper.md
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.paper import curve_indices, read_cells
from benchmarks.paper_cases import ARRIVAL, CASES, DEADLINE
from benchmarks.paper_plot import plot_curves, plot_goodput
from benchmarks.search import rate_at

# Request rate at 90% attainment of semi-PD over each, as published (mean over its models and data sets).
PUBLISHED = {"prefill-first": "1.72", "chunked": "1.55", "disaggregated": "1.62", "shared": "1.11"}
PUBLISHED_LATENCY = {
    "v2lite-sharegpt": "1.27 to 2.40",
    "v3-math500": "1.49 to 2.58",
}  # over SGLang's default

Row = dict[str, Any]
Ways = dict[str, dict[int, Row]]  # way -> seed -> its cell
Figure = Callable[[Row], float]


def grouped(path: Path) -> dict[tuple[str, str], Ways]:
    """(case, targets) -> its ways, in the order of the cases; of a way the seeds with most requests."""
    found: dict[tuple[str, str], Ways] = defaultdict(lambda: defaultdict(dict))
    cells = read_cells(path)
    order = list(CASES)
    for key in sorted(cells, key=lambda key: (order.index(key[0]), key[1] != "tight")):
        found[key[0], key[1]][key[2]][key[3]] = cells[key]
    return {key: {way: longest(rows) for way, rows in ways.items()} for key, ways in found.items()}


def longest(rows: dict[int, Row]) -> dict[int, Row]:
    """The seeds with most requests: one that only has the fewer of a screening is not like the others."""
    most = max(row["requests"] for row in rows.values())
    return {seed: row for seed, row in rows.items() if row["requests"] == most}


def goodput(row: Row) -> float:
    return float(row["goodput"])


def latency(index: int) -> Figure:
    """Mean seconds to the last token at one of the rates of the curve."""
    return lambda row: float(point_at(row, index)["e2e_mean_s"])


def point_at(row: Row, index: int) -> dict[str, float]:
    """What was measured at one of the rates of the case's curve."""
    wanted = rate_at(CASES[row["case"]].rate, curve_indices(CASES[row["case"]])[index])
    return next(point for point in row["curve"] if math.isclose(point["rate"], wanted, rel_tol=1e-3))


def spread(values: Iterable[float], digits: int = 2) -> str:
    """ "median (least to most)"; the value alone where there is one."""
    rows = sorted(values)
    if not rows:
        return "-"
    text = f"{statistics.median(rows):.{digits}f}"
    return text if len(rows) == 1 else f"{text} ({rows[0]:.{digits}f} to {rows[-1]:.{digits}f})"


def best(
    ways: Ways, seeds: set[int], figure: Figure, names: Iterable[str], least: bool = False
) -> str | None:
    """The one of `names` with the best median over exactly these seeds; None when none has them all."""
    medians = {
        name: statistics.median(figure(ways[name][seed]) for seed in seeds)
        for name in names
        if name in ways and seeds <= set(ways[name])
    }
    if not medians:
        return None
    return (min if least else max)(medians, key=lambda name: medians[name])


def ratios(ways: Ways, ours: str, other: str | None, figure: Figure, least: bool = False) -> list[float]:
    """How many times better `ours` is than `other`, seed by seed."""
    if other is None or ours not in ways:
        return []
    pairs = [
        (figure(row), figure(ways[other][seed])) for seed, row in ways[ours].items() if seed in ways[other]
    ]
    return [theirs / mine if least else mine / theirs for mine, theirs in pairs if min(mine, theirs) > 0.0]


def full(rows: dict[int, Row]) -> bool:
    """Whether every seed saw the requests that the case asks for; other ways only were screened."""
    return all(row["requests"] >= CASES[row["case"]].requests for row in rows.values())


def plain(ways: Ways, *starts: str) -> list[str]:
    """Contenders in the usual order of prompts whose names start so."""
    names = [way for way in ways if way.startswith(starts) and not way.endswith((DEADLINE, ARRIVAL))]
    return [way for way in names if full(ways[way])]


def fixed(ways: Ways) -> list[str]:
    """Every fixed way on one device."""
    return plain(ways, "static", "shared", "paper", "prefill-first", "chunked")


def title(case: str, slo: str) -> str:
    ttft, tpot = CASES[case].slos[slo]
    return f"{case}, {slo} ({ttft:g} / {tpot:g} s)"


def goodput_table(cells: dict[tuple[str, str], Ways]) -> list[str]:
    """auto over each kind of way; the last row is the published one."""
    kinds = ("prefill-first", "chunked", "disaggregated", "shared", "paper", "static")
    heads = "".join(f" over {'best ' * (kind in ('chunked', 'static'))}{kind} |" for kind in kinds)
    lines = [f"| workload | seeds | auto, req/s |{heads} over the best fixed way | which |"]
    lines.append("|" + "---|" * (len(kinds) + 5))
    for (case, slo), ways in cells.items():
        if "auto" not in ways:
            continue
        seeds = set(ways["auto"])
        chosen = [best(ways, seeds, goodput, plain(ways, kind)) for kind in kinds]
        chosen.append(best(ways, seeds, goodput, fixed(ways)))
        figures = [spread(ratios(ways, "auto", name, goodput)) for name in chosen]
        rate = spread(map(goodput, ways["auto"].values()))
        lines.append(
            f"| {title(case, slo)} | {len(seeds)} | {rate} | {' | '.join(figures)} | {chosen[-1] or '-'} |"
        )
    published = " | ".join(PUBLISHED.get(kind, "-") for kind in kinds)
    return [*lines, f"| published for semi-PD, mean over its set | | | {published} | - | |"]


def latency_table(cells: dict[tuple[str, str], Ways]) -> list[str]:
    """How many times lower auto's mean latency is, at every rate of the curve."""
    kinds = ("prefill-first", "chunked", "shared", "static")
    heads = "".join(f" over {'best ' * (kind in ('chunked', 'static'))}{kind} |" for kind in kinds)
    lines = [f"| workload | req/s | auto, s |{heads} over the best fixed way | which | published |"]
    lines.append("|" + "---|" * (len(kinds) + 6))
    for (case, slo), ways in cells.items():
        if "auto" not in ways:
            continue
        seeds = set(ways["auto"])
        for index, at in enumerate(curve_indices(CASES[case])):
            figure = latency(index)
            chosen = [best(ways, seeds, figure, plain(ways, kind), least=True) for kind in kinds]
            chosen.append(best(ways, seeds, figure, fixed(ways), least=True))
            cols = " | ".join(spread(ratios(ways, "auto", name, figure, least=True)) for name in chosen)
            seconds = spread(map(figure, ways["auto"].values()))
            rate, published = rate_at(CASES[case].rate, at), PUBLISHED_LATENCY.get(case, "-")
            head = f"| {title(case, slo)} | {rate:.3g} | {seconds}"
            lines.append(f"{head} | {cols} | {chosen[-1] or '-'} | {published} |")
    return lines


def order_table(cells: dict[tuple[str, str], Ways]) -> list[str]:
    """The lead of choosing shares and the lead of the order of prompts, apart."""
    lines = [
        "| workload | auto over the best fixed way | the same, all in order of arrival "
        "| the same, all by deadline | what the order gives auto | what it gives the best fixed way |",
        "|" + "---|" * 6,
    ]
    for (case, slo), ways in cells.items():
        others = [way for way in ways if way.endswith(DEADLINE) and full(ways[way])]
        if "auto" not in ways or f"auto{ARRIVAL}" not in ways or not others:
            continue
        seeds = set(ways["auto"])
        usual, ordered = best(ways, seeds, goodput, fixed(ways)), best(ways, seeds, goodput, others)
        entries = [
            ratios(ways, "auto", usual, goodput),
            ratios(ways, f"auto{ARRIVAL}", usual, goodput),
            ratios(ways, "auto", ordered, goodput),
            ratios(ways, "auto", f"auto{ARRIVAL}", goodput),
            ratios(ways, ordered, usual, goodput) if ordered else [],
        ]
        lines.append(f"| {title(case, slo)} | {' | '.join(map(spread, entries))} |")
    return lines if len(lines) > 2 else []


def case_table(ways: Ways) -> list[str]:
    """One line a way: goodput, and at every rate of the curve the mean latency and the attainment."""
    case = CASES[next(row["case"] for rows in ways.values() for row in rows.values())]
    rates = [rate_at(case.rate, index) for index in curve_indices(case)]
    heads = " | ".join(f"mean latency at {rate:.3g}/s (attainment)" for rate in rates)
    lines = [f"| way | goodput, req/s | {heads} |", "|---|---|" + "---|" * len(rates)]
    seeds = max(map(len, ways.values()))
    order = sorted(ways, key=lambda way: -statistics.median(map(goodput, ways[way].values())))
    for way in order:
        rows = ways[way].values()
        times = []
        for index in range(len(rates)):
            met = statistics.median(point_at(row, index)["attainment"] for row in rows)
            times.append(f"{statistics.median(map(latency(index), rows)):.2f} s ({met:.0%})")
        name = f"**{way}**" if way == "auto" else way
        if not full(ways[way]) or len(rows) < seeds:
            count = next(iter(rows))["requests"]
            name += f" [{count} requests, {len(rows)} seed{'s' * (len(rows) > 1)}]"
        lines.append(f"| {name} | {spread(map(goodput, rows))} | {' | '.join(times)} |")
    return lines


def document(cells: dict[tuple[str, str], Ways]) -> str:
    """The whole page."""
    lines = [
        "# The paper's evaluation, in simulation: every table",
        "",
        "Made by `python -m benchmarks.paper_table --out docs/results-paper.md`; how to read it, and what",
        "it means, is in [results.md](results.md). Goodput: requests per second at which 90% meet both",
        "targets (TTFT / TPOT, after each workload's name). Medians over the seeds; least and most in",
        "brackets.",
        "",
        "![goodput of every way over auto's](results-paper.png)",
        "",
        "![attainment and mean latency against rate](results-paper-curves.png)",
        "",
        *("## Goodput of auto over the others", "", *goodput_table(cells), ""),
        *("## Mean latency of the others over auto's", "", *latency_table(cells), ""),
    ]
    if orders := order_table(cells):
        lines += ["## The order of prompts, apart from the shares (goodput)", "", *orders, ""]
    for (case, slo), ways in cells.items():
        sources = sorted({row.get("commit", "?") for rows in ways.values() for row in rows.values()})
        requests = max(row["requests"] for rows in ways.values() for row in rows.values())
        lines += [f"## {title(case, slo)}", "", f"{requests} requests. Commits: {', '.join(sources)}.", ""]
        lines += [*case_table(ways), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=Path, default=Path("benchmarks/results/paper.jsonl"))
    parser.add_argument("--out", type=Path, help="Markdown file; the pictures go beside it")
    options = parser.parse_args()
    cells = grouped(options.cells)
    text = document(cells)
    if options.out:
        options.out.write_text(text)
        plot_goodput(cells, options.out.with_suffix(".png"))
        plot_curves(cells, options.out.with_name(f"{options.out.stem}-curves.png"))
    print(text)
    print(json.dumps({"benchmark": "paper_table", "cases": len(cells)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
