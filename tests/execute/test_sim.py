"""The conformance suite on the fake and on the simulator's bare clock."""

from __future__ import annotations

import pytest

from semipd.core.ports import Executor
from semipd.core.types import Lane
from semipd.execute.sim import FixedCost, SimExecutor, VirtualClock
from tests.execute.conformance import ExecutorConformance, Harness
from tests.execute.fake import FakeExecutor, fake_device


class SimHarness(Harness):
    slots = None
    logits = False

    def make(self) -> Executor:
        return SimExecutor(fake_device(), FixedCost(2), VirtualClock())

    def kill(self, executor: Executor, lane: Lane) -> None:
        assert isinstance(executor, SimExecutor)
        executor.kill(lane)

    def now(self, executor: Executor) -> float:
        assert isinstance(executor, SimExecutor)
        return executor.clock.now()


class FakeHarness(SimHarness):
    def make(self) -> Executor:
        return FakeExecutor()


class TestSimExecutor(ExecutorConformance):
    @pytest.fixture
    def harness(self) -> Harness:
        return SimHarness()


class TestFakeExecutor(ExecutorConformance):
    @pytest.fixture
    def harness(self) -> Harness:
        return FakeHarness()
