"""The few calls to the system that Python has no name for."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let malloc reuse large buffers instead of giving them back to the kernel.

    A forward allocates and frees the same megabytes in every layer; a fresh page costs a fault and
    zeroing, several times what the arithmetic on it takes. Does nothing on other C libraries than glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1))


def give_freed_memory_back() -> None:
    """Hand what malloc holds for nobody to the kernel. Does nothing on other C libraries than glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def thread_ids() -> list[int]:
    """All threads of this process."""
    return [int(name) for name in os.listdir("/proc/self/task")]


def read_text(path: str) -> str:
    """A file of the system, without the white space around it; empty when there is none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def table(path: str) -> dict[str, int]:
    """The first number after each name in a table of the system; empty when there is none."""
    rows = (line.split() for line in read_text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
