"""Workers that give way to others which were forked with more: unnoticed, but for what is quicker then."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from semipd.execute.cpu import CpuExecutor
from semipd.execute.resident import LARGE_TOKENIZER
from tests.checkpoints import VOCABULARY
from tests.execute.conformance import Driver
from tests.execute.constrained import END, follow, rule
from tests.execute.cpu_tools import dead, eventually, make

PROMPT = [(7 * i + 3) % VOCABULARY for i in range(13)]


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """Of a model whose tokenizer is large, by blanks."""
    shutil.copytree(checkpoint, tmp_path / "model")
    with (tmp_path / "model" / "tokenizer.json").open("a") as file:
        file.write(" " * LARGE_TOKENIZER)
    return tmp_path / "model"


@pytest.fixture
def executor(folder: Path) -> Iterator[CpuExecutor]:
    executor = make(folder)
    yield executor
    executor.close()


def renewed(executor: CpuExecutor, before: dict[str, int | None]) -> bool:
    """Whether other workers are there than before."""
    assert executor.wait(time.monotonic()) == []
    now = executor.processes()
    return all(now[role] not in (None, before[role]) for role in ("prefill", "decode"))


def test_at_rest_workers_are_forked_anew_with_a_tokenizer(folder: Path, executor: CpuExecutor) -> None:
    before = executor.processes()
    driver = Driver(executor, 4)
    driver.open(0, PROMPT)
    expected = driver.generate(0, PROMPT, 2)
    eventually(lambda: renewed(executor, before))
    assert executor.processes()["resident"] == before["resident"]
    assert len(os.listdir(f"/proc/{before['resident']}/task")) == 1, "or it could not fork any more"
    eventually(lambda: all(dead(pid or 0) for role, pid in before.items() if role != "resident"))

    driver.open(0, PROMPT)
    assert driver.generate(0, PROMPT, 2) == expected, "the same weights and the same pool"
    (folder / "tokenizer.json").unlink()  # nobody reads it again
    settled = executor.processes()
    assert follow(driver, 1, rule())[-1] == END
    time.sleep(0.05)
    assert not renewed(executor, settled) and executor.processes() == settled, "only once"
