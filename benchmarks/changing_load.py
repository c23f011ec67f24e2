"""A load that changes, under every way on this engine: who keeps the targets, on the machine and simulated.

Four phases: quiet (a few short prompts), a burst of long prompts, many streams that decode, and a mixture.
All ways see the same arrivals; the targets and rates are scaled to this machine by a profile made first.
Attainment is the share of requests that met both targets; with the mean latencies, real and simulated. A
way runs again when the host of a virtual machine took part of a core meanwhile.

    python benchmarks/changing_load.py                    # 0.5B shape, random weights, bf16
    python benchmarks/changing_load.py --shape 12m --seconds 5
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.both import Machine, lengths, machine, poisson, run_real, run_simulated
from benchmarks.machine import deliver, describe, undisturbed
from semipd.core.partition import Targets
from semipd.trace import Arrival

WAYS: dict[str, dict[str, Any]] = {
    "auto": {"policy": "semi-pd", "split": "auto"},
    "static:1,1": {"policy": "semi-pd", "split": "static:1,1"},
    "shared": {"policy": "semi-pd", "split": "shared"},
    "chunked 64": {"policy": "chunked", "chunk_tokens": 64},
    "chunked 256": {"policy": "chunked", "chunk_tokens": 256},
    "chunked 512": {"policy": "chunked", "chunk_tokens": 512},
    "prefill-first": {"policy": "prefill-first"},
}
# Name: load (share of the machine's time), prompt tokens, output tokens.
PHASES: dict[str, tuple[float, tuple[int, int], tuple[int, int]]] = {
    "quiet": (0.15, (32, 128), (16, 48)),
    "prompt burst": (0.8, (512, 1024), (4, 16)),
    "decode-heavy": (0.6, (16, 64), (64, 128)),
    "mixed": (0.6, (16, 1024), (8, 96)),
}
TTFT_PROMPT = 1024  # the target to the first token is TTFT_TIMES the time of such a lone prompt
TTFT_TIMES, TPOT_TIMES = 2.0, 2.0  # the target per token, as times a lone step of TPOT_BATCH streams
TPOT_BATCH = 8


def changing_load(of: Machine, seconds: float, seed: int) -> list[Arrival]:
    """The phases one after another, each `seconds` long."""
    generator = random.Random(seed)
    found: list[Arrival] = []
    for number, (load, prompts, outputs) in enumerate(PHASES.values()):
        pairs = [lengths(generator, prompts, outputs) for _ in range(100)]
        found += poisson(generator, pairs, of.rate(pairs, load), number * seconds, seconds)
    return found


def targets_of(of: Machine) -> Targets:
    """Targets that this machine can meet when it does one thing at a time."""
    return Targets(TTFT_TIMES * of.prompt_seconds(TTFT_PROMPT), TPOT_TIMES * of.token_seconds(TPOT_BATCH))


def measure(of: Machine, name: str, arrivals: list[Arrival], targets: Targets) -> dict[str, Any]:
    """One way, real and simulated."""
    settings = dict(WAYS[name])
    if settings["policy"] == "semi-pd":
        settings |= {"ttft_slo": targets.ttft, "tpot_slo": targets.tpot}
    planner = {"device_file": str(of.device)} if name == "auto" else {}
    real, stolen = undisturbed(lambda: run_real(of, {**settings, **planner}, arrivals, targets))
    results = {
        "real": real,
        "simulated": run_simulated(of, settings, arrivals, targets),
    }
    kept = ("attainment", "ttft_s", "tpot_s", "e2e_s", "requests", "split_switches")
    sides = {side: {key: result[key] for key in kept} for side, result in results.items()}
    return {"way": name, "stolen": stolen, **sides}


def show(rows: list[dict[str, Any]], targets: Targets) -> None:
    title = f"real | simulated; targets {1e3 * targets.ttft:.0f} ms, {1e3 * targets.tpot:.0f} ms per token"
    table = Table(title=title)
    for heading in ("way", "attainment", "TTFT mean", "TPOT mean", "E2E mean", "E2E p99", "cores stolen"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for row in rows:
        sides = (row["real"], row["simulated"])
        cells = [" | ".join(f"{side['attainment']:.1%}" for side in sides)]
        for key, part in (("ttft_s", "mean"), ("tpot_s", "mean"), ("e2e_s", "mean"), ("e2e_s", "p99")):
            cells.append(" | ".join(f"{1e3 * side[key][part]:.0f}" for side in sides) + " ms")
        table.add_row(row["way"], *cells, f"{row['stolen']:.2f}")
    Console(width=130).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=("0.5b", "12m"), default="0.5b")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each phase")
    parser.add_argument("--profile-seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=Path, help="use this device file instead of a fresh profile")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    busy = os.getloadavg()[0]
    with machine(options.shape, options.profile_seconds, options.device) as found:
        arrivals = changing_load(found, options.seconds, options.seed)
        targets = targets_of(found)
        rows = [measure(found, name, arrivals, targets) for name in options.ways]
    show(rows, targets)
    result = {
        "benchmark": "changing_load",
        "shape": options.shape,
        "phases": list(PHASES),
        "phase_seconds": options.seconds,
        "targets": {"ttft_s": targets.ttft, "tpot_s": targets.tpot},
        "load_average_before": busy,
        "machine": describe(),
        "rows": rows,
    }
    deliver(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
