"""The GPU executor on a GPU that is not there: conformance with a real tiny model, and what only streams,
graphs and partitions can get wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from semipd.core.engine import Engine
from semipd.core.kv import BlockPool
from semipd.core.partition import Static
from semipd.core.policies import Chunked, Limits, PrefillFirst, SemiPD
from semipd.core.ports import Executor, Policy
from semipd.core.types import Lane, Request, Sampling
from semipd.execute.cuda import CudaExecutor
from semipd.execute.cuda_start import Shape, start_cuda
from tests.checkpoints import VOCABULARY, make_checkpoint
from tests.execute.conformance import Driver, ExecutorConformance, Harness
from tests.execute.constrained import CHECKS, Check
from tests.execute.fake_cuda import UNITS, FakeBackend


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


@pytest.mark.parametrize("graph_sides", [0, 2])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_constraint(checkpoint: Path, check: Check, graph_sides: int) -> None:
    executor = make(checkpoint, FakeBackend(), graph_sides)
    check(Driver(executor, 4))
    executor.close()


class TestCudaExecutorWithoutPartitions(ExecutorConformance):
    @pytest.fixture
    def harness(self, checkpoint: Path) -> Harness:
        return CudaHarness(checkpoint, graph_sides=1, parts=False)


PROMPTS = [[(11 * i * i + 5 * i + seed) % VOCABULARY for i in range(20 + 9 * seed)] for seed in range(6)]


class TestEngine:
    """The whole engine on the executor: every policy gives the tokens of lone requests."""

    def run(self, checkpoint: Path, policy: Policy | None, graph_sides: int = 2) -> list[list[int]]:
        executor = make(checkpoint, FakeBackend(), graph_sides, max_length=100, most_rows=200)
        pool = BlockPool(256, 4)
        kv = {Lane.PREFILL: pool, Lane.DECODE: pool}
        limits = Limits(executor.device.units, prefill_tokens=32, batch=4)
        policy = policy or SemiPD(limits, Static(68, 64, executor.device.units))
        clock = SimpleNamespace(now=executor._backend.now)
        engine = Engine(executor, policy, kv, clock, max_sequences=4, max_length=100)
        rules = [Sampling(temperature=0.7 * (index % 2), seed=index) for index in range(len(PROMPTS))]
        requests = [
            Request(f"{index}", prompt, 12, rule, block_keys=[])
            for index, (prompt, rule) in enumerate(zip(PROMPTS, rules, strict=True))
        ]
        for request in requests:
            engine.add(request)
        for _ in range(2000):
            if engine.idle:
                break
            engine.step()
        assert engine.idle and [request.error for request in requests] == [None] * len(requests)
        engine.check_idle()
        executor.close()
        return [request.output for request in requests]

    def test_every_policy_gives_the_same_tokens(self, checkpoint: Path) -> None:
        expected = self.run(checkpoint, None)
        assert all(len(output) == 12 for output in expected)
        limits = Limits(UNITS, prefill_tokens=32, batch=4)
        policies = [
            PrefillFirst(limits),
            Chunked(limits, 24),
            SemiPD(limits, Static(UNITS, UNITS, UNITS)),
            SemiPD(limits, Static(4, 128, UNITS)),
        ]
        for policy in policies:
            assert self.run(checkpoint, policy) == expected, policy
        assert self.run(checkpoint, PrefillFirst(limits), graph_sides=0) == expected
