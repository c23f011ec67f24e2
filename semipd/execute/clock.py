"""The clock of every executor that runs on a real device."""

from __future__ import annotations

import time


class MonotonicClock:
    """Seconds of CLOCK_MONOTONIC: the same for all processes of one machine."""

    def now(self) -> float:
        return time.monotonic()
