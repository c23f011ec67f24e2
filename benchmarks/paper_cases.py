"""What the paper's evaluation consists of: models, workloads and targets, and the ways to serve them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from semipd.config import PolicyConfig

Settings = dict[str, Any]

UNITS = {"a100-80g": 108, "h200": 132}
UNIT_STEP = 8
CHUNKS = (256, 512, 1024, 2048)
LONG_PROMPTS = ((512, 256), (1024, 256), (2048, 512))  # chunk, most tokens of one prompt in it
PREFILL_HEAVY = (0.07, 0.15, 0.22, 0.3, 0.45)  # of decode, for the static splits
DECODE_HEAVY = (0.07, 0.22, 0.45, 0.6, 0.8)
DEADLINE, ARRIVAL = ", by deadline", ", as they came"  # ends of the names of ways in their unusual order


@dataclass(frozen=True)
class Case:
    """A workload. rate: near the best goodput, requests per second, all devices together; `curve` are the
    parts of it at which latencies are compared. slos: by name, (TTFT, TPOT) in seconds."""

    model: str
    device: str
    workload: str
    rate: float
    slos: dict[str, tuple[float, float]]
    tensor_parallel: int = 1
    requests: int = 800
    arrivals: str = "poisson"
    shares: tuple[float, ...] = PREFILL_HEAVY
    curve: tuple[float, ...] = (0.4, 0.8)
    changing: bool = False  # mixed, bursty or drifting


_SHAREGPT = {"tight": (0.3, 0.15), "loose": (0.4, 0.2)}
_LONGBENCH = {"tight": (2.25, 0.13), "loose": (3.0, 0.18)}
_BIG_SHAREGPT = {"tight": (0.85, 0.3), "loose": (1.1, 0.4)}
_BIG_LONGBENCH = {"tight": (6.0, 0.3), "loose": (8.0, 0.4)}

CASES: dict[str, Case] = {
    "8b-sharegpt": Case("llama3-8b", "a100-80g", "sharegpt", 18.0, _SHAREGPT),
    "8b-longbench": Case("llama3-8b", "a100-80g", "longbench", 7.0, _LONGBENCH),
    "8b-mixed": Case("llama3-8b", "a100-80g", "mixed", 14.0, {"tight": (1.0, 0.1)}, changing=True),
    "8b-bursty": Case(
        "llama3-8b", "a100-80g", "sharegpt", 4.0, {"tight": (0.3, 0.1)}, arrivals="gamma:3", changing=True
    ),
    "8b-drifting": Case(
        "llama3-8b", "a100-80g", "drifting", 2.5, {"tight": (0.6, 0.1)},
        requests=2000, curve=(0.6,), changing=True,
    ),
    "8b-h200-sharegpt": Case("llama3-8b", "h200", "sharegpt", 80.0, _SHAREGPT, requests=2000),
    "8b-h200-longbench": Case("llama3-8b", "h200", "longbench", 25.0, _LONGBENCH, requests=1200),
    "8b-h200-mixed": Case(
        "llama3-8b", "h200", "mixed", 55.0, {"tight": (1.0, 0.1)}, requests=2000, changing=True
    ),
    "70b-sharegpt": Case("llama3-70b", "a100-80g", "sharegpt", 9.0, _BIG_SHAREGPT, 4),
    "70b-longbench": Case("llama3-70b", "a100-80g", "longbench", 3.0, _BIG_LONGBENCH, 4),
    "v2lite-sharegpt": Case(
        "deepseek-v2-lite", "a100-80g", "sharegpt", 40.0, {"as 8b tight": (0.3, 0.15)}, requests=1200
    ),
    "v3-math500": Case(
        "deepseek-v3", "h200", "math500", 14.0, {"as 70b loose": (1.1, 0.4)}, 8, shares=DECODE_HEAVY
    ),
}  # fmt: skip


def static_splits(case: Case) -> Iterator[str]:
    """The static splits of the case, as written in `--split`."""
    units = UNITS[case.device]
    for share in case.shares:
        decode = max(UNIT_STEP, round(share * units / UNIT_STEP) * UNIT_STEP)
        yield f"static:{units - decode},{decode}"


def fixed_ways(case: Case) -> Iterator[tuple[str, Settings]]:
    """Every fixed way by name. One right after another should have a similar goodput: the search for one
    begins where the last one ended."""
    for split in static_splits(case):
        yield split.replace("static:", "static ").replace(",", ":"), {"split": split}
    yield "shared", {"split": "shared"}
    yield "paper", {"split": "paper"}
    yield "prefill-first", {"policy": "prefill-first"}
    for chunk in reversed(CHUNKS):
        yield f"chunked {chunk}", {"policy": "chunked", "chunk_tokens": chunk}
    for chunk, longest in LONG_PROMPTS:
        chunked = {"policy": "chunked", "chunk_tokens": chunk, "long_prompt_threshold": longest}
        yield f"chunked {chunk}, long prompts {longest}", chunked
    if case.tensor_parallel == 1:
        yield "disaggregated, 2 devices", {"policy": "disaggregated", "transfer_bandwidth": 64 * 2**30}


def ways(case: Case) -> dict[str, Settings]:
    """Every way by name: the fixed ones, auto, and both in the order of prompts that is the other's."""
    fixed = dict(fixed_ways(case))
    auto: dict[str, Settings] = {
        "auto": {"split": "auto"},
        f"auto{ARRIVAL}": {"split": "auto", "prompt_order": "fcfs"},
    }
    ordered = {
        f"{way}{DEADLINE}": settings | {"prompt_order": "deadline"}
        for way, settings in fixed.items()
        if not way.startswith("disaggregated")
    }
    return fixed | auto | ordered


def policy_of(case: Case, slo: str, way: str) -> PolicyConfig:
    """The settings of a way under these targets. Raises KeyError for an unknown name."""
    ttft, tpot = case.slos[slo]
    policy = PolicyConfig(max_num_seqs=512, ttft_slo=ttft, tpot_slo=tpot)
    return dataclasses.replace(policy, **ways(case)[way])
