"""The GPU executor on a GPU that is not there: conformance with a real tiny model, and what only streams,
graphs and partitions can get wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from semipd.core.ports import Executor
from semipd.execute.cuda import CudaExecutor
from semipd.execute.cuda_start import Shape, start_cuda
from tests.checkpoints import VOCABULARY, make_checkpoint
from tests.execute.conformance import ExecutorConformance, Harness
from tests.execute.fake_cuda import FakeBackend


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(folder: Path, backend: FakeBackend, graph_sides: int = 2, **shape: Any) -> CudaExecutor:
    sizes = {"slots": 4, "max_length": 64, "block_size": 4, "blocks": 256, "most_rows": 128, **shape}
    return start_cuda(backend, folder, Shape(**sizes), dtype="float32", graph_sides=graph_sides).executor


class CudaHarness(Harness):
    vocabulary = VOCABULARY

    def __init__(self, folder: Path, graph_sides: int, **backend: Any) -> None:
        self._folder, self._graph_sides, self._backend = folder, graph_sides, backend

    def make(self) -> Executor:
        return make(self._folder, FakeBackend(**self._backend), self._graph_sides)

    def now(self, executor: Executor) -> float:
        assert isinstance(executor, CudaExecutor)
        return executor._backend.now()


class TestCudaExecutor(ExecutorConformance):
    @pytest.fixture
    def harness(self, checkpoint: Path) -> Harness:
        return CudaHarness(checkpoint, graph_sides=3)


class TestCudaExecutorWithoutGraphs(ExecutorConformance):
    @pytest.fixture
    def harness(self, checkpoint: Path) -> Harness:
        return CudaHarness(checkpoint, graph_sides=0)


class TestCudaExecutorWithoutPartitions(ExecutorConformance):
    @pytest.fixture
    def harness(self, checkpoint: Path) -> Harness:
        return CudaHarness(checkpoint, graph_sides=1, parts=False)
