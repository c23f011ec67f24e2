"""A server that answers like an OpenAI-compatible one, with delays and faults chosen by the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


class Connections:
    """What a test's server still holds open, so that no socket outlives the test."""

    def __init__(self) -> None:
        self._open: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    def register(self, writer: asyncio.StreamWriter) -> None:
        """Note the connection that the present task handles."""
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer

    async def end(self) -> None:
        await asyncio.sleep(0.01)  # one that was just accepted has its task by then
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        for writer in self._open.values():
            writer.transport.abort()
        await asyncio.sleep(0.01)  # transports let go of their sockets a round later


@dataclass
class Mock:
    """Settings, and what was asked so far. Seconds.

    per_chunk: tokens in one chunk. lanes: requests worked on at a time. cut: close after this many chunks.
    """

    first: float = 0.0
    gap: float = 0.0
    per_chunk: int = 1
    lanes: int = 10**6
    status: int = 200
    cut: int | None = None
    usage: bool = True
    broken: bytes = b""  # sent instead of the second chunk
    api_key: str | None = None
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "mock"}])
    answer: str | None = None  # text of a chat; None: one x per token
    requests: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0
    url: str = ""
    closed: int = 0  # connections that the client ended
    _room: asyncio.Semaphore = field(init=False)
    _open: Connections = field(init=False)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Mock]:
        """Listen on a free loopback port for as long as the block lasts."""
        self._room, self._open = asyncio.Semaphore(self.lanes), Connections()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            await self._open.end()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.register(writer)
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            self.closed += 1
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path = first.split()[1]
        if self.api_key is not None and headers.get("authorization") != f"Bearer {self.api_key}":
            _plain(writer, 401, {"error": {"message": "who are you?", "type": "auth"}})
        elif path.endswith("/models"):
            _plain(writer, 200, {"object": "list", "data": self.models})
        elif self.status != 200:
            self.requests.append(json.loads(body))
            _plain(writer, self.status, {"error": {"message": "not now", "type": "busy"}})
        else:
            self.requests.append(json.loads(body))
            async with self._room:
                return await self._stream(writer, self.requests[-1], path.endswith("/chat/completions"))
        await writer.drain()
        return True

    async def _stream(self, writer: asyncio.StreamWriter, request: dict[str, Any], chat: bool) -> bool:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        if chat:
            _event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        pieces = list(self.answer) if self.answer is not None else ["x"] * request.get("max_tokens", 16)
        await asyncio.sleep(self.first)
        for number, at in enumerate(range(0, len(pieces), self.per_chunk)):
            if number:
                await asyncio.sleep(self.gap)
            if number == self.cut:
                return False
            if number == 1 and self.broken:
                _chunk(writer, self.broken)
                continue
            text = "".join(pieces[at : at + self.per_chunk])
            _event(writer, {"choices": [{"delta": {"content": text}} if chat else {"text": text}]})
            await writer.drain()
        _event(writer, {"choices": [{"delta": {}, "text": "", "finish_reason": "length"}]})
        if self.usage:
            prompt = request.get("prompt", [])
            usage = {"prompt_tokens": len(prompt), "completion_tokens": len(pieces)}
            _event(writer, {"choices": [], "usage": usage})
        _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def _plain(writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)


def _event(writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
    _chunk(writer, b"data: " + json.dumps(data).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
