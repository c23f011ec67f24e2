"""What planning by `auto` costs a step: CPU time of every `plan` call while about 64 requests decode.

The simulator runs the engine itself, so these are the calls that a real device would see; the times are of
this machine's CPU. A call that launches a step on both lanes counts as two steps.

    python -m benchmarks.planning [--running 64] [--seeds 0 1 2] [--repeats 3] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import deliver, describe
from semipd.bench.scenario import Scenario, simulate
from semipd.config import PolicyConfig
from semipd.core.auto import Auto
from semipd.core.live import Live
from semipd.core.ports import KVManager
from semipd.core.types import Lane, Plan

NEAR = 8  # requests more or less that still count
LIMIT_US = 100.0


class Timed:
    """Stands in for `Auto.plan` and notes what the calls take."""

    def __init__(self, running: int) -> None:
        self._running, self._plan = running, Auto.plan
        self.calls: list[float] = []
        self.steps = 0

    def __enter__(self) -> Timed:
        timed = self

        def plan(
            auto: Auto, idle: frozenset[Lane], live: Live, kv: Mapping[Lane, KVManager], now: float
        ) -> Plan:
            counts = abs(len(live.decoding) - timed._running) <= NEAR
            begin = time.thread_time()
            result = timed._plan(auto, idle, live, kv, now)
            if counts:
                timed.calls.append(time.thread_time() - begin)
                timed.steps += sum(bool(slices) for slices in result.slices.values())
            return result

        Auto.plan = plan  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        Auto.plan = self._plan  # type: ignore[method-assign]


def measure(running: int, seeds: list[int]) -> dict[str, float]:
    """Microseconds of planning in one round of simulations."""
    settings = PolicyConfig(max_num_seqs=512, ttft_slo=0.3, tpot_slo=0.15, split="auto")
    gc.collect()
    gc.freeze()  # as the engine's process does
    with Timed(running) as timed:
        for seed in seeds:
            simulate(Scenario("llama3-8b", "a100-80g", rate=21.0, requests=1500, seed=seed), settings)
    whole = sum(timed.calls) * 1e6
    return {
        "calls": len(timed.calls),
        "steps": timed.steps,
        "mean_call_us": round(whole / len(timed.calls), 1),
        "median_call_us": round(statistics.median(timed.calls) * 1e6, 1),
        "p99_call_us": round(statistics.quantiles(timed.calls, n=100)[98] * 1e6, 1),
        "mean_step_us": round(whole / timed.steps, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    for _ in range(options.repeats):
        rounds.append(measure(options.running, options.seeds))
        print(
            "{calls} calls, {steps} steps: {mean_step_us} us a step, median call {median_call_us}".format(
                **rounds[-1]
            )
        )
    steps = [row["mean_step_us"] for row in rounds]
    deliver(
        {
            "benchmark": "planning",
            "machine": describe(),
            "running": options.running,
            "limit_us": LIMIT_US,
            "rounds": rounds,
            "mean_step_us": [min(steps), statistics.median(steps), max(steps)],
        },
        options.out,
    )


if __name__ == "__main__":
    main()
