"""Every compiled kernel beside its plain torch twin, interleaved in one run, on the shapes of a 0.5B model.

    python -m benchmarks.cpu_kernels [--threads 2] [--rounds 15] [--step]

A matrix is never timed twice in a row: several copies of the layer take turns, so that weights and KV come
from memory, as they do in a model. --step times whole steps too (it loads the model four times, 4 GB).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.shapes import write_shape
from semipd.core.types import BlockAppend, Sampling, Slice
from semipd.execute.runner import Runner
from semipd.execute.storage import SlotTable
from semipd.model.attention import Pool, Ragged, attend, plan_attention
from semipd.model.compiled import compiled_kind
from semipd.model.dense import load_model
from semipd.model.kernels import Kernels, load_kernels
from semipd.model.layers import choose_kind
from semipd.model.quantize import quantized_kind
from semipd.model.row_ops import CompiledRowOps, Heads, PlainRowOps

HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 896, 4864, 14, 2, 64, 16
LAYERS = 6  # copies that take turns
DTYPE = torch.bfloat16

Case = tuple[str, dict[str, Callable[[], Any]]]  # a name, and the ways to compute it; the plain one first


def attention_cases(kernels: Kernels) -> Iterator[Case]:
    for batch, start, count in (
        (1, 512, 1),
        (8, 512, 1),
        (8, 2000, 1),
        (16, 2000, 1),
        (4, 16000, 1),
        (1, 0, 256),
        (1, 0, 1024),
        (1, 3072, 1024),
        (1, 0, 4096),
    ):
        blocks = -(-(start + count) // BLOCK_SIZE)
        tables = (
            np.random.default_rng(0).permutation(batch * blocks).reshape(batch, blocks).astype(np.int32)
        )
        layers = [
            torch.randn(2, batch * blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM).to(DTYPE) for _ in range(2)
        ]
        step = Ragged(np.full(batch, start), np.full(batch, count), tables)
        query = torch.randn(batch * count, HEADS, HEAD_DIM).to(DTYPE)
        kind = "decode" if count == 1 else "prefill"
        ways = {}
        for name, chosen in (("torch", None), ("kernel", kernels)):
            plan = plan_attention(step, Pool.of(layers[0][None]), None, chosen)
            ways[name] = lambda plan=plan, query=query, layers=layers: [
                attend(query, x, plan) for x in layers
            ]
        yield f"{kind} attention {batch} x {start}+{count}", ways


def linear_cases(kernels: Kernels) -> Iterator[Case]:
    onednn = choose_kind(DTYPE)
    compiled = compiled_kind(kernels, DTYPE, onednn)
    kinds = {"torch": onednn, "bf16": compiled}
    kinds |= {name: quantized_kind(kernels, DTYPE, name, compiled) for name in ("int8", "int4")}
    layers = {
        name: [
            (
                kind.linear(torch.randn(1152, HIDDEN).to(DTYPE), None),
                kind.linear(torch.randn(HIDDEN, HIDDEN).to(DTYPE), None),
                kind.gated(
                    torch.randn(MLP, HIDDEN).to(DTYPE), None, torch.randn(MLP, HIDDEN).to(DTYPE), None
                ),
                kind.linear(torch.randn(HIDDEN, MLP).to(DTYPE), None),
            )
            for _ in range(LAYERS)
        ]
        for name, kind in kinds.items()
    }
    for rows in (1, 4, 8, 16, 32, 64, 256, 1024):
        narrow, wide = torch.randn(rows, HIDDEN).to(DTYPE), torch.randn(rows, MLP).to(DTYPE)

        def run(name: str, narrow: torch.Tensor = narrow, wide: torch.Tensor = wide) -> None:
            for qkv, output, gate_up, down in layers[name]:
                qkv(narrow), output(narrow), gate_up(narrow), down(wide)

        yield (
            f"{LAYERS} layers' linears, {rows} rows",
            {name: lambda name=name: run(name) for name in kinds},
        )


def row_cases(kernels: Kernels) -> Iterator[Case]:
    frequencies = 1.0 / 1e6 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    for rows in (1, 8, 1024):
        x, delta, weight = (torch.randn(n, HIDDEN).to(DTYPE) for n in (rows, rows, 1))
        qkv = torch.randn(rows, HEADS + 2 * KV_HEADS, HEAD_DIM).to(DTYPE)
        layer = torch.zeros(2, rows, KV_HEADS, 1, HEAD_DIM, dtype=DTYPE)
        where = Pool.of(layer[None]).rows(np.arange(rows), np.zeros(rows, np.int64))
        heads = Heads(HEADS, KV_HEADS, HEAD_DIM, 1e-6)
        norms, turns = {}, {}
        for name, ops in (("torch", PlainRowOps(DTYPE)), ("kernel", CompiledRowOps(kernels, DTYPE))):
            made = ops.rotations(torch.arange(rows), frequencies, 1.0, where)
            norms[name] = lambda ops=ops, a=(x, delta, weight[0]): [
                ops.add_norm(*a, 1e-6) for _ in range(9)
            ]
            turns[name] = lambda ops=ops, a=(qkv, layer, made, heads): [
                ops.rotate_and_store(*a, None, None) for _ in range(9)
            ]
        yield f"9 x add and norm, {rows} rows", norms
        yield f"9 x rotate and store, {rows} rows", turns


def step_cases() -> Iterator[Case]:
    options: dict[str, dict[str, Any]] = {
        "torch": {"kernels": False},
        "bf16": {},
        "int8": {"quantization": "int8"},
        "int4": {"quantization": "int4", "quantize_head": True},
    }
    with tempfile.TemporaryDirectory() as folder:
        shape = write_shape("0.5b", Path(folder))
        runners = {
            name: make_runner(load_model(shape, load_format="dummy", **o)) for name, o in options.items()
        }
    for batch, start, count in (
        (1, 128, 1),
        (8, 128, 1),
        (8, 512, 1),
        (16, 2000, 1),
        (1, 0, 512),
        (1, 0, 1024),
    ):
        slices = [Slice(slot, start, count) for slot in range(batch)]
        ways = {
            name: lambda r=runner, slices=slices: r.run(slices, lambda: None)
            for name, runner in runners.items()
        }
        yield f"whole step {batch} x {start}+{count}", ways


def make_runner(model: Any, slots: int = 16, length: int = 2048) -> Runner:
    table = SlotTable(bytearray(SlotTable.nbytes(slots, length, BLOCK_SIZE)), slots, length, BLOCK_SIZE)
    each = table.blocks.shape[1]
    order = np.random.default_rng(0).permutation(slots * each).reshape(slots, each)
    for slot in range(slots):
        table.open(slot, range(1, length), Sampling(temperature=0.0))
        table.append([BlockAppend(slot, 0, tuple(order[slot].tolist()))])
    kv = torch.zeros(model.kv_shape(slots * each, BLOCK_SIZE), dtype=model.dtype)
    return Runner(model, table, kv)


def measure(ways: dict[str, Callable[[], Any]], rounds: int, budget: float = 4.0) -> dict[str, list[float]]:
    """Seconds of each round of each way, in turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    end = time.perf_counter() + budget
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--step", action="store_true", help="whole steps too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernels = load_kernels()
    if kernels is None:
        raise SystemExit("the kernels were not built here")
    cases = [attention_cases(kernels), linear_cases(kernels), row_cases(kernels)]
    if options.step:
        cases.append(step_cases())
    table = Table("case", "torch, ms", "ours: ms (times torch's speed; best of rounds, and median)")
    results = []
    with torch.inference_mode():
        for case in (case for group in cases for case in group):
            name, ways = case
            times = measure(ways, options.rounds)
            best = {way: min(found) * 1e3 for way, found in times.items()}
            middle = {way: statistics.median(found) * 1e3 for way, found in times.items()}
            gain = {way: (best["torch"] / best[way], middle["torch"] / middle[way]) for way in ways}
            ours = [
                f"{way} {best[way]:.3f} (x{gain[way][0]:.2f}, x{gain[way][1]:.2f})"
                for way in ways
                if way != "torch"
            ]
            table.add_row(name, f"{best['torch']:.3f}", "   ".join(ours))
            results.append({"case": name, "best_ms": best, "median_ms": middle})
    Console(width=160).print(table)
    ran = {"threads": options.threads, "level": kernels.level, **describe()}
    print(json.dumps({"benchmark": "cpu_kernels", "ran_on": ran, "results": results}))


if __name__ == "__main__":
    main()
