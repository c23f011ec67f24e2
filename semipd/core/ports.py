"""The protocols between the rooms. An executor, policy, controller or cost model is whatever fits here;
none of them needs a special case in another's room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from semipd.core.types import (
    Batch,
    Device,
    Event,
    Lane,
    Plan,
    Request,
    Sampling,
    Split,
    StepResult,
    Work,
)

if TYPE_CHECKING:
    from semipd.core.live import Live
    from semipd.core.partition import Window


class Clock(Protocol):
    """The only way time enters the brain."""

    def now(self) -> float:
        """Seconds from an arbitrary origin; never falls."""
        ...


class Executor(Protocol):
    """Runs batches. Called by the planner thread alone, except `wake`.

    Contract (tests/execute/conformance.py runs it on every implementation):
    a lane runs its batches in the order of `submit`; every submitted batch comes back from `wait` exactly
    once, as tokens or as an error; tokens and scores depend on the slot's tokens, rule and position, not on
    what shared the batch, on the split, or on a worker's death. Once it is lost or closed, every call but
    `wake` and `close` raises ExecutorLost.
    """

    @property
    def device(self) -> Device: ...

    def open(self, slot: int, tokens: Sequence[int], sampling: Sampling) -> None:
        """Give a free slot its known tokens and its sampling rule. Raises ValueError out of range."""
        ...

    def close_slot(self, slot: int) -> None:
        """Forget a slot that no step in flight uses."""
        ...

    def submit(self, lane: Lane, batch: Batch) -> None:
        """Queue a batch; returns at once. Raises ValueError for a lane that the device has not, and for
        more than `device.depth` in flight on one."""
        ...

    def wait(self, until: float | None) -> list[StepResult]:
        """Block until a result is there, `wake` was called, or the clock reads `until`; then return what is
        done (maybe nothing). Raises `ExecutorLost` when no later step can ever succeed."""
        ...

    def wake(self) -> None:
        """Cut the running or the next `wait` short. Safe from any thread."""
        ...

    def resize(self, split: Split) -> None:
        """Make `split` the target of every lane from its next boundary on. A lane grows only after the
        others have given up what it takes. Raises ValueError for a split of another number of units."""
        ...

    def close(self) -> None:
        """Release everything; idempotent. Batches in flight are lost."""
        ...


class ExecutorLost(RuntimeError):
    """The executor cannot run anything any more; every live request ends with this message."""


class KVManager(Protocol):
    """Owns the blocks of one pool. free + cached + held == total, always."""

    @property
    def block_size(self) -> int: ...

    @property
    def total(self) -> int: ...

    @property
    def available(self) -> int:
        """Blocks that a reserve could take now: free plus cached and unreferenced."""
        ...

    @property
    def queried_tokens(self) -> int:
        """Known tokens of all requests that entered: what the prefix cache was asked for."""
        ...

    @property
    def hit_tokens(self) -> int:
        """Those of them that it had."""
        ...

    def reserve(self, request: Request, upto: int) -> bool:
        """Make `request.blocks` cover positions below `upto`, all or nothing. For a request without blocks,
        first match its prefix in the cache and set `computed` and `planned` to the matched positions
        (at most all full blocks before the last known token)."""
        ...

    def publish(self, request: Request, computed: int) -> None:
        """Make the full blocks below position `computed` shareable under `request.block_keys`."""
        ...

    def release(self, request: Request) -> None:
        """Give back every block of the request; published ones stay cached until they are evicted."""
        ...


class Policy(Protocol):
    """Decides what each idle lane runs next. Reserves blocks for what it plans."""

    def plan(self, idle: frozenset[Lane], live: Live, kv: Mapping[Lane, KVManager], now: float) -> Plan: ...


class Controller(Protocol):
    """Chooses shares from a window of observations: the fixed ways and the paper's. A pure function."""

    def split(self, window: Window, current: Split) -> Split: ...


class CostModel(Protocol):
    """Predicts the seconds of a step with this work on `units`, beside another step (or None)."""

    def seconds(
        self, work: Work, units: int, beside: Work | None = None, beside_units: int = 0
    ) -> float: ...


class Observer(Protocol):
    """Hears every event, in order, on the planner thread. Must not block."""

    def __call__(self, event: Event) -> None: ...
