"""A link to an engine in a process of its own: what the server uses."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from semipd.config import Config
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

ENGINE_MODULE = "semipd.serve.engine_process"
CLOSE_SECONDS = 2.0  # for an engine that may hang; with the rest of the way out, Ctrl-C keeps to 5 s


class ProcessLink:
    """Implements `session.Link`. The process is a fresh interpreter, ends with this one, and is deaf to the
    terminal's Ctrl-C: this process tells it when to end. Call `start` and `open` on the main thread (the
    kernel ends the child with the thread that started it)."""

    def __init__(self, config: Config, module: str = ENGINE_MODULE) -> None:
        self._config = config
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._transport: asyncio.Transport | None = None
        self._built = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process; it loads the model meanwhile."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        ours.sendall(frame(Start(_plain(self._config))))
        ours.setblocking(False)
        self._socket = ours

    async def open(self, deliver: Callable[[Up], None]) -> None:
        if self._process is None:
            self.start()

        def hear(message: Up) -> None:
            self._built = self._built or isinstance(message, EngineInfo)
            deliver(message)

        self._transport, _ = await asyncio.get_running_loop().create_unix_connection(
            lambda: _Protocol(hear, self._why_lost), sock=self._socket
        )

    def send(self, message: Submit | Abort | Ask) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message))

    async def close(self) -> None:
        if self._process is None:
            return
        if self._transport is not None:
            if self._built:  # while it builds, it does not listen
                self._transport.write(frame(Close()))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(self._process.wait, CLOSE_SECONDS)
            self._transport.close()
        self.kill()

    def kill(self) -> None:
        """End the process without a word. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()  # does nothing to one that has ended
            process.wait()
        if self._socket is not None:
            self._socket.close()

    def _why_lost(self) -> str:
        """After the socket was closed from the other end."""
        if self._process is None:
            return "the engine was closed"
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(0.5)
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
