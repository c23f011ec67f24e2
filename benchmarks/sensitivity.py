"""How much the lead of `auto` depends on what the simulator assumes, and on what auto knows.

One scenario (Llama3-8B on one A100-80G, chat with 5% long prompts), one assumption changed at a time: how
much phases that run side by side slow each other, what a switch of the split costs, how many units saturate
the device; and auto alone is told wrong: the device's old figures, step times off by 30%, output lengths
off by a factor of 2.

    python -m benchmarks.sensitivity --cells benchmarks/results/sensitivity.jsonl [--seeds 1 2 3]
    python -m benchmarks.sensitivity --cells benchmarks/results/sensitivity.jsonl --report
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper import Runs, commit, scenario_of
from benchmarks.paper_cases import CASES, policy_of
from benchmarks.search import goodput_index, rate_at
from semipd.bench.scenario import STEADY, Scenario
from semipd.bench.simulate import Summary, run
from semipd.build import make_policy, targets_of
from semipd.config import PolicyConfig
from semipd.core.engine import Engine
from semipd.core.kv import BlockPool
from semipd.core.live import Live
from semipd.core.ports import CostModel, KVManager, Observer, Policy
from semipd.core.types import Event, Finished, Lane, Plan, Work
from semipd.execute.cost import StepCost, kv_capacity
from semipd.execute.device_file import load_device
from semipd.execute.sim import SimExecutor, VirtualClock
from semipd.model.catalogue import named_spec

CASE, SLO = "8b-mixed", "tight"
FIXED = ("static 100:8", "static 92:16", "static 84:24", "static 76:32", "shared", "prefill-first")
CHUNKED = ("chunked 2048", "chunked 1024", "chunked 512", "chunked 1024, long prompts 256")


@dataclass(frozen=True)
class Variation:
    """What is different. The first three change the device; auto is told them unless `untold`. The others
    change what auto believes: factors of a prompt's and of a decode step's time, and of output lengths."""

    contention: float | None = None
    switch_seconds: float | None = None
    knee: float = 1.0
    untold: bool = False
    prompt_times: float = 1.0
    decode_times: float = 1.0
    lengths: float = 1.0

    @property
    def device(self) -> tuple[float | None, float | None, float]:
        """What a fixed way sees of it."""
        return (self.contention, self.switch_seconds, self.knee)


VARIATIONS: dict[str, Variation] = {
    "as fitted (contention 20%, switch 20 us)": Variation(),
    "contention 0": Variation(contention=0.0),
    "contention 10%": Variation(contention=0.1),
    "contention 30%": Variation(contention=0.3),
    "contention 40%": Variation(contention=0.4),
    "contention 40%, auto believes 20%": Variation(contention=0.4, untold=True),
    "switch 1 ms": Variation(switch_seconds=1e-3),
    "switch 10 ms": Variation(switch_seconds=1e-2),
    "switch 50 ms": Variation(switch_seconds=5e-2),
    "saturates at 0.7 of the units": Variation(knee=0.7),
    "saturates at 1.4 of the units": Variation(knee=1.4),
    "saturates at 1.4, auto believes 1": Variation(knee=1.4, untold=True),
    "auto's step times 30% low": Variation(prompt_times=0.7, decode_times=0.7),
    "auto's step times 30% high": Variation(prompt_times=1.3, decode_times=1.3),
    "prompts 30% low, decode 30% high": Variation(prompt_times=0.7, decode_times=1.3),
    "prompts 30% high, decode 30% low": Variation(prompt_times=1.3, decode_times=0.7),
    "auto expects outputs of half the length": Variation(lengths=0.5),
    "auto expects outputs of twice the length": Variation(lengths=2.0),
}


class Mistaken:
    """A cost model whose times are off by a factor for prompts (any but pure decode steps) and decodes."""

    def __init__(self, cost: CostModel, prompts: float, decodes: float) -> None:
        self._cost, self._prompts, self._decodes = cost, prompts, decodes

    def seconds(self, work: Work, units: int, beside: Work | None = None, beside_units: int = 0) -> float:
        factor = self._decodes if work.decodes == work.tokens else self._prompts
        return factor * self._cost.seconds(work, units, beside, beside_units)


class Misled:
    """A policy that sees every output end at `factor` times its length."""

    def __init__(self, policy: Policy, factor: float) -> None:
        self._policy, self._factor = policy, factor

    def plan(self, idle: frozenset[Lane], live: Live, kv: Mapping[Lane, KVManager], now: float) -> Plan:
        return self._policy.plan(idle, live, kv, now)

    def __call__(self, event: Event) -> None:
        if not callable(self._policy):
            return
        if not isinstance(event, Finished):
            self._policy(event)
            return
        request, true = event.request, event.request.output
        request.output = [0] * max(round(self._factor * len(true)), 1)
        self._policy(event)
        request.output = true


def simulate(
    variation: Variation,
    scenario: Scenario,
    settings: PolicyConfig,
    *,
    steady: bool,
    observers: Iterable[Observer],
) -> dict[str, Any]:
    """As `semipd.bench.scenario.simulate`, on one device that is different."""
    window = (STEADY[0] * scenario.span, STEADY[1] * scenario.span) if steady else (0.0, float("inf"))
    summary = Summary(targets_of(settings), window)
    spec, known = named_spec(scenario.model), load_device(scenario.device)
    contention, switch_seconds, knee = variation.device
    hardware = known.varied(contention=contention, switch_seconds=switch_seconds, knee=knee)
    cost = StepCost(spec, hardware)
    believed: CostModel = StepCost(spec, known) if variation.untold else cost
    if (variation.prompt_times, variation.decode_times) != (1.0, 1.0):
        believed = Mistaken(believed, variation.prompt_times, variation.decode_times)
    policy = Misled(make_policy(settings, hardware.device(), believed), variation.lengths)
    pool = BlockPool(kv_capacity(spec, hardware) // scenario.block_size, scenario.block_size)
    clock = VirtualClock()
    engine = Engine(
        SimExecutor(hardware.device(), cost, clock),
        policy,
        {Lane.PREFILL: pool, Lane.DECODE: pool},
        clock,
        max_sequences=settings.max_num_seqs,
        max_length=min(spec.max_positions, pool.total * pool.block_size),
        observers=(summary, *observers, policy),
    )
    run(engine, clock, scenario.arrive(), summary)
    engine.check_idle()
    return summary.data()


class VariedRuns(Runs):
    """Runs on the different device."""

    def __init__(self, variation: Variation, scenario: Scenario, policy: PolicyConfig) -> None:
        super().__init__(scenario, policy)
        self._variation = variation

    def result(self, scenario: Scenario, observers: Iterable[Observer]) -> dict[str, Any]:
        return simulate(self._variation, scenario, self.policy, steady=True, observers=observers)


Cells = dict[tuple[str, str, int], dict[str, Any]]


def read_cells(path: Path) -> Cells:
    """(variation, way, seed) -> row."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    return {(row["variation"], row["way"], row["seed"]): row for row in rows}


