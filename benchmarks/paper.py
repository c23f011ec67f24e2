"""The evaluation of semi-PD (arXiv 2504.19867) in simulation: goodput and latency of every way.

One cell is (case, targets, way, seed): the rate at which 90% of the requests meet both targets, and
latencies at fixed rates. All ways see the same requests. Cells are kept in a JSON-lines file with the
commit they were made from and are not computed again unless they hold fewer requests than are asked for,
so a run can be stopped and resumed; several runs with different --only or --seeds can share a file.
Seeds 1 to 3 are for the tables; policies are tuned on seeds from 100 on, in a file of their own.

    python -m benchmarks.paper --cells benchmarks/results/paper.jsonl [--only 8b-sharegpt] [--seeds 1 2 3]
    python -m benchmarks.paper_table --cells benchmarks/results/paper.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.paper_cases import ARRIVAL, CASES, DEADLINE, Case, policy_of, ways
from benchmarks.search import GRID, goodput_index, rate_at
from semipd.bench.scenario import STEADY, Scenario, simulate
from semipd.config import PolicyConfig
from semipd.core.ports import Observer
from semipd.core.types import Event, Finished

HOPELESS = (
    0.2  # share of missed requests at which a run of the search is broken off: its verdict is certain
)

Key = tuple[str, str, str, int]
Cells = dict[Key, dict[str, Any]]


class Hopeless(Exception):
    """More requests have missed than a run may that meets its goal."""


class GiveUp:
    """An observer that raises Hopeless once `allowed` of the requests that count have missed."""

    def __init__(self, policy: PolicyConfig, window: tuple[float, float], allowed: float) -> None:
        self._ttft, self._tpot = policy.ttft_slo or math.inf, policy.tpot_slo or math.inf
        self._window, self._allowed = window, allowed
        self.missed = 0

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Finished):
            return
        request = event.request
        if self._window[0] <= request.arrival <= self._window[1]:
            gaps = max(len(request.output) - 1, 1)
            tpot = (request.last_token_at - request.first_token_at) / gaps
            late = request.first_token_at - request.arrival > self._ttft
            self.missed += late or tpot > self._tpot
            if self.missed > self._allowed:
                raise Hopeless


def scenario_of(case: Case, way: str, seed: int, requests: int | None = None) -> Scenario:
    """The case as a scenario at its nominal rate per device that the others use."""
    return Scenario(
        model=case.model,
        device=case.device,
        tensor_parallel=case.tensor_parallel,
        devices=2 if way.startswith("disaggregated") else 1,
        workload=case.workload,
        arrivals=case.arrivals,
        rate=case.rate * (2 if way.startswith("disaggregated") else 1),
        requests=requests or case.requests,
        seed=seed,
    )


class Runs:
    """Runs of one way at points of the grid, kept by index."""

    def __init__(self, scenario: Scenario, policy: PolicyConfig) -> None:
        self._scenario, self.policy = scenario, policy
        self._attainment: dict[int, float] = {}
        self.points: dict[int, dict[str, float]] = {}  # the runs that went to their end

    def attainment(self, index: int) -> float:
        """At a rate; of a hopeless run an upper bound, below the goal."""
        if index not in self._attainment:
            scenario = dataclasses.replace(self._scenario, rate=rate_at(self._scenario.rate, index))
            window = (STEADY[0] * scenario.span, STEADY[1] * scenario.span)
            counted = sum(window[0] <= arrival.time <= window[1] for arrival in scenario.arrive())
            try:
                self._run(index, GiveUp(self.policy, window, HOPELESS * counted))
            except Hopeless:
                self._attainment[index] = 1.0 - HOPELESS
        return self._attainment[index]

    def point(self, index: int) -> dict[str, float]:
        """Latencies at a rate, however bad."""
        if index not in self.points:
            self._run(index)
        return self.points[index]

    def result(self, scenario: Scenario, observers: Iterable[Observer]) -> dict[str, Any]:
        """One run; its steady part."""
        return simulate(scenario, self.policy, steady=True, observers=observers)

    def _run(self, index: int, *observers: GiveUp) -> None:
        scenario = dataclasses.replace(self._scenario, rate=rate_at(self._scenario.rate, index))
        result = self.result(scenario, observers)
        self._attainment[index] = result["attainment"]
        self.points[index] = {
            "rate": round(scenario.rate / scenario.devices, 4),
            "attainment": round(result["attainment"], 4),
            "e2e_mean_s": round(result["e2e_s"]["mean"], 4),
            "ttft_mean_s": round(result["ttft_s"]["mean"], 4),
            "ttft_p90_s": round(result["ttft_s"]["p90"], 4),
            "tpot_p90_s": round(result["tpot_s"]["p90"], 5),
        }


def curve_indices(case: Case) -> list[int]:
    """Points of the grid at which every way's latency is taken."""
    return [round(math.log(part) / math.log(GRID)) for part in case.curve]


