"""The host's part of a decode step on a CPU: all that is not a call of C. By who does it:

worker: between steps, from one's end to the next one's begin, under the engine, which plans ahead; and
inside, what a step takes besides its call of C, which is timed in this process, with the same runner on the
same shape. All of it delays the device; goals: 300 us together, and 5% of the step.

planner: processor time of its thread per step, of which wire is what messages take to send and to receive.
It is hidden where it has a core of its own, and takes time of one of the worker's threads where it has not.
late: steps that the worker had to wait for, since they were sent after the one before had ended.

Medians, but for the planner's time, which is a mean.

    python -m benchmarks.host_part [--shape 0.5b] [--batch 8] [--context 512] [--steps 150] [--sampled]
        [--policy chunked] [--out FILE]

sampled: tokens are drawn, as many models want it; that is inside, though most of it is in C, too.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.machine import deliver, describe
from benchmarks.shapes import SHAPES, write_shape
from semipd.build import build_engine
from semipd.config import from_mapping
from semipd.core.types import BlockAppend, Event, Launched, Request, Sampling, Slice, Stepped, StepResult
from semipd.execute.linux import keep_freed_memory
from semipd.execute.runner import Runner
from semipd.execute.storage import SlotTable
from semipd.execute.wire import Channel, pack
from semipd.model.dense import load_model

BLOCK_SIZE = 16
GOAL_SECONDS, GOAL_SHARE = 300e-6, 0.05


@dataclass
class Watch:
    """An observer of the engine: of its steps that decode a whole batch, what was said of them."""

    batch: int
    results: list[StepResult] = field(default_factory=list)
    launched: dict[int, float] = field(default_factory=dict)  # by step
    planned: list[float] = field(default_factory=list)  # this thread's processor seconds, after each
    wired: list[float] = field(default_factory=list)  # seconds of messages, after each
    wire: float = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Launched):
            self.launched[event.batch.step] = event.now
        elif isinstance(event, Stepped) and event.work.decodes == event.work.tokens == self.batch:
            self.results.append(event.result)
            self.planned.append(time.thread_time())
            self.wired.append(self.wire)

    def time_messages(self) -> None:
        """From now on, those that this process sends and receives."""
        for name in ("send", "poll"):
            setattr(Channel, name, self._timed(getattr(Channel, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.wire += time.perf_counter() - begin

        return run

    def told(self) -> dict[str, float]:
        """Seconds, and the share of late steps."""
        pairs = list(itertools.pairwise(self.results))
        late = [self.launched[after.step] > before.finished for before, after in pairs]
        return {
            "step": statistics.median(result.finished - result.started for result in self.results),
            "between": statistics.median(after.started - before.finished for before, after in pairs),
            "planner": (self.planned[-1] - self.planned[0]) / len(pairs),
            "wire": (self.wired[-1] - self.wired[0]) / len(pairs),
            "late": statistics.mean(late),
        }


def measure_engine(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """What `Watch.told` says of decode steps under the engine."""
    watch = Watch(options.batch)
    watch.time_messages()
    length = options.context + options.steps + 2
    config = from_mapping(
        {
            "model": str(folder),
            "load_format": "dummy",
            "max_num_seqs": options.batch,
            "max_model_len": length,
            "kv_blocks": options.batch * -(-length // BLOCK_SIZE),
            "block_size": BLOCK_SIZE,
            "policy": options.policy,
            "chunk_tokens": 2048,
        }
    )
    engine = build_engine(config, [watch])
    try:
        for index in range(options.batch):
            prompt = [index + 1] * options.context
            engine.add(
                Request(
                    str(index),
                    prompt,
                    options.steps,
                    sampling(index, options),
                    arrival=engine.clock.now(),
                    salt=None,
                )
            )
        while not engine.idle:
            engine.step()
    finally:
        engine.executor.close()
    return watch.told()


def sampling(seed: int, options: argparse.Namespace) -> Sampling:
    return Sampling(temperature=0.7, top_p=0.8, top_k=20, seed=seed) if options.sampled else Sampling()


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
        table.open(slot, [slot + 1] * options.context, sampling(slot, options))
        table.append([BlockAppend(slot, 0, tuple(range(slot * blocks, (slot + 1) * blocks)))])
    runner = Runner(model, table, kv)
    computed = time_calls(runner)
    target = ctypes.c_uint64()  # a split that stays, as in a worker whose lane is alone
    watched = ctypes.addressof(target), target.value
    steps, outside = [], []
    with torch.inference_mode():
        for position in range(options.context - 1, options.context + options.steps - 1):
            computed.clear()
            slices = pack(Slice(slot, position, 1) for slot in range(options.batch))
            begin = time.perf_counter()
            runner.run(slices, lambda: watched)
            steps.append(time.perf_counter() - begin)
            outside.append(steps[-1] - sum(computed))
    return statistics.median(steps), statistics.median(outside)


def time_calls(runner: Runner) -> list[float]:
    """Its step's calls of C add their seconds to what is returned."""
    step, computed = runner._step, list[float]()
    assert step is not None, "without compiled kernels there is no such part"
    call = step._call

    def timed(*arguments: Any) -> int:
        begin = time.perf_counter()
        result = call(*arguments)
        computed.append(time.perf_counter() - begin)
        return result

    step._call = timed
    return computed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--policy", default="chunked")
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = write_shape(options.shape, Path(name))
        engine = measure_engine(folder, options)
        alone, inside = measure_runner(folder, options)
    host, whole = engine["between"] + inside, engine["step"] + engine["between"]
    share = host / whole
    result = {
        **describe(),
        "shape": options.shape,
        "policy": options.policy,
        "sampled": options.sampled,
        "batch": options.batch,
        "context": options.context,
        "step_ms": 1e3 * whole,
        "step_alone_ms": 1e3 * alone,
        "between_us": 1e6 * engine["between"],
        "inside_us": 1e6 * inside,
        "planner_us": 1e6 * engine["planner"],
        "wire_us": 1e6 * engine["wire"],
        "late": engine["late"],
        "host_us": 1e6 * host,
        "host_share": share,
        "met": host <= GOAL_SECONDS and share <= GOAL_SHARE,
    }
    Console(stderr=True).print(
        f"{options.shape}, {options.batch} sequences at {options.context}: {1e6 * host:.0f} us of host in "
        f"a step of {1e3 * whole:.2f} ms ({share:.1%}), {result['between_us']:.0f} of them between two. "
        f"Beside it, the planner takes {result['planner_us']:.0f} us, "
        f"{result['wire_us']:.0f} of them for messages; {engine['late']:.0%} of the steps came late"
    )
    deliver(result, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
