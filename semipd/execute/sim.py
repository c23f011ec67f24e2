"""The simulated executor: a cost model and a virtual clock instead of a device.

The planner cannot tell it from a real one. A step's speed is constant between events (a step starts or
ends, the split changes), so time moves from event to event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from semipd.core.ports import CostModel, ExecutorLost
from semipd.core.types import Batch, Device, Lane, Sampling, Split, StepResult, Work


class VirtualClock:
    """Time that only `SimExecutor.wait` moves."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time


class FixedCost:
    """Seconds of a step = a + b * tokens + c * context, scaled by the share of the device."""

    def __init__(
        self, units: int, launch: float = 1e-3, token: float = 1e-4, context: float = 1e-6
    ) -> None:
        self._units, self._launch, self._token, self._context = units, launch, token, context

    def seconds(self, work: Work, units: int, beside: Work | None = None, beside_units: int = 0) -> float:
        whole = self._launch + self._token * work.tokens + self._context * work.context
        crowd = max(1.0, (units + beside_units) / self._units) if beside is not None else 1.0
        return whole * crowd * self._units / max(units, 1)


class Isolated:
    """Lanes on devices of their own: each step runs as if alone on all units."""

    def __init__(self, cost: CostModel, units: int) -> None:
        self._cost, self._units = cost, units

    def seconds(self, work: Work, units: int, beside: Work | None = None, beside_units: int = 0) -> float:
        return self._cost.seconds(work, self._units)


Compute = Callable[[Batch], tuple[int, ...]]


GOES_ON, ENDS = 0, 1  # the two tokens of a simulated model


@dataclass(slots=True)
class _Run:
    """The step at the head of a lane. `left`: share of its work that remains, 1 to 0."""

    batch: Batch
    work: Work
    started: float
    seconds: float = 0.0  # of the whole step at the present speed
    left: float = 1.0
    attempts: int = 1


class SimExecutor:
    """Implements `core.ports.Executor` in virtual time. `compute` makes the tokens (at a step's end).

    Without one, a sequence says ENDS as soon as its `min_tokens` let it: so a request carries its true
    length where no policy looks. block_copy_seconds: of one KV block on the transfer lane, which takes
    nothing from the others.
    """

    def __init__(
        self,
        device: Device,
        cost: CostModel,
        clock: VirtualClock,
        compute: Compute | None = None,
        block_copy_seconds: float = 0.0,
    ) -> None:
        self.device = device
        self.clock = clock
        self._cost = cost
        self._block_copy_seconds = block_copy_seconds
        self._compute = compute or self._end_when_allowed
        self._queued: dict[Lane, deque[Batch]] = {lane: deque() for lane in device.lanes}
        self._running: dict[Lane, _Run] = {}
        self._open: dict[int, int] = {}  # slot: first position where its sequence may end
        self._split = Split.pair(device.units, device.units, device.units)
        self._woken = False
        self._closed = False

    def open(self, slot: int, tokens: Sequence[int], sampling: Sampling) -> None:
        self._check()
        if slot < 0:
            raise ValueError(f"slot {slot} is out of range")
        self._open[slot] = sampling.ban_until

    def close_slot(self, slot: int) -> None:
        self._open.pop(slot, None)

    def submit(self, lane: Lane, batch: Batch) -> None:
        self._check()
        queued = self._queued.get(lane)
        if queued is None:
            raise ValueError(f"this device has no lane {lane.value}")
        if len(queued) + (lane in self._running) >= self.device.depth:
            raise ValueError(f"more than {self.device.depth} steps in flight on {lane.value}")
        queued.append(batch)
        if lane not in self._running:
            self._start(lane)

    def wait(self, until: float | None) -> list[StepResult]:
        self._check()
        if self._woken:
            self._woken = False
            return []
        clock = self.clock
        if not self._running:
            if until is None:
                raise AssertionError("waiting for nothing, for ever: no step runs and nothing will arrive")
            clock.time = max(clock.time, until)
            return []
        lane, run = min(self._running.items(), key=lambda item: item[1].left * item[1].seconds)
        end = clock.time + run.left * run.seconds
        if until is not None and until < end:
            self._progress(max(until - clock.time, 0.0))
            return []
        self._progress(end - clock.time)
        return [self._end(lane)]

    def wake(self) -> None:
        self._woken = True

    def resize(self, split: Split) -> None:
        self._check()
        if split.total != self.device.units:
            raise ValueError(f"a split of {split.total} units on {self.device.units}")
        if split == self._split:
            return
        self._split = split
        if self.device.switch_seconds:
            for run in self._running.values():
                if run.seconds > 0.0:
                    run.left += self.device.switch_seconds / run.seconds
        self._retime()

    def close(self) -> None:
        self._closed = True

    def kill(self, lane: Lane) -> None:
        """What a worker's death does: the running step starts again, the second death fails it."""
        run = self._running[lane]
        run.attempts += 1
        run.left = 1.0 if run.attempts <= 2 else 0.0

    def _check(self) -> None:
        if self._closed:
            raise ExecutorLost("the executor is closed")

    def _end_when_allowed(self, batch: Batch) -> tuple[int, ...]:
        ends = self._open
        return tuple(
            ENDS if start + count >= ends[slot] else GOES_ON
            for slot, start, count, sample in batch.slices
            if sample
        )

    def _start(self, lane: Lane) -> None:
        batch = self._queued[lane].popleft()
        self._running[lane] = _Run(batch, batch.work or Work.of(batch.slices), self.clock.time)
        self._retime()

    def _end(self, lane: Lane) -> StepResult:
        run = self._running.pop(lane)
        tokens: tuple[int, ...] = ()
        error = None
        if run.attempts > 2:
            error = "the worker died twice under this batch"
        elif any(piece.slot not in self._open for piece in run.batch.slices):
            error = "a slice names a slot that is not open"
        else:
            try:
                tokens = self._compute(run.batch)
            except Exception as failure:
                error = str(failure)
        result = StepResult(
            lane, run.batch.step, tokens, run.started, self.clock.time, error, min(run.attempts, 2)
        )
        if self._queued[lane]:
            self._start(lane)
        else:
            self._retime()
        return result

    def _progress(self, seconds: float) -> None:
        self.clock.time += seconds
        for run in self._running.values():
            run.left = max(run.left - seconds / run.seconds, 0.0) if run.seconds > 0.0 else 0.0

    def _retime(self) -> None:
        """Every running step's speed, given the split and who runs beside it."""
        for lane, run in self._running.items():
            if lane is Lane.TRANSFER:
                run.seconds = self._block_copy_seconds * len(run.batch.copies)
                continue
            other = Lane.DECODE if lane is Lane.PREFILL else Lane.PREFILL
            beside = self._running.get(other)
            run.seconds = self._cost.seconds(
                run.work,
                self._split.of(lane),
                beside.work if beside else None,
                self._split.of(other) if beside else 0,
            )
