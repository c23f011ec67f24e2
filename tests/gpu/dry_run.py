"""The tests of this folder on a GPU that is not there: what is wrong with a test costs no time on a card.

    python -m tests.gpu.dry_run [pytest's options]

Tokens are real, times are not; what only a card can do (`test_partition`) is collected and left out.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import semipd.execute.choose as choose
from tests.execute.fake_cuda import FakeBackend

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}


class Pretence:
    """A plugin that puts the fake card where the tests open the real one."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        import tests.gpu.test_executor as module

        given: Any = {
            "CudaBackend": lambda **_: FakeBackend(step=40, free=2**36),
            "LONG": 700,
            "WIDE": SMALL,
        }
        for name, value in given.items():
            setattr(module, name, value)
        left_out = ("test_partition", "without_partitions_says_so")
        kept = [item for item in items if not any(part in item.nodeid for part in left_out)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def main() -> int:
    torch.set_num_threads(1)
    choose.has_gpu = lambda *_: True
    options = ["-q", "-p", "no:cacheprovider", "-W", "default", "--tb=short", "tests/gpu", *sys.argv[1:]]
    return int(pytest.main(options, plugins=[Pretence()]))


if __name__ == "__main__":
    sys.exit(main())
