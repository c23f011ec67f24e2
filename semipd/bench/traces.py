"""Recorded arrivals: readers for four trace formats. `semipd.trace` writes our own.

Every reader yields `Arrival`s in order of time, seconds from the first row, without holding the file in
memory (nor any line of more than `MAX_LINE` bytes). A row that cannot be used raises ConfigError with its
number (the line in the file, from 1) and the reason.

azure     CSV with TIMESTAMP, ContextTokens, GeneratedTokens (Azure LLM inference traces).
mooncake  JSONL with timestamp (ms), input_length, output_length, hash_ids (512-token prefix blocks).
          Timestamps fall in bins of about 3 s; each is spread uniformly inside its bin.
burstgpt  CSV with Timestamp (s), Request tokens, Response tokens. Rows without response tokens are requests
          that failed where the trace was taken; they are left out.
semipd    JSONL: {"time": s, "prompt_tokens", "output_tokens", "block_size"?, "keys"?, "service_class"?},
          keys as hexadecimal text of up to 64 bits. Rows may be in any order. Holds no text.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import IO, Annotated, Any, AnyStr

import msgspec
import numpy as np

from semipd.core.errors import ConfigError
from semipd.trace import MAX_SECONDS, MAX_TOKENS, TRACE_BLOCK, Arrival, Count, SemipdRow, Time

MOONCAKE_BIN_SECONDS = 3.0
MAX_LINE = 2**26

_Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class MooncakeRow(msgspec.Struct):
    """A line of a Mooncake trace; timestamp in milliseconds."""

    timestamp: Time
    input_length: Count
    output_length: Count
    hash_ids: list[_Id] = msgspec.field(default_factory=list)


def read(path: str | Path, format: str, seed: int = 0, speed: float = 1.0) -> Iterator[Arrival]:
    """Arrivals of a trace file, `speed` times as fast as recorded. `seed` spreads Mooncake's bins.

    Raises ConfigError: at once for an unknown format or a missing file, on reading for a bad row."""
    if format not in READERS:
        raise ConfigError(f"unknown trace format {format!r}; known ones: {', '.join(READERS)}")
    if not 1e-6 <= speed <= 1e6:
        raise ConfigError(f"a trace speed of {speed:g} is not between 1e-6 and 1e6")
    path = Path(path)
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from None
    rows = READERS[format](path, seed)
    if speed == 1.0:
        return rows
    return (dataclasses.replace(row, time=row.time / speed) for row in rows)


def _bad(path: Path, row: int, reason: object) -> ConfigError:
    return ConfigError(f"{path.name}, row {row}: {reason}")


def _lines(path: Path, file: IO[AnyStr]) -> Iterator[AnyStr]:
    """The lines of a file, none of which may be longer than memory has room for."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise _bad(path, number, f"a line of more than {MAX_LINE} bytes")
        yield line


def _in_order(path: Path, rows: Iterable[tuple[int, Arrival]]) -> Iterator[Arrival]:
    """Times from the first row on; refuses a time that runs backwards."""
    first = latest = None
    for number, row in rows:
        if first is None or latest is None:
            first = latest = row.time
        if row.time < latest:
            raise _bad(path, number, f"its time is {latest - row.time:g} s before the row above")
        latest = row.time
        yield dataclasses.replace(row, time=row.time - first)


# CSV


def _csv_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """(row number, the named columns) of each row, which must have as many fields as the header."""
    # Bytes that are no text pass as surrogates: the field that needs them then names its row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(_lines(path, file))
        try:
            header = [name.strip() for name in next(lines, [])]
            missing = [name for name in columns if name not in header]
            if missing:
                raise _bad(path, 1, f"no column {missing[0]!r}")
            places = [header.index(name) for name in columns]
            for fields in lines:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise _bad(path, lines.line_num, f"{len(fields)} fields, not {len(header)}")
                yield lines.line_num, [fields[place].strip() for place in places]
        except csv.Error as error:
            raise _bad(path, lines.line_num + 1, error) from None


