"""An event loop whose clock runs only while nothing happens, so that measured times do not depend on how
busy the machine is: work takes no time, and sleeping takes what it says (and less in truth).

Client and server of a test share the loop, and what one sends over the loopback device the other can read
at once. Only when nothing has come for a moment does time go on, in small steps.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest import mock

STEP = 0.02  # most seconds that pass at a time
MOMENT = 0.004  # true seconds that a busy kernel may take to deliver
TICK = 1e-6  # between two looks at the clock: nothing is simultaneous

Result = TypeVar("Result")


class _Selector(selectors.DefaultSelector):
    """skipped: seconds of waiting that were left out."""

    skipped = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0.0:
            return super().select(timeout)
        events = super().select(min(timeout, MOMENT))
        if not events:
            self.skipped += min(timeout, STEP)
        return events


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._waits = _Selector()
        self._looks = 0
        super().__init__(self._waits)

    def time(self) -> float:
        self._looks += 1
        return self._waits.skipped + TICK * self._looks


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run` on such a loop; time.perf_counter is its clock meanwhile."""
    with (
        asyncio.Runner(loop_factory=_Loop) as runner,
        mock.patch.object(time, "perf_counter", runner.get_loop().time),
    ):
        return runner.run(main)
