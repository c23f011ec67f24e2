"""How well the simulator agrees with the engine on this machine: profile, run and simulate, back to back.

A Poisson load of short and long prompts, scaled to keep the machine half busy, runs on the real engine
under several policies; the same arrivals then run in the simulator. A profile is made before the first run
and after each one, and each run is simulated on the two beside it: machines that others share change their
pace within minutes, and what is compared is the model, not the minutes. For the same reason a run is taken
again, with the profile after it, when the host of a virtual machine took part of a core meanwhile.

    python benchmarks/sim_agreement.py                    # 0.5B shape, random weights, bf16; 60 s a policy
    python benchmarks/sim_agreement.py --shape 12m --seconds 20
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.both import Machine, lengths, model_of, poisson, profiling, run_real, run_simulated
from benchmarks.machine import deliver, describe, undisturbed
from semipd.bench.profile import Measured, measure, write_device
from semipd.bench.profile import describe as describe_profiles
from semipd.core.partition import Targets
from semipd.trace import Arrival

WAYS: dict[str, dict[str, Any]] = {
    "static:1,1": {"policy": "semi-pd", "split": "static:1,1"},
    "shared": {"policy": "semi-pd", "split": "shared"},
    "chunked 256": {"policy": "chunked", "chunk_tokens": 256},
}
FIGURES = {
    "ttft mean": ("ttft_s", "mean"),
    "tpot mean": ("tpot_s", "mean"),
    "throughput": ("output_throughput", None),
    "ttft p99": ("ttft_s", "p99"),
    "tpot p99": ("tpot_s", "p99"),
}
GOALS = {"ttft mean": 0.15, "tpot mean": 0.15, "throughput": 0.15, "ttft p99": 0.25, "tpot p99": 0.25}


def mixed_load(of: Machine, seconds: float, load: float, seed: int) -> list[Arrival]:
    """Four short prompts for each long one, at a rate that this machine can bear."""
    generator = random.Random(seed)
    pairs = [lengths(generator, (16, 128), (16, 96)) for _ in range(200)]
    pairs += [lengths(generator, (512, 1024), (8, 48)) for _ in range(50)]
    return poisson(generator, pairs, of.rate(pairs, load), 0.0, seconds)


def compare(name: str, real: dict[str, Any], simulated: dict[str, Any], stolen: float) -> dict[str, Any]:
    """Each figure as the engine gave it, as the simulator did, and the relative difference. stolen: cores
    that the host took while the engine and the profile after it ran."""
    row: dict[str, Any] = {"way": name, "requests": real["requests"], "stolen": stolen}
    for figure, (key, part) in FIGURES.items():
        values = [result[key] if part is None else result[key][part] for result in (real, simulated)]
        difference = values[1] / values[0] - 1.0
        row[figure] = {
            "real": values[0],
            "simulated": values[1],
            "difference": difference,
            "within_goal": abs(difference) <= GOALS[figure],
        }
    return row


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="real engine | simulator (difference)")
    table.add_column("policy")
    for figure in FIGURES:
        table.add_column(figure, justify="right")
    table.add_column("cores stolen", justify="right")
    for row in rows:
        cells = []
        for figure in FIGURES:
            entry = row[figure]
            scale, unit = (1.0, "/s") if figure == "throughput" else (1e3, "ms")
            pair = f"{scale * entry['real']:.1f} | {scale * entry['simulated']:.1f} {unit}"
            cells.append(f"{pair} ({entry['difference']:+.0%})")
        table.add_row(row["way"], *cells, f"{row['stolen']:.2f}")
    Console(width=150).print(table)


def run(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(figures of every way, how well the profiles were fitted)."""
    rows, fits = [], []
    with model_of(options.shape) as model:

        def profile() -> Measured:
            return measure(str(model), profiling(options.profile_seconds))

        before, _ = undisturbed(profile)
        of = _machine(options.shape, model, [before])
        arrivals = mixed_load(of, options.seconds, options.load, options.seed)
        for name in options.ways:
            way = WAYS[name]
            engine = partial(run_real, of, way, arrivals, Targets())
            (real, after), stolen = undisturbed(lambda engine=engine: (engine(), profile()))
            of = _machine(options.shape, model, [before, after])
            rows.append(compare(name, real, run_simulated(of, way, arrivals, Targets()), stolen))
            fits.append(json.loads(of.device.read_text())["fit"])
            before = after
    return rows, fits


def _machine(shape: str, model: Path, profiles: list[Measured]) -> Machine:
    file = model.parent / "cpu.json"
    write_device(describe_profiles(profiles), file)
    return Machine(shape, model, file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=("0.5b", "12m"), default="0.5b")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals, for each policy")
    parser.add_argument("--profile-seconds", type=float, default=60.0, help="of each profile")
    parser.add_argument("--load", type=float, default=0.5, help="share of the machine's time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    busy = os.getloadavg()[0]
    rows, fits = run(options)
    show(rows)
    result = {
        "benchmark": "sim_agreement",
        "shape": options.shape,
        "seconds": options.seconds,
        "load": options.load,
        "load_average_before": busy,
        "machine": describe(),
        "fits": fits,
        "rows": rows,
    }
    deliver(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
