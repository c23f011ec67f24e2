"""Trace readers: good rows as they are, bad rows by number; and the writer that comes back unharmed."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from semipd.bench import traces
from semipd.bench.traces import read
from semipd.cli import main
from semipd.core.errors import ConfigError
from semipd.trace import Arrival, TraceWriter

RECORDED = Path(__file__).parents[2].parent / "shared" / "data" / "traces"
recorded = pytest.mark.skipif(
    not RECORDED.is_dir(), reason="the recorded traces are not beside the project"
)

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
BURST = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def lengths(rows: list[Arrival]) -> list[tuple[int, int]]:
    return [(row.prompt_tokens, row.output_tokens) for row in rows]


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_azure(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        AZURE
        + "2023-11-16 18:15:46.6805900,374,44\r\n"
        + "2023-11-16 18:15:50.9951690,396,109\r\n\r\n"
        + "2023-11-16 18:16:46.6805900,8,1\r\n",
    )
    rows = list(read(path, "azure"))
    assert [row.time for row in rows] == pytest.approx([0, 4.314579, 60.0])
    assert lengths(rows) == [(374, 44), (396, 109), (8, 1)]
    assert [row.time for row in read(path, "azure", speed=4)] == pytest.approx([0, 1.07864475, 15])


def test_mooncake_spreads_a_bin_but_keeps_its_order(tmp_path: Path) -> None:
    row = '{{"timestamp": {}, "input_length": {}, "output_length": 5, "hash_ids": [{}]}}\n'
    path = write(
        tmp_path,
        "".join(
            row.format(stamp, 500 + number, number) for number, stamp in enumerate([0] * 40 + [3000] * 40)
        )
        + row.format(3500, 700, 99),
    )
    rows = list(read(path, "mooncake", seed=1))
    times = np.array([row.time for row in rows])
    assert np.all(np.diff(times) >= 0) and times[0] == 0
    assert 1.0 < times[20] < 2.0 and times[39] <= 3.0
    assert times[40] + 0.1 > 2.9 and times[79] - times[40] <= 0.5  # the next stamp ends this bin
    assert [row.keys for row in rows[:3]] == [(0,), (1,), (2,)]
    assert rows == list(read(path, "mooncake", seed=1)) and rows != list(read(path, "mooncake", seed=2))


def test_burstgpt_leaves_out_failures(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        BURST
        + "5,1,2.0,ChatGPT,472,18,490,Conversation log\n"
        + "45,2,0.0,ChatGPT,1087,0,1087,Conversation log\n"
        + "118,3,4.0,GPT-4,417,276,693,API log\n",
    )
    rows = list(read(path, "burstgpt"))
    assert [row.time for row in rows] == [0, 113] and lengths(rows) == [(472, 18), (417, 276)]


BAD = [
    ("azure", "", "row 1: no column 'TIMESTAMP'"),
    ("azure", "TIMESTAMP,ContextTokens\n", "row 1: no column 'GeneratedTokens'"),
    ("azure", AZURE + "yesterday,1,1\n", "row 2: TIMESTAMP is 'yesterday'"),
    (
        "azure",
        AZURE + "2023-11-16 18:15:46,1,1\n2023-11-16 18:15:47,many,1\n",
        "row 3: ContextTokens is 'many'",
    ),
    ("azure", AZURE + "2023-11-16 18:15:46,0,1\n", "row 2: ContextTokens is 0"),
    ("azure", AZURE + "2023-11-16 18:15:46,1,nan\n", "row 2: GeneratedTokens is nan"),
    ("azure", AZURE + "2023-11-16 18:15:46,1\n", "row 2: 2 fields, not 3"),
    (
        "azure",
        AZURE + "2023-11-16 18:15:46,1,1\n2023-11-16 18:15:45,1,1\n",
        "row 3: its time is 1 s before",
    ),
    ("azure", AZURE + "2023-11-16 18:15:46,1,1\n2023-11-16 18:15:47+00:00,1,1\n", "row 3: TIMESTAMP"),
    ("azure", AZURE.encode() + b"\xff,1,1\n", "row 2: TIMESTAMP"),
    ("burstgpt", BURST + "nan,1,2,x,1,1,2,y\n", "row 2: Timestamp is 'nan'"),
    ("burstgpt", BURST + "1,1,2,x,-4,1,2,y\n", "row 2: Request tokens is -4"),
    ("mooncake", "{}\n", "row 1: .*timestamp"),
    ("mooncake", '{"timestamp": 1, "input_length": 9, "output_length": 0}\n', "row 1: .*output_length"),
    (
        "mooncake",
        '{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [1, 2]}\n',
        "row 1: 2 hash_ids for 9 tokens",
    ),
    (
        "mooncake",
        '{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [-1]}',
        "row 1: .*hash_ids",
    ),
    ("semipd", '{"time": 0, "prompt_tokens": 1, "output_tokens": 1}\n\n[]\n', "row 3: .*object"),
    ("semipd", '{"time": 0, "prompt_tokens": 1, "output_tokens": 1, "text": "x"}\n', "row 1: .*text"),
    ("semipd", '{"time": 0, "prompt_tokens": 99999999, "output_tokens": 1}\n', "row 1: .*prompt_tokens"),
    ("semipd", '{"time": 0, "prompt_tokens": 1, "output_tokens": 1, "keys": ["x"]}\n', "row 1: .*keys"),
    (
        "semipd",
        '{"time": 0, "prompt_tokens": 9, "output_tokens": 1, "block_size": 8, "keys": ["1", "2", "3"]}\n',
        "row 1: 3 keys for 9 tokens",
    ),
    ("semipd", b'{"time": 0, "prompt_tokens": 1, "output_to', "row 1: "),
    ("semipd", b"\xff\xfe\n", "row 1: "),
]


@pytest.mark.parametrize(("format", "text", "message"), BAD, ids=[f"{row[0]}-{row[2][:24]}" for row in BAD])
def test_a_bad_row_is_named(tmp_path: Path, format: str, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(read(write(tmp_path, text), format))


def test_a_file_that_cannot_be_read_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path / "none", "azure")
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path, "azure")
    with pytest.raises(ConfigError, match="unknown trace format"):
        read(write(tmp_path, ""), "vidur")
    with pytest.raises(ConfigError, match="speed"):
        read(write(tmp_path, ""), "semipd", speed=0)


@pytest.mark.parametrize("format", ["mooncake", "semipd"])
def test_an_empty_trace_is_empty(tmp_path: Path, format: str) -> None:
    assert list(read(write(tmp_path, "\n"), format)) == []


def test_what_is_written_is_read_in_order(tmp_path: Path) -> None:
    """The server writes a row when a request ends; arrivals must come back in order of arrival."""
    path = tmp_path / "own"
    rows = [
        Arrival(1000.5, 30, 4, (1, 2**64 - 1), 16, "batch"),
        Arrival(1000.0, 10, 400),
        Arrival(1003.25, 7, 1),
    ]
    with TraceWriter(path) as writer:
        writer.write(rows[0])
        writer.write(rows[1])
        assert len(list(read(path, "semipd"))) == 2  # whole rows are there before it is closed
    with TraceWriter(path) as writer:
        writer.write(rows[2])
        writer.close()
    read_back = list(read(path, "semipd"))
    assert [row.time for row in read_back] == [0.0, 0.5, 3.25]
    assert lengths(read_back) == [(10, 400), (30, 4), (7, 1)]
    assert read_back[1].keys == (1, 2**64 - 1) and read_back[1].block_size == 16
    assert read_back[1].service_class == "batch"


def test_blinded_keys_match_within_a_file_and_tell_nothing(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "a") as one, TraceWriter(tmp_path / "b") as other:
        assert one.blind([b"x", b"y", b"x"])[0] == one.blind([b"x"])[0] != one.blind([b"y"])[0]
        assert one.blind([b"x"]) != other.blind([b"x"])


def test_a_writer_without_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        TraceWriter(tmp_path / "none" / "trace")


@recorded
def test_the_azure_trace_reads_as_published() -> None:
    rows = list(read(RECORDED / "azure_conv_2023.csv", "azure"))
    gaps = np.diff([row.time for row in rows])
    assert len(rows) == 19366
    assert np.mean([row.prompt_tokens for row in rows]) == pytest.approx(1155, abs=1)
    assert np.mean([row.output_tokens for row in rows]) == pytest.approx(211, abs=1)
    assert 1 / gaps.mean() == pytest.approx(5.53, abs=0.01)
    assert gaps.std() / gaps.mean() == pytest.approx(1.09, abs=0.01)


@recorded
def test_the_mooncake_trace_reads_as_published() -> None:
    rows = list(read(RECORDED / "mooncake_conversation.jsonl", "mooncake"))
    assert len(rows) == 12031
    assert np.mean([row.prompt_tokens for row in rows]) == pytest.approx(12035, abs=1)
    assert len(rows) / rows[-1].time == pytest.approx(3.40, abs=0.01)
    gaps = np.diff([row.time for row in rows])
    assert gaps.min() >= 0 and gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.1)  # no bins left
    seen: set[int] = set()
    tokens = hits = 0
    for row in rows:
        matched = next((n for n, key in enumerate(row.keys) if key not in seen), len(row.keys))
        tokens += row.prompt_tokens
        hits += min(matched * row.block_size, row.prompt_tokens)
        seen.update(row.keys)
    assert hits / tokens == pytest.approx(0.366, abs=0.01)


@recorded
def test_reading_is_lazy() -> None:
    first = list(islice(read(RECORDED / "mooncake_conversation.jsonl", "mooncake"), 3))
    assert [row.prompt_tokens for row in first] == [6758, 7322, 7236]


@pytest.mark.parametrize("format", ["azure", "mooncake", "burstgpt", "semipd"])
def test_a_line_without_an_end_is_not_held_in_memory(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk image, say: a single line of a terabyte."""
    path = tmp_path / "trace"
    path.touch()
    os.truncate(path, 2**40)
    monkeypatch.setattr(traces, "MAX_LINE", 2**16)
    with pytest.raises(ConfigError, match="row 1: a line of more than 65536 bytes"):
        list(traces.read(path, format))


def test_a_bad_row_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, AZURE + "2023-11-16 18:15:46,1,1\nyesterday,1,1\n")
    words = ["simulate", "--trace", str(path), "--trace-format", "azure", "--json"]
    assert main(words) == 2
    assert (
        capsys.readouterr().err == "semipd: trace, row 3: TIMESTAMP is 'yesterday', not a date and time\n"
    )
