"""Runs an engine on the calling thread, and tells whoever listens what each turn of its loop gave.

`submit`, `abort`, `ask` and `close` may be called from any thread.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from semipd.core.engine import Engine
from semipd.core.errors import Refused, SemipdError
from semipd.core.metrics import Metrics
from semipd.core.partition import Targets
from semipd.core.ports import ExecutorLost, Observer
from semipd.core.types import Event, Finished, FinishReason, Lane, Launched, Score, Scored, Stepped, Tokens
from semipd.serve.messages import Abort, Ended, EngineInfo, LaneState, Lost, Stats, Step, Submit, Up

Build = Callable[[Sequence[Observer]], Engine]

log = logging.getLogger("semipd")


class Listener(Protocol):
    """Hears every message on the planner thread. Must not block."""

    def __call__(self, message: Up) -> None: ...


class Planner:
    """One engine and its loop. `run` builds it, serves until `close`, and takes it down again."""

    def __init__(self, build: Build, targets: Mapping[str, Targets] | None = None) -> None:
        """targets: by service class; what the metrics count as attained."""
        self._build = build
        self._outbox = _Outbox()
        self._heartbeat = _Heartbeat()
        self._metrics = Metrics(targets)
        self._listeners: tuple[Listener, ...] = ()
        self._inbox: deque[Submit | Abort] = deque()
        self._asked = False
        self._closed = False
        self._engine: Engine | None = None
        self.lost: Lost | None = None

    def listen(self, listener: Listener) -> None:
        """Send every later message there; each listener knows its own requests by their ids."""
        self._listeners = (*self._listeners, listener)

    def unlisten(self, listener: Listener) -> None:
        self._listeners = tuple(other for other in self._listeners if other != listener)

    # -- from any thread ---------------------------------------------------------------------------

    def submit(self, message: Submit) -> None:
        self._inbox.append(message)
        self._wake()

    def abort(self, message: Abort) -> None:
        self._inbox.append(message)
        self._wake()

    def ask(self) -> None:
        self._asked = True
        self._wake()

    def close(self) -> None:
        """Make `run` return soon. Requests that still run are lost."""
        self._closed = True
        self._wake()

    # -- on the planner thread ---------------------------------------------------------------------

    def run(self) -> None:
        """Build the engine, announce it, and serve. Never raises: what goes wrong is told as `Lost`."""
        try:
            self._engine = self._build((self._outbox, self._heartbeat, self._metrics))
            self._tell(_info(self._engine))
            self._serve(self._engine)
        except SemipdError as error:
            self._lose(Lost(str(error), refused=self._engine is None))
        except ExecutorLost as error:
            self._lose(Lost(str(error)))
        except Exception as error:
            log.exception("the engine failed")
            self._lose(Lost(f"{type(error).__name__}: {error}"))
        finally:
            if self._engine is not None:
                self._engine.executor.close()

    def _serve(self, engine: Engine) -> None:
        while not self._closed:
            self._accept(engine)
            engine.step()  # a message that comes between these two lines has woken this wait already
            if engine.dead is not None:
                self._lose(Lost(engine.dead))
                return
            if (step := self._outbox.take()) is not None:
                self._tell(step)
            if self._asked:
                self._asked = False
                self._tell(_stats(engine, self._heartbeat, self._metrics))
        self._lose(Lost("the engine was closed"))

    def _accept(self, engine: Engine) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Abort):
                for request_id in message.ids:
                    if message.stopped:
                        self._metrics.count_as_stop(request_id)
                    engine.abort(request_id)
                continue
            try:
                engine.add(message.request(engine.clock.now()))
            except Refused as refused:
                self._outbox.refuse(message.id, refused)
                self._wake()  # or the answer would wait for the next event

    def _tell(self, message: Up) -> None:
        for listener in self._listeners:
            listener(message)

    def _lose(self, lost: Lost) -> None:
        self.lost = lost
        self._tell(lost)

    def _wake(self) -> None:
        if (engine := self._engine) is not None:
            engine.executor.wake()


class _Outbox:
    """Collects a turn's tokens and endings."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._tokens: list[int] = []
        self._ended: list[Ended] = []
        self._scored: list[str] = []
        self._scores: list[Score] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Tokens):
            self._ids += [request.id for request in event.requests]
            self._tokens += event.tokens
        elif isinstance(event, Scored):
            self._scored += [request.id for request in event.requests]
            self._scores += event.scores
        elif isinstance(event, Finished):
            request = event.request
            reason = request.finish_reason or FinishReason.ERROR
            ended = Ended(request.id, reason, request.error, cached_tokens=request.cached_tokens)
            self._ended.append(ended)

    def refuse(self, request_id: str, refused: Refused) -> None:
        self._ended.append(
            Ended(request_id, FinishReason.ERROR, str(refused), refused=True, param=refused.param)
        )

    def take(self) -> Step | None:
        if not self._ids and not self._ended and not self._scores:
            return None
        step = Step(self._ids, self._tokens, self._ended, self._scored, self._scores)
        self._ids, self._tokens, self._ended, self._scored, self._scores = [], [], [], [], []
        return step


class _Heartbeat:
    """When each lane last made progress, by the wall clock."""

    def __init__(self) -> None:
        self._in_flight: dict[Lane, int] = {}
        self._moved: dict[Lane, float] = {}
        self._longest: dict[Lane, float] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Launched):
            flying = self._in_flight.get(event.lane, 0)
            self._in_flight[event.lane] = flying + 1
            if not flying:
                self._moved[event.lane] = time.monotonic()
        elif isinstance(event, Stepped):
            lane = event.result.lane
            self._in_flight[lane] -= 1
            now = time.monotonic()
            self._longest[lane] = max(self._longest.get(lane, 0.0), now - self._moved[lane])
            self._moved[lane] = now

    def lanes(self, known: frozenset[Lane]) -> dict[str, LaneState]:
        now = time.monotonic()
        states = {}
        for lane in sorted(known, key=lambda lane: lane.value):
            flying = self._in_flight.get(lane, 0)
            waited = now - self._moved[lane] if flying else 0.0
            states[lane.value] = LaneState(flying, waited, self._longest.get(lane, 0.0))
        return states


def _info(engine: Engine) -> EngineInfo:
    device = engine.executor.device
    pools = [manager.total * manager.block_size for manager in engine.kv.values()]
    return EngineInfo(
        device=device.name,
        units=device.units,
        unit_kind=device.unit_kind,
        limit=min(engine.max_length, *pools),
        block_size=engine.kv[Lane.DECODE].block_size,
    )


def _stats(engine: Engine, heartbeat: _Heartbeat, metrics: Metrics) -> Stats:
    live = engine.live
    pools = list({id(pool): pool for pool in engine.kv.values()}.values())
    total = sum(pool.total for pool in pools)
    available = sum(pool.available for pool in pools)
    return Stats(
        running=len(live.prefilling) + len(live.decoding),
        waiting=len(live.waiting),
        kv_usage=1.0 - available / total,
        prefix_queries=sum(pool.queried_tokens for pool in pools),
        prefix_hits=sum(pool.hit_tokens for pool in pools),
        lanes=heartbeat.lanes(engine.executor.device.lanes),
        metrics=metrics.snapshot(),
    )