def _count(path: Path, row: int, name: str, text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        raise _bad(path, row, f"{name} is {text!r}, not a number") from None
    if not (value.is_integer() and 1 <= value <= MAX_TOKENS):
        raise _bad(path, row, f"{name} is {text}, not a whole number from 1 to {MAX_TOKENS}")
    return int(value)


def _azure(path: Path, seed: int) -> Iterator[Arrival]:
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

    def rows() -> Iterator[tuple[int, Arrival]]:
        origin: datetime | None = None
        for number, (stamp, prompt, output) in _csv_rows(path, columns):
            try:
                moment = datetime.fromisoformat(stamp)
                origin = moment if origin is None else origin
                time = (moment - origin).total_seconds()
            except (ValueError, TypeError):
                raise _bad(path, number, f"TIMESTAMP is {stamp!r}, not a date and time") from None
            yield (
                number,
                Arrival(
                    time,
                    _count(path, number, columns[1], prompt),
                    _count(path, number, columns[2], output),
                ),
            )

    return _in_order(path, rows())


def _burstgpt(path: Path, seed: int) -> Iterator[Arrival]:
    columns = ("Timestamp", "Request tokens", "Response tokens")

    def rows() -> Iterator[tuple[int, Arrival]]:
        for number, (stamp, prompt, output) in _csv_rows(path, columns):
            try:
                time = float(stamp)
            except ValueError:
                time = math.nan
            if not 0 <= time <= MAX_SECONDS:
                raise _bad(path, number, f"Timestamp is {stamp!r}, not a time in seconds")
            if output in ("0", "0.0"):
                continue
            yield (
                number,
                Arrival(
                    time,
                    _count(path, number, columns[1], prompt),
                    _count(path, number, columns[2], output),
                ),
            )

    return _in_order(path, rows())


# JSONL


def _decode(path: Path, number: int, line: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _bad(path, number, error) from None


def _mooncake(path: Path, seed: int) -> Iterator[Arrival]:
    decoder = msgspec.json.Decoder(MooncakeRow)

    def rows() -> Iterator[tuple[int, MooncakeRow]]:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(path, file), 1):
                if line.strip():
                    row = _decode(path, number, line, decoder)
                    if len(row.hash_ids) > -(-row.input_length // TRACE_BLOCK):
                        blocks = len(row.hash_ids)
                        raise _bad(path, number, f"{blocks} hash_ids for {row.input_length} tokens")
                    yield number, row

    return _in_order(path, _spread(rows(), seed))


def _spread(rows: Iterable[tuple[int, MooncakeRow]], seed: int) -> Iterator[tuple[int, Arrival]]:
    """Draw each bin's times uniformly from its stamp up to the next, but no further than a bin's width.

    Rows of a bin keep their order. One bin is held at a time."""
    generator = np.random.default_rng(seed)

    def spread(group: list[tuple[int, MooncakeRow]], width: float) -> Iterator[tuple[int, Arrival]]:
        offsets = np.sort(generator.random(len(group))) * max(width, 0.0)
        for (number, row), offset in zip(group, offsets.tolist(), strict=True):
            time = row.timestamp / 1000 + offset
            yield number, Arrival(time, row.input_length, row.output_length, tuple(row.hash_ids))

    waiting: list[tuple[int, MooncakeRow]] = []
    for stamp, group in groupby(rows, key=lambda numbered: numbered[1].timestamp):
        if waiting:
            gap = stamp / 1000 - waiting[0][1].timestamp / 1000
            yield from spread(waiting, min(gap, MOONCAKE_BIN_SECONDS))
        waiting = list(group)
    yield from spread(waiting, MOONCAKE_BIN_SECONDS)


def _semipd(path: Path, seed: int) -> Iterator[Arrival]:
    """Reads twice: first the times, to find the order (32 bytes a row); then the rows, in that order."""
    decoder = msgspec.json.Decoder(SemipdRow)
    times, starts = array("d"), array("q")
    numbers = array("q")
    with path.open("rb") as file:
        start = 0
        for number, line in enumerate(_lines(path, file), 1):
            if line.strip():
                row = _decode(path, number, line, decoder)
                if len(row.keys) > -(-row.prompt_tokens // row.block_size):
                    raise _bad(path, number, f"{len(row.keys)} keys for {row.prompt_tokens} tokens")
                times.append(row.time)
                starts.append(start)
                numbers.append(number)
            start += len(line)
        order = np.argsort(np.frombuffer(times), kind="stable") if times else np.empty(0, np.int64)
        first, place = min(times, default=0.0), -1
        for index in order:
            if place != starts[index]:
                file.seek(starts[index])
            line = file.readline()
            place = starts[index] + len(line)
            row = _decode(path, numbers[index], line, decoder)
            yield Arrival(
                row.time - first,
                row.prompt_tokens,
                row.output_tokens,
                tuple(int(key, 16) for key in row.keys),
                row.block_size,
                row.service_class,
            )


READERS: dict[str, Callable[[Path, int], Iterator[Arrival]]] = {
    "azure": _azure,
    "mooncake": _mooncake,
    "burstgpt": _burstgpt,
    "semipd": _semipd,
}
