"""The bridge between one asyncio loop and an engine, wherever that runs.

Every message of the engine is handled in one call on the loop; a stream is woken at most once for it.
A consumer that goes away aborts its requests.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from semipd.core.engine import NOTHING_FOLLOWS
from semipd.core.errors import EngineDead, Refused, SemipdError
from semipd.core.types import FinishReason, Score
from semipd.serve.messages import Abort, Ask, Ended, EngineInfo, Lost, Stats, Step, Submit, Up

ANSWER_SECONDS = 10.0  # a planner that has not answered for this long is stuck
NEVER_STEPPED_SECONDS = 600.0  # patience with the first step of a lane
STALLED_SECONDS, STALLED_FACTOR = 60.0, 10.0  # later: this long, and this many times its longest step

log = logging.getLogger("semipd")


class RequestFailed(SemipdError):
    """The engine could not finish this request; it serves others."""


class Link(Protocol):
    """A way to an engine: a thread of this process, or another process."""

    async def open(self, deliver: Callable[[Up], None]) -> None:
        """Call `deliver` on the running loop for every message from now on."""
        ...

    def send(self, message: Submit | Abort | Ask) -> None: ...

    async def close(self) -> None:
        """No message is delivered any more. Idempotent."""
        ...


@dataclass(slots=True)
class Piece:
    """New tokens of one sequence, and whether they were the last. cached_tokens: known at the end.

    scores: of tokens of the prompt, then of `tokens`, where they were asked for."""

    index: int
    tokens: list[int]
    finish: FinishReason | None = None
    cached_tokens: int | None = None
    scores: list[Score] = field(default_factory=list)


class Session:
    """Requests go in, streams of tokens come out. Used from one loop only."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._numbers = itertools.count(1)
        self._prefix = secrets.token_hex(4)  # several sessions may share an engine
        self._streams: dict[str, tuple[Stream, int]] = {}
        self._info: asyncio.Future[EngineInfo] | None = None
        self._asked: tuple[float, asyncio.Future[Stats]] | None = None  # when, and the answer to come
        self._latest: tuple[float, Stats] | None = None
        self._closing = False
        self.lost: Lost | None = None

    async def open(self) -> None:
        """Connect. Does not wait for the engine: `info` does."""
        self._info = asyncio.get_running_loop().create_future()
        await self._link.open(self._deliver)

    async def info(self) -> EngineInfo:
        """What the engine can do, once it is there. Raises EngineDead when it will never be."""
        assert self._info is not None, "the session is not open"
        return await asyncio.shield(self._info)

    @property
    def ready(self) -> bool:
        """Whether the engine is built and alive."""
        return self.lost is None and self._info is not None and self._info.done()

    def loaded(self) -> EngineInfo:
        """`info` without waiting, when `ready`."""
        assert self._info is not None
        return self._info.result()

    def submit(self, requests: Sequence[Submit]) -> Stream:
        """Start the requests (their ids are replaced by fresh ones). Raises EngineDead.

        Use the stream in a `with` block, at whose end what still runs is aborted."""
        self._check_alive()
        stream = Stream(self._abort)
        for index, request in enumerate(requests):
            name = f"{self._prefix}-{next(self._numbers)}"
            stream.running[index] = name
            self._streams[name] = (stream, index)
            self._link.send(msgspec.structs.replace(request, id=name))
        return stream

    async def stats(self, patience: float = 1.0, age: float = 0.0) -> Stats:
        """The engine's state, at most `age` seconds old. Raises TimeoutError when there is no answer
        within `patience` seconds."""
        self._check_alive()
        now = time.monotonic()
        if self._latest is not None and now - self._latest[0] <= age:
            return self._latest[1]
        if self._asked is None:
            self._asked = now, asyncio.get_running_loop().create_future()
            self._link.send(Ask())
        return await asyncio.wait_for(asyncio.shield(self._asked[1]), patience)

    async def health(self) -> str | None:
        """Why the engine makes no progress, or None when all is well or it is still loading."""
        if self.lost is not None:
            return self.lost.why
        if not self.ready:
            return None
        try:
            return _stalled(await self.stats(age=0.5))
        except TimeoutError:
            waited = time.monotonic() - self._asked[0] if self._asked else 0.0
            return f"the planner has not answered for {waited:.0f} s" if waited > ANSWER_SECONDS else None
        except EngineDead as dead:
            return str(dead)

    async def close(self) -> None:
        """Let go of the engine. Streams that still run end with EngineDead."""
        self._closing = True
        await self._link.close()
        self._lose(Lost("the session was closed"))

    def _check_alive(self) -> None:
        if self.lost is not None:
            raise EngineDead(self.lost.why)

    def _abort(self, names: Sequence[str], stopped: bool) -> None:
        for name in names:
            self._streams.pop(name, None)
        if names and self.lost is None:
            self._link.send(Abort(tuple(names), stopped))

    def _deliver(self, message: Up) -> None:
        if isinstance(message, Step):
            self._step(message)
        elif isinstance(message, Stats):
            self._latest = (time.monotonic(), message)
            asked, self._asked = self._asked, None
            if asked is not None and not asked[1].done():
                asked[1].set_result(message)
        elif isinstance(message, EngineInfo):
            if self._info is not None and not self._info.done():
                self._info.set_result(message)
        else:
            if self.ready and not self._closing:
                log.error("the engine is lost: %s", message.why)
            self._lose(message)

    def _step(self, step: Step) -> None:
        streams = self._streams
        for name, score in zip(step.scored, step.scores, strict=True):
            if (entry := streams.get(name)) is not None:
                entry[0].score(entry[1], score)
        for name, token in zip(step.ids, step.tokens, strict=True):
            if (entry := streams.get(name)) is not None:
                entry[0].put(entry[1], token)
        for ended in step.ended:
            if (entry := streams.pop(ended.id, None)) is not None:
                entry[0].end(entry[1], ended)

    def _lose(self, lost: Lost) -> None:
        if self.lost is not None:
            return
        self.lost = lost
        error = EngineDead(lost.why)
        for future in (self._asked and self._asked[1], self._info):
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # seen: nobody need be waiting
        streams = {id(stream): stream for stream, _ in self._streams.values()}
        self._streams.clear()
        for stream in streams.values():
            stream.fail(error)


