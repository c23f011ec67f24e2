"""What a client may keep the HTTP server waiting for: headers, and room for the answer."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.types import Receive, Scope, Send

from semipd.serve.gate import Limits
from semipd.serve.http import _Alarm, _Connection, http_server
from tests.serve.fakes import LiveFake, eventually, make_folder
from tests.serve.serving import serving

LIMITS = Limits(header_seconds=0.3, stall_seconds=0.3)
LARGE = 32 * 2**20  # more than any kernel buffers


class App:
    """Answers LARGE bytes, then waits until the connection is gone."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * LARGE, "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left.set()


@asynccontextmanager
async def listening(app: App) -> AsyncIterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = http_server(app, LIMITS)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    yield listener.getsockname()[1]
    server.should_exit = True
    await serving


async def connect(port: int, beginning: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    # A small buffer here, so that what the reader does not take stays with the server.
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
    writer.write(beginning)
    return reader, writer


async def close(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    await asyncio.sleep(0)


def test_headers_that_never_come_end_the_connection() -> None:
    async def main() -> None:
        async with listening(App()) as port:
            for beginning in (b"", b"GET /health HT", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "):
                reader, writer = await connect(port, beginning)
                try:
                    async with asyncio.timeout(20):
                        assert await reader.read(100) == b""
                except ConnectionResetError:
                    pass
                await close(writer)

    asyncio.run(main())


def test_an_answer_that_nobody_takes_ends_the_request() -> None:
    """Its place in the gate stayed taken for a day, and a shutdown waited for it."""

    async def main() -> None:
        app = App()
        async with listening(app) as port:
            _, writer = await connect(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(20):
                await app.left.wait()
            await close(writer)

    asyncio.run(main())


class Draining:
    """A transport whose buffer empties by a byte at every look, down to a rest that stays."""

    def __init__(self, size: int, rest: int) -> None:
        self.size, self.rest = size, rest
        self.aborted = asyncio.Event()

    def get_write_buffer_size(self) -> int:
        self.size = max(self.size - 1, self.rest)
        return self.size

    def abort(self) -> None:
        self.aborted.set()


def test_a_connection_too_many_is_turned_away(tmp_path: Path) -> None:
    """Without a file to accept it with, asyncio wrote 300,000 lines in ten seconds and did little else."""
    limits = Limits(connections=2)
    with serving(make_folder(tmp_path), LiveFake(), limits=limits) as server, eventually() as wait_for:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        idle = [socket.create_connection(address) for _ in range(2)]
        with socket.create_connection(address, timeout=20.0) as third:
            assert b" 503 " in third.recv(1000)
        for connection in idle:
            connection.close()

        def welcome() -> bool:
            with server.client() as client:
                return client.get("/version").status_code == 200

        wait_for(welcome)


def test_a_slow_reader_is_no_deaf_one() -> None:
    class Connection(_Connection):
        stall_seconds = 0.001

        def __init__(self, transport: Draining) -> None:
            self.loop, self.transport = asyncio.get_running_loop(), transport  # type: ignore[assignment]
            self._stall = _Alarm()

    async def main() -> None:
        transport = Draining(size=20, rest=5)
        Connection(transport)._watch()
        async with asyncio.timeout(20):
            await transport.aborted.wait()
        assert transport.size == 5, "it was given up while it still took something"

    asyncio.run(main())


def test_every_answer_has_an_id_and_probes_may_use_head(tmp_path: Path) -> None:
    with serving(make_folder(tmp_path), LiveFake(), api_key="k") as running, running.client() as client:
        for path in ("/health", "/ready", "/v1/models", "/none"):
            given = client.get(path, headers={"X-Request-Id": "mine-7"})
            assert given.headers["x-request-id"] == "mine-7"
            head = client.head(path)
            assert (head.status_code, head.content) == (client.get(path).status_code, b"")
        for bad in (b"", b"two words", b"x" * 129, b"caf\xc3\xa9"):
            made = client.get("/health", headers=[(b"x-request-id", bad)]).headers["x-request-id"]
            assert made.startswith("req-") and made != client.get("/health").headers["x-request-id"]
        assert client.head("/v1/completions").status_code == 401
        assert client.head("/v1/completions", headers={"Authorization": "Bearer k"}).status_code == 405


def test_the_description_covers_every_status(tmp_path: Path) -> None:
    """A client that is made of it met answers that it does not know."""
    with serving(make_folder(tmp_path), LiveFake()) as running, running.client() as client:
        description = client.get("/openapi.json").json()
        operations = [way for path in description["paths"].values() for way in path.values()]
        reference = {"$ref": "#/components/schemas/ErrorBody"}
        for operation in operations:
            assert operation["responses"]["default"]["content"]["application/json"]["schema"] == reference
        assert len(operations) == 12 and "ErrorDetail" in description["components"]["schemas"]
        assert "text/plain" in description["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
