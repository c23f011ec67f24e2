"""Our own trace format: what arrived, as rows of JSON without any text, and the writer of such rows.

It stands apart from `semipd.bench` because the server writes what the simulator reads. Needs no numpy.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from semipd.core.errors import ConfigError

MAX_TOKENS = 2**24
MAX_SECONDS = 1e11
TRACE_BLOCK = 512

Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
Time = Annotated[float, msgspec.Meta(ge=0, le=MAX_SECONDS)]
_Key = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{1,16}$")]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a workload: its time in seconds from the start, and its lengths in tokens.

    keys: one id per block of `block_size` prompt tokens, from the start on; the last may stand for a
    part of a block. Equal ids mean equal prompts up to and including that block. May be empty.
    """

    time: float
    prompt_tokens: int
    output_tokens: int
    keys: tuple[int, ...] = ()
    block_size: int = TRACE_BLOCK
    service_class: str = "default"


class SemipdRow(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A line of our own format; time in seconds of any clock, the same for the whole file."""

    time: Time
    prompt_tokens: Count
    output_tokens: Count
    block_size: Count = TRACE_BLOCK
    keys: list[_Key] = msgspec.field(default_factory=list)
    service_class: Annotated[str, msgspec.Meta(max_length=64)] = "default"


class TraceWriter:
    """Appends arrivals to a file in the semipd format, one whole line per write; reopening goes on.

    `secret` blinds block keys (see `blind`): keys of unsalted prompts would otherwise let anybody who
    knows a text check whether it was sent. By default it is random per writer."""

    def __init__(self, path: str | Path, secret: bytes | None = None) -> None:
        self._secret = os.urandom(16) if secret is None else secret
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"cannot write the trace {path}: {error.strerror}") from None

    def blind(self, keys: Iterable[bytes]) -> tuple[int, ...]:
        """Ids for an `Arrival` from an engine's block keys: equal for equal keys, telling nothing else."""
        return tuple(
            int.from_bytes(hashlib.blake2b(key, key=self._secret, digest_size=8).digest(), "big")
            for key in keys
        )

    def write(self, arrival: Arrival) -> None:
        """Append one row. Its time may be of any clock, the same for the whole file."""
        row = SemipdRow(
            arrival.time,
            arrival.prompt_tokens,
            arrival.output_tokens,
            arrival.block_size,
            [f"{key:x}" for key in arrival.keys],
            arrival.service_class,
        )
        line = msgspec.json.encode(row) + b"\n"
        if (written := os.write(self._file, line)) < len(line):  # the disk is full: half a row helps nobody
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
