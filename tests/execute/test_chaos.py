"""Whole engines through the public door, while their processes are killed again and again."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from semipd import LLM, SamplingParams
from semipd.core.errors import EngineDead
from semipd.execute.cpu import CpuExecutor
from tests.checkpoints import VOCABULARY
from tests.execute.cpu_tools import dead, eventually

SETTINGS = {"policy": "semi-pd", "max_model_len": 96, "kv_blocks": 200, "block_size": 4, "max_num_seqs": 6}
PROMPTS = [[(11 * i + 7 * j) % VOCABULARY for j in range(5 + 6 * i)] for i in range(10)]
PARAMS = SamplingParams(max_tokens=24, temperature=0.7, seed=3, ignore_eos=True)


def executor_of(llm: LLM) -> CpuExecutor:
    assert llm._thread is not None and llm._thread.planner._engine is not None
    executor = llm._thread.planner._engine.executor
    assert isinstance(executor, CpuExecutor)
    return executor


def answers(llm: LLM) -> list[list[int]]:
    return [result.outputs[0].token_ids for result in llm.generate(PROMPTS, PARAMS)]


def left_over() -> tuple[set[str], list[int]]:
    """Open descriptors of this process, and its living children."""
    children = psutil.Process().children(recursive=True)
    return set(os.listdir("/proc/self/fd")), sorted(child.pid for child in children if not dead(child.pid))


class Gun:
    """Kills workers under a step, or at rest after one; never two under the same, which rightly fails
    its requests. shots: how many it has killed."""

    def __init__(self, executor: CpuExecutor) -> None:
        self._executor = executor
        self._last = [0, 0]
        self.shots = 0

    def aim(self, number: int) -> int | None:
        """The worker of lane `number`, if it has begun anything since the last one died."""
        step = self._executor._shared.words.running(number)
        if step in (0, self._last[number]):
            return None
        self._last[number] = step
        return self._executor.processes()[("prefill", "decode")[number]]

    def shoot(self, lanes: tuple[int, ...]) -> None:
        for pid in [self.aim(number) for number in lanes]:
            if pid is not None and not dead(pid):
                os.kill(pid, signal.SIGKILL)
                self.shots += 1


def under_fire(llm: LLM, both: bool, shots: int) -> list[list[list[int]]]:
    """Answer the prompts again and again until a gun has hit so often, at moments of its own."""
    gun, over = Gun(executor_of(llm)), threading.Event()
    chance = random.Random(shots)

    def fire() -> None:
        while gun.shots < shots and not over.is_set():
            time.sleep(0.05 + 0.2 * chance.random())
            gun.shoot((0, 1) if both else (gun.shots % 2,))

    gunner = threading.Thread(target=fire)
    gunner.start()
    seen = []
    try:
        while gunner.is_alive():
            seen.append(answers(llm))
    finally:
        over.set()
        gunner.join()
    assert gun.shots >= shots
    return [*seen, answers(llm)]


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True])
def test_no_request_notices_twenty_deaths(checkpoint: Path, both: bool) -> None:
    with LLM(str(checkpoint), **SETTINGS) as llm:  # whatever this process opens once, it has opened
        expected = answers(llm)
    before = left_over()
    with LLM(str(checkpoint), **SETTINGS) as llm:
        assert all(found == expected for found in under_fire(llm, both, 20))
    assert left_over() == before


@pytest.mark.slow
def test_the_end_of_the_resident_is_the_end_and_is_told(checkpoint: Path) -> None:
    """Nobody waits for an answer that will not come; the next engine has nothing of the last one."""
    with LLM(str(checkpoint), **SETTINGS) as llm:
        expected = answers(llm)
    before = left_over()
    for _ in range(3):
        with LLM(str(checkpoint), **SETTINGS) as llm:
            pids = [pid for pid in executor_of(llm).processes().values() if pid]
            timer = threading.Timer(0.05, os.kill, [pids[0], signal.SIGKILL])
            timer.start()
            with pytest.raises(EngineDead, match="resident process was killed"):
                [answers(llm) for _ in range(1000)]
            timer.join()
        eventually(lambda pids=pids: all(dead(pid) for pid in pids))
    with LLM(str(checkpoint), **SETTINGS) as llm:
        assert answers(llm) == expected
    assert left_over() == before


@pytest.mark.slow
def test_deaths_during_the_start(checkpoint: Path) -> None:
    """A worker that dies as soon as it exists is forked again; of a resident's death the caller is told."""
    with LLM(str(checkpoint), **SETTINGS) as llm:
        expected = answers(llm)
    before = left_over()
    for role in ("semipd-decode", "semipd-prefill", "semipd-resident"):
        over = threading.Event()

        def shoot_once(role: str = role, over: threading.Event = over) -> None:
            while not over.is_set():
                for child in psutil.Process().children(recursive=True):
                    try:
                        if child.name() == role:
                            child.kill()
                            return
                    except psutil.NoSuchProcess:
                        continue
                time.sleep(0.002)

        gunner = threading.Thread(target=shoot_once)
        gunner.start()
        try:
            if role == "semipd-resident":
                with pytest.raises(EngineDead, match="killed by SIGKILL"):
                    LLM(str(checkpoint), **SETTINGS)
            else:
                with LLM(str(checkpoint), **SETTINGS) as llm:
                    assert answers(llm) == expected
        finally:
            over.set()
            gunner.join()
        assert left_over() == before
