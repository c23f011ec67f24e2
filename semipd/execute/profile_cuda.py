"""Measure a device through its executor: step times on every share, alone and beside the other phase.

`measure` is what `semipd profile` runs; `StepTimer` is also the GPU benchmark's stop-watch. Times are the
device's own, between events. Contents of the KV pool do not matter here, so decode steps run on contexts
that were never computed; callers fill the pool with noise first, since zeros cost less power than data.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from semipd.core.types import Batch, BlockAppend, Lane, Sampling, Slice, Split, StepResult
from semipd.execute.backend import Backend
from semipd.execute.cuda import CudaExecutor
from semipd.execute.cuda_start import Shape, start_cuda
from semipd.model.spec import load_spec

PREFILL_TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
DECODE_BATCHES = (1, 8, 32, 64, 128, 256)
DECODE_CONTEXTS = (1024, 2048, 4096, 8192, 16384)
MOST_CONTEXT = 800_000  # cached positions that one decode step may read
BESIDE_BATCHES = (16, 128)
REPEATS = 5
PATIENCE = 0.4  # seconds after which a measurement is not repeated any more
BUDGET = 450.0  # seconds after which no other split is begun


@dataclass(frozen=True)
class Sizes:
    """What the executor can hold: slots, KV blocks of so many tokens, positions of a step, of a slot."""

    slots: int
    blocks: int
    block_size: int
    most_rows: int
    max_length: int


class StepTimer:
    """Runs steps on an executor that nobody else uses, and tells their seconds.

    Decode uses the lower slots, prefill the highest one."""

    def __init__(self, executor: CudaExecutor, sizes: Sizes, vocabulary: int, seed: int = 0) -> None:
        self.executor = executor
        self.sizes = sizes
        self._rng = np.random.default_rng(seed)
        self._vocabulary = vocabulary
        self._steps = itertools.count(1)

    def can_decode(self, batch: int, context: int) -> bool:
        per_slot = -(-(context + 1) // self.sizes.block_size)
        fits = batch < self.sizes.slots and context < self.sizes.max_length
        fits = fits and batch * context <= MOST_CONTEXT
        return fits and batch * per_slot < self.sizes.blocks - self._prefill_blocks()

    def can_prefill(self, tokens: int) -> bool:
        return tokens <= min(self.sizes.most_rows, self.sizes.max_length)

    def decode(self, batch: int, context: int, repeats: int = REPEATS) -> list[float]:
        """Seconds of steps of one token for `batch` sequences, after one that is left out: `repeats` of
        them, or as many as begin within PATIENCE."""
        return self._repeated(Lane.DECODE, self._decode_batches(batch, context), repeats)

    def prefill(self, tokens: int, repeats: int = REPEATS) -> list[float]:
        """Seconds of prompts of so many tokens, as `decode`."""
        return self._repeated(Lane.PREFILL, self._prefill_batches(tokens), repeats)

    def beside(self, batch: int, context: int, tokens: int, repeats: int = REPEATS) -> tuple[float, float]:
        """(median seconds of a decode step, of a prompt) while both lanes always have something to run."""
        make = {
            Lane.DECODE: self._decode_batches(batch, context),
            Lane.PREFILL: self._prefill_batches(tokens),
        }
        seconds: dict[Lane, list[float]] = {lane: [] for lane in make}
        in_flight = dict.fromkeys(make, 0)
        while min(len(times) for times in seconds.values()) <= repeats:
            for lane, batches in make.items():
                while in_flight[lane] < 2:
                    self.executor.submit(lane, next(batches))
                    in_flight[lane] += 1
            for result in self.executor.wait(None):
                in_flight[result.lane] -= 1
                seconds[result.lane].append(_seconds(result))
        while any(in_flight.values()):
            for result in self.executor.wait(None):
                in_flight[result.lane] -= 1
        decode, prefill = seconds[Lane.DECODE], seconds[Lane.PREFILL]
        return statistics.median(decode[1:]), statistics.median(prefill[1:])

    def switched(self, batch: int, context: int, splits: Sequence[Split], steps: int = 40) -> float:
        """Host seconds from a switch to the end of the decode step after it, median; the splits in turn."""
        make = self._decode_batches(batch, context)
        times = []
        for step in range(steps):
            begin = time.perf_counter()
            self.executor.resize(splits[step % len(splits)])
            self._one(Lane.DECODE, next(make))
            times.append(time.perf_counter() - begin)
        return statistics.median(times[len(splits) :])

    def _repeated(self, lane: Lane, make: Iterator[Batch], repeats: int) -> list[float]:
        self._one(lane, next(make))
        times: list[float] = []
        while len(times) < repeats and (not times or sum(times) < PATIENCE):
            times.append(self._one(lane, next(make)))
        return times

    def _one(self, lane: Lane, batch: Batch) -> float:
        self.executor.submit(lane, batch)
        while not (results := self.executor.wait(None)):
            pass
        return _seconds(results[0])

    def _prefill_blocks(self) -> int:
        return -(-min(self.sizes.most_rows, self.sizes.max_length) // self.sizes.block_size)

    def _decode_batches(self, batch: int, context: int) -> Iterator[Batch]:
        """The same step again and again: a step can be run twice."""
        per_slot = -(-(context + 1) // self.sizes.block_size)
        appends = []
        for slot in range(batch):
            self._open(slot, context + 1)
            first = slot * per_slot
            appends.append(BlockAppend(slot, 0, tuple(range(first, first + per_slot))))
        slices = tuple(Slice(slot, context, 1) for slot in range(batch))
        yield Batch(next(self._steps), slices, tuple(appends))
        while True:
            yield Batch(next(self._steps), slices)

    def _prefill_batches(self, tokens: int) -> Iterator[Batch]:
        slot, blocks = self.sizes.slots - 1, self._prefill_blocks()
        self._open(slot, tokens)
        table = tuple(range(self.sizes.blocks - blocks, self.sizes.blocks))
        piece = (Slice(slot, 0, tokens),)
        yield Batch(next(self._steps), piece, (BlockAppend(slot, 0, table),))
        while True:
            yield Batch(next(self._steps), piece)

    def _open(self, slot: int, tokens: int) -> None:
        known = self._rng.integers(0, self._vocabulary, tokens)
        self.executor.open(slot, known.tolist(), Sampling())


def profile_gpu(
    backend: Backend,
    folder: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    load_format: str = "auto",
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Load a model, fill the KV pool with noise and `measure`. Takes minutes; the device must be idle."""
    spec = load_spec(os.fspath(folder))
    longest = min(spec.max_positions, max(PREFILL_TOKENS) + 1)
    shape = Shape(max(DECODE_BATCHES) + 2, longest, most_rows=longest, fixed_length=False)
    started = start_cuda(backend, folder, shape, dtype=dtype, load_format=load_format, seed=seed)
    executor = started.executor
    try:
        executor.fill_with_noise(seed)
        sizes = Sizes(shape.slots, started.blocks, shape.block_size, longest, started.max_length)
        found = measure(StepTimer(executor, sizes, spec.vocabulary, seed), say)
        return {"model": os.fspath(folder), "start": started.costs, **found}
    finally:
        executor.close()


