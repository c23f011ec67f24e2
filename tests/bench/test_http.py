"""The lean HTTP client: the same answer however its bytes are cut, and a named error for anything else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from semipd.bench.http import Client, Endpoint, HttpError, Response
from semipd.core.errors import ConfigError
from tests.bench.mock import Connections

CHUNKED = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"6\r\nhello \r\n5;note=x\r\nworld\r\n0\r\n\r\n"
)
SIZED = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world"
UNTIL_CLOSED = b"HTTP/1.0 200 OK\r\n\r\nhello world"
TRAILERS = CHUNKED[:-2] + b"X-Sum: 1\r\n\r\n"


@asynccontextmanager
async def serving(*answers: bytes, pieces: int = 10**6, close: bool = True) -> AsyncIterator[Client]:
    """Answer the n-th request (on any connection) with `answers[n]`, cut into pieces of a size."""
    left = iter(answers)
    connections = Connections()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.register(writer)
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                answer = next(left)
                for at in range(0, len(answer), pieces):
                    writer.write(answer[at : at + pieces])
                    await writer.drain()
                    await asyncio.sleep(0)
                if close:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    client = Client(Endpoint("127.0.0.1", server.sockets[0].getsockname()[1], False, ""))
    try:
        yield client
    finally:
        client.close()
        server.close()
        await connections.end()


def ask(*answers: bytes, pieces: int = 10**6) -> Response:
    async def go() -> Response:
        async with asyncio.timeout(10), serving(*answers, pieces=pieces) as client:
            return await client.get("/")

    return asyncio.run(go())


@pytest.mark.parametrize("answer", [CHUNKED, SIZED, UNTIL_CLOSED, TRAILERS])
@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 10**6])
def test_an_answer_is_read_however_it_is_cut(answer: bytes, pieces: int) -> None:
    response = ask(answer, pieces=pieces)
    assert (response.status, response.body) == (200, b"hello world")


def test_an_error_keeps_its_body() -> None:
    response = ask(b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nbusy")
    assert (response.status, response.body) == (429, b"busy")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "protocol"),
        (b"HTTP/1.1\r\n\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\nab\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabcdef\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, "protocol"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello", "disconnect"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "disconnect"),
        (b"", "disconnect"),
    ],
)
def test_a_broken_answer_is_an_error_of_its_kind(answer: bytes, kind: str) -> None:
    with pytest.raises(HttpError) as caught:
        ask(answer)
    assert caught.value.kind == kind


def test_connections_are_reused_and_replaced() -> None:
    """A server may close an idle connection at any moment; the next request must not fail for it."""

    async def go() -> None:
        seen: list[int] = []
        connections = Connections()

        async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.register(writer)
            seen.append(0)
            for _ in range(2):
                await reader.readuntil(b"\r\n\r\n")
                seen[-1] += 1
                writer.write(CHUNKED)
            # The third request on this connection meets its end.
            await reader.readuntil(b"\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(connection, "127.0.0.1", 0)
        client = Client(Endpoint("127.0.0.1", server.sockets[0].getsockname()[1], False, ""))
        async with asyncio.timeout(10):
            for _ in range(4):
                assert (await client.get("/")).body == b"hello world"
        client.close()
        server.close()
        await connections.end()
        assert seen == [2, 2]

    asyncio.run(go())


def test_an_answer_that_began_is_not_asked_for_twice() -> None:
    """Asking again would put load on the server that the result does not count."""

    async def go() -> None:
        async with asyncio.timeout(10), serving(CHUNKED, CHUNKED[:-10], SIZED, close=False) as client:
            await client.get("/")
            (connection,) = client._idle
            task = asyncio.create_task(client.get("/"))
            while not (connection.heard and not connection.reusable):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            connection.close()
            with pytest.raises(HttpError):
                await task

    asyncio.run(go())


def test_nobody_listens() -> None:
    async def go() -> None:
        async with serving() as client:
            pass
        await client.get("/")

    with pytest.raises(HttpError, match="connection refused") as caught:
        asyncio.run(go())
    assert caught.value.kind == "connect"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("https://example.org/api/v1", "https://example.org:443/api"),
        ("http://[::1]:9", "http://[::1]:9"),
    ],
)
def test_urls(url: str, shown: str) -> None:
    assert str(Endpoint.parse(url)) == shown


BAD_URLS = [
    "ftp://x",
    "http://",
    "http://x:99999",
    "http://x:port",
    "http://u:p@x",
    "http://x/?a=b",
    "http://x/a b",
]


@pytest.mark.parametrize("make", [*BAD_URLS, "http://x/\r\nHost: y"])
def test_what_is_no_url_is_refused(make: str) -> None:
    with pytest.raises(ConfigError):
        Endpoint.parse(make)


def test_a_key_cannot_smuggle_a_header() -> None:
    with pytest.raises(ConfigError, match="Authorization"):
        Client(Endpoint("127.0.0.1", 1, False, ""), {"Authorization": "Bearer x\r\nX: y"})
