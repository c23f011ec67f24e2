"""A decode step at batch 1 beside plain reading of the weights that it reads: how far it is from the limit.

read: sums over the packed weights, nothing else. linears: every linear layer on one row. step: all of it.
The three take turns; fastest and median times, and bytes of weights per second.

    python -m benchmarks.read_weights [--shape 0.5b] [--context 512] [--threads 2] [--rounds 25]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import deliver, describe
from benchmarks.shapes import SHAPES, write_shape
from semipd.core.types import BlockAppend, Sampling, Slice
from semipd.execute.linux import keep_freed_memory
from semipd.execute.runner import Runner
from semipd.execute.storage import SlotTable
from semipd.model.compiled import CompiledLinear
from semipd.model.dense import DenseModel, load_model

BLOCK_SIZE = 16


def compiled_linears(model: DenseModel) -> list[CompiledLinear]:
    found = [linear for linear in model._parts.linears() if isinstance(linear, CompiledLinear)]
    assert len(found) == len(model._parts.linears()), "some layers have no compiled form here"
    return found


def make_step(model: DenseModel, context: int) -> Callable[[], Any]:
    """One position of one sequence with `context` positions before it."""
    blocks = context // BLOCK_SIZE + 1
    shape = 1, blocks * BLOCK_SIZE + 2, BLOCK_SIZE
    table = SlotTable(bytearray(SlotTable.nbytes(*shape)), *shape)
    table.open(0, [1] * (context + 1), Sampling())
    table.append([BlockAppend(0, 0, tuple(range(blocks)))])
    runner = Runner(model, table, torch.zeros(model.kv_shape(blocks, BLOCK_SIZE), dtype=model.dtype))
    target = ctypes.c_uint64()  # a split that stays
    watched = ctypes.addressof(target), target.value

    def step() -> None:
        runner.run([Slice(0, context, 1)], lambda: watched)

    return step


def make_ways(model: DenseModel, context: int) -> dict[str, Callable[[], Any]]:
    linears = compiled_linears(model)
    weights = [linear._weight.view(torch.int64) for linear in linears]
    rows = [torch.randn(1, linear.shape.inputs).to(model.dtype) for linear in linears]
    return {
        "read": lambda: [weight.sum() for weight in weights],
        "linears": lambda: [linear(row) for linear, row in zip(linears, rows, strict=True)],
        "step": make_step(model, context),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        model = load_model(write_shape(options.shape, Path(name)), load_format="dummy")
    torch.set_num_threads(options.threads)
    size = sum(linear._weight.nbytes for linear in compiled_linears(model))
    ways = make_ways(model, options.context)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(options.rounds + 1):
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - begin)
    table = Table(title=f"{options.shape}, {size / 1e6:.0f} MB of weights, {options.threads} threads")
    for heading in ("", "fastest, ms", "median, ms", "GB/s"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = []
    for name, taken in seconds.items():
        best, middle = min(taken[1:]), statistics.median(taken[1:])
        rows.append(
            {"what": name, "fastest_ms": 1e3 * best, "median_ms": 1e3 * middle, "gbps": size / best / 1e9}
        )
        table.add_row(name, f"{1e3 * best:.1f}", f"{1e3 * middle:.1f}", f"{size / best / 1e9:.1f}")
    Console(stderr=True).print(table)
    deliver({**describe(), "shape": options.shape, "threads": options.threads, "rows": rows}, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
