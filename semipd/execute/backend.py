"""What the executor of asynchronous devices needs of one: streams, events, copies, graphs, partitions.

`cuda_backend.CudaBackend` is the real one; the tests have one that runs on the CPU and keeps a virtual
timeline. Calls come from one thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from semipd.core.types import Lane
from semipd.model.device_model import DeviceModel
from semipd.model.ops import Ops


@dataclass(frozen=True, eq=False)
class Side:
    """A stream and the SMs that its kernels run on. units: as granted, not as asked for. sms: their
    hardware numbers where they were measured, else None. pair: which partition it is a side of; -1: the
    whole device."""

    stream: Any
    units: int
    pair: int = -1
    sms: frozenset[int] | None = None


@dataclass(frozen=True)
class Pair:
    """One partition of the device in two disjoint sides."""

    prefill: Side
    decode: Side

    def side(self, lane: Lane) -> Side:
        return self.decode if lane is Lane.DECODE else self.prefill


class Event(Protocol):
    """A point on a stream."""

    def done(self) -> bool:
        """Whether the device has passed it. Raises what the device raised before it."""
        ...

    def seconds_since(self, earlier: Any) -> float:
        """Device time between two points that were both passed."""
        ...


class Reading(Protocol):
    """Values on their way to the host; there once an event recorded after `Backend.read` is done."""

    def values(self) -> np.ndarray: ...


class Backend(Protocol):
    """One device. `device`: where tensors are; `units`: its SMs; `name`: its product name."""

    name: str
    units: int

    @property
    def device(self) -> torch.device: ...

    def whole(self, lane: Lane) -> Side:
        """A stream on the whole device; decode's has the higher priority."""
        ...

    def partition(self) -> list[Pair]:
        """Every way to cut the device in two that it allows, decode's side rising; empty (and one line in
        the log) when it allows none."""
        ...

    def on(self, side: Side) -> AbstractContextManager[Any]:
        """Launches inside go to the side's stream."""
        ...

    def record(self, side: Side) -> Event: ...

    def wait(self, side: Side, event: Any) -> None:
        """Later work of the side starts after the event. Does not block the host."""
        ...

    def upload(self, values: np.ndarray) -> torch.Tensor:
        """A copy on the device, ordered on the current stream. Does not block; `values` may be reused."""
        ...

    def upload_into(self, target: torch.Tensor, values: np.ndarray) -> None: ...

    def read(self, source: torch.Tensor) -> Reading: ...

    def capture(self, side: Side, launch: Callable[[], None]) -> Callable[[], None]:
        """Record what `launch` launches; calling the result launches it again. Blocks; the device must be
        idle and `launch` must have run once before."""
        ...

    def ops(self, model: DeviceModel, rows: int) -> Ops:
        """Kernels for one lane with at most `rows` slices of one position in a step."""
        ...

    def settle(self) -> None:
        """Wait until the device has done all that was launched on any stream. Not while requests run."""
        ...

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        ...

    def lost(self, error: BaseException) -> str | None:
        """Why nothing can run on the device any more after this error, or None when others can go on."""
        ...

    def now(self) -> float:
        """Seconds on the executor's clock."""
        ...

    def rest(self, woken: threading.Event, seconds: float | None) -> None:
        """Return after so many seconds, or sooner when `woken` is set."""
        ...

    def close(self) -> None: ...
