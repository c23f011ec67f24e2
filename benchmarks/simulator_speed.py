"""How much faster than its traffic the simulator is: every policy, one core, and its peak memory.

Each policy runs in a fresh process, `--repeats` times in turn with the others; the best CPU time counts.
Speed is simulated seconds per second of CPU time, so that a busy machine matters little.

    python -m benchmarks.simulator_speed --requests 2000 --rate 10
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import deliver, describe
from semipd.bench.scenario import Scenario, simulate
from semipd.config import PolicyConfig

TARGETS: dict[str, Any] = {"ttft_slo": 0.3, "tpot_slo": 0.15}
WAYS: dict[str, PolicyConfig] = {
    "static": PolicyConfig(split="static:54,54", **TARGETS),
    "shared": PolicyConfig(split="shared", **TARGETS),
    "paper": PolicyConfig(split="paper", **TARGETS),
    "prefill-first": PolicyConfig(policy="prefill-first", **TARGETS),
    "chunked": PolicyConfig(policy="chunked", **TARGETS),
    "disaggregated": PolicyConfig(policy="disaggregated", **TARGETS),
    "auto": PolicyConfig(split="auto", **TARGETS),
}


def measure(way: str, requests: int, rate: float) -> dict[str, float]:
    """One run in this process. CPU time leaves out the start of the interpreter and the imports."""
    scenario = Scenario(rate=rate, requests=requests, devices=2 if way == "disaggregated" else 1)
    simulate(Scenario(rate=rate, requests=5), PolicyConfig())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    result = simulate(scenario, WAYS[way])
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "speed": result["simulated_s"] / seconds,
        "cpu_s": seconds,
        "steps_per_s": result["steps"] / seconds,
        "peak_mib": peak / 1024,
        "added_mib": (peak - before) / 1024,
    }


def _apart(way: str, requests: int, rate: float) -> dict[str, float]:
    """`measure` in a process of its own."""
    words = ["--one", way, "--requests", str(requests), "--rate", str(rate)]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.simulator_speed", *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(ran.stdout)
    return found


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table(
        title=f"Simulator: {options.requests} ShareGPT-like requests at {options.rate:g} per second"
    )
    for heading in ("", "speed", "steps/s", "peak memory", "added by the run"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(
            row["way"],
            f"{row['speed']:.0f}x",
            f"{row['steps_per_s']:.0f}",
            f"{row['peak_mib']:.0f} MiB",
            f"{row['added_mib']:.1f} MiB",
        )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, metavar="NAME")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.requests, options.rate)))
        return 0
    found: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
    for _ in range(options.repeats):
        for way in options.ways:
            found[way].append(_apart(way, options.requests, options.rate))
    rows: list[dict[str, Any]] = []
    for way, runs in found.items():
        best = max(runs, key=lambda run: run["speed"])
        rows.append({"way": way, **best, "speeds": [run["speed"] for run in runs]})
    show(rows, options)
    result = {
        "benchmark": "simulator_speed",
        "requests": options.requests,
        "rate": options.rate,
        "machine": describe(),
        "rows": rows,
    }
    deliver(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