def source_of(name: str, way: str) -> str:
    """The variation whose cell answers for this one: a fixed way sees only the device, and one that never
    runs two phases side by side sees nothing of it that is varied here."""
    if way == "auto":
        return name
    device = VARIATIONS[name].device if way.startswith(("static", "shared")) else Variation().device
    return next(other for other, variation in VARIATIONS.items() if variation.device == device)


def measure(name: str, way: str, seed: int, guess: int) -> dict[str, Any]:
    """One cell."""
    begin = time.process_time()
    case = CASES[CASE]
    runs = VariedRuns(VARIATIONS[name], scenario_of(case, way, seed), policy_of(case, SLO, way))
    index = goodput_index(runs.attainment, guess)
    row = {"variation": name, "way": way, "seed": seed, "goodput": round(rate_at(case.rate, index), 4)}
    return row | {"index": round(index, 2), "cpu_s": round(time.process_time() - begin, 1)}


def guess_for(way: str, done: Cells) -> int:
    """Where the goodput may be: that of the same way before it, else of any."""
    for wanted in (way, None):
        for (_, found, _), row in reversed(done.items()):
            if wanted in (found, None):
                return round(float(row["index"]))
    return 0


def report(done: Cells, seeds: list[int]) -> str:
    """One line a variation: auto, the best fixed way and the ratios, medians over the seeds."""
    lines = [
        "| what is different | auto, req/s | best fixed way | its req/s | auto over it | over shared |",
        "|---|---|---|---|---|---|",
    ]
    for name in VARIATIONS:
        rates = {
            way: [
                done[key]["goodput"] for seed in seeds if (key := (source_of(name, way), way, seed)) in done
            ]
            for way in ("auto", *FIXED, *CHUNKED)
        }
        rates = {way: values for way, values in rates.items() if len(values) == len(seeds)}
        if "auto" not in rates or len(rates) < 2:
            continue
        best = max((way for way in rates if way != "auto"), key=lambda way: statistics.median(rates[way]))
        lines.append(
            f"| {name} | {statistics.median(rates['auto']):.2f} | {best} "
            f"| {statistics.median(rates[best]):.2f} | {ratio(rates['auto'], rates[best])} "
            f"| {ratio(rates['auto'], rates.get('shared', []))} |"
        )
    return "\n".join(lines)


def ratio(ours: list[float], others: list[float]) -> str:
    """Median of the ratios seed by seed, and the least and most where there are several."""
    ratios = [mine / other for mine, other in zip(ours, others, strict=False) if other > 0.0]
    if not ratios:
        return "-"
    span = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}{span}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=Path, default=Path("benchmarks/results/sensitivity.jsonl"))
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--ways", nargs="*", help="only those whose name starts with one of these")
    parser.add_argument("--report", action="store_true", help="only the table of what is there")
    options = parser.parse_args()
    done, source = read_cells(options.cells), commit()
    wanted = [
        (source_of(name, way), way, seed)
        for seed in options.seeds
        for name in VARIATIONS
        for way in ("auto", *FIXED, *CHUNKED)
        if not options.ways or way.startswith(tuple(options.ways))
    ]
    for name, way, seed in [] if options.report else wanted:
        if (name, way, seed) in done:
            continue
        row = {**measure(name, way, seed, guess_for(way, done)), "commit": source}
        done[name, way, seed] = row
        with options.cells.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:42} {way:30} {seed} {row['goodput']:7.2f}/s {row['cpu_s']:6.1f} s", flush=True)
    print(report(done, options.seeds))
    print(json.dumps({"benchmark": "sensitivity", "cells": len(done)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
