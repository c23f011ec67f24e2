"""The CPU executor: the conformance suite on a tiny random Llama, processes, cores and memory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from semipd.core.errors import ConfigError
from semipd.core.ports import Executor, ExecutorLost
from semipd.core.types import Lane, Sampling, Slice, Split
from semipd.execute.cores import REST, available_cores
from semipd.execute.cpu import CpuExecutor
from semipd.execute.launch import environment
from semipd.execute.wire import cut_scores
from semipd.model.kernels import load_kernels
from tests.checkpoints import VOCABULARY
from tests.execute.conformance import Driver, ExecutorConformance, Harness
from tests.execute.constrained import CHECKS, Check, survives_a_death
from tests.execute.cpu_tools import (
    WIDE_BYTES,
    await_step,
    cores_of,
    eventually,
    make,
    make_wide,
    pid_of,
)

ROOT = Path(__file__).parents[2]
PROMPT = [(7 * i + 3) % VOCABULARY for i in range(13)]
UNITS = len(available_cores())


class CpuHarness(Harness):
    vocabulary = VOCABULARY

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make(self) -> Executor:
        return make(self._folder)

    def kill(self, executor: Executor, lane: Lane) -> None:
        assert isinstance(executor, CpuExecutor)
        os.kill(pid_of(executor, lane.value), signal.SIGKILL)


class TestCpuExecutor(ExecutorConformance):
    @pytest.fixture
    def harness(self, checkpoint: Path) -> Harness:
        return CpuHarness(checkpoint)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_constraint(lasting: CpuExecutor, check: Check) -> None:
    check(Driver(lasting, 4))


def test_a_constraint_survives_a_death(lasting: CpuExecutor, checkpoint: Path) -> None:
    survives_a_death(Driver(lasting, 4), CpuHarness(checkpoint).kill)


def test_scores_of_a_step_may_take_several_packets(lasting: CpuExecutor) -> None:
    """Those of a long prompt do not fit into one."""
    driver, prompt = Driver(lasting, 4), [(5 * i + 1) % VOCABULARY for i in range(60)]
    most = Sampling(prompt_logprobs=VOCABULARY, logprobs=VOCABULARY, prompt_length=60)
    driver.open(0, prompt, most)
    driver.open(1, prompt)
    whole = driver.run(Lane.PREFILL, Slice(0, 0, 60), Slice(1, 0, 30, False))
    assert len(cut_scores(whole.scores)) > 2
    assert [score.position for score in whole.scores] == list(range(1, 61))
    assert all(sorted(score.ids) == list(range(VOCABULARY)) for score in whole.scores)
    assert len(whole.tokens) == 1 and driver.run(Lane.PREFILL, Slice(0, 0, 60)).tokens == whole.tokens


class TestProcesses:
    """What holds while all is well."""

    @pytest.fixture
    def driver(self, lasting: CpuExecutor) -> Driver:
        driver = Driver(lasting, 4)
        driver.open(0, PROMPT)
        return driver

    def test_processes_say_who_they_are(self, lasting: CpuExecutor) -> None:
        """`ps` shows the title, `pkill` looks at the name."""
        for role, pid in lasting.processes().items():
            process = psutil.Process(pid)
            assert process.cmdline()[0] == process.name() == f"semipd-{role}"

    def test_the_resident_has_one_thread(self, lasting: CpuExecutor) -> None:
        assert psutil.Process(pid_of(lasting, "resident")).num_threads() == 1

    def test_ctrl_c_is_for_the_parent_to_decide(self, lasting: CpuExecutor, driver: Driver) -> None:
        before = lasting.processes()
        for pid in before.values():
            assert pid is not None and os.getpgid(pid) != os.getpgid(0)
            os.kill(pid, signal.SIGINT)
        assert driver.run(Lane.PREFILL, Slice(0, 0, 13)).attempts == 1
        assert lasting.processes() == before

    def test_an_arrival_wakes_a_waiting_planner(self, lasting: CpuExecutor) -> None:
        timer = threading.Timer(0.05, lasting.wake)
        timer.start()
        assert lasting.wait(time.monotonic() + 30.0) == []
        timer.join()


class TestCores:
    """On a model whose prompt takes long enough to meddle with."""

    @pytest.fixture
    def driver(self, slow: CpuExecutor) -> Driver:
        driver = Driver(slow, 16)
        for slot in range(4):
            driver.open(slot, [(5 * i + slot) % 8192 for i in range(2000)])
        return driver

    @pytest.mark.skipif(UNITS < 2, reason="one core cannot be split")
    def test_cores_follow_the_split_inside_a_step(self, slow: CpuExecutor, driver: Driver) -> None:
        cores = available_cores()
        prefill, decode = pid_of(slow, "prefill"), pid_of(slow, "decode")
        driver.run(Lane.DECODE, Slice(1, 0, 4))
        slow.resize(Split.lone(Lane.PREFILL, UNITS))
        batch = driver.batch(Slice(0, 0, 2000))
        slow.submit(Lane.PREFILL, batch)
        await_step(slow, batch.step)
        eventually(lambda: cores_of(prefill) == set(cores))
        slow.resize(Split.pair(1, UNITS - 1, UNITS))
        eventually(lambda: cores_of(prefill) == {cores[0]})
        results = [driver.run(Lane.DECODE, Slice(1, 4 + i, 1, False)) for i in range(3)]
        assert cores_of(decode) == set(cores[1:])
        assert [result.lane for result in results] == [Lane.DECODE] * 3  # all while the prompt ran
        driver.collect(1)
        slow.resize(Split.lone(Lane.DECODE, UNITS))
        driver.run(Lane.DECODE, Slice(1, 7, 1))
        assert cores_of(decode) == set(cores)


@pytest.mark.skipif(load_kernels() is None, reason="the kernels were not built")
def test_after_a_rest_every_thread_of_a_lane_has_a_core_of_its_own(lasting: CpuExecutor) -> None:
    """Those that may go anywhere in their lane are woken on one."""
    cores, driver = available_cores(), Driver(lasting, 4)
    driver.open(0, PROMPT)
    for lane in (Lane.PREFILL, Lane.DECODE):
        lasting.resize(Split.lone(lane, UNITS))
        driver.run(lane, Slice(0, 0, 13))
        time.sleep(2.0 * REST)
        driver.run(lane, Slice(0, 0, 13))
        threads = Path(f"/proc/{pid_of(lasting, lane.value)}/task").iterdir()
        where = [os.sched_getaffinity(int(thread.name)) for thread in threads]
        assert sorted(where, key=min) == [{core} for core in cores]


def test_weights_are_in_memory_once(wide: Path, checkpoint: Path) -> None:
    """Three processes map them; a copy in any of them would show in the sum of proportional shares."""
    taken = []
    for executor in (make_wide(wide), make(checkpoint)):
        driver = Driver(executor, 16)
        driver.open(2, PROMPT)
        driver.run(Lane.PREFILL, Slice(2, 0, 13))
        driver.run(Lane.DECODE, Slice(2, 0, 13))
        taken.append(private_bytes(executor))
        executor.close()
    assert 0.7 * WIDE_BYTES < taken[0] - taken[1] < 1.6 * WIDE_BYTES  # two copies would be 2, three 3


def private_bytes(executor: CpuExecutor) -> int:
    """Anonymous memory of all its processes; what n of them share counts 1/n in each."""
    total = 0
    for pid in executor.processes().values():
        found = re.search(r"Pss_Anon:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
        assert found
        total += int(found[1]) * 1024
    return total


def test_close_leaves_nothing_behind(checkpoint: Path) -> None:
    """No process (not even a zombie), no descriptor; twice in a row, with steps in flight."""
    make(checkpoint).close()
    before = set(os.listdir("/proc/self/fd"))
    executor = make(checkpoint)
    driver = Driver(executor, 4)
    driver.open(0, PROMPT)
    for lane in (Lane.PREFILL, Lane.DECODE):
        executor.submit(lane, driver.batch(Slice(0, 0, 13)))
    pids = executor.processes().values()
    executor.close()
    assert not any(psutil.pid_exists(pid) for pid in pids if pid)
    assert set(os.listdir("/proc/self/fd")) == before
    executor.wake()  # an arrival may come late
    with pytest.raises(ExecutorLost, match="closed"):
        executor.wait(None)


def test_a_folder_without_a_model_is_a_setting_that_cannot_work(tmp_path: Path) -> None:
    """The resident's own words reach the caller, as one line."""
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError) as caught:
        make(tmp_path)
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_pool_that_cannot_fit_is_refused_before_it_is_used(checkpoint: Path) -> None:
    """Anonymous memory is taken when touched: without a check the machine would run out much later."""
    with pytest.raises(ConfigError, match=r"KV pool takes .* lower --kv-memory"):
        CpuExecutor(checkpoint, slots=4, max_length=64, blocks=10**9)


def test_cores_that_this_process_lacks_are_refused(checkpoint: Path) -> None:
    for cores in ((), (10**6,)):
        with pytest.raises(ConfigError, match="cores"):
            CpuExecutor(checkpoint, slots=4, max_length=64, blocks=64, cores=cores)


def test_settings_of_thread_pools_are_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that exports OMP_PROC_BIND for other programs would nail the pools down."""
    for name in (
        "OMP_PROC_BIND",
        "OMP_NUM_THREADS",
        "GOMP_CPU_AFFINITY",
        "KMP_AFFINITY",
        "MKL_NUM_THREADS",
    ):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    found = environment()
    assert "7" not in [
        value for name, value in found.items() if name.startswith(("OMP", "GOMP", "KMP", "MKL"))
    ]
    assert found["GLIBC_TUNABLES"].startswith("glibc.malloc.check=0:")
    assert found["PATH"] == os.environ["PATH"]


def test_the_planners_process_needs_no_torch() -> None:
    """The engine process imports the executor; torch there would cost 200 MB and start-up time."""
    program = "import sys, semipd.execute.cpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, cwd=ROOT).returncode == 0
