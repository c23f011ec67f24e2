"""The planner's books: every live request by stage, the slots, and the steps in flight.

Policies read this and call its few verbs; the engine alone applies results to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from semipd.core.types import Batch, Device, Lane, Request, Split, Stage, StepResult, Work

LONG_STEP = 0.02  # seconds; waiting for the planner after such a step costs about a hundredth of it


@dataclass(frozen=True, slots=True)
class Flight:
    """A submitted batch and the request of each slice."""

    batch: Batch
    requests: tuple[Request, ...]
    work: Work
    split: Split
    launched: float


class Live:
    """Requests that are not finished, in four queues; each request is in exactly one.

    waiting: no slot, no blocks; oldest first (a preempted request returns to the front).
    prefilling: slot and blocks, prompt not fully computed. transferring: prompt computed, blocks in the
    prefill pool (only with two pools). decoding: the rest.
    """

    def __init__(self, max_sequences: int, lanes: frozenset[Lane]) -> None:
        self.waiting: deque[Request] = deque()
        self.prefilling: dict[Request, None] = {}
        self.transferring: dict[Request, None] = {}
        self.decoding: dict[Request, None] = {}
        self.flights: dict[Lane, deque[Flight]] = {lane: deque() for lane in lanes}
        self._took = dict.fromkeys(lanes, 0.0)  # seconds of the last step
        self.by_slot: dict[int, Request] = {}
        self._constrained: set[int] = set()  # slots of requests whose rule has a constraint
        self.closed_slots: list[int] = []  # to be told to the executor before the next submit
        self.preempted: list[Request] = []  # since the engine last looked
        self.max_sequences = max_sequences
        self._free_slots = list(range(max_sequences - 1, -1, -1))

    def __len__(self) -> int:
        return len(self.waiting) + self.holding

    @property
    def holding(self) -> int:
        """Requests that hold a slot and blocks."""
        return len(self.prefilling) + len(self.transferring) + len(self.decoding)

    def busy(self, lane: Lane) -> bool:
        """Whether any step is in flight on the lane."""
        return bool(self.flights[lane])

    def lanes_with_room(self, device: Device) -> frozenset[Lane]:
        """Lanes that can take a step now: those without one, or with fewer than the device's depth. No step
        is planned ahead of a long one while prompts are on their way: whoever ends his prompt during the
        long one would miss the next one, too."""
        prompts = bool(self.prefilling or self.transferring)
        return frozenset(
            lane
            for lane, flights in self.flights.items()
            if len(flights) < (1 if prompts and self._took[lane] > LONG_STEP else self._depth(lane, device))
        )

    def _depth(self, lane: Lane, device: Device) -> int:
        if self._constrained and lane is Lane.DECODE:
            return min(device.constrained_depth, device.depth)
        return device.depth

    def land(self, result: StepResult) -> Flight:
        """The flight that came back, the oldest of its lane."""
        flight = self.flights[result.lane].popleft()
        assert flight.batch.step == result.step, "a lane returned its steps out of order"
        self._took[result.lane] = result.finished - result.started
        return flight

    @property
    def in_flight(self) -> int:
        return sum(len(flights) for flights in self.flights.values())

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    def holders(self) -> Iterator[Request]:
        """Requests that hold blocks, oldest admission first within each stage."""
        yield from self.prefilling
        yield from self.transferring
        yield from self.decoding

    def admit(self, request: Request) -> None:
        """Move the waiting request, whose blocks were just reserved, into a slot."""
        self.waiting.remove(request)
        request.slot = self._free_slots.pop()
        request.stage = Stage.PREFILL
        self.by_slot[request.slot] = request
        if request.sampling.constraint is not None:
            self._constrained.add(request.slot)
        self.prefilling[request] = None

    def move(self, request: Request, stage: Stage) -> None:
        """Take the request from its queue into another one (into none when it is finished). It keeps its
        slot and blocks: steps may be in flight."""
        if request.stage is Stage.WAITING:
            self.waiting.remove(request)
        else:
            del self._queue(request.stage)[request]
        request.stage = stage
        if stage is not Stage.FINISHED:
            self._queue(stage)[request] = None

    def free(self, request: Request) -> None:
        """Give back slot and blocks of a request with nothing in flight."""
        if request.in_flight:
            raise AssertionError(f"request {request.id} is pinned by a step in flight")
        for holder in (request, request.incoming):
            if holder is not None and holder.pool is not None:
                holder.pool.release(holder)
        request.incoming = None
        if request.slot >= 0:
            del self.by_slot[request.slot]
            self._free_slots.append(request.slot)
            self._constrained.discard(request.slot)
            if request.opened:
                self.closed_slots.append(request.slot)
            request.slot = -1
            request.opened = False
            request.blocks_sent = 0

    def preempt(self, request: Request) -> None:
        """Send a request with nothing in flight back to the head of the queue, to be recomputed from its
        prompt and the tokens it has produced."""
        del self._queue(request.stage)[request]
        self.free(request)
        request.stage = Stage.WAITING
        request.planned = request.computed = 0
        request.preemptions += 1
        self.waiting.appendleft(request)
        self.preempted.append(request)

    def _queue(self, stage: Stage) -> dict[Request, None]:
        if stage is Stage.PREFILL:
            return self.prefilling
        return self.decoding if stage is Stage.DECODE else self.transferring
