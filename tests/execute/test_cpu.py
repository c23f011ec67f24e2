"""The CPU executor: the conformance suite on a tiny random Llama, and what only processes can get wrong."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from semipd.core.errors import ConfigError
from semipd.core.ports import Executor, ExecutorLost
from semipd.core.types import Lane, Sampling, Slice, Split, StepResult
from semipd.execute.cores import available_cores
from semipd.execute.cpu import CpuExecutor
from semipd.execute.launch import environment
from tests.checkpoints import VOCABULARY, make_checkpoint
from tests.execute.conformance import Driver, ExecutorConformance, Harness

ROOT = Path(__file__).parents[2]
PROMPT = [(7 * i + 3) % VOCABULARY for i in range(13)]
UNITS = len(available_cores())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape of a model of 38 million parameters, for dummy weights: a prompt takes a while on it."""
    folder = tmp_path_factory.mktemp("wide")
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


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


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
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


@pytest.fixture(scope="module")
def lasting(checkpoint: Path) -> Iterator[CpuExecutor]:
    """An executor for the tests that leave it as it was."""
    executor = make(checkpoint)
    yield executor
    executor.close()


@pytest.fixture(scope="module")
def slow(wide: Path) -> Iterator[CpuExecutor]:
    """An executor whose steps take long enough to meddle with."""
    executor = make_wide(wide)
    yield executor
    executor.close()


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

    def test_more_steps_than_the_depth_are_refused(self, lasting: CpuExecutor, driver: Driver) -> None:
        for _ in range(lasting.device.depth):
            lasting.submit(Lane.PREFILL, driver.batch(Slice(0, 0, 13)))
        with pytest.raises(ValueError, match="in flight"):
            lasting.submit(Lane.PREFILL, driver.batch(Slice(0, 0, 13)))
        driver.collect(lasting.device.depth)

    def test_what_the_device_lacks_is_refused(self, lasting: CpuExecutor, driver: Driver) -> None:
        with pytest.raises(ValueError, match="transfer"):
            lasting.submit(Lane.TRANSFER, driver.batch(Slice(0, 0, 1)))
        with pytest.raises(ValueError, match="units"):
            lasting.resize(Split.lone(Lane.DECODE, UNITS + 1))


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

    def await_step(self, executor: CpuExecutor, step: int) -> int:
        """The process id of the prefill worker, once it runs this step."""
        while executor._shared.words.running(0) != step or executor.processes()["prefill"] is None:
            assert executor.wait(time.monotonic() + 0.002) == []
        return pid_of(executor, "prefill")

    def test_a_batch_survives_one_death_and_not_two(self, slow: CpuExecutor, driver: Driver) -> None:
        """The poison guard: without it a batch that kills its worker would do so for ever."""
        expected = driver.run(Lane.PREFILL, Slice(0, 0, 1500)).tokens
        for deaths in (1, 2):
            batch = driver.batch(Slice(0, 0, 1500))
            slow.submit(Lane.PREFILL, batch)
            slow.submit(Lane.PREFILL, driver.batch(Slice(0, 0, 1500)))
            results: list[StepResult] = []
            for _ in range(deaths):
                victim = self.await_step(slow, batch.step)
                os.kill(victim, signal.SIGKILL)
                eventually(lambda victim=victim: dead(victim))
                while slow.processes()["prefill"] in (victim, None) and not results:
                    results += slow.wait(time.monotonic() + 0.002)
            first, second = results + driver.collect(2 - len(results))
            assert first.step == batch.step and first.attempts == 2
            if deaths == 1:
                assert first.tokens == expected
            else:
                assert first.error and "died twice" in first.error and first.tokens == ()
            assert (second.tokens, second.attempts) == (expected, 1)

    @pytest.mark.skipif(UNITS < 2, reason="one core cannot be split")
    def test_cores_follow_the_split_inside_a_step(self, slow: CpuExecutor, driver: Driver) -> None:
        cores = available_cores()
        prefill, decode = pid_of(slow, "prefill"), pid_of(slow, "decode")
        driver.run(Lane.DECODE, Slice(1, 0, 4))
        slow.resize(Split.lone(Lane.PREFILL, UNITS))
        batch = driver.batch(Slice(0, 0, 2000))
        slow.submit(Lane.PREFILL, batch)
        self.await_step(slow, batch.step)
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
    assert 0.9 * WIDE_BYTES < taken[0] - taken[1] < 1.4 * WIDE_BYTES


def cores_of(pid: int) -> set[int]:
    """Where any thread of the process may run."""
    found: set[int] = set()
    for name in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):
            found |= os.sched_getaffinity(int(name))
    return found


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