class Stream:
    """The tokens of a group of sequences, read by one consumer: `async for pieces in stream`.

    An iteration gives all that has arrived since the last one, at most one piece per sequence, and ends
    when every sequence has. Raises EngineDead, Refused or RequestFailed.
    """

    def __init__(self, abort: Callable[[Sequence[str], bool], None]) -> None:
        self.running: dict[int, str] = {}  # sequences that have not ended, and their requests' ids
        self._abort = abort
        self._pieces: dict[int, Piece] = {}
        self._scores: dict[int, list[Score]] = {}  # of tokens to come: no piece is made of scores alone
        self._error: SemipdError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        names = list(self.running.values())
        self.running.clear()
        self._abort(names, False)

    def stop(self, index: int) -> None:
        """The consumer has all that it wants of this sequence: a success, not an abort."""
        if (name := self.running.pop(index, None)) is not None:
            self._abort([name], True)
        self._pieces.pop(index, None)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[Piece]:
        while not self._pieces and self._error is None:
            if not self.running:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        pieces, self._pieces = self._pieces, {}
        return list(pieces.values())

    # -- called by the session ---------------------------------------------------------------------

    def put(self, index: int, token: int) -> None:
        piece = self._pieces.get(index)
        if piece is None:
            self._pieces[index] = Piece(index, [token])
        else:
            piece.tokens.append(token)
        if self._scores:
            self._pieces[index].scores += self._scores.pop(index, ())
        self._wake()

    def score(self, index: int, score: Score) -> None:
        self._scores.setdefault(index, []).append(score)

    def end(self, index: int, ended: Ended) -> None:
        self.running.pop(index, None)
        if ended.refused or ended.error == NOTHING_FOLLOWS:  # the client's own doing
            self.fail(Refused(ended.error or "", ended.param))
        elif ended.reason is FinishReason.ERROR:
            self.fail(RequestFailed(ended.error or "the engine gave no reason"))
        else:
            piece = self._pieces.setdefault(index, Piece(index, []))
            piece.finish = ended.reason
            piece.cached_tokens = ended.cached_tokens
            self._wake()

    def fail(self, error: SemipdError) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def _stalled(stats: Stats) -> str | None:
    for name, lane in stats.lanes.items():
        patience = max(STALLED_SECONDS, STALLED_FACTOR * lane.longest)
        if lane.waited > (patience if lane.longest else NEVER_STEPPED_SECONDS):
            return f"{name} has made no progress for {lane.waited:.0f} s"
    return None
