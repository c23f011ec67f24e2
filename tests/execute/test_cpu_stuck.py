"""The CPU executor when a process neither works nor dies (is stopped, is deadlocked), or cannot start."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from semipd.core.ports import ExecutorLost
from semipd.core.types import Lane, Slice
from semipd.execute import watch
from semipd.execute.cpu import CpuExecutor
from tests.checkpoints import VOCABULARY
from tests.execute.conformance import Driver
from tests.execute.cpu_tools import await_step, dead, eventually, make, pid_of

PROMPT = [(7 * i + 3) % VOCABULARY for i in range(13)]


@pytest.fixture
def sharp_eyes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks that follow each other faster: what takes ten seconds takes half of one."""
    monkeypatch.setattr(watch, "LOOK", 0.05)


@pytest.fixture
def executor(checkpoint: Path) -> Iterator[CpuExecutor]:
    executor = make(checkpoint)
    yield executor
    executor.close()


@pytest.mark.usefixtures("sharp_eyes")
class TestStuck:
    def test_a_stopped_worker_is_replaced(self, executor: CpuExecutor) -> None:
        """Its socket stays open, so without a watch every request on the lane would wait for ever."""
        driver = Driver(executor, 4)
        driver.open(0, PROMPT)
        expected = driver.generate(0, PROMPT, 3)
        victim = pid_of(executor, "decode")
        os.kill(victim, signal.SIGSTOP)
        tokens = [driver.run(Lane.DECODE, Slice(0, start, 1)).tokens[0] for start in (13, 14)]
        assert tokens == expected[1:]
        eventually(lambda: dead(victim))

    def test_one_at_rest_is_left_alone(self, executor: CpuExecutor) -> None:
        """Only who owes an answer can be late with it; a debugger may look at the others."""
        before = executor.processes()
        assert executor.wait(time.monotonic() + 1.0) == []
        assert executor.processes() == before and not dead(pid_of(executor, "decode"))

    def test_a_stopped_resident_ends_it(self, executor: CpuExecutor) -> None:
        """Workers go on without it; it is missed when one dies and nobody forks the next."""
        os.kill(pid_of(executor, "resident"), signal.SIGSTOP)
        os.kill(pid_of(executor, "decode"), signal.SIGKILL)
        with pytest.raises(ExecutorLost, match="resident process does not answer"):
            executor.wait(time.monotonic() + 30.0)


def test_a_worker_stopped_in_a_step_counts_as_dead_under_it(
    slow: CpuExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that hangs its worker would hang the next one too: it fails after the second."""
    driver = Driver(slow, 16)
    driver.open(0, [(5 * i) % 8192 for i in range(2000)])
    batch = driver.batch(Slice(0, 0, 1500))
    slow.submit(Lane.PREFILL, batch)
    for _ in range(2):
        monkeypatch.setattr(watch, "LOOK", 60.0)
        victim = await_step(slow, batch.step)
        os.kill(victim, signal.SIGSTOP)
        monkeypatch.setattr(watch, "LOOK", 0.05)
        results = []
        deadline = time.monotonic() + 30.0
        while slow.processes()["prefill"] in (victim, None) and not results:
            assert time.monotonic() < deadline
            results += slow.wait(time.monotonic() + 0.002)
    monkeypatch.setattr(watch, "LOOK", 60.0)
    (result,) = results or driver.collect(1)
    assert result.error and "died twice" in result.error
    assert driver.run(Lane.PREFILL, Slice(0, 0, 16)).error is None


def test_slow_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that gets little of a busy machine still gets some, and each look sees it."""
    used = iter([1.0, 1.0, 1.0, 1.1, 1.1, 1.1, 1.1, None, 1.1, 1.1])
    monkeypatch.setattr(watch, "PATIENCE", 3)
    monkeypatch.setattr(watch, "processor_seconds", lambda pid: next(used))
    seen = watch.Watch()
    assert [seen.stuck(7) for _ in range(10)] == [False] * 6 + [True] + [False] * 3


def test_a_resident_that_cannot_be_started_leaves_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of processes or descriptors: a named error, and the sockets made for it are closed."""

    def refuse(*arguments: object, **rest: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(ExecutorLost, match="cannot start: Resource temporarily unavailable"):
        make(checkpoint)
    assert set(os.listdir("/proc/self/fd")) == before
