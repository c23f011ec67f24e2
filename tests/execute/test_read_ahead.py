"""Weights that are on their way from the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from semipd.execute.read_ahead import STRETCH, start_reading
from tests.execute.cpu_tools import eventually

SIZE = 3 * STRETCH + 100


def cached(path: Path) -> bool:
    """Whether a read of every stretch's first byte, and of the last byte, would not wait."""
    with path.open("rb", buffering=0) as file:
        for at in (*range(0, SIZE, STRETCH), SIZE - 1):
            try:
                os.preadv(file.fileno(), [bytearray(1)], at, os.RWF_NOWAIT)
            except BlockingIOError:
                return False
            except OSError as error:
                pytest.skip(f"this file system cannot say: {error}")
    return True


def test_the_system_reads_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00001.safetensors"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(path):
        pytest.skip("this file system keeps everything in memory")
    start_reading(str(tmp_path)).join()
    eventually(lambda: cached(path))


def test_what_is_missing_or_unreadable_is_left_to_who_loads_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    start_reading(str(tmp_path)).join()
    start_reading(str(tmp_path / "nowhere")).join()