def measure(timer: StepTimer, say: Callable[[str], None] = print, budget: float = BUDGET) -> dict[str, Any]:
    """Curves over shares, slowdowns beside each other, and what a switch costs, as plain data. The whole
    device comes first, then splits spread over the sizes; none is begun after `budget` seconds."""
    device = timer.executor.device
    rows: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": [], "beside": []}
    splits = [(0, device.units), (device.units, 0), *_spread(device.legal_splits)]
    timer.executor.capture_graphs()  # a step launched kernel by kernel would tell the host's speed
    deadline, left_out = time.monotonic() + budget, 0
    for prefill, decode in splits:
        if time.monotonic() > deadline:
            left_out += 1
            continue
        timer.executor.resize(Split.pair(prefill, decode, device.units))
        if prefill:
            rows["prefill"] += _prefill_rows(timer, prefill)
        if decode:
            rows["decode"] += _decode_rows(timer, decode)
        if prefill and decode:
            rows["beside"] += _beside_rows(timer, prefill, decode)
        say(f"{prefill}:{decode} of {device.units} {device.unit_kind}s done")
    if left_out:
        say(f"{left_out} splits were left out: the time was up")
    return {
        "device": device.name,
        "units": device.units,
        "unit_kind": device.unit_kind,
        **rows,
        "splits_left_out": left_out,
        **_switching(timer),
        "graph_bytes": timer.executor.graphs.nbytes,
        "curves": curves(rows["prefill"], rows["decode"], device.units),
    }


