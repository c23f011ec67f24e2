"""One lane of the GPU executor: its queue of batches, what it has launched, how much at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from semipd.core.types import Batch, Lane
from semipd.execute.backend import Reading, Side
from semipd.execute.device_scores import Told
from semipd.execute.device_storage import Packed
from semipd.model.device_model import Buffers
from semipd.model.ops import Ops

QUANTUM = 3e-3  # seconds of device time that one group of layers should take
AHEAD = 2  # groups launched and not finished: one runs, one waits behind it
_FIRST_LAYERS = 1  # of a large step whose pace is not known yet
_SMALL = 64  # rows up to which a step is small


@dataclass(eq=False)
class Flight:
    """A submitted batch. columns: see `columns_of`. after: the last step of the other lane that
    used one of them. packed: None until its first launch.
    layers: launches still to come, or None when all are made. replayed: it was one graph. began: event
    before its first kernel. ids: its tokens on their way to the host; told: their scores, and prompts'."""

    batch: Batch
    columns: np.ndarray
    after: int
    packed: Packed | None = None
    layers: Iterator[None] | None = None
    replayed: bool = False
    began: Any = None
    ids: Reading | None = None
    told: list[Told] = field(default_factory=list)
    error: str | None = None


@dataclass(eq=False)
class Group:
    """Some layers of a flight (0: unknown how many) between two events. last: the flight ends with it."""

    flight: Flight
    begin: Any
    end: Any
    layers: int
    units: int
    last: bool


@dataclass(eq=False)
class LaneState:
    """What the launching thread knows of one lane. Only it reads and writes this.

    queue: batches not launched completely, oldest first. groups: launched and not seen finished. side,
    tail: where the last launch went, and the event after it. launched, finished: last steps to have been.
    pace: unit-seconds that one row takes in one layer, learnt from finished groups.
    """

    lane: Lane
    buffers: Buffers
    ops: Ops
    layers: int
    queue: deque[Flight] = field(default_factory=deque)
    groups: deque[Group] = field(default_factory=deque)
    side: Side | None = None
    tail: Any = None
    launched: int = 0
    finished: int = 0
    pace: float | None = None

    @property
    def in_flight(self) -> int:
        """Batches submitted and not returned."""
        waiting = sum(1 for group in self.groups if group.last)
        return len(self.queue) + waiting

    @property
    def busy_side(self) -> Side | None:
        """Where unfinished work is; the lane's launches are in order, so its last launch tells."""
        return self.side if self.groups else None

    def group_size(self, rows: int, units: int) -> int:
        """Layers to launch together, at least one."""
        if self.pace is None:
            return self.layers if rows <= _SMALL else _FIRST_LAYERS
        return max(1, min(int(QUANTUM * units / (self.pace * rows)), self.layers))

    def learn(self, group: Group) -> None:
        """Update the pace from a finished group."""
        if group.flight.packed is None or not group.layers:
            return
        seconds = group.end.seconds_since(group.begin)
        pace = seconds * group.units / (group.layers * group.flight.packed.rows)
        if pace > 0.0:
            self.pace = pace if self.pace is None else 0.7 * self.pace + 0.3 * pace
