"""A GPU that is not there: arithmetic at once on the CPU, time on a virtual timeline per stream.

What is launched later never computes earlier, so a missing wait cannot spoil a token here; it shows in the
timeline instead, where the tests look for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from semipd.core.types import Lane
from semipd.execute.backend import Pair, Side
from semipd.model.device_model import DeviceModel
from semipd.model.ops import Ops, PlainOps

PACE = 2e-3  # unit-seconds of one row in one layer
UNITS = 132


class DeviceGone(RuntimeError):
    """What a sticky error of the driver looks like."""


@dataclass(eq=False)
class FakeStream:
    name: str
    until: float = 0.0  # when the last work launched on it ends


@dataclass(frozen=True)
class Span:
    """Some work of a stream."""

    side: Side
    begin: float
    end: float


@dataclass
class FakeEvent:
    backend: FakeBackend
    time: float

    def done(self) -> bool:
        if self.backend.broken is not None:
            raise self.backend.broken
        return self.backend.time >= self.time

    def seconds_since(self, earlier: FakeEvent) -> float:
        assert self.time >= earlier.time
        return self.time - earlier.time


@dataclass
class FakeReading:
    kept: np.ndarray
    event: FakeEvent

    def values(self) -> np.ndarray:
        assert self.event.done(), "read before the device had written it"
        return self.kept


class SpendingOps(PlainOps):
    """Plain arithmetic that takes virtual time in proportion to rows and layers."""

    def __init__(self, backend: FakeBackend) -> None:
        self._backend = backend

    def attend(self, qkv: Any, layer: Any, step: Any, *rest: Any) -> None:
        self._backend.spend(step.rows)
        super().attend(qkv, layer, step, *rest)


@dataclass
class FakeBackend:
    """Implements `execute.backend.Backend`. Faults: `poison` is raised by the next upload, `broken` by
    every event."""

    name: str = "fake GPU"
    units: int = UNITS
    parts: bool = True  # whether it can be partitioned
    step: int = 8  # a partition is a multiple of this
    known: bool = True  # whether the SMs of each side are known
    free: int = 2**34
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    time: float = 0.0
    spans: list[Span] = field(default_factory=list)
    captures: list[Side] = field(default_factory=list)
    replays: int = 0
    settled: int = 0
    poison: BaseException | None = None
    broken: BaseException | None = None
    closed: bool = False
    current: Side | None = None

    def whole(self, lane: Lane) -> Side:
        return Side(FakeStream(f"{lane.value} whole"), self.units, -1, self._sms(range(self.units)))

    def partition(self) -> list[Pair]:
        if not self.parts:
            return []
        pairs = []
        for index, decode in enumerate(range(self.step, self.units, self.step)):
            sides = [(self.units - decode, range(decode, self.units)), (decode, range(decode))]
            prefill, small = (
                Side(FakeStream(f"{units}"), units, index, self._sms(numbers)) for units, numbers in sides
            )
            pairs.append(Pair(prefill, small))
        return pairs

    def _sms(self, numbers: range) -> frozenset[int] | None:
        return frozenset(numbers) if self.known else None

    @contextmanager
    def on(self, side: Side) -> Iterator[None]:
        assert self.current is None, "one thread is on one stream"
        self.current = side
        try:
            yield
        finally:
            self.current = None

    def spend(self, rows: int) -> None:
        """Some work on the current stream."""
        assert self.current is not None, "a launch on no stream"
        side = self.current
        begin = max(side.stream.until, self.time)
        side.stream.until = begin + rows * PACE / side.units
        self.spans.append(Span(side, begin, side.stream.until))

    def record(self, side: Side) -> FakeEvent:
        return FakeEvent(self, max(side.stream.until, self.time))

    def wait(self, side: Side, event: FakeEvent) -> None:
        side.stream.until = max(side.stream.until, event.time)

    def upload(self, values: np.ndarray) -> torch.Tensor:
        assert self.current is not None, "a copy on no stream"
        if self.poison is not None:
            error, self.poison = self.poison, None
            raise error
        return torch.from_numpy(np.array(values))

    def upload_into(self, target: torch.Tensor, values: np.ndarray) -> None:
        target.copy_(self.upload(values))

    def read(self, source: torch.Tensor) -> FakeReading:
        assert self.current is not None
        return FakeReading(source.numpy().copy(), self.record(self.current))

    def capture(self, side: Side, launch: Callable[[], None]) -> Callable[[], None]:
        self.captures.append(side)
        self.time = max(self.time, side.stream.until)  # it waits for the device

        def replay() -> None:
            assert self.current is side, "a graph was replayed on another stream than its own"
            self.replays += 1
            launch()

        return replay

    def ops(self, model: DeviceModel, rows: int) -> Ops:
        return SpendingOps(self)

    def settle(self) -> None:
        self.settled += 1

    def memory(self) -> tuple[int, int]:
        return self.free, 2**34

    def lost(self, error: BaseException) -> str | None:
        return str(error) if isinstance(error, DeviceGone) else None

    def now(self) -> float:
        return self.time

    def rest(self, woken: threading.Event, seconds: float | None) -> None:
        if woken.is_set():
            return
        assert seconds is not None, "waiting for nothing, for ever"
        self.time += max(seconds, 1e-9)

    def close(self) -> None:
        self.closed = True
