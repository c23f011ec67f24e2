"""Everything in this folder needs a CUDA device; without one each test is skipped, with one line each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from semipd.execute.choose import has_gpu
from tests.checkpoints import make_checkpoint

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not (has_gpu() or torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")
