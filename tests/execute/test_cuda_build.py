"""Choosing the GPU by settings, on a machine without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import semipd.build as build
import semipd.execute.cuda_backend as cuda_backend
from semipd.config import from_mapping
from semipd.core.errors import ConfigError
from semipd.execute.cuda import CudaExecutor
from tests.checkpoints import make_checkpoint
from tests.execute.fake_cuda import FakeBackend


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def settings(folder: Path, **more: Any) -> Any:
    given = {"model": str(folder), "device": "cuda", "max_num_seqs": 4, "max_model_len": 128, **more}
    return from_mapping(given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_asking_for_a_gpu_that_is_not_there_says_what_to_do(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="no CUDA device here; use --device cpu"):
        build.build_engine(settings(checkpoint))


def test_auto_is_the_gpu_where_there_is_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for found, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(build, "has_gpu", lambda found=found: found)
        assert build.resolve(settings(checkpoint, device="auto")).device == expected


def test_settings_reach_the_executor(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend(step=40)
    monkeypatch.setattr(cuda_backend, "CudaBackend", lambda **_: backend)
    engine = build.build_engine(settings(checkpoint, kv_blocks=64, split="static:92,40"))
    executor = engine.executor
    assert isinstance(executor, CudaExecutor)
    assert executor.device.legal_splits == ((92, 40), (52, 80), (12, 120))
    assert engine.max_length == 128 and next(iter(engine.kv.values())).total == 64
    executor.close()


def test_attention_s_kernels_are_a_setting(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def make(attention: str) -> FakeBackend:
        asked.append(attention)
        return FakeBackend(step=40)

    monkeypatch.setattr(cuda_backend, "CudaBackend", make)
    for name in ("triton", "flashinfer"):
        build.build_engine(settings(checkpoint, kv_blocks=64, attention_backend=name)).executor.close()
    assert asked == ["triton", "flashinfer"]
    with pytest.raises(ConfigError, match="--attention-backend is for the GPU"):
        build.resolve(settings(checkpoint, device="cpu", attention_backend="flashinfer"))


def test_a_split_that_the_card_cannot_have_gives_it_back(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FakeBackend(step=40)
    monkeypatch.setattr(cuda_backend, "CudaBackend", lambda **_: backend)
    with pytest.raises(ConfigError, match="does not fit 132 SMs"):
        build.build_engine(settings(checkpoint, split="static:92,400", kv_blocks=64))
    assert backend.closed


def test_a_card_without_partitions_is_shared(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default split is the middle one of those that the device has: here it has none."""
    monkeypatch.setattr(cuda_backend, "CudaBackend", lambda **_: FakeBackend(parts=False))
    engine = build.build_engine(settings(checkpoint, kv_blocks=64))
    assert engine.executor.device.legal_splits == ()
    engine.executor.close()


@pytest.mark.parametrize("lost", [False, True])
def test_partitions_on_which_nothing_runs_are_not_used(
    lost: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kernel, an event or a product that fails there costs the partitions, not the start; unless it costs
    the device."""

    contexts = SimpleNamespace(closed=0)
    contexts.close = lambda: vars(contexts).update(closed=1)

    def refused(*_: Any) -> Any:
        raise RuntimeError("CUDA error: invalid resource handle\nCompile with TORCH_USE_CUDA_DSA")

    backend = object.__new__(cuda_backend.CudaBackend)
    backend.device, backend._partitioned = torch.device("cuda", 0), True
    backend._contexts, backend.units, backend._most_pairs = None, 132, 1
    monkeypatch.setattr(cuda_backend, "GreenContexts", lambda ordinal: contexts)
    monkeypatch.setattr(cuda_backend, "partition_pairs", lambda contexts, most: [(None, None)])
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(backend, "_side", refused)
    monkeypatch.setattr(backend, "lost", lambda error: "the GPU's context is lost" if lost else None)
    if lost:
        with pytest.raises(ConfigError, match="context is lost"):
            backend.partition()
        return
    assert backend.partition() == [] and contexts.closed
    assert "share it with priorities: CUDA error: invalid resource handle" in caplog.text
    assert "TORCH_USE" not in caplog.text
