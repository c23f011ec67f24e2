"""A link to an engine in a process of its own: what the server uses."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import subprocess
from collections.abc import Callable
from typing import Any

from semipd.config import Config
from semipd.serve.launch import EngineProcess
from semipd.serve.messages import (
    Abort,
    Ask,
    Close,
    EngineInfo,
    Lost,
    Start,
    Submit,
    Unframer,
    Up,
    decode_up,
    frame,
)

CLOSE_SECONDS = 2.0  # for an engine that may hang; with the rest of the way out, Ctrl-C keeps to 5 s


class ProcessLink:
    """Implements `session.Link`, over an engine's process, which is this link's from here on."""

    def __init__(self, config: Config, engine: EngineProcess) -> None:
        self._config = config
        self._engine = engine
        self._transport: asyncio.Transport | None = None
        self._started = self._built = self._killed = False

    @property
    def pid(self) -> int:
        return self._engine.process.pid

    def start(self) -> None:
        """Tell the process what to load; it does so while this one goes on."""
        with contextlib.suppress(OSError):  # it is gone; whoever listens will hear so
            self._engine.socket.sendall(frame(Start(_plain(self._config))))
        self._engine.socket.setblocking(False)
        self._started = True

    async def open(self, deliver: Callable[[Up], None]) -> None:
        if not self._started:
            self.start()

        def hear(message: Up) -> None:
            self._built = self._built or isinstance(message, EngineInfo)
            deliver(message)

        self._transport, _ = await asyncio.get_running_loop().create_unix_connection(
            lambda: _Protocol(hear, self._why_lost), sock=self._engine.socket
        )

    def send(self, message: Submit | Abort | Ask) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message))

    async def close(self) -> None:
        if self._killed:
            return
        if self._transport is not None:
            if self._built:  # while it builds, it does not listen
                self._transport.write(frame(Close()))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(self._engine.process.wait, CLOSE_SECONDS)
            self._transport.close()
        self.kill()

    def kill(self) -> None:
        """End the process without a word. Idempotent."""
        self._killed = True
        self._engine.kill()

    def _why_lost(self) -> str:
        """After the socket was closed from the other end."""
        if self._killed:
            return "the engine was closed"
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._engine.process.wait(0.5)
            return f"the engine process ended with {f'signal {-code}' if code < 0 else f'code {code}'}"
        return "the engine process hung up"


class _Protocol(asyncio.Protocol):
    def __init__(self, deliver: Callable[[Up], None], why_lost: Callable[[], str]) -> None:
        self._deliver = deliver
        self._why_lost = why_lost
        self._unframer = Unframer()

    def data_received(self, data: bytes) -> None:
        for body in self._unframer.feed(data):
            self._deliver(decode_up(body))

    def connection_lost(self, error: Exception | None) -> None:
        self._deliver(Lost(self._why_lost()))


def _plain(config: Config) -> dict[str, dict[str, Any]]:
    """The settings that an engine needs; of the server's (the API key is one) only what it uses."""
    server = {name: getattr(config.server, name) for name in ("log_level", "record_trace")}
    return dataclasses.asdict(config) | {"server": server}
