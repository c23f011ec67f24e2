"""The profiler's loops on a fake device whose step times are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from semipd.core.types import Lane, Split
from semipd.execute import profile_cuda
from semipd.execute.cuda_start import Shape, start_cuda
from semipd.execute.profile_cuda import Sizes, StepTimer, curves, measure
from tests.checkpoints import VOCABULARY, make_checkpoint
from tests.execute.fake_cuda import PACE, UNITS, FakeBackend


@pytest.fixture(scope="module")
def timer(tmp_path_factory: pytest.TempPathFactory) -> StepTimer:
    torch.set_num_threads(1)
    folder = make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")
    shape = Shape(slots=5, max_length=64, block_size=4, blocks=128, most_rows=64)
    executor = start_cuda(FakeBackend(step=40), folder, shape, dtype="float32", graph_sides=1).executor
    return StepTimer(executor, Sizes(5, 128, 4, 64, 64), VOCABULARY)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in {
        "PREFILL_TOKENS": (16, 32, 10**6),
        "DECODE_BATCHES": (1, 3, 1000),
        "DECODE_CONTEXTS": (20, 10**6),
        "REPEATS": 2,
    }.items():
        monkeypatch.setattr(profile_cuda, name, values)


def test_a_profile_has_every_share_and_the_device_s_own_times(timer: StepTimer) -> None:
    profile = measure(timer, lambda line: None)
    assert {row["units"] for row in profile["decode"]} == {*range(40, 132, 40), UNITS}
    assert {row["units"] for row in profile["prefill"]} == {UNITS - d for d in range(40, 132, 40)} | {UNITS}
    layers = 3
    for row in profile["prefill"]:
        assert row["seconds"] == pytest.approx(layers * row["tokens"] * PACE / row["units"], rel=1e-6)
    for row in profile["decode"]:
        assert row["seconds"] >= layers * row["batch"] * PACE / row["units"] * 0.999
    assert profile["switch_seconds"] < 1e-3
    assert profile["curves"]["compute"][-1] == [132.0, 1.0]
    assert profile["curves"]["compute"][0][1] == pytest.approx(132 / 12, rel=1e-3)


def test_what_is_measured_runs_as_graphs_on_every_split(timer: StepTimer) -> None:
    """Launched kernel by kernel, a step would tell the speed of the host, and a curve over shares lie."""
    executor: Any = timer.executor
    measure(timer, lambda line: None, budget=0.0)
    backend, sides = executor._backend, executor._placement.sides(Lane.DECODE)
    for side in sides:
        executor.resize(Split.pair(UNITS - side.units, side.units, UNITS))
        before = backend.replays
        timer.decode(3, 20, 1)
        assert backend.replays == before + 2


def test_both_lanes_are_timed_side_by_side(timer: StepTimer) -> None:
    decode, prefill = timer.beside(3, 20, 32, 3)
    assert decode > 0 and prefill > decode


def test_curves_never_rise_with_units() -> None:
    """A device file's curve has to be a curve, whatever the noise of a measurement."""
    rows: list[dict[str, Any]] = [
        {"units": units, "tokens": 8, "seconds": seconds}
        for units, seconds in ((132, 1.0), (100, 0.98), (68, 1.5), (36, 1.4))
    ]
    assert curves(rows, [], 132) == {
        "compute": [[36.0, 1.5], [68.0, 1.5], [100.0, 1.0], [132.0, 1.0]],
        "memory": [],
    }


def test_a_model_folder_is_all_it_takes(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_cuda, "PREFILL_TOKENS", (16,))
    monkeypatch.setattr(profile_cuda, "DECODE_BATCHES", (1,))
    folder = make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")
    profile = profile_cuda.profile_gpu(
        FakeBackend(parts=False, free=int(2**34 * 0.1) + 2**30 + 2**22), folder
    )
    assert [row["units"] for row in profile["prefill"]] == [UNITS] and profile["beside"] == []
