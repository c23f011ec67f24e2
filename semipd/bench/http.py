"""A lean HTTP/1.1 client for streams: what it costs per received chunk is what it takes from the server.

On a small machine the load generator shares the cores with the server, so a stream is cut up right in the
protocol's callback: no tasks, queues or wrapper objects per chunk. It knows persistent connections,
chunked and sized bodies, and TLS; no redirects, proxies, compression or HTTP/2.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from semipd.core.errors import ConfigError

MAX_HEAD = 64 * 1024
MAX_BUFFER = 16 * 1024 * 1024

# Called with a piece of the body and the moment (time.perf_counter) at which it was received.
OnBody = Callable[[bytes, float], None]


class HttpError(Exception):
    """An exchange that failed below HTTP. kind: connect, disconnect or protocol."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is. `prefix` comes before every path."""

    host: str
    port: int
    secure: bool
    prefix: str

    @staticmethod
    def parse(url: str) -> Endpoint:
        """From "http://host:port[/prefix]"; a trailing "/v1" is dropped. Raises ConfigError."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r} is not a URL: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not a URL; write http://127.0.0.1:8000")
        if parts.username is not None or parts.query or parts.fragment:
            raise ConfigError("a server's URL has no user name, query or fragment")
        secure = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        if not prefix.isascii() or any(character <= " " for character in prefix):
            raise ConfigError(f"{url!r} is not a URL: its path needs escaping")
        return Endpoint(parts.hostname, port or (443 if secure else 80), secure, prefix)

    @property
    def authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.secure else 'http'}://{self.authority}{self.prefix}"


@dataclass(slots=True)
class Response:
    """Status and headers (names in lower case) of an answer, and the body if no `OnBody` took it."""

    status: int
    headers: dict[str, str]
    body: bytes = b""


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time. Errors end the connection."""

    def __init__(self) -> None:
        self.reusable = False
        self.heard = False  # a byte of the present answer has arrived
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._done: asyncio.Future[Response] | None = None
        self._on_body: OnBody | None = None
        self._response: Response | None = None
        self._collected = bytearray()
        self._left = 0  # bytes of a sized body still to come; -1: chunked; -2: until the connection ends

    async def exchange(self, request: bytes, on_body: OnBody) -> Response:
        """Send a whole request and wait for the end of its answer.

        The body of a 200 goes to `on_body` piece by piece; any other one into the response.
        Raises HttpError."""
        if self._transport is None or self._transport.is_closing():
            raise HttpError("disconnect", "the connection is closed")
        self.reusable = self.heard = False
        self._on_body, self._response = on_body, None
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._done
        finally:
            self._done = None
            if not self.reusable:
                self.close()

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._done is None or self._done.done():
            self.close()  # nobody asked
            return
        self.heard = True
        try:
            if self._left == -1 and not self._buffer and self._response is not None:
                rest = self._whole_chunks(data, now)
                self._buffer += rest
            else:
                self._buffer += data
                self._consume(now)
            if len(self._buffer) > MAX_BUFFER or len(self._collected) > MAX_BUFFER:
                raise ValueError("too long a line, chunk or body")
        except (ValueError, IndexError) as error:
            self._fail("protocol", f"not an HTTP answer: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        if self._response is not None and self._left == -2:
            self._end(keep=False)
        else:
            self._fail("disconnect", str(error or "the server closed the connection"))

    # The parser

    def _consume(self, now: float) -> None:
        """Take what is complete out of the buffer. Raises ValueError or IndexError on nonsense."""
        while self._response is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD:
                    raise ValueError("its head is too long")
                return
            head = bytes(self._buffer[:end])
            del self._buffer[: end + 4]
            self._start(head)
            if self._response is not None and self._left == 0:
                self._end(keep=True)
                return
        data = bytes(self._buffer)
        self._buffer.clear()
        if self._left == -1:
            self._buffer += self._whole_chunks(data, now)
        elif self._left == -2:
            self._deliver(data, now)
        else:
            self._deliver(data[: self._left], now)
            self._left -= len(data)
            if self._left <= 0:
                self._end(keep=self._left == 0)

    def _start(self, head: bytes) -> None:
        """Read a head; `_response` stays None for a 1xx answer, which another head follows."""
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, *_ = first.split(" ", 2)
        if not version.startswith("HTTP/1."):
            raise ValueError(f"it begins with {first[:40]!r}")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        if status.startswith("1"):
            return
        self._response = Response(int(status), headers)
        self._collected.clear()
        if headers.get("transfer-encoding", "").lower().endswith("chunked"):
            self._left = -1
        elif "content-length" in headers:
            self._left = int(headers["content-length"])
            if self._left < 0:
                raise ValueError("a negative content-length")
        else:
            self._left = 0 if int(status) in (204, 304) else -2

    def _whole_chunks(self, data: bytes, now: float) -> bytes:
        """Deliver the complete chunks at the head of `data`; returns what is left of it."""
        at = 0
        while (line := data.find(b"\r\n", at)) >= 0:
            size = int(data[at:line].split(b";", 1)[0], 16)
            begin, end = line + 2, line + 2 + size
            if len(data) < end + 2:
                break
            if size == 0:
                if data[begin : begin + 2] != b"\r\n":  # trailers
                    if (trailers := data.find(b"\r\n\r\n", begin)) < 0:
                        break
                    end = trailers + 2
                self._end(keep=len(data) == end + 2)
                return b""
            if size < 0 or data[end : end + 2] != b"\r\n":
                raise ValueError("a chunk of the wrong size")
            self._deliver(data[begin:end], now)
            at = end + 2
        return data[at:]

    def _deliver(self, piece: bytes, now: float) -> None:
        assert self._response is not None and self._on_body is not None
        if self._response.status == 200:
            self._on_body(piece, now)
        else:
            self._collected += piece

    def _end(self, keep: bool) -> None:
        assert self._response is not None
        self._response.body = bytes(self._collected)
        self.reusable = keep and self._response.headers.get("connection", "").lower() != "close"
        if self._done is not None and not self._done.done():
            self._done.set_result(self._response)

    def _fail(self, kind: str, message: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(HttpError(kind, message))


@dataclass(slots=True)
class Client:
    """Requests to one server over as many connections as there are exchanges at a time."""

    endpoint: Endpoint
    headers: dict[str, str] = field(default_factory=dict)
    _idle: list[Connection] = field(default_factory=list)
    _tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        for name, value in self.headers.items():
            if not value.isascii() or not value.isprintable():
                raise ConfigError(f"the {name} header holds characters that HTTP cannot carry")
        if self.endpoint.secure:
            self._tls = ssl.create_default_context()

    def encode(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a request, ready to be sent."""
        lines = [f"{method} {self.endpoint.prefix}{path} HTTP/1.1", f"Host: {self.endpoint.authority}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if body:
            lines += ["Content-Type: application/json"]
        lines += [f"Content-Length: {len(body)}", "", ""]
        return "\r\n".join(lines).encode("ascii") + body

    async def send(self, request: bytes, on_body: OnBody) -> Response:
        """One exchange; see `Connection.exchange`. A connection that the server closed while it was idle
        is replaced. Raises HttpError."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.reusable:
                continue
            try:
                return await self._on(connection, request, on_body)
            except HttpError as error:
                if error.kind != "disconnect" or connection.heard:
                    raise
        return await self._on(await self._connect(), request, on_body)

    async def get(self, path: str) -> Response:
        """A plain GET with its whole body. Raises HttpError."""
        pieces: list[bytes] = []
        response = await self.send(self.encode("GET", path), lambda piece, _: pieces.append(piece))
        response.body = b"".join(pieces) or response.body
        return response

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _on(self, connection: Connection, request: bytes, on_body: OnBody) -> Response:
        response = await connection.exchange(request, on_body)
        if connection.reusable:
            self._idle.append(connection)
        return response

    async def _connect(self) -> Connection:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection, self.endpoint.host, self.endpoint.port, ssl=self._tls
            )
        except (OSError, UnicodeError) as error:
            raise HttpError("connect", _reason(error)) from None
        return connection


def _reason(error: Exception) -> str:
    """Few words: asyncio's own message repeats addresses and error numbers."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    return str(getattr(error, "strerror", None) or error)
