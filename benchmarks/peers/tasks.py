"""What is asked of every engine, and the figure that follows from its steps. Pure."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Steps = Sequence[tuple[float, int]]  # (seconds since the request, tokens that came), in order

MIXED_PROMPTS, MIXED_OUTPUTS = (32, 512), (16, 128)  # log-uniform between these
DECODE_TOKENS = 33
SMALL_REQUESTS, SMALL_PROMPT, SMALL_OUTPUT = 16, 128, 64


@dataclass(frozen=True)
class Task:
    """prompts, new: lengths. kind: "step" (ms of a decode step of the whole batch), "stream" (tokens/s of
    it), "prompt" (prompt tokens/s), or "output" (output tokens/s of it all).

    repeat: the same prompts every time, and once before it counts: engines that keep prefixes then decode
    at once, so that no engine is charged for prompts that it staggers."""

    name: str
    kind: str
    prompts: tuple[int, ...]
    new: tuple[int, ...]

    @property
    def repeat(self) -> bool:
        return self.kind in ("step", "stream")

    @property
    def unit(self) -> str:
        return "ms" if self.kind == "step" else "tok/s"

    def better(self, values: Sequence[float]) -> float:
        """The best of several."""
        return min(values) if self.kind == "step" else max(values)

    def figure(self, steps: Steps) -> float:
        """NaN when the steps do not tell."""
        if self.kind in ("step", "stream"):
            seconds = step_seconds(steps, len(self.new))
            return 1e3 * seconds if self.kind == "step" else len(self.new) / seconds
        if not steps:
            return math.nan
        done = steps[-1][0]
        return (sum(self.prompts) if self.kind == "prompt" else sum(self.new)) / done


def step_seconds(steps: Steps, batch: int) -> float:
    """Median time of a step that brought a token to each of `batch` sequences, right after another such
    one; NaN when fewer than half of the steps were such."""
    gaps = [
        later - earlier for (earlier, before), (later, now) in pairwise(steps) if before == now == batch
    ]
    return statistics.median(gaps) if gaps and 2 * len(gaps) >= len(steps) - 1 else math.nan


def decode_tasks(contexts: Sequence[int], batches: Sequence[int]) -> list[Task]:
    tasks = []
    for context in contexts:
        for batch in batches:
            kind = "stream" if batch == 1 else "step"
            name = f"batch {batch} at {context}"
            tasks.append(Task(name, kind, (context,) * batch, (DECODE_TOKENS,) * batch))
    return tasks


def prefill_tasks(lengths: Sequence[int]) -> list[Task]:
    return [Task(f"prompt of {length}", "prompt", (length,), (1,)) for length in lengths]


def mixed_tasks(counts: Sequence[int]) -> list[Task]:
    """Requests of log-uniform lengths, the same for every engine and every run."""
    tasks = []
    for count in counts:
        generator = random.Random(count)
        prompts = tuple(_log_uniform(generator, *MIXED_PROMPTS) for _ in range(count))
        new = tuple(_log_uniform(generator, *MIXED_OUTPUTS) for _ in range(count))
        tasks.append(Task(f"{count} mixed", "output", prompts, new))
    return tasks


def small_task() -> Task:
    """For the small model: overheads dominate there."""
    new = (SMALL_OUTPUT,) * SMALL_REQUESTS
    return Task(
        f"{SMALL_REQUESTS} of {SMALL_PROMPT}/{SMALL_OUTPUT}", "output", (SMALL_PROMPT,) * len(new), new
    )


def random_prompts(lengths: Sequence[int], vocabulary: int, seed: str) -> list[list[int]]:
    """Token ids; equal seeds give equal prompts. The lowest 1,000 ids are left out."""
    generator = random.Random(seed)
    return [[generator.randrange(1000, vocabulary) for _ in range(length)] for length in lengths]


def worst_gap(streams: Sequence[Sequence[float]], begin: float, finish: float) -> float:
    """The longest gap between two tokens of one stream, of those that overlap [begin, finish]; a stream
    that brought nothing since counts until `finish`. NaN without streams."""
    worst = math.nan
    for moments in streams:
        ends = [*moments, finish] if moments and moments[-1] < finish else moments
        for earlier, later in pairwise(ends):
            if later > begin and earlier < finish and not later - earlier <= worst:
                worst = later - earlier
    return worst


def _log_uniform(generator: random.Random, low: int, high: int) -> int:
    return round(math.exp(generator.uniform(math.log(low), math.log(high))))
