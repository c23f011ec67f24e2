"""A link to an engine in a thread of this process: what `LLM` uses."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping

from semipd.core.errors import ConfigError, EngineDead
from semipd.core.partition import Targets
from semipd.serve.messages import Abort, Ask, EngineInfo, Lost, Submit, Up
from semipd.serve.planner import Build, Planner

CLOSE_SECONDS = 10.0


class EngineThread:
    """A planner on a thread of its own. Several links, one per event loop, may share it."""

    def __init__(self, build: Build, targets: Mapping[str, Targets] | None = None) -> None:
        """Start it and wait until the engine is built. Raises what building raised."""
        self.planner = Planner(build, targets)
        self.info: EngineInfo | None = None
        self._built = threading.Event()
        self.planner.listen(self._first_word)
        self._thread = threading.Thread(target=self.planner.run, name="semipd-engine", daemon=True)
        self._thread.start()
        self._built.wait()
        self.planner.unlisten(self._first_word)
        if self.info is None:
            self._thread.join()
            lost = self.planner.lost or Lost("the engine did not start")
            raise ConfigError(lost.why) if lost.refused else EngineDead(lost.why)

    def close(self) -> None:
        """End the engine and its processes. Idempotent."""
        self.planner.close()
        self._thread.join(CLOSE_SECONDS)

    def _first_word(self, message: Up) -> None:
        if isinstance(message, EngineInfo):
            self.info = message
        self._built.set()


class ThreadLink:
    """Implements `session.Link`."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread
        self._planner = thread.planner
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deliver: Callable[[Up], None] | None = None

    async def open(self, deliver: Callable[[Up], None]) -> None:
        self._loop, self._deliver = asyncio.get_running_loop(), deliver
        self._planner.listen(self._hear)
        assert self._thread.info is not None
        deliver(self._thread.info)
        if self._planner.lost is not None:  # it went before we listened, or just now: the same news twice
            deliver(self._planner.lost)

    def send(self, message: Submit | Abort | Ask) -> None:
        if isinstance(message, Submit):
            self._planner.submit(message)
        elif isinstance(message, Abort):
            self._planner.abort(message)
        else:
            self._planner.ask()

    async def close(self) -> None:
        self._planner.unlisten(self._hear)

    def _hear(self, message: Up) -> None:
        """On the planner thread."""
        assert self._loop is not None and self._deliver is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, message)
        except RuntimeError:  # the loop was closed: nobody listens any more
            self._planner.unlisten(self._hear)
