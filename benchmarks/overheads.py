"""What the engine adds to the arithmetic, on a model so small that overheads dominate (12.6M parameters).

throughput: offline, 16 requests of 128 in and 64 out, beside transformers' `generate` in batches of 1, 8
and 16 and its continuous batching, interleaved in one run. http: what HTTP adds to a lone request's first
token. memory: PSS of all processes of a server after traffic, for this model and the 0.5B shape, against
weights, packed tied head, KV pool and 600 MB.

    python -m benchmarks.overheads [--parts throughput http memory] [--rounds 3] [--pairs 40]
        [--peers 8 16 continuous] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import deliver, describe
from benchmarks.overheads_http import LIMIT_MS, compare
from benchmarks.overheads_memory import measure as measure_memory
from benchmarks.shapes import write_shape
from semipd import LLM, SamplingParams

SHAPE = "12m"
REQUESTS, INPUT, OUTPUT = 16, 128, 64
KV_BLOCKS = 2048
TARGET_RATE = 1500  # output tokens per second
PARTS = ("throughput", "http", "memory")
PEERS = ("1", "8", "16", "continuous")
MEMORY = {SHAPE: 2048, "0.5b": 1024}  # KV blocks of the servers whose memory is read


def some_prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(8000) for _ in range(INPUT)] for _ in range(REQUESTS)]


def ours(folder: Path, dtype: str) -> tuple[Callable[[int], float], Callable[[], None]]:
    """Output tokens per second of one round, and how to end it."""
    llm = LLM(str(folder), load_format="dummy", dtype=dtype, kv_blocks=KV_BLOCKS, max_model_len=2048)
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)

    def measure(seed: int) -> float:
        prompts = some_prompts(seed)
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params)
        elapsed = time.perf_counter() - begin
        return sum(len(out.outputs[0].token_ids) for out in outputs) / elapsed

    return measure, llm.close


def transformers_peer(folder: Path, batch: int, dtype: str) -> Callable[[int], float]:
    """`generate` on batches of `batch` equal-length prompts."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()

    def measure(seed: int) -> float:
        prompts = torch.tensor(some_prompts(seed))
        begin = time.perf_counter()
        with torch.inference_mode():
            for part in prompts.split(batch):
                model.generate(
                    part,
                    attention_mask=torch.ones_like(part),
                    max_new_tokens=OUTPUT,
                    min_new_tokens=OUTPUT,
                    do_sample=False,
                    pad_token_id=0,
                )
        return REQUESTS * OUTPUT / (time.perf_counter() - begin)

    return measure


