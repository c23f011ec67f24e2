"""The progress bar of a benchmark, redrawn twice a second: drawing must not disturb what is measured."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from semipd.bench.measure import Measurements
from semipd.bench.options import Options

SECONDS_BETWEEN = 0.5


class Watched(Protocol):
    """What the bar looks at."""

    measurements: Measurements
    running: int


class Progress:
    """A context manager; `watch` redraws until it is cancelled. Draws on stderr, or nothing at all."""

    def __init__(self, load: Watched, options: Options, show: bool) -> None:
        self._load = load
        self._options = options
        self._started = time.perf_counter()
        self._bar = Bar(
            TextColumn("requests"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=Console(file=sys.stderr),
            auto_refresh=False,
            transient=True,
            disable=not show,
        )
        self._task = self._bar.add_task("", total=self._total())

    def _total(self) -> float | None:
        return self._options.limit or self._options.duration

    async def watch(self) -> None:
        """Redraw at intervals."""
        while True:
            await asyncio.sleep(SECONDS_BETWEEN)
            seen = self._load.measurements
            done = seen.completed + seen.failed
            elapsed = time.perf_counter() - self._started
            self._bar.update(
                self._task,
                completed=done if self._options.limit else elapsed,
                description=(
                    f"{done} done, {seen.failed} failed, {self._load.running} running, "
                    f"{seen.output_tokens / elapsed:.0f} tokens/s"
                ),
            )
            self._bar.refresh()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()
