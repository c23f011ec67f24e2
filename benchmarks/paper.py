"""The evaluation of semi-PD (arXiv 2504.19867) in simulation: goodput and latency of every policy.

One cell is (model, workload, SLO, policy, seed): the rate at which 90% of the requests meet both targets,
found by bisection, and the mean latency at two fixed rates. Cells are kept in a JSON-lines file and not
computed again, so a run can be stopped and resumed.

    python -m benchmarks.paper --cells benchmarks/results/paper.jsonl [--only 8b-sharegpt] [--seeds 0 1 2]
    python -m benchmarks.paper_table --cells benchmarks/results/paper.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semipd.bench.scenario import Scenario, find_goodput, simulate
from semipd.config import PolicyConfig

MAX_BATCH = 512
RATES = (0.5, 0.8)  # of the case's nominal rate, for mean latencies
PRECISION = 0.04  # of a goodput, relative


@dataclass(frozen=True)
class Case:
    """A row of the paper's evaluation. rate: nominal requests per second, all devices together.
    published: goodput of semi-PD over vLLM's default, vLLM chunked and DistServe, where given."""

    model: str
    device: str
    workload: str
    rate: float
    slos: dict[str, tuple[float, float]]
    tensor_parallel: int = 1
    requests: int = 800


CASES: dict[str, Case] = {
    "8b-sharegpt": Case(
        "llama3-8b", "a100-80g", "sharegpt", 12.0, {"tight": (0.3, 0.15), "loose": (0.4, 0.2)}
    ),
    "8b-longbench": Case(
        "llama3-8b", "a100-80g", "longbench", 4.0, {"tight": (2.25, 0.13), "loose": (3.0, 0.18)}
    ),
    "70b-sharegpt": Case(
        "llama3-70b", "a100-80g", "sharegpt", 6.0, {"tight": (0.85, 0.3), "loose": (1.1, 0.4)}, 4
    ),
    "70b-longbench": Case(
        "llama3-70b", "a100-80g", "longbench", 2.0, {"tight": (6.0, 0.3), "loose": (8.0, 0.4)}, 4
    ),
    "v2lite-sharegpt": Case("deepseek-v2-lite", "a100-80g", "sharegpt", 14.0, {"as 8b tight": (0.3, 0.15)}),
    "v3-math500": Case("deepseek-v3", "h200", "math500", 14.0, {"as 70b loose": (1.1, 0.4)}, 8),
    "8b-mixed": Case("llama3-8b", "a100-80g", "mixed", 6.0, {"tight": (1.0, 0.1)}),
    "8b-bursty": Case("llama3-8b", "a100-80g", "sharegpt", 10.0, {"tight": (0.3, 0.1)}),
    "8b-drifting": Case("llama3-8b", "a100-80g", "drifting", 6.0, {"tight": (0.6, 0.1)}),
}
ARRIVALS = {"8b-bursty": "gamma:3"}
CHUNKS = (512, 1024, 2048)
SHARES = (0.22, 0.3, 0.37, 0.45, 0.6)  # of decode, for the static splits


def ways(case: Case) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every policy by name."""
    units = {"a100-80g": 108, "h200": 132}[case.device]
    for share in SHARES:
        decode = max(8, round(share * units / 8) * 8)
        yield f"static {units - decode}:{decode}", {"split": f"static:{units - decode},{decode}"}
    yield "shared", {"split": "shared"}
    yield "paper", {"split": "paper"}
    yield "auto", {"split": "auto"}
    yield "prefill-first", {"policy": "prefill-first"}
    for chunk in CHUNKS:
        yield f"chunked {chunk}", {"policy": "chunked", "chunk_tokens": chunk}
    yield (
        "chunked 2048, long prompts 512",
        {"policy": "chunked", "chunk_tokens": 2048, "long_prompt_threshold": 512},
    )
    if case.tensor_parallel == 1:
        yield "disaggregated, 2 devices", {"policy": "disaggregated", "transfer_bandwidth": 64 * 2**30}


def measure(name: str, slo: str, way: str, seed: int, requests: int | None) -> dict[str, Any]:
    """One cell."""
    case = CASES[name]
    ttft, tpot = case.slos[slo]
    settings = dict(ways(case))[way]
    policy = PolicyConfig(max_num_seqs=MAX_BATCH, ttft_slo=ttft, tpot_slo=tpot, **settings)
    disaggregated = policy.policy == "disaggregated"
    scenario = Scenario(
        model=case.model,
        device=case.device,
        tensor_parallel=case.tensor_parallel,
        devices=2 if disaggregated else 1,
        workload=case.workload,
        arrivals=ARRIVALS.get(name, "poisson"),
        rate=case.rate,
        requests=requests or case.requests,
        seed=seed,
    )
    per = 2 if disaggregated else 1  # rates are per device that the others use
    begin = time.perf_counter()
    best = find_goodput(scenario, policy, PRECISION)
    curve = []
    for factor in RATES:
        rate = factor * case.rate * per
        result = simulate(dataclasses.replace(scenario, rate=rate), policy, steady=True)
        curve.append(
            {
                "rate": rate / per,
                "e2e_mean_s": result["e2e_s"]["mean"],
                "ttft_p90_s": result["ttft_s"]["p90"],
                "tpot_p90_s": result["tpot_s"]["p90"],
                "attainment": result["attainment"],
            }
        )
    return {
        "case": name,
        "slo": slo,
        "way": way,
        "seed": seed,
        "requests": scenario.requests,
        "goodput": best["goodput"] / per,
        "curve": curve,
        "seconds": time.perf_counter() - begin,
    }


def _key(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return (row["case"], row["slo"], row["way"], row["seed"])


def read_cells(path: Path) -> dict[tuple[str, str, str, int], dict[str, Any]]:
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {_key(row): row for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=Path, default=Path("benchmarks/results/paper.jsonl"))
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--requests", type=int, help="per run (default: the case's own)")
    parser.add_argument("--ways", nargs="*", help="only policies whose name starts with one of these")
    parser.add_argument("--slos", nargs="*", help="only these SLOs")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    done = read_cells(options.cells)
    todo = [
        (name, slo, way, seed, options.requests)
        for seed in options.seeds
        for name in options.only
        for slo in CASES[name].slos
        for way, _ in ways(CASES[name])
        if (name, slo, way, seed) not in done
        and (not options.ways or way.startswith(tuple(options.ways)))
        and (not options.slos or slo in options.slos)
    ]
    with ProcessPoolExecutor(options.workers) as pool, options.cells.open("a") as file:
        for row in pool.map(measure, *zip(*todo, strict=True)) if todo else ():
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(
                f"{row['case']:16} {row['slo']:12} {row['way']:30} {row['goodput']:7.2f} req/s", flush=True
            )
    print(json.dumps({"benchmark": "paper", "cells": len(read_cells(options.cells)), "new": len(todo)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
