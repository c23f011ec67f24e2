"""The GPU executor: two phases on one card, re-partitioned between launches. Implements
`core.ports.Executor`; a unit is an SM.

One process, one launching thread (the planner's, inside `wait`). Prefill is launched in groups of layers
sized by time, so the thread is never away from decode for long, and the split may change between groups.
Decode steps are replays of captured graphs where there is one. Ids stay on the device: a step reads the
token that the step before wrote, so two steps can be in flight per lane. The thread polls events; on the
hot path it never waits for a stream.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from semipd.core.ports import ExecutorLost
from semipd.core.types import Batch, Device, Lane, Sampling, Score, Split, StepResult
from semipd.execute.backend import Backend, Side
from semipd.execute.cuda_graphs import DecodeGraphs, Graph
from semipd.execute.cuda_lane import AHEAD, Flight, Group, LaneState
from semipd.execute.cuda_partition import Placement
from semipd.execute.device_scores import Told, Wanted
from semipd.execute.device_storage import DeviceStorage, Packed, all_below, columns_of
from semipd.model.device_model import DeviceModel
from semipd.model.sampler_device import chances_on_device, greedy, sample_on_device

SWITCH_SECONDS = 100e-6  # host time; nothing is rebuilt and nothing waits
POLL = 20e-6  # seconds between looks at events
SCORED = 64  # prompt positions whose logits exist at the same time
LANES = (Lane.DECODE, Lane.PREFILL)  # decode first: its launches are short and its deadline is near

_END = object()

log = logging.getLogger("semipd")


class CudaExecutor:
    """Runs batches on `backend`. `cuda_start.start_cuda` makes one from a model folder.

    model, storage, lanes, graphs: made for the same backend; the decode lane's buffers are the graphs'.
    most_rows: positions in one step. depth: steps in flight per lane.
    """

    def __init__(
        self,
        backend: Backend,
        model: DeviceModel,
        storage: DeviceStorage,
        placement: Placement,
        lanes: Sequence[LaneState],
        graphs: DecodeGraphs,
        *,
        most_rows: int,
        depth: int = 2,
    ) -> None:
        self.device = Device(
            *(backend.name, backend.units, "SM", placement.legal_splits, depth, SWITCH_SECONDS),
            only_legal=True,
        )
        self.graphs = graphs
        self._backend, self._model, self._storage = backend, model, storage
        self._placement = placement
        self._lanes = {state.lane: state for state in lanes}
        self._most_rows = most_rows
        # The last step submitted on each lane that uses a slot.
        self._users = np.full((len(LANES), storage.table.slots), -1, dtype=np.int64)
        self._woken = threading.Event()
        self._lost: str | None = None
        self._closed = False

    # -- the port ----------------------------------------------------------------------------------

    def open(self, slot: int, tokens: Sequence[int], sampling: Sampling) -> None:
        self._check()
        self._storage.open(slot, tokens, sampling)
        self._users[:, slot] = -1

    def close_slot(self, slot: int) -> None:
        self._check()
        self._storage.close_slot(slot)

    def submit(self, lane: Lane, batch: Batch) -> None:
        self._check()
        state = self._lanes.get(lane)
        if state is None:
            raise ValueError(f"the GPU has no lane {lane.value}")
        if batch.copies:
            raise ValueError("lanes share one KV pool here: there is nothing to copy between")
        if state.in_flight >= self.device.depth:
            raise ValueError(f"more than {self.device.depth} steps in flight on {lane.value}")
        columns = columns_of(batch.slices)
        slots = columns[0]
        if slots.size and not all_below(slots, self._users.shape[1]):
            slots = slots[:0]  # the batch will be refused
        mine = LANES.index(lane)
        others = self._users[1 - mine, slots]
        state.queue.append(Flight(batch, columns, int(others.max()) if others.size else -1))
        self._users[mine, slots] = batch.step

    def wait(self, until: float | None) -> list[StepResult]:
        self._check()
        while True:
            launched = self._launch_due()
            if results := self._harvest():
                return results
            if self._woken.is_set():
                self._woken.clear()
                return []
            now = self._backend.now()
            if until is not None and now >= until:
                return []
            if not launched:
                self._rest(None if until is None else until - now)

    def wake(self) -> None:
        self._woken.set()

    def resize(self, split: Split) -> None:
        self._check()
        if split.total != self.device.units:
            raise ValueError(f"a split of {split.total} units on {self.device.units} SMs")
        self._placement.retarget(split)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            # Graphs go before the partitions that they were captured on, when nothing of them runs.
            with contextlib.suppress(RuntimeError):
                self._backend.settle()
            self.graphs.clear()
            self._backend.close()

    def capture_graphs(self) -> None:
        """Capture at once what would be captured while nothing runs. Nothing may be in flight."""
        while self._capture_when_idle():
            pass

    def fill_with_noise(self, seed: int = 0) -> None:
        """Overwrite the KV pool, for measurements: arithmetic on zeros takes less power than on data."""
        kv = self._storage.kv
        generator = torch.Generator(kv.device).manual_seed(seed)
        with torch.inference_mode():
            for layer in kv:
                layer.normal_(0.0, 0.5, generator=generator)
        self._backend.settle()

    # -- within ------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._closed:
            raise ExecutorLost("the executor is closed")
        if self._lost is not None:
            raise ExecutorLost(self._lost)

    def _rest(self, seconds: float | None) -> None:
        """Nothing to launch and nothing finished: let time pass, or capture a graph while all is idle."""
        if any(state.groups for state in self._lanes.values()):
            self._backend.rest(self._woken, POLL if seconds is None else min(POLL, seconds))
        elif not self._capture_when_idle():
            self._backend.rest(self._woken, seconds)

    def _capture_when_idle(self) -> bool:
        try:
            return self.graphs.capture_next()
        except Exception as error:
            self._survive(error)
            raise

    def _launch_due(self) -> bool:
        """Launch what may be launched now; whether anything was."""
        launched = False
        for lane in LANES:
            state = self._lanes[lane]
            while state.queue and len(state.groups) < AHEAD and self._is_due(state):
                self._launch_group(state)
                launched = True
                if lane is Lane.PREFILL:
                    break  # look after decode between groups
        return launched

    def _is_due(self, state: LaneState) -> bool:
        """Whether what the first queued batch reads was launched before it."""
        return state.queue[0].after <= self._other(state).launched

    def _other(self, state: LaneState) -> LaneState:
        return self._lanes[Lane.PREFILL if state.lane is Lane.DECODE else Lane.DECODE]

    def _launch_group(self, state: LaneState) -> None:
        """Launch the next layers of the lane's first queued batch between two events."""
        flight, other, backend = state.queue[0], self._other(state), self._backend
        first = flight.layers is None
        place = self._placement.place(state.lane, state.side, other.busy_side)
        side, layers = place.side, 0
        with torch.inference_mode(), backend.on(side):
            if state.tail is not None and state.side is not side:
                backend.wait(side, state.tail)
            handover = first and flight.after > other.finished
            if (place.wait or handover) and other.tail is not None:
                backend.wait(side, other.tail)
            state.side = side
            begin = backend.record(side)
            try:
                if first:
                    flight.began = begin
                    flight.packed = self._storage.pack(flight.batch, flight.columns, self._most_rows)
                    flight.layers = self._steps(state, flight, flight.packed)
                layers = self._advance(state, flight, side)
            except Exception as error:
                self._fail(flight, error)
            last = flight.layers is None
            state.tail = backend.record(side)
        state.groups.append(Group(flight, begin, state.tail, layers, side.units, last))
        if last:
            state.queue.popleft()
            state.launched = flight.batch.step

    def _advance(self, state: LaneState, flight: Flight, side: Side) -> int:
        """Launch one group of layers; how many. `flight.layers` becomes None with the last."""
        assert flight.layers is not None and flight.packed is not None
        count = state.group_size(flight.packed.rows, side.units)
        for done in range(count):
            if next(flight.layers, _END) is _END:
                flight.layers = None
                return 0 if flight.replayed else done + 1
        return count

    def _steps(self, state: LaneState, flight: Flight, packed: Packed) -> Iterator[None]:
        """The launches of a batch, yielding after each layer. The side may change between two."""
        backend, storage = self._backend, self._storage
        if state.lane is Lane.DECODE and packed.decode_only and state.side is not None:
            graph = self.graphs.find(state.side, packed.rows)
            if graph is not None:
                flight.replayed = True
                self._replay(state, flight, packed, graph)
                return
        step, write = storage.step(packed, backend)
        if state.ops.plans:
            state.ops.plan(storage.outline(packed.slots, packed.starts, packed.counts))
        prompts, units = storage.wanted_of_prompts(packed), lambda: _units(state)
        yield from self._model.launch(
            step, state.buffers, storage.kv, state.ops, units, head=prompts is None
        )
        if prompts is not None:
            yield from self._score_prompts(state, flight, prompts)
        if write.shape[0]:
            logits = state.buffers.logits[: write.shape[0]]
            if prompts is not None:
                assert step.sample is not None
                logits = self._model.logits_of(step.sample, state.buffers)
            storage.put(write, self._choose(flight, packed, logits))

    def _score_prompts(self, state: LaneState, flight: Flight, wanted: Wanted) -> Iterator[None]:
        """Launch the head for these rows, a few at a time, and send their scores to the host."""
        for part in wanted.parts(min(SCORED, state.buffers.logits.shape[0])):
            rows, tokens = self._backend.upload(np.stack((part.rows, part.tokens)))
            logits = self._model.logits_of(rows, state.buffers)
            found = chances_on_device(logits, tokens, part.most)
            flight.told.append(Told(part, self._backend.read(found)))
            yield

    def _choose(
        self, flight: Flight, packed: Packed, logits: torch.Tensor, best: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The tokens of a batch by its rules, int64; they and the scores asked for go to the host. best:
        the greedy ones, where they are known."""
        wanted, raw = self._storage.wanted(packed), None
        if wanted is not None:
            rows = self._backend.upload(wanted.rows)
            raw = logits.index_select(0, rows)  # a copy: rules change logits
        rules = self._storage.rules(packed, self._backend)
        if rules is not None:
            ids = sample_on_device(logits, rules)
        else:
            ids = greedy(logits) if best is None else best
        flight.ids = self._backend.read(ids)
        if wanted is not None and raw is not None:
            found = chances_on_device(raw, ids.index_select(0, rows), wanted.most)
            flight.told.append(Told(wanted, self._backend.read(found)))
        return ids

    def _replay(self, state: LaneState, flight: Flight, packed: Packed, graph: Graph) -> None:
        """A decode step by its graph, which chooses greedily; other rules choose again after it."""
        self.graphs.replay(graph, packed)
        best = graph.ids[: packed.rows]
        ids = self._choose(flight, packed, state.buffers.logits[: packed.rows], best)
        if ids is not best:
            self._storage.put(graph.write[: packed.rows], ids)

    def _harvest(self) -> list[StepResult]:
        """Take note of finished groups; the results of finished batches."""
        results = []
        for lane in LANES:
            state = self._lanes[lane]
            try:
                while state.groups and state.groups[0].end.done():
                    group = state.groups.popleft()
                    state.learn(group)
                    if group.last:
                        state.finished = group.flight.batch.step
                        results.append(self._result(state, group))
            except Exception as error:
                self._lost = self._backend.lost(error) or _line(error)
                raise ExecutorLost(self._lost) from error
        return results

    def _result(self, state: LaneState, group: Group) -> StepResult:
        flight = group.flight
        tokens: tuple[int, ...] = ()
        scores: tuple[Score, ...] = ()
        error = flight.error
        if error is None and flight.ids is not None and flight.packed is not None:
            tokens = tuple(flight.ids.values().tolist())
            if (bad := self._storage.learn(flight.packed, tokens)) is not None:
                tokens, error = (), f"the logits of row {bad} have no finite maximum"
        if error is None and flight.told:
            try:
                scores = tuple(score for told in flight.told for score in told.scores())
            except FloatingPointError as broken:
                tokens, error = (), str(broken)
        finished = self._backend.now()
        started = finished - group.end.seconds_since(flight.began)
        return StepResult(state.lane, flight.batch.step, tokens, started, finished, error, scores=scores)

    def _fail(self, flight: Flight, error: Exception) -> None:
        """End a batch whose launch raised; raise ExecutorLost when nothing can be launched any more."""
        flight.layers = None
        if isinstance(error, ValueError):
            flight.error = str(error)
            return
        self._survive(error)
        log.error("step %d failed", flight.batch.step, exc_info=error)
        flight.error = f"{type(error).__name__}: {_line(error)}"

    def _survive(self, error: Exception) -> None:
        """Raise ExecutorLost if the device did not survive this error."""
        if (why := self._backend.lost(error)) is not None:
            self._lost = why
            raise ExecutorLost(why) from error


def _units(state: LaneState) -> int:
    assert state.side is not None
    return state.side.units


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
