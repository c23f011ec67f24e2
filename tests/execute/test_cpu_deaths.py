"""The CPU executor when processes die: workers, the resident, the parent."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from semipd.core.engine import Engine
from semipd.core.errors import ConfigError
from semipd.core.kv import BlockPool
from semipd.core.partition import Shared
from semipd.core.policies import Limits, SemiPD
from semipd.core.ports import ExecutorLost, Observer
from semipd.core.types import Event, Lane, Request, Sampling, Scored, Slice, Split, Stepped, StepResult
from semipd.execute import resident
from semipd.execute.clock import MonotonicClock
from semipd.execute.cores import available_cores
from semipd.execute.cpu import CpuExecutor
from tests.checkpoints import VOCABULARY
from tests.execute.conformance import Driver
from tests.execute.cpu_tools import (
    await_step,
    dead,
    eventually,
    make,
    pid_of,
)

ROOT = Path(__file__).parents[2]
PROMPT = [(7 * i + 3) % VOCABULARY for i in range(13)]
UNITS = len(available_cores())


class TestDeaths:
    @pytest.fixture
    def executor(self, checkpoint: Path) -> Iterator[CpuExecutor]:
        executor = make(checkpoint)
        yield executor
        executor.close()

    @pytest.fixture
    def driver(self, executor: CpuExecutor) -> Driver:
        driver = Driver(executor, 4)
        driver.open(0, PROMPT)
        return driver

    def test_a_death_at_rest_goes_unnoticed(self, executor: CpuExecutor, driver: Driver) -> None:
        expected = driver.generate(0, PROMPT, 2)
        for role in ("prefill", "decode"):
            victim = pid_of(executor, role)
            os.kill(victim, signal.SIGKILL)
            eventually(lambda victim=victim: dead(victim))
            assert executor.wait(time.monotonic() + 0.01) == []
        driver.open(1, PROMPT)
        results = [driver.run(Lane.PREFILL, Slice(1, 0, 13)), driver.run(Lane.DECODE, Slice(1, 13, 1))]
        assert [(r.tokens[0], r.attempts) for r in results] == [(token, 1) for token in expected]

    def test_sigterm_is_the_parents_affair(self, executor: CpuExecutor, driver: Driver) -> None:
        """Of systemd every process of a service hears it, while the server finishes what is under way."""
        expected = driver.generate(0, PROMPT, 2)
        before = executor.processes()
        for pid in before.values():
            assert pid is not None
            os.kill(pid, signal.SIGTERM)
        driver.open(1, PROMPT)
        results = [driver.run(Lane.PREFILL, Slice(1, 0, 13)), driver.run(Lane.DECODE, Slice(1, 13, 1))]
        assert [(r.tokens[0], r.attempts) for r in results] == [(token, 1) for token in expected]
        assert executor.processes() == before

    def test_batches_queued_behind_a_death_run_in_order(
        self, executor: CpuExecutor, driver: Driver
    ) -> None:
        """Both steps wait in a stopped worker's socket when it dies."""
        expected = driver.generate(0, PROMPT, 3)
        driver.open(1, PROMPT)
        driver.run(Lane.PREFILL, Slice(1, 0, 13))
        victim = pid_of(executor, "decode")
        os.kill(victim, signal.SIGSTOP)
        for start in (13, 14):
            executor.submit(Lane.DECODE, driver.batch(Slice(1, start, 1)))
        os.kill(victim, signal.SIGKILL)
        assert [r.tokens[0] for r in driver.collect(2)] == expected[1:]

    def test_workers_that_die_at_once_end_it(self, executor: CpuExecutor) -> None:
        """Otherwise a worker that cannot start is forked again for ever."""
        deadline = time.monotonic() + 20.0

        def kill_whatever_is_there() -> None:
            while time.monotonic() < deadline:
                if pid := executor.processes()["decode"]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                executor.wait(time.monotonic() + 0.01)

        with pytest.raises(ExecutorLost, match="as soon as they started"):
            kill_whatever_is_there()

    def test_deaths_long_apart_are_none_of_a_start(
        self, executor: CpuExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The prefill lane of a chunked engine never has a result; its fifth early death was the end."""
        for number in range(12):  # every other one, as if it had lived for long
            monkeypatch.setattr("semipd.execute.cpu._EARLY", 0.0 if number % 2 else 60.0)
            victim = pid_of(executor, "prefill")
            os.kill(victim, signal.SIGKILL)
            deadline = time.monotonic() + 30.0
            while executor.processes()["prefill"] in (victim, None):
                assert time.monotonic() < deadline
                executor.wait(time.monotonic() + 0.01)

    def test_the_residents_death_ends_it(self, executor: CpuExecutor, driver: Driver) -> None:
        pids = [pid for pid in executor.processes().values() if pid]
        os.kill(pid_of(executor, "resident"), signal.SIGKILL)
        with pytest.raises(ExecutorLost, match="resident process was killed by SIGKILL"):
            executor.wait(time.monotonic() + 10.0)
        calls: list[Callable[[], object]] = [
            lambda: executor.wait(None),
            lambda: executor.submit(Lane.DECODE, driver.batch(Slice(0, 0, 13))),
            lambda: executor.open(1, PROMPT, Sampling()),
            lambda: executor.resize(Split.lone(Lane.DECODE, UNITS)),
        ]
        for call in calls:
            with pytest.raises(ExecutorLost):
                call()
        eventually(lambda: all(dead(pid) for pid in pids))


class TestLongSteps:
    """On a model whose prompt takes long enough to meddle with."""

    @pytest.fixture
    def driver(self, slow: CpuExecutor) -> Driver:
        driver = Driver(slow, 16)
        for slot in range(4):
            driver.open(slot, [(5 * i + slot) % 8192 for i in range(2000)])
        return driver

    def test_a_batch_survives_one_death_and_not_two(self, slow: CpuExecutor, driver: Driver) -> None:
        """The poison guard: without it a batch that kills its worker would do so for ever."""
        expected = driver.run(Lane.PREFILL, Slice(0, 0, 1500)).tokens
        for deaths in (1, 2):
            batch = driver.batch(Slice(0, 0, 1500))
            slow.submit(Lane.PREFILL, batch)
            slow.submit(Lane.PREFILL, driver.batch(Slice(0, 0, 1500)))
            results: list[StepResult] = []
            for _ in range(deaths):
                victim = await_step(slow, batch.step)
                os.kill(victim, signal.SIGKILL)
                eventually(lambda victim=victim: dead(victim))
                deadline = time.monotonic() + 30.0
                while slow.processes()["prefill"] in (victim, None) and not results:
                    assert time.monotonic() < deadline
                    results += slow.wait(time.monotonic() + 0.002)
            first, second = results + driver.collect(2 - len(results))
            assert first.step == batch.step and first.attempts == 2
            if deaths == 1:
                assert first.tokens == expected
            else:
                assert first.error and "died twice" in first.error and first.tokens == ()
            assert (second.tokens, second.attempts) == (expected, 1)


def test_a_resident_that_does_not_answer_is_killed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semipd.execute.launch.PATIENCE", 0.1)
    executor = make(checkpoint)
    pids = [pid for pid in executor.processes().values() if pid]
    os.kill(pid_of(executor, "resident"), signal.SIGSTOP)
    executor.close()
    eventually(lambda: all(dead(pid) for pid in pids))


def test_the_thread_that_starts_it_may_end(checkpoint: Path) -> None:
    """The kernel's parent-death signal is sent when a thread ends, not only a process."""
    made: list[CpuExecutor] = []
    thread = threading.Thread(target=lambda: made.append(make(checkpoint)))
    thread.start()
    thread.join()
    driver = Driver(made[0], 4)
    driver.open(0, PROMPT)
    assert driver.run(Lane.PREFILL, Slice(0, 0, 13)).error is None
    made[0].close()


PARENT = """
import sys
from semipd.execute.cpu import CpuExecutor
from semipd.execute.launch import ResidentProcess
if sys.argv[2] == "loading":
    start = ResidentProcess.load
    ResidentProcess.load = lambda self, *rest: (print(self.pid, flush=True), start(self, *rest))
executor = CpuExecutor(sys.argv[1], slots=4, max_length=64, blocks=64)
print(*executor.processes().values(), flush=True)
executor.wait(None)
"""


@pytest.mark.parametrize("moment", ["loading", "running"])
def test_a_killed_parent_takes_everything_along(checkpoint: Path, moment: str) -> None:
    """Nobody is left to close it."""
    command = [sys.executable, "-c", PARENT, str(checkpoint), moment]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == (1 if moment == "loading" else 3)
    eventually(lambda: all(dead(pid) for pid in pids))


def test_a_fork_that_fails_for_a_moment_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([BlockingIOError(11, "no"), OSError(12, "no"), 4242])

    def fork() -> int:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(resident.os, "fork", fork)
    assert resident._patient_fork() == 4242


def test_a_pool_that_the_system_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the address space, which no figure of free memory tells of."""
    monkeypatch.setattr(resident, "available_memory", lambda: 2**80)
    with pytest.raises(ConfigError, match="lower --kv-memory"):
        resident.kv_pool((2**50,), torch.float32)


def test_a_death_while_loading_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most likely the system's out-of-memory killer."""
    spawn = subprocess.Popen

    def spawn_and_kill(*arguments: object, **rest: object) -> object:
        process = spawn(*arguments, **rest)  # type: ignore[call-overload]
        process.kill()
        return process

    monkeypatch.setattr(subprocess, "Popen", spawn_and_kill)
    with pytest.raises(ExecutorLost, match=r"killed by SIGKILL.* while loading"):
        make(checkpoint)


class TestEngine:
    """The planner on real workers."""

    def serve(
        self, executor: CpuExecutor, killer: Callable[[], None], observe: Observer = lambda event: None
    ) -> tuple[list[list[int]], dict[tuple[str, int], float]]:
        """Six requests with prompts of 5 to 40 tokens, the odd ones with penalties and scores; `killer` is
        called after every turn. Their outputs, and log probabilities by request and position."""
        logprobs: dict[tuple[str, int], float] = {}

        def collect(event: Event) -> None:
            observe(event)
            if isinstance(event, Scored):
                for request, score in zip(event.requests, event.scores, strict=True):
                    assert (request.id, score.position) not in logprobs, "scored twice"
                    logprobs[request.id, score.position] = score.logprob

        pool = BlockPool(256, 4)
        policy = SemiPD(Limits(UNITS, prefill_tokens=24, batch=4), Shared(UNITS))
        lanes = {Lane.PREFILL: pool, Lane.DECODE: pool}
        engine = Engine(
            executor, policy, lanes, MonotonicClock(), max_sequences=4, max_length=64, observers=[collect]
        )
        rule = Sampling(repetition_penalty=1.3, frequency_penalty=0.5, logprobs=2, prompt_logprobs=1)
        requests = [
            Request(
                f"r{i}",
                [(11 * i + 7 * j) % VOCABULARY for j in range(5 + 7 * i)],
                20,
                replace(rule, prompt_length=5 + 7 * i) if i % 2 else Sampling(),
            )
            for i in range(6)
        ]
        for request in requests:
            engine.add(request)
        deadline = time.monotonic() + 60.0
        while not engine.idle:
            assert time.monotonic() < deadline
            engine.step(time.monotonic() + 1.0)
            killer()
        engine.check_idle()
        assert [request.error for request in requests] == [None] * 6
        return [request.output for request in requests], logprobs

    def test_no_request_notices_the_deaths_of_workers(self, lasting: CpuExecutor) -> None:
        """Kill a worker at every seventh turn, in mid-step and at rest: the tokens are the same. But never
        twice under one step, which would rightly fail it."""
        turns = itertools.count(1)
        victims: list[int] = []
        unharmed = {Lane.PREFILL, Lane.DECODE}  # a step came back since the last kill

        def observe(event: Event) -> None:
            if isinstance(event, Stepped):
                unharmed.add(event.result.lane)

        def kill() -> None:
            lane = (Lane.PREFILL, Lane.DECODE)[len(victims) % 2]
            if next(turns) % 7 == 0 and len(victims) < 6 and lane in unharmed:
                pid = lasting.processes()[lane.value]
                if pid is not None and pid not in victims:
                    os.kill(pid, signal.SIGKILL)
                    victims.append(pid)
                    unharmed.discard(lane)

        expected, logprobs = self.serve(lasting, lambda: None)
        outputs, found = self.serve(lasting, kill, observe)
        assert outputs == expected
        assert len(logprobs) == sum(4 + 7 * i + 20 for i in (1, 3, 5))
        assert found == pytest.approx(logprobs, abs=1e-4)
        assert len(victims) > 3
