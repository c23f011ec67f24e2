"""Executors for the tests of the CPU executor, and looks at their processes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from semipd.execute.cpu import CpuExecutor

WIDE_BYTES = 2 * (8 * (2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 2048) + 2 * 8192 * 512)


def make(folder: Path) -> CpuExecutor:
    return CpuExecutor(folder, dtype="float32", slots=4, max_length=64, blocks=256, block_size=4)


def make_wide(folder: Path) -> CpuExecutor:
    return CpuExecutor(
        folder, dtype="bfloat16", load_format="dummy", slots=4, max_length=2048, blocks=512, block_size=16
    )


def pid_of(executor: CpuExecutor, role: str) -> int:
    pid = executor.processes()[role]
    assert pid is not None
    return pid


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for it, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def dead(pid: int) -> bool:
    """Gone, or only waiting for whatever adopted it to read its exit code."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def cores_of(pid: int) -> set[int]:
    """Where any thread of the process may run."""
    found: set[int] = set()
    for name in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):
            found |= os.sched_getaffinity(int(name))
    return found


def await_step(executor: CpuExecutor, step: int) -> int:
    """The process id of the prefill worker, once it runs this step (and no result has come yet)."""

    def runs() -> bool:
        assert executor.wait(time.monotonic()) == []
        known = executor.processes()["prefill"] is not None
        return known and executor._shared.words.running(0) == step

    eventually(runs)
    return pid_of(executor, "prefill")
