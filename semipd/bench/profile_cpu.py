"""Measures steps of one model on this machine's cores: batches go straight to the executor, as the planner
would send them, and the time is that between results as the planner gets them.

Keys and values are whatever the pool holds: the time of a step does not depend on them.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from semipd.bench.step_fit import Timing
from semipd.core.engine import Engine
from semipd.core.errors import SemipdError
from semipd.core.ports import Executor
from semipd.core.types import (
    Batch,
    BlockAppend,
    Event,
    Lane,
    Request,
    Sampling,
    Slice,
    Split,
    StepResult,
    Tokens,
    Work,
)

PROMPTS = (16, 32, 64, 128, 256, 512, 1024, 2048)
STARTS = (256, 1024)  # cached positions before a chunk
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (32, 512, 1536)
# Steps with a piece of a prompt: (sequences that decode, their context, tokens of the piece, its start)
MIXED = ((1, 256, 63, 0), (4, 256, 60, 0), (8, 512, 24, 256), (2, 512, 126, 512), (16, 256, 112, 256),
         (32, 256, 96, 0), (8, 256, 248, 0), (16, 32, 240, 0), (4, 1024, 252, 256), (8, 256, 504, 0),
         (32, 512, 480, 256))  # fmt: skip
PASSES = 4  # over all steps, in another order each time: other load on the machine comes and goes
MOST = 20  # repetitions of a step in one pass
TURNS = 3  # of the planner and the executor alone, one after the other: the machine's pace changes
BESIDE_PROMPTS = (64, 512)
BESIDE_BATCHES = (1, 8, 16)
BESIDE_CONTEXT = 256


@dataclass(frozen=True)
class Step:
    """A step to measure. pieces: (start, count, sample) of each sequence. pipelined: as decode and mixed
    steps run, the next one submitted before this one is back; prompts wait for the planner."""

    pieces: tuple[tuple[int, int, bool], ...]
    pipelined: bool

    @property
    def work(self) -> Work:
        return Work.of([Slice(0, *piece) for piece in self.pieces])

    @property
    def length(self) -> int:
        """Positions of the longest sequence."""
        return max(start + count for start, count, _ in self.pieces)


def decode_step(batch: int, context: int, sample: bool = True) -> Step:
    """One position of each of `batch` sequences with `context` positions before it."""
    return Step(((context, 1, sample),) * batch, pipelined=True)


def prompt_step(tokens: int, start: int = 0, prompts: int = 1) -> Step:
    """Prompts of `tokens` positions each, of which `start` are in the cache already."""
    return Step(((start, tokens, True),) * prompts, pipelined=False)


def steps_to_measure(longest: int, slots: int, pool_tokens: int) -> list[Step]:
    """The steps that tell the prices apart, as far as the limits allow."""
    steps = [prompt_step(tokens) for tokens in PROMPTS]
    steps += [prompt_step(tokens, start) for tokens in (16, 64, 256) for start in STARTS]
    steps += [prompt_step(64, prompts=4), prompt_step(256, prompts=3)]
    steps += [decode_step(batch, context) for batch in BATCHES for context in CONTEXTS]
    steps += [decode_step(batch, 32, sample=False) for batch in (1, 4, 16, 64)]
    for batch, context, chunk, start in MIXED:
        steps.append(Step((((context, 1, True),) * batch) + ((start, chunk, False),), pipelined=True))

    def fits(step: Step) -> bool:
        tokens = len(step.pieces) * (step.length + 16)
        return step.length < longest and len(step.pieces) <= slots and tokens <= pool_tokens

    return [step for step in steps if fits(step)]


@dataclass
class Bench:
    """Sends batches to an executor. longest, slots, blocks, block_size: the shape of its storage."""

    executor: Executor
    longest: int
    slots: int
    blocks: int
    block_size: int
    vocabulary: int
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _open: list[int] = field(default_factory=list)
    _next_block: int = 0

    def prepare(self, step: Step) -> Callable[[], Batch]:
        """Open slots for the step's sequences; what is returned makes a new batch of it each time."""
        slices, appends = [], []
        generator = random.Random(len(step.pieces))
        for start, count, sample in step.pieces:
            slot = len(self._open)
            known = [generator.randrange(self.vocabulary) for _ in range(start + count)]
            self.executor.open(slot, known, Sampling())
            self._open.append(slot)
            need = -(-(start + count) // self.block_size)
            appends.append(BlockAppend(slot, 0, tuple(range(self._next_block, self._next_block + need))))
            self._next_block += need
            slices.append(Slice(slot, start, count, sample))
        first = iter([tuple(appends)])
        work = Work.of(slices)
        return lambda: Batch(next(self._numbers), tuple(slices), next(first, ()), (), work)

    def clear(self) -> None:
        """Close all slots. Nothing may be in flight."""
        for slot in self._open:
            self.executor.close_slot(slot)
        self._open.clear()
        self._next_block = 0

    def time(self, step: Step, units: int, seconds: float, least: int = 1) -> list[float]:
        """Seconds of each of some repetitions on `units`, for about so long, with `least` at the least."""
        lane = Lane.DECODE if step.pipelined else Lane.PREFILL
        total = self.executor.device.units
        rest = {Lane.PREFILL: 0, Lane.DECODE: 0}
        self.executor.resize(Split({**rest, lane: units}, total))
        found = self._run({lane: step}, seconds, least)[lane]
        self.clear()
        return found

    def time_beside(self, prompt: Step, decode: Step, split: Split, seconds: float) -> tuple[float, float]:
        """Mean seconds of both while both go on all the time."""
        self.executor.resize(split)
        found = self._run({Lane.PREFILL: prompt, Lane.DECODE: decode}, seconds, least=3)
        self.clear()
        return statistics.fmean(found[Lane.PREFILL]), statistics.fmean(found[Lane.DECODE])

    def _run(self, steps: dict[Lane, Step], seconds: float, least: int) -> dict[Lane, list[float]]:
        """Keep every lane busy for so long, and until each has `least` repetitions to show. The first one
        warms up and does not count unless it is the only one; nor do those of two lanes that end when one
        of them has stopped."""
        make = {lane: self.prepare(step) for lane, step in steps.items()}
        begin = time.monotonic()
        last = dict.fromkeys(steps, begin)
        found: dict[Lane, list[float]] = {lane: [] for lane in steps}
        in_flight = 0
        for lane, step in steps.items():
            for _ in range(2 if step.pipelined else 1):
                self.executor.submit(lane, make[lane]())
                in_flight += 1
        going = True
        while in_flight:
            for result in self.executor.wait(None):
                in_flight -= 1
                _check(result)
                now = time.monotonic()
                if going or len(steps) == 1 or not found[result.lane]:
                    found[result.lane].append(now - last[result.lane])
                last[result.lane] = now
                fewest = min(map(len, found.values()))
                over = now - begin > seconds or (len(steps) == 1 and fewest > MOST)
                going = going and (not over or fewest < least)
                if going:
                    self.executor.submit(result.lane, make[result.lane]())
                    in_flight += 1
        return {lane: values[1:] or values for lane, values in found.items()}


def _check(result: StepResult) -> None:
    if result.error is not None or result.attempts != 1:
        raise SemipdError(f"a step failed while measuring: {result.error or 'its worker died'}")


def affordable(bench: Bench, steps: Sequence[Step], units: Sequence[int], seconds: float) -> list[Step]:
    """Those of the steps that take at most a thirtieth of the time each, judged by one prompt."""
    probe = next(step for step in reversed(steps[:5]) if not step.pipelined)
    token = min(bench.time(probe, min(units), 0.0)) / probe.work.tokens
    return [step for step in steps if step.work.tokens * token <= seconds / 30 or step.work.tokens <= 64]


def measure_alone(
    bench: Bench, steps: Sequence[Step], units: Sequence[int], seconds: float
) -> dict[int, list[Timing]]:
    """The median seconds of each step on each number of units, in about so many seconds in all."""
    deadline = time.monotonic() + seconds
    each = seconds / (PASSES * len(steps) * len(units))
    samples: dict[tuple[int, int], list[float]] = {}
    jobs = [(index, count) for index in range(len(steps)) for count in units]
    order = random.Random(0)
    for _ in range(PASSES):
        order.shuffle(jobs)
        for index, count in jobs:
            if (index, count) in samples and time.monotonic() > deadline:
                continue
            samples.setdefault((index, count), []).extend(bench.time(steps[index], count, each))
    return {
        count: [
            Timing(step.work, statistics.median(samples[index, count])) for index, step in enumerate(steps)
        ]
        for count in units
    }


@dataclass(frozen=True)
class Slowdown:
    """How many times as long prompts and decode steps take while both run on these shares: medians over
    pairs of steps, and the largest deviation from them as a ratio."""

    prefill: int
    decode: int
    prompt: float
    single: float
    spread: float


def mean_slowdown(found: Sequence[Slowdown]) -> Slowdown:
    """Of several measurements on the same shares: means in the logs, and the largest spread."""
    prompt, single = (
        statistics.geometric_mean(values)
        for values in ([slowdown.prompt for slowdown in found], [slowdown.single for slowdown in found])
    )
    spread = max(slowdown.spread for slowdown in found)
    return Slowdown(found[0].prefill, found[0].decode, prompt, single, spread)


def measure_beside(
    bench: Bench, shares: Iterable[tuple[int, int]], seconds: float, slots: int, longest: int
) -> list[Slowdown]:
    """Each pair of steps on each pair of shares, beside each other and alone on the same units."""
    prompts = [prompt_step(tokens) for tokens in BESIDE_PROMPTS if tokens < longest]
    context = min(BESIDE_CONTEXT, longest // 2)
    decodes = [decode_step(batch, context) for batch in BESIDE_BATCHES if batch < slots]
    shares = list(shares)
    each = seconds / (len(shares) * len(prompts) * len(decodes) * 3)
    total = bench.executor.device.units
    found = []
    for first, second in shares:
        logs: tuple[list[float], list[float]] = ([], [])
        for prompt, decode in itertools.product(prompts, decodes):
            alone = (
                statistics.fmean(bench.time(prompt, first, each / 2, least=3)),
                statistics.fmean(bench.time(decode, second, each / 2, least=3)),
            )
            both = bench.time_beside(prompt, decode, Split.pair(first, second, total), 2.0 * each)
            for kind in (0, 1):
                logs[kind].append(math.log(both[kind] / alone[kind]))
        means = [statistics.median(values) for values in logs]
        spread = max(
            abs(value - mean) for values, mean in zip(logs, means, strict=True) for value in values
        )
        found.append(Slowdown(first, second, math.exp(means[0]), math.exp(means[1]), math.exp(spread)))
    return found


@dataclass
class _Pace:
    """Observes the time of every decode step's tokens."""

    times: list[float] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Tokens):
            self.times.append(event.now)


def measure_host(
    engine: Engine, pace: _Pace, bench: Bench, sequences: int, seconds: float
) -> tuple[int, float]:
    """(sequences, seconds that the planner adds to a step of so many): the difference of medians of decode
    steps under the planner and of the same steps straight on the executor, taken in turn, the median of
    `TURNS`. May come out below 0."""
    each = seconds / (2 * TURNS)
    added = []
    for _ in range(TURNS):
        taken, context = _under_planner(engine, pace, sequences, each, bench.vocabulary)
        own = bench.time(decode_step(sequences, context), engine.executor.device.units, each, least=3)
        added.append(taken - statistics.median(own))
    return sequences, statistics.median(added)


def _under_planner(
    engine: Engine, pace: _Pace, sequences: int, seconds: float, vocabulary: int
) -> tuple[float, int]:
    """(median seconds, mean context of a sequence) of decode steps, `sequences` at a time."""
    length = engine.max_length // 2
    generator = random.Random(sequences)
    names = [f"{sequences}-{index}" for index in range(sequences)]
    for name in names:
        prompt = [generator.randrange(vocabulary) for _ in range(16)]
        now = engine.clock.now()
        engine.add(Request(name, prompt, length - 16, Sampling(), arrival=now))
    while len(engine.live.decoding) < sequences:
        engine.step()
    pace.times.clear()
    begin = sum(request.computed for request in engine.live.decoding)
    until = engine.clock.now() + seconds
    while len(engine.live.decoding) == sequences:
        if len(pace.times) > 3 and engine.clock.now() >= until:
            break
        engine.step()
    end = sum(request.computed for request in engine.live.decoding)
    for name in names:
        engine.abort(name)
    while not engine.idle:
        engine.step()
    gaps = [later - earlier for earlier, later in itertools.pairwise(pace.times)]
    return statistics.median(gaps), max(begin + end, 2 * sequences) // (2 * sequences)


def new_pace() -> _Pace:
    """The observer that `measure_host` needs on its engine."""
    return _Pace()