def measure(key: Key, guess: int, requests: int | None = None) -> dict[str, Any]:
    """One cell. guess: index of the grid where the goodput may be."""
    name, slo, way, seed = key
    case = CASES[name]
    begin = time.process_time()
    scenario = scenario_of(case, way, seed, requests)
    runs = Runs(scenario, policy_of(case, slo, way))
    curve = [runs.point(index) for index in curve_indices(case)]
    index = goodput_index(runs.attainment, guess)
    return {
        "case": name,
        "slo": slo,
        "way": way,
        "seed": seed,
        "requests": scenario.requests,
        "goodput": round(rate_at(case.rate, index), 4),
        "index": round(index, 2),
        "curve": curve,
        "tried": [
            [point[name] for name in ("rate", "attainment", "e2e_mean_s", "ttft_p90_s", "tpot_p90_s")]
            for _, point in sorted(runs.points.items())
        ],
        "cpu_s": round(time.process_time() - begin, 1),
    }


def key_of(row: dict[str, Any]) -> Key:
    return (row["case"], row["slo"], row["way"], row["seed"])


def read_cells(path: Path) -> Cells:
    """Every finished cell, the last one of each key; empty without a file."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {key_of(row): row for row in rows}


def relative(way: str, names: list[str]) -> str:
    """The way whose goodput is likely to be near: the same in the other order of prompts, or the one before
    it; for auto the second static split, which is often among the best."""
    if way == "auto":
        return names[1]
    plain = way.removesuffix(DEADLINE).removesuffix(ARRIVAL)
    return plain if plain != way else names[max(names.index(way) - 1, 0)]


def guess_for(key: Key, done: Cells) -> int:
    """Where the goodput may be: that of the same way with fewer requests, another seed or other targets, or
    of its relative; else the nominal rate."""
    name, slo, way, seed = key
    near = relative(way, list(ways(CASES[name])))
    for wanted in (
        (slo, way, seed),
        (slo, way, None),
        (None, way, None),
        (slo, near, seed),
        (slo, near, None),
    ):
        for (case, *found), row in reversed(done.items()):
            if case == name and all(want in (has, None) for want, has in zip(wanted, found, strict=True)):
                return round(float(row["index"]))
    return 0


def commit() -> str:
    """The commit of this checkout, with "+" when files of the engine differ from it."""
    words = ["git", "rev-parse", "--short=9", "HEAD"]
    name = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "semipd"], check=False).returncode
    return name + "+" * bool(changed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=Path, default=Path("benchmarks/results/paper.jsonl"))
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--requests", type=int, help="per run (default: the case's own)")
    parser.add_argument("--ways", nargs="*", help="only those whose name starts with one of these")
    parser.add_argument("--skip", nargs="*", default=[], help="none whose name starts with one of these")
    parser.add_argument("--slos", nargs="*", help="only these targets")
    parser.add_argument("--usual-order", action="store_true", help="no way in the other order of prompts")
    options = parser.parse_args()
    source, new = commit(), 0
    for key in (
        (name, slo, way, seed)
        for name in options.only
        for seed in options.seeds
        for slo in CASES[name].slos
        for way in ways(CASES[name])
        if (not options.ways or way.startswith(tuple(options.ways)))
        and not way.startswith(tuple(options.skip))
        and (not options.slos or slo in options.slos)
        and not (options.usual_order and way.endswith((DEADLINE, ARRIVAL)))
    ):
        done = read_cells(options.cells)  # again, as another run may have written to it
        if key in done and done[key]["requests"] >= (options.requests or CASES[key[0]].requests):
            continue
        row = {**measure(key, guess_for(key, done), options.requests), "commit": source}
        with options.cells.open("a") as file:
            file.write(json.dumps(row) + "\n")
        new += 1
        print(f"{key[0]:18} {key[1]:6} {key[2]:30} {key[3]} {row['goodput']:7.2f}/s {row['cpu_s']:6.1f} s")
        sys.stdout.flush()
    print(json.dumps({"benchmark": "paper", "cells": len(read_cells(options.cells)), "new": new}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
