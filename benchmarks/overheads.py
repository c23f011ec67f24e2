"""What the engine adds to the arithmetic, on a model so small that overheads dominate (12.6M parameters).

Offline throughput of 16 requests (128 in, 64 out), beside transformers' `generate` in batches and its
continuous batching, interleaved in one run; what HTTP adds to a lone request's first token; and the memory
of all processes (PSS), beside weights and KV pool.

    python -m benchmarks.overheads [--rounds 3] [--no-peers] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.shapes import SHAPES, write_shape
from semipd import LLM, SamplingParams

SHAPE = "12m"
REQUESTS, INPUT, OUTPUT = 16, 128, 64
KV_BLOCKS, BLOCK_SIZE = 2048, 16


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


def throughput(folder: Path, rounds: int, peers: bool, dtype: str) -> dict[str, list[float]]:
    """Interleaved rounds of everybody, after one round of warm-up."""
    measure, close = ours(folder, dtype)
    runners = {"semipd": measure}
    if peers:
        runners["transformers generate, batch 8"] = transformers_peer(folder, 8, dtype)
        runners["transformers generate, batch 16"] = transformers_peer(folder, 16, dtype)
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


def http_overhead(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds to the first token of lone requests, through HTTP and through the library, in turn."""
    from tests.checkpoints import write_tokenizer

    write_tokenizer(folder)
    command = [sys.executable, "-m", "semipd.cli", "serve", str(folder), "--load-format", "dummy"]
    command += ["--port", "0", "--dtype", "float32", "--kv-blocks", str(KV_BLOCKS), "--log-level", "error"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = next(word for line in server.stdout for word in line.split() if word.startswith("http://"))
        over_http, memory = _first_tokens_over_http(url, rounds), _pss(server.pid)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(10)
    with LLM(str(folder), load_format="dummy", dtype="float32", kv_blocks=KV_BLOCKS) as llm:
        inside = asyncio.run(_first_tokens_inside(llm, rounds))
    return {
        "http_ms": 1e3 * statistics.median(over_http),
        "library_ms": 1e3 * statistics.median(inside),
        "added_ms": 1e3 * (statistics.median(over_http) - statistics.median(inside)),
        "pss_mb": memory / 1e6,
    }


def _first_tokens_over_http(url: str, rounds: int) -> list[float]:
    seconds = []
    with httpx.Client(base_url=url, timeout=30.0) as client:
        for number in range(-3, rounds):
            body = {"prompt": some_prompts(number)[0], "max_tokens": 4, "temperature": 0, "stream": True}
            begin = time.perf_counter()
            with client.stream("POST", "/v1/completions", json=body) as response:
                next(line for line in response.iter_lines() if line.startswith("data:"))
                seconds.append(time.perf_counter() - begin)
    return seconds[3:]


async def _first_tokens_inside(llm: LLM, rounds: int) -> list[float]:
    seconds = []
    for number in range(-3, rounds):
        begin = time.perf_counter()
        params = SamplingParams(max_tokens=4, temperature=0.0)
        stream = llm.stream(some_prompts(number)[0], params)
        await anext(stream)
        seconds.append(time.perf_counter() - begin)
        async for _ in stream:
            pass
    return seconds[3:]


def _pss(pid: int) -> float:
    """Proportional set size of a process and everything below it, in bytes."""
    parent = psutil.Process(pid)
    return sum(process.memory_full_info().pss for process in [parent, *parent.children(recursive=True)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="offline part")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as name:
        folder = write_shape(SHAPE, Path(name))
        rates = throughput(folder, options.rounds, not options.no_peers, options.dtype)
        added = http_overhead(folder, 20)
    best = statistics.median(rates["semipd"])
    table = Table(title=f"{REQUESTS} requests, {INPUT} in, {OUTPUT} out, 12.6M parameters, {options.dtype}")
    for heading in ("engine", "output tok/s (median)", "ours is"):
        table.add_column(heading)
    for name, values in rates.items():
        table.add_row(name, f"{statistics.median(values):.0f}", f"{best / statistics.median(values):.2f}x")
    console = Console()
    console.print(table)
    shape: dict[str, Any] = SHAPES[SHAPE]
    pool = KV_BLOCKS * BLOCK_SIZE * shape["num_hidden_layers"] * 2 * shape["hidden_size"] * 4 / 1e6
    console.print(
        f"first token: {added['http_ms']:.1f} ms over HTTP, {added['library_ms']:.1f} ms inside; "
        f"memory {added['pss_mb']:.0f} MB, of which the KV pool is {pool:.0f} MB when full"
    )
    result = {
        "benchmark": "overheads",
        "dtype": options.dtype,
        "machine": describe(),
        "tokens_per_s": rates,
        **added,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
