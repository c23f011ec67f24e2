"""The CPU executor: two worker processes over one copy of the weights and one KV pool, on shares of the
cores. Runs in the planner's process and needs no torch there.

A worker's death loses nothing: weights, KV pool and slot table live in the resident, and a step that runs
again gives the same tokens. So the lane gets a new worker, forked in milliseconds, and its batches in
flight are sent again, in order. A batch under which two workers died fails alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from semipd.core.errors import ConfigError
from semipd.core.ports import ExecutorLost
from semipd.core.types import Batch, Device, Lane, Sampling, Score, Split, StepResult
from semipd.execute import watch
from semipd.execute.cores import available_cores
from semipd.execute.launch import ResidentProcess
from semipd.execute.read_ahead import start_reading
from semipd.execute.shared import LANES, SharedMemory
from semipd.execute.wire import Channel, Done, Failed, Forked, Job, Start, pack

SWITCH_SECONDS = 50e-6  # moving a worker's threads to other cores, at its next boundary
_EARLY = 1.0  # a worker that dies idle within this many seconds of its fork died of its start
_EARLY_DEATHS = 5  # so many in a row without a result, and forking again is hopeless

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Flight:
    """A submitted batch. deaths: workers that died while running it. scores: told by the present one."""

    batch: Batch
    deaths: int = 0
    scores: tuple[Score, ...] = ()


@dataclass(slots=True)
class _Worker:
    """A lane's present worker, and what it was asked to do.

    ordered: forks that the resident has not told of yet; until it has, the worker's pid is None.
    """

    lane: Lane
    number: int
    channel: Channel[Done]
    pid: int | None = None
    forked_at: float = 0.0  # when the resident told
    ordered: int = 1
    flights: deque[_Flight] = field(default_factory=deque)
    early_deaths: int = 0
    watch: watch.Watch = field(default_factory=watch.Watch)


class CpuExecutor:
    """Implements `core.ports.Executor` on the cores of this machine; a unit is a core.

    model: a folder in Hugging Face format; dtype, load_format, seed, quantization and quantize_head as in
    `ModelConfig`.
    slots, max_length, blocks, block_size: the shape of the slot table and of the KV pool.
    cores: system numbers of the cores to use; default: all that this process may use.
    depth: steps in flight per lane. resident: one that was started before; this executor's from here on.

    The constructor returns when the model is loaded and both workers exist. It raises ConfigError for a
    setting or a folder that cannot work and ExecutorLost when the resident fails otherwise. Must be closed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        slots: int,
        max_length: int,
        blocks: int,
        block_size: int = 16,
        dtype: str = "auto",
        load_format: str = "auto",
        seed: int = 0,
        quantization: str = "none",
        quantize_head: bool = False,
        cores: Sequence[int] | None = None,
        depth: int = 2,
        resident: ResidentProcess | None = None,
    ) -> None:
        numbers = _check_cores(cores)
        self.device = cpu_device(len(numbers), depth)
        self._lost: str | None = None
        self._lock = threading.Lock()  # between `wake` on any thread and `close`
        self._closed = False
        self._looked = 0.0
        self._workers: dict[Lane, _Worker] = {}
        self._by_descriptor: dict[int, _Worker] = {}
        start = Start(
            os.fspath(model),
            dtype,
            load_format,
            seed,
            slots,
            max_length,
            blocks,
            block_size,
            numbers,
            os.getpid(),
            log.getEffectiveLevel(),
            quantization,
            quantize_head,
        )
        self._resources = contextlib.ExitStack()
        try:
            self._acquire(start, resident)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):  # no descriptors, processes or memory for so few as these
                raise ExecutorLost(f"the CPU executor cannot start: {error.strerror}") from error
            raise

    def processes(self) -> dict[str, int | None]:
        """Process ids by role: "resident", and the lanes' names; None for a worker being forked."""
        workers = {worker.lane.value: worker.pid for worker in self._workers.values()}
        return {"resident": self._resident.pid, **workers}

    def open(self, slot: int, tokens: Sequence[int], sampling: Sampling) -> None:
        self._check()
        self._shared.table.open(slot, tokens, sampling)

    def close_slot(self, slot: int) -> None:
        self._check()
        self._shared.table.close(slot)

    def submit(self, lane: Lane, batch: Batch) -> None:
        self._check()
        worker = self._workers.get(lane)
        if worker is None:
            raise ValueError(f"the CPU has no lane {lane.value}")
        if batch.copies:
            raise ValueError("lanes share one KV pool here: there is nothing to copy between")
        if len(worker.flights) >= self.device.depth:
            raise ValueError(f"more than {self.device.depth} steps in flight on {lane.value}")
        self._shared.table.append(batch.appends)
        worker.flights.append(_Flight(batch))
        self._send(worker, batch)

    def wait(self, until: float | None) -> list[StepResult]:
        self._check()
        results: list[StepResult] = []
        while True:
            woken = False
            for descriptor, _ in self._events.poll(self._pause(until)):
                if descriptor == self._alarm:
                    os.eventfd_read(self._alarm)
                    woken = True
                elif (worker := self._by_descriptor.get(descriptor)) is not None:
                    self._hear_worker(worker, results)
                else:
                    self._hear_resident()
            self._look()
            if results or woken:
                return results
            self._check()
            if until is not None and time.monotonic() >= until:
                return results

    def wake(self) -> None:
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._alarm, 1)

    def resize(self, split: Split) -> None:
        self._check()
        if split.total != self.device.units:
            raise ValueError(f"a split of {split.total} units on {self.device.units} cores")
        self._shared.words.set_target(split)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for worker in self._workers.values():
            worker.channel.close()
        self._resources.close()

    # -- within ------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._closed:
            raise ExecutorLost("the executor is closed")
        if self._lost is not None:
            raise ExecutorLost(self._lost)

    def _acquire(self, start: Start, resident: ResidentProcess | None) -> None:
        """Make the memory and the processes; `close` gives back whatever was made."""
        self._shared = SharedMemory.new(start.slots, start.max_length, start.block_size)
        self._resources.callback(self._shared.close)
        self._shared.words.set_target(Split.pair(len(start.cores), len(start.cores), len(start.cores)))
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._resources.callback(os.close, self._alarm)
        self._events = self._resources.enter_context(select.epoll())
        self._events.register(self._alarm, select.EPOLLIN)
        self._resident = resident or ResidentProcess()
        self._resources.callback(self._resident.close)
        self._events.register(self._resident.channel.fileno(), select.EPOLLIN)
        start_reading(start.model)
        self._resident.load(start, self._shared.descriptor)
        for number, lane in enumerate(LANES):
            self._adopt(_Worker(lane, number, self._resident.fork(number)))
        while None in self.processes().values():
            self.wait(time.monotonic() + 1.0)

    def _adopt(self, worker: _Worker) -> None:
        self._workers[worker.lane] = worker
        self._by_descriptor[worker.channel.fileno()] = worker
        self._events.register(worker.channel.fileno(), select.EPOLLIN)

    def _send(self, worker: _Worker, batch: Batch) -> None:
        # When the worker is dead, `wait` sees it too, and sends everything in flight again.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.channel.send(Job(batch.step, pack(batch.slices)))

    def _pause(self, until: float | None) -> float | None:
        """How long `wait` may sleep now: no longer than to the next look while anybody owes an answer."""
        owed = any(worker.flights or worker.pid is None for worker in self._workers.values())
        longest = watch.LOOK if owed else None
        if until is None:
            return longest
        left = max(until - time.monotonic(), 0.0)
        return left if longest is None else min(left, longest)

    def _look(self) -> None:
        """Once a second, see whether those who owe an answer still work on it."""
        now = time.monotonic()
        if now < self._looked + watch.LOOK:
            return
        self._looked = now
        for worker in self._workers.values():
            if worker.pid is None:
                if worker.watch.stuck(self._resident.pid):
                    self._lost = self._lost or "the resident process does not answer"
            elif not worker.flights:
                worker.watch.rest()
            elif worker.watch.stuck(worker.pid):
                log.warning("the %s worker computes no more: it is killed", worker.lane.value)
                os.kill(worker.pid, signal.SIGKILL)  # ours until a fork is ordered in its place

    def _hear_resident(self) -> None:
        """Take what the resident says; its end is the executor's."""
        try:
            answer = self._resident.channel.poll()
        except EOFError:
            self._lost = self._lost or self._resident.why_dead()
            return
        if isinstance(answer, Forked):
            worker = self._workers[LANES[answer.lane]]
            worker.ordered -= 1
            if not worker.ordered:  # else it tells of one that has died since
                worker.pid, worker.forked_at = answer.pid, time.monotonic()
        elif isinstance(answer, Failed):
            self._lost = answer.message

    def _hear_worker(self, worker: _Worker, results: list[StepResult]) -> None:
        """Take what the lane has done, up to one result (the events tell when there is more); repair it
        when its worker is gone."""
        try:
            while (done := worker.channel.poll()) is not None:
                flight = worker.flights[0]
                assert flight.batch.step == done.step, "a worker answered out of order"
                worker.early_deaths = 0
                flight.scores += done.scores
                if done.more:
                    continue
                worker.flights.popleft()
                results.append(
                    StepResult(
                        worker.lane,
                        done.step,
                        done.tokens,
                        done.started,
                        done.finished,
                        done.error,
                        flight.deaths + 1,
                        flight.scores,
                    )
                )
                return
        except EOFError:
            self._repair(worker, results)

    def _repair(self, worker: _Worker, results: list[StepResult]) -> None:
        """Order a new worker and give it the batches in flight, without waiting for it to exist."""
        now = time.monotonic()
        self._by_descriptor.pop(worker.channel.fileno())
        self._events.unregister(worker.channel.fileno())
        worker.channel.close()
        flights = worker.flights
        if flights and flights[0].batch.step == self._shared.words.running(worker.number):
            log.warning("the %s worker died under step %d", worker.lane.value, flights[0].batch.step)
            flights[0].deaths += 1
            if flights[0].deaths >= 2:
                results.append(_poisoned(worker.lane, flights.popleft(), now))
        elif flights or worker.pid is None or now - worker.forked_at < _EARLY:
            worker.early_deaths += 1  # it could not even begin
        else:
            worker.early_deaths = 0  # it lived, if only to wait: some policies never use a lane
        if worker.early_deaths >= _EARLY_DEATHS:
            self._lost = (
                f"{_EARLY_DEATHS} {worker.lane.value} workers in a row died as soon as they started"
            )
            return
        try:
            worker.channel = self._resident.fork(worker.number)
        except ExecutorLost as lost:
            self._lost = str(lost)
            return
        worker.pid = None
        worker.ordered += 1
        worker.watch.rest()
        self._adopt(worker)
        for flight in flights:
            flight.scores = ()
            self._send(worker, flight.batch)


def cpu_device(units: int, depth: int = 2) -> Device:
    """What a policy may know about this executor with so many cores."""
    legal = tuple((prefill, units - prefill) for prefill in range(1, units))
    return Device("cpu", units, "core", legal, depth, SWITCH_SECONDS, constrained_depth=depth)


def _poisoned(lane: Lane, flight: _Flight, now: float) -> StepResult:
    error = f"the worker died twice under this batch (step {flight.batch.step})"
    return StepResult(lane, flight.batch.step, (), now, now, error, flight.deaths)


def _check_cores(cores: Sequence[int] | None) -> tuple[int, ...]:
    if sys.platform != "linux":
        raise ConfigError(f"the CPU executor needs Linux, not {sys.platform}")
    if cores is None:
        return available_cores()
    chosen = tuple(sorted(set(cores)))
    if not chosen or not set(chosen) <= os.sched_getaffinity(0):
        raise ConfigError(f"cores {list(cores)} are not among those that this process may use")
    return chosen
