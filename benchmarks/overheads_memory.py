"""Memory of all processes of `semipd serve` after traffic, against what it may take: the weights, the
packed head where it is tied to the embedding, the KV pool, and 600 MB for everything else.

PSS shares each page among the processes that map it, so the sum counts every page once. Of the KV pool only
what requests have used is in memory, so only that much is allowed for it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.overheads_http import Server, some_prompt
from benchmarks.shapes import write_shape
from semipd.model.spec import load_spec

REST = 600e6
BLOCK_SIZE = 16
STREAMS, OUTPUT = 8, 16


def measure(shape: str, folder: Path, dtype: str, kv_blocks: int, requests: int) -> dict[str, Any]:
    """Bytes by process, in all, and allowed."""
    spec = load_spec(write_shape(shape, folder))
    itemsize = 4 if dtype == "float32" else 2
    weights = spec.parameters * itemsize
    head = spec.vocabulary * spec.hidden * itemsize if spec.tied else 0
    pool = kv_blocks * BLOCK_SIZE * spec.kv_bytes_per_token(itemsize)
    flags = ("--dtype", dtype, "--kv-blocks", str(kv_blocks), "--max-model-len", "2048")
    with Server(folder, *flags) as server:
        _traffic(server.url, requests)
        family = server.family()
        processes = {name: process.memory_full_info().pss for name, process in family.items()}
        touched = sum(map(_pool_pss, family.values()))
    total, bound = sum(processes.values()), weights + head + touched + REST
    return {
        "shape": shape,
        "dtype": dtype,
        "processes": processes,
        "pss": total,
        "weights": weights,
        "tied_head": head,
        "kv_pool": pool,
        "kv_touched": touched,
        "bound": bound,
        "met": total <= bound,
    }


def _pool_pss(process: psutil.Process) -> int:
    """This process's share of the KV pool, in bytes."""
    return sum(part.pss for part in process.memory_maps() if "semipd-kv" in part.path)


def _traffic(url: str, requests: int) -> None:
    """Requests of some hundred tokens, several at a time: every process has then done its work."""
    with httpx.Client(base_url=url, timeout=600.0, trust_env=False) as client:

        def ask(seed: int) -> None:
            prompt = [token for part in range(4) for token in some_prompt(4 * seed + part)]
            body = {"prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True}
            client.post("/v1/completions", json=body).raise_for_status()

        with ThreadPoolExecutor(STREAMS) as pool:
            list(pool.map(ask, range(requests)))
