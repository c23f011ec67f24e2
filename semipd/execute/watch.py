"""Whether a process that owes an answer still works on it. A stopped or deadlocked process lives on, so its
socket says nothing; but it uses no processor time, while a slow one always does.

Looks are counted, not seconds: while a machine or container is frozen, nobody looks.
"""

from __future__ import annotations

import time

LOOK = 1.0  # seconds between looks
PATIENCE = 10  # looks in a row without progress, and it is stuck


class Watch:
    """What was seen of one process at the last look."""

    def __init__(self) -> None:
        self._seen: tuple[int, float] | None = None
        self._idle_looks = 0

    def rest(self) -> None:
        """It owes nothing: whatever was seen does not count."""
        self._seen, self._idle_looks = None, 0

    def stuck(self, pid: int) -> bool:
        """Look: whether the process has used no processor time for `PATIENCE` looks, this one included."""
        used = processor_seconds(pid)
        if used is None or (pid, used) != self._seen:
            self._seen = None if used is None else (pid, used)
            self._idle_looks = 0
            return False
        self._idle_looks += 1
        return self._idle_looks >= PATIENCE


def processor_seconds(pid: int) -> float | None:
    """Processor time of all threads of a process; None when the system does not tell."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3), for which Python has no name
    except OSError:
        return None
