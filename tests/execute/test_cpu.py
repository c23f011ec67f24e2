"""The CPU executor: the conformance suite on a tiny random Llama, and what only processes can get wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from semipd.core.ports import Executor
from semipd.core.types import Lane
from semipd.execute.cpu import CpuExecutor
from tests.checkpoints import VOCABULARY, make_checkpoint
from tests.execute.conformance import ExecutorConformance, Harness


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def make(folder: Path) -> CpuExecutor:
    return CpuExecutor(folder, dtype="float32", slots=4, max_length=64, blocks=256, block_size=4)


class CpuHarness(Harness):
    vocabulary = VOCABULARY

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make(self) -> Executor:
        return make(self._folder)

    def kill(self, executor: Executor, lane: Lane) -> None:
        assert isinstance(executor, CpuExecutor)
        pid = executor.processes()[lane.value]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)


class TestCpuExecutor(ExecutorConformance):
    @pytest.fixture
    def harness(self, checkpoint: Path) -> Harness:
        return CpuHarness(checkpoint)


def test_the_planners_process_needs_no_torch() -> None:
    """The engine process imports the executor; torch there would cost 200 MB and start-up time."""
    program = "import sys, semipd.execute.cpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
