"""The HTTP server: uvicorn with a bound on everything that a client may keep it waiting for."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from semipd.serve.gate import Limits

KEEP_ALIVE_SECONDS = 75  # longer than clients keep theirs: the one who closes must not be the one who waits
MOST_FILES = 2**16
BACKLOG = 2048  # connections that wait to be accepted; asyncio accepts so many before it looks at one
OWN_FILES = BACKLOG + 64
TURNED_AWAY = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 2\r\nContent-Length: 0\r\n\r\n"
)


def http_server(app: ASGIApp, limits: Limits) -> uvicorn.Server:
    """The app behind uvicorn: bounded headers, no log of its own, signals left to us."""

    class Connection(_Connection):
        header_seconds, stall_seconds = limits.header_seconds, limits.stall_seconds
        most = limits.connections

    return _Uvicorn(
        uvicorn.Config(
            app,
            log_config=None,
            log_level="error",  # a client may send what it likes: that is no news
            access_log=False,
            backlog=min(max(limits.connections // 2, 16), BACKLOG),
            lifespan="off",
            ws="none",
            http=Connection,  # h11, which bounds the headers; httptools does not
            h11_max_incomplete_event_size=limits.headers,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=1,
        )
    )


def allow_many_connections() -> int:
    """Raise this process's limit of open files towards the hard one: each connection is a file. Returns how
    many there may be, with files left for the process itself: where there is none, asyncio logs thousands
    of attempts to accept a connection, every second."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = MOST_FILES if soft == resource.RLIM_INFINITY else min(soft, MOST_FILES)
    return max(files - OWN_FILES, files // 2)


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Alarm:
    """A call that is due after a while, unless it is put off."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_set(self) -> bool:
        return self._timer is not None

    def set(self, loop: asyncio.AbstractEventLoop, seconds: float, call: Callable[[], None]) -> None:
        self.clear()
        self._timer = loop.call_later(seconds, call)

    def clear(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Connection(H11Protocol):
    """Ends when the headers of a request take longer than header_seconds to arrive, whether they trickle or
    never begin, and when its client takes nothing of an answer for stall_seconds. Beyond `most`, now."""

    header_seconds: float
    stall_seconds: float
    most: int  # connections

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._headers, self._stall = _Alarm(), _Alarm()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(TURNED_AWAY)
            transport.close()
        self._headers.set(self.loop, self.header_seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._headers.clear()
        elif not self._headers.is_set:
            self._headers.set(self.loop, self.header_seconds, self.transport.abort)

    def pause_writing(self) -> None:
        """The buffer is full: the client is slower than the model, or gone without a word."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall.clear()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers.clear()
        self._stall.clear()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Look again after a while whether anything has left the buffer."""
        size = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < size:
                self._watch()
            else:
                self.transport.abort()

        self._stall.set(self.loop, self.stall_seconds, look)