def continuous_peer(folder: Path, dtype: str) -> Callable[[int], float]:
    """transformers' continuous batching: paged attention, all requests at once, a manager that is kept."""
    import torch
    import transformers
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
    wanted = transformers.GenerationConfig(
        max_new_tokens=OUTPUT, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # Its own sizing reads a GPU's memory; this holds all requests, and all prompts fit one batch.
    pages = ContinuousBatchingConfig(page_size=256, num_blocks=4 * REQUESTS, max_batch_tokens=4096)

    def measure(seed: int) -> float:
        prompts = some_prompts(seed)
        begin = time.perf_counter()
        found = model.generate_batch(
            prompts,
            generation_config=wanted,
            continuous_batching_config=pages,
            persistent_manager=True,
        )
        elapsed = time.perf_counter() - begin
        tokens = sum(len(output.generated_tokens) for output in found.values())
        if tokens != REQUESTS * OUTPUT:
            raise SystemExit(f"continuous batching gave {tokens} tokens, not {REQUESTS * OUTPUT}")
        return tokens / elapsed

    return measure


def throughput(folder: Path, rounds: int, peers: Sequence[str], dtype: str) -> dict[str, list[float]]:
    """Interleaved rounds of everybody, after one round of warm-up."""
    measure, close = ours(folder, dtype)
    runners = {"semipd": measure}
    for peer in peers:
        if peer == "continuous":
            runners["transformers continuous batching"] = continuous_peer(folder, dtype)
        else:
            runners[f"transformers generate, batch {peer}"] = transformers_peer(folder, int(peer), dtype)
    try:
        for runner in runners.values():
            runner(0)
        rates: dict[str, list[float]] = {name: [] for name in runners}
        for number in range(1, rounds + 1):
            for name, runner in runners.items():
                rates[name].append(runner(number))
    finally:
        close()
    return rates


def show_throughput(console: Console, rates: dict[str, list[float]], dtype: str) -> None:
    best = statistics.median(rates["semipd"])
    table = Table(title=f"{REQUESTS} requests, {INPUT} in, {OUTPUT} out, 12.6M parameters, {dtype}")
    for heading in ("engine", "output tok/s (median)", "ours is"):
        table.add_column(heading)
    for name, values in rates.items():
        table.add_row(name, f"{statistics.median(values):.0f}", f"{best / statistics.median(values):.2f}x")
    console.print(table)
    console.print(f"target: {TARGET_RATE} tok/s: {_verdict(best >= TARGET_RATE)}")


def show_http(console: Console, found: dict[str, float]) -> None:
    console.print(
        f"first token of a lone request, {found['pairs']} pairs in turn: {found['http_ms']:.1f} ms over "
        f"HTTP, {found['library_ms']:.1f} ms in the library; HTTP adds {found['added_ms']:.1f} ms (median "
        f"of the differences). Of the server's mean of {found['http_mean_ms']:.1f} ms its engine counts "
        f"{found['http_engine_mean_ms']:.1f}"
    )
    console.print(f"target: at most {LIMIT_MS:g} ms: {_verdict(found['added_ms'] <= LIMIT_MS)}")


def show_memory(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="PSS of all processes of a server after traffic, MB")
    for heading in (
        "shape",
        "dtype",
        "PSS",
        "weights",
        "tied head",
        "KV pool",
        "of it used",
        "allowed",
        "target",
    ):
        table.add_column(heading)
    for row in rows:
        names = ("pss", "weights", "tied_head", "kv_pool", "kv_touched", "bound")
        sizes = [f"{row[name] / 1e6:.0f}" for name in names]
        table.add_row(row["shape"], row["dtype"], *sizes, _verdict(row["met"]))
    console.print(table)
    for row in rows:
        parts = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in row["processes"].items())
        console.print(f"{row['shape']}: {parts}", markup=False)


def _verdict(met: bool) -> str:
    return "pass" if met else "MISS"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3, help="of throughput")
    parser.add_argument("--pairs", type=int, default=40, help="of lone requests")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--requests", type=int, default=32, help="of traffic before memory is read")
    parser.add_argument("--shapes", nargs="+", choices=tuple(MEMORY), default=tuple(MEMORY))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="12.6M model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Console(width=120)
    result: dict[str, Any] = {"benchmark": "overheads", "dtype": options.dtype, "machine": describe()}
    with tempfile.TemporaryDirectory() as name:
        folder = write_shape(SHAPE, Path(name))
        if "throughput" in options.parts:
            result["tokens_per_s"] = throughput(folder, options.rounds, options.peers, options.dtype)
            show_throughput(console, result["tokens_per_s"], options.dtype)
        if "http" in options.parts:
            flags = {"dtype": options.dtype, "kv_blocks": KV_BLOCKS, "max_model_len": 2048}
            result["first_token"] = compare(folder, options.pairs, flags)
            show_http(console, result["first_token"])
    if "memory" in options.parts:
        rows = []
        for shape in options.shapes:
            dtype = options.dtype if shape == SHAPE else "bfloat16"
            with tempfile.TemporaryDirectory() as name:
                rows.append(measure_memory(shape, Path(name), dtype, MEMORY[shape], options.requests))
        result["memory"] = rows
        show_memory(console, rows)
    deliver(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