def _spread(splits: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same, every fourth first, then those half way between, then the rest."""
    order = sorted(range(len(splits)), key=lambda index: (index % 4 != 0, index % 2 != 0, index))
    return [splits[index] for index in order]


def curves(
    prefill: Sequence[dict[str, Any]], decode: Sequence[dict[str, Any]], units: int
) -> dict[str, list[list[float]]]:
    """Entries `compute` and `memory` of a device file: [units, slowdown] of the longest prompt, and of the
    decode step that reads most. Slowdowns are made to fall with units, whatever the noise."""
    longest = max((row["tokens"] for row in prefill), default=0)
    heaviest = max(((row["batch"] * row["context"], row["batch"]) for row in decode), default=(0, 0))
    chosen = {
        "compute": [row for row in prefill if row["tokens"] == longest],
        "memory": [row for row in decode if (row["batch"] * row["context"], row["batch"]) == heaviest],
    }
    return {name: _slowdowns(rows, units) for name, rows in chosen.items()}


def _slowdowns(rows: Sequence[dict[str, Any]], units: int) -> list[list[float]]:
    seconds = {row["units"]: row["seconds"] for row in rows}
    whole = seconds.pop(units, None)
    if whole is None:
        return []
    points, least = [[float(units), 1.0]], 1.0
    for share in sorted(seconds, reverse=True):
        least = max(least, seconds[share] / whole)
        points.append([float(share), round(least, 4)])
    return points[::-1]


def _prefill_rows(timer: StepTimer, units: int) -> list[dict[str, Any]]:
    return [
        {"units": units, "tokens": tokens, "seconds": statistics.median(timer.prefill(tokens))}
        for tokens in PREFILL_TOKENS
        if timer.can_prefill(tokens)
    ]


def _decode_rows(timer: StepTimer, units: int) -> list[dict[str, Any]]:
    return [
        {
            "units": units,
            "batch": batch,
            "context": context,
            "seconds": statistics.median(timer.decode(batch, context)),
        }
        for batch, context in itertools.product(DECODE_BATCHES, DECODE_CONTEXTS)
        if timer.can_decode(batch, context)
    ]


def _beside_rows(timer: StepTimer, prefill: int, decode: int) -> list[dict[str, Any]]:
    rows = []
    tokens = max(
        (tokens for tokens in PREFILL_TOKENS if tokens <= 2048 and timer.can_prefill(tokens)), default=0
    )
    for batch in BESIDE_BATCHES:
        context = DECODE_CONTEXTS[0]
        if not tokens or not timer.can_decode(batch, context):
            continue
        alone = statistics.median(timer.decode(batch, context))
        prompt_alone = statistics.median(timer.prefill(tokens))
        step, prompt = timer.beside(batch, context, tokens)
        rows.append(
            {
                "prefill_units": prefill,
                "decode_units": decode,
                "batch": batch,
                "context": context,
                "tokens": tokens,
                "decode_slowdown": step / alone,
                "prefill_slowdown": prompt / prompt_alone,
            }
        )
    return rows


def _switching(timer: StepTimer) -> dict[str, float]:
    """switch_seconds: median host time of `resize`. switched_step_seconds, settled_step_seconds: a decode
    step from the planner's view when every one is on another split, and when none is."""
    device = timer.executor.device
    legal = device.legal_splits or ((device.units, device.units),)
    splits = [Split.pair(*split, device.units) for split in legal]
    times = []
    for index in range(200):
        begin = time.perf_counter()
        timer.executor.resize(splits[index % len(splits)])
        times.append(time.perf_counter() - begin)
    found = {"switch_seconds": statistics.median(times)}
    batch, context = min(BESIDE_BATCHES[0], max(DECODE_BATCHES)), DECODE_CONTEXTS[0]
    if timer.can_decode(batch, context):
        middle = splits[len(splits) // 2 - 1 :][:2]
        alone = [timer.switched(batch, context, [split]) for split in middle]
        found["settled_step_seconds"] = statistics.fmean(alone)
        found["switched_step_seconds"] = timer.switched(batch, context, middle)
    return found


def _seconds(result: StepResult) -> float:
    if result.error is not None:
        raise RuntimeError(f"a measured step failed: {result.error}")
    return result.finished - result.started
