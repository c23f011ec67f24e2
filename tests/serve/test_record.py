"""The recorder of traces: what it writes, and that a full disk harms nobody."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from semipd.bench.traces import read
from semipd.core.errors import ConfigError
from semipd.core.types import Finished, FinishReason, Request
from semipd.serve.record import TraceRecorder


def finished(prompt: int, output: int, now: float = 100.0, arrival: float = 99.0) -> Finished:
    keys = [bytes([place]) * 32 for place in range((prompt + output) // 4)]
    request = Request("r", range(prompt), 64, arrival=arrival, block_keys=keys, service_class="batch")
    request.output = [1] * output
    request.finish_reason = FinishReason.LENGTH
    return Finished(now, request)


def test_rows_hold_times_and_lengths(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    record = TraceRecorder(path, block_size=4)
    record(finished(10, 6))
    record(finished(3, 0))  # aborted before its first token
    record(finished(5, 1, arrival=98.5))
    late, early = sorted(read(path, "semipd"), key=lambda row: row.prompt_tokens, reverse=True)
    assert (late.prompt_tokens, late.output_tokens, late.block_size) == (10, 6, 4)
    assert len(late.keys) == 2  # of the prompt, though the engine knows keys of produced blocks too
    assert late.time - early.time == pytest.approx(0.5, abs=0.05)
    assert early.keys == late.keys[:1] and late.service_class == "batch"
    assert f'"time":{str(time.time())[:7]}' in path.read_text()


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        TraceRecorder(tmp_path, 16)


def test_no_row_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a row, which a disk may have room for, would spoil the first one after a restart."""
    path, write = tmp_path / "trace", os.write
    record = TraceRecorder(path, block_size=4)
    record(finished(10, 6))
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:30]))
    record(finished(3, 3))
    monkeypatch.undo()
    record.close()
    TraceRecorder(path, block_size=4)(finished(5, 1))
    assert [row.prompt_tokens for row in read(path, "semipd")] == [10, 5]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_ends_the_recording_alone(caplog: pytest.LogCaptureFixture) -> None:
    record = TraceRecorder("/dev/full", 16)
    record(finished(3, 3))
    record(finished(3, 3))
    assert len(caplog.records) == 1 and "no longer recorded" in caplog.text
    record.close()
