"""Writes what a server experienced as a trace that `semipd simulate` replays: times, lengths, no text."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from semipd.core.types import Event, Finished, Request
from semipd.trace import MAX_TOKENS, Arrival, TraceWriter

log = logging.getLogger("semipd")


class TraceRecorder:
    """An observer. One row per request that produced a token, written when it ends (so rows come in order
    of their ends, which readers of the format allow). Times are those of the arrival, by the wall clock,
    so a file may go on after a restart.

    A disk that is full ends the recording, never the service."""

    def __init__(self, path: str | Path, block_size: int) -> None:
        """block_size: tokens per block key of the engine. Raises ConfigError if the file cannot be had."""
        self._writer = TraceWriter(path)
        self._block_size = block_size
        self._broken = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, Finished) and event.request.output and not self._broken:
            wall = time.time() - event.now  # now: of the engine's clock, whose origin means nothing
            try:
                self._writer.write(self._arrival(event.request, wall))
            except OSError as error:
                self._broken = True
                log.error("the trace is no longer recorded: %s", error.strerror)

    def _arrival(self, request: Request, wall: float) -> Arrival:
        prompt = len(request.prompt)
        return Arrival(
            wall + request.arrival,
            prompt,
            min(len(request.output), MAX_TOKENS),
            self._writer.blind(request.block_keys[: prompt // self._block_size]),
            self._block_size,
            request.service_class,
        )

    def close(self) -> None:
        """Idempotent."""
        self._writer.close()
        self._broken = True
