"""The host's part of a decode step on a CPU: what planner, messages, runner and sampler add to C.

between: from a step's end in the decode worker to the next one's begin there, under the engine, which plans
ahead. inside: what a step takes besides its calls of C, which are timed one by one, in this process, with
the same runner on the same shape. Medians; goals: 300 us together, and 5% of the step.

    python -m benchmarks.host_part [--shape 0.5b] [--batch 8] [--context 512] [--steps 150] [--out FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.machine import deliver, describe
from benchmarks.shapes import SHAPES, write_shape
from semipd.build import build_engine
from semipd.config import from_mapping
from semipd.core.types import BlockAppend, Event, Request, Sampling, Slice, Stepped, StepResult
from semipd.execute.linux import keep_freed_memory
from semipd.execute.runner import Runner
from semipd.execute.storage import SlotTable
from semipd.model.dense import load_model

BLOCK_SIZE = 16
CALLS = ("semipd_step_begin", "semipd_step_layers", "semipd_step_end")
GOAL_SECONDS, GOAL_SHARE = 300e-6, 0.05


def measure_engine(folder: Path, options: argparse.Namespace) -> tuple[float, float]:
    """(a step's seconds in the worker, seconds between two steps) under the engine."""
    results: list[StepResult] = []

    def observe(event: Event) -> None:
        if isinstance(event, Stepped) and event.work.decodes == event.work.tokens == options.batch:
            results.append(event.result)

    length = options.context + options.steps + 2
    config = from_mapping(
        {
            "model": str(folder),
            "load_format": "dummy",
            "max_num_seqs": options.batch,
            "max_model_len": length,
            "kv_blocks": options.batch * -(-length // BLOCK_SIZE),
            "block_size": BLOCK_SIZE,
            "policy": "chunked",
            "chunk_tokens": 2048,
        }
    )
    engine = build_engine(config, [observe])
    try:
        for index in range(options.batch):
            prompt = [index + 1] * options.context
            engine.add(
                Request(
                    str(index), prompt, options.steps, Sampling(), arrival=engine.clock.now(), salt=None
                )
            )
        while not engine.idle:
            engine.step()
    finally:
        engine.executor.close()
    steps = [result.finished - result.started for result in results]
    between = [after.started - before.finished for before, after in itertools.pairwise(results)]
    return statistics.median(steps), statistics.median(between)


def measure_runner(folder: Path, options: argparse.Namespace) -> tuple[float, float]:
    """(a step's seconds, those outside of C) in this process."""
    keep_freed_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = load_model(folder, load_format="dummy")
    length = options.context + options.steps + 2
    blocks = -(-length // BLOCK_SIZE)
    shape = options.batch, length, BLOCK_SIZE
    table = SlotTable(bytearray(SlotTable.nbytes(*shape)), *shape)
    kv = torch.zeros(model.kv_shape(options.batch * blocks, BLOCK_SIZE), dtype=model.dtype)
    for slot in range(options.batch):
        table.open(slot, [slot + 1] * options.context, Sampling())
        table.append([BlockAppend(slot, 0, tuple(range(slot * blocks, (slot + 1) * blocks)))])
    runner = Runner(model, table, kv)
    computed = time_calls(runner)
    target = ctypes.c_uint64()  # a split that stays, as in a worker whose lane is alone
    watched = ctypes.addressof(target), target.value
    steps, outside = [], []
    with torch.inference_mode():
        for position in range(options.context - 1, options.context + options.steps - 1):
            computed[:] = [0.0]
            begin = time.perf_counter()
            runner.run([Slice(slot, position, 1) for slot in range(options.batch)], lambda: watched)
            steps.append(time.perf_counter() - begin)
            outside.append(steps[-1] - computed[0])
    return statistics.median(steps), statistics.median(outside)


def time_calls(runner: Runner) -> list[float]:
    """Its step's calls of C add their seconds to the first entry of what is returned."""
    step, computed = runner._step, [0.0]
    assert step is not None, "without compiled kernels there is no such part"

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = call(*arguments)
            computed[0] += time.perf_counter() - begin
            return result

        return run

    for name in CALLS:
        setattr(step._library, name, timed(getattr(step._library, name)))
    return computed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = write_shape(options.shape, Path(name))
        step, between = measure_engine(folder, options)
        alone, inside = measure_runner(folder, options)
    host = between + inside
    share = host / (step + between)
    result = {
        **describe(),
        "shape": options.shape,
        "batch": options.batch,
        "context": options.context,
        "step_ms": 1e3 * (step + between),
        "step_alone_ms": 1e3 * alone,
        "between_us": 1e6 * between,
        "inside_us": 1e6 * inside,
        "host_us": 1e6 * host,
        "host_share": share,
        "met": host <= GOAL_SECONDS and share <= GOAL_SHARE,
    }
    Console(stderr=True).print(
        f"{options.shape}, {options.batch} sequences at {options.context}: {1e6 * host:.0f} us of host in "
        f"a step of {1e3 * (step + between):.2f} ms ({share:.1%}), {1e6 * between:.0f} of them between two"
    )
    deliver(result, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
