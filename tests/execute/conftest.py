"""Model folders and executors that several files of this room use; made once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from semipd.execute.cpu import CpuExecutor
from tests.checkpoints import make_checkpoint
from tests.execute.cpu_tools import make, make_wide


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
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
