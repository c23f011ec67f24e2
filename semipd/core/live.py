"""The planner's books: every live request by stage, the slots, and the steps in flight.

Policies read this and call its few verbs; the engine alone applies results to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from semipd.core.ports import KVManager
from semipd.core.types import Batch, Lane, Request, Split, Stage, Work


@dataclass(frozen=True, slots=True)
class Flight:
    """A submitted batch and the request of each slice."""

    batch: Batch
    requests: tuple[Request, ...]
    work: Work
    split: Split
    launched: float


class Live:
    """Requests that are not finished, in three queues; each request is in exactly one.

    waiting: no slot, no blocks; oldest first (a preempted request returns to the front).
    prefilling: slot and blocks, prompt not fully computed. decoding: the rest.
    """

    def __init__(self, max_sequences: int, lanes: frozenset[Lane]) -> None:
        self.waiting: deque[Request] = deque()
        self.prefilling: dict[Request, None] = {}
        self.decoding: dict[Request, None] = {}
        self.flights: dict[Lane, deque[Flight]] = {lane: deque() for lane in lanes}
        self.by_slot: dict[int, Request] = {}
        self.closed_slots: list[int] = []  # to be told to the executor before the next submit
        self.preempted: list[Request] = []  # since the engine last looked
        self.max_sequences = max_sequences
        self._free_slots = list(range(max_sequences - 1, -1, -1))

    def __len__(self) -> int:
        return len(self.waiting) + len(self.prefilling) + len(self.decoding)

    def busy(self, lane: Lane) -> bool:
        """Whether any step is in flight on the lane."""
        return bool(self.flights[lane])

    @property
    def in_flight(self) -> int:
        return sum(len(flights) for flights in self.flights.values())

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    def holders(self) -> Iterator[Request]:
        """Requests that hold blocks, oldest admission first within each stage."""
        yield from self.prefilling
        yield from self.decoding

    def admit(self, request: Request) -> None:
        """Move the waiting request, whose blocks were just reserved, into a slot."""
        self.waiting.remove(request)
        request.slot = self._free_slots.pop()
        request.stage = Stage.PREFILL
        self.by_slot[request.slot] = request
        self.prefilling[request] = None

    def start_decoding(self, request: Request) -> None:
        del self.prefilling[request]
        request.stage = Stage.DECODE
        self.decoding[request] = None

    def leave(self, request: Request) -> None:
        """Take the request out of its queue. It keeps its slot and blocks (steps may be in flight)."""
        if request.stage is Stage.WAITING:
            self.waiting.remove(request)
        elif request.stage is Stage.PREFILL:
            del self.prefilling[request]
        elif request.stage is Stage.DECODE:
            del self.decoding[request]

    def free(self, request: Request, kv: KVManager) -> None:
        """Give back slot and blocks of a request with nothing in flight."""
        if request.in_flight:
            raise AssertionError(f"request {request.id} is pinned by a step in flight")
        if request.slot >= 0:
            kv.release(request)
            del self.by_slot[request.slot]
            self._free_slots.append(request.slot)
            if request.blocks_sent:
                self.closed_slots.append(request.slot)
            request.slot = -1
            request.blocks_sent = 0

    def preempt(self, request: Request, kv: KVManager) -> None:
        """Send a request with nothing in flight back to the head of the queue, to be recomputed from its
        prompt and the tokens it has produced."""
        self.leave(request)
        self.free(request, kv)
        request.stage = Stage.WAITING
        request.planned = request.computed = 0
        request.preemptions += 1
        self.waiting.appendleft(request)
        self.preempted.append(request)
