"""What crosses between the front end and the engine: plain records, at most one per step and direction.

Between threads they are handed over as they are; between processes, as msgpack behind a length."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from typing import Any

import msgspec

from semipd.core.metrics import MetricsSnapshot
from semipd.core.types import FinishReason, Request, Sampling, Score

MAX_MESSAGE = 2**28
_LENGTH = struct.Struct("<I")
KEY_BYTES = 32


class Submit(msgspec.Struct, frozen=True, tag="submit", array_like=True):
    """A request. prompt: int32 ids. keys: its block keys, joined. age: seconds since it arrived."""

    id: str
    prompt: bytes
    max_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    min_tokens: int
    keys: bytes
    salt: bytes | None
    age: float
    service_class: str = "default"

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) // 4

    @property
    def prompt_ids(self) -> array[int]:
        ids = array("i")
        ids.frombytes(self.prompt)
        return ids

    def request(self, now: float) -> Request:
        """The planner's own copy of the request, `now` being its clock."""
        return Request(
            id=self.id,
            prompt=self.prompt_ids,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            stop_tokens=frozenset(self.stop_tokens),
            min_tokens=self.min_tokens,
            arrival=now - self.age,
            block_keys=[self.keys[at : at + KEY_BYTES] for at in range(0, len(self.keys), KEY_BYTES)],
            service_class=self.service_class,
            salt=self.salt,
        )


class Abort(msgspec.Struct, frozen=True, tag="abort", array_like=True):
    """Nobody wants these requests any more. stopped: because their text is complete."""

    ids: tuple[str, ...]
    stopped: bool = False


class Ask(msgspec.Struct, frozen=True, tag="ask", array_like=True):
    """Please send `Stats`."""


class Close(msgspec.Struct, frozen=True, tag="close", array_like=True):
    """End everything."""


class EngineInfo(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    """The engine is built. limit: most tokens of one sequence, by the model and by the KV pool.

    block_size: tokens per block key."""

    device: str
    units: int
    unit_kind: str
    limit: int
    block_size: int


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """A request left the engine. refused: it never entered, because of its field `param`."""

    id: str
    reason: FinishReason
    error: str | None = None
    refused: bool = False
    param: str | None = None
    cached_tokens: int = 0


class Step(msgspec.Struct, frozen=True, tag="step", array_like=True):
    """What one turn of the planner's loop gave: `ids[i]` got `tokens[i]`, in order; then some ended.

    scored, scores: `scored[i]` has `scores[i]`, of a token of its prompt or of one among `tokens`."""

    ids: list[str]
    tokens: list[int]
    ended: list[Ended]
    scored: list[str] = []
    scores: list[Score] = []


class LaneState(msgspec.Struct, frozen=True, array_like=True):
    """A lane's heartbeat. waited: seconds since its last launch or result while steps are in flight, else
    0. longest: seconds of its longest step so far (0 before the first)."""

    in_flight: int
    waited: float
    longest: float


class Stats(msgspec.Struct, frozen=True, tag="stats", array_like=True):
    """The engine's state at one moment. kv_usage: share of the pool held, 0 to 1. prefix_*: tokens."""

    running: int
    waiting: int
    kv_usage: float
    prefix_queries: int
    prefix_hits: int
    lanes: dict[str, LaneState]
    metrics: MetricsSnapshot


class Lost(msgspec.Struct, frozen=True, tag="lost", array_like=True):
    """The engine is gone. refused: it was never there, because a setting or the model cannot work."""

    why: str
    refused: bool = False


class Start(msgspec.Struct, frozen=True, tag="start", array_like=True):
    """First message to an engine process. settings: every field of a Config, by section."""

    settings: dict[str, dict[str, Any]]


Down = Start | Submit | Abort | Ask | Close
Up = EngineInfo | Step | Stats | Lost

_encode = msgspec.msgpack.Encoder().encode
decode_down = msgspec.msgpack.Decoder(Down).decode
decode_up = msgspec.msgpack.Decoder(Up).decode


def frame(message: Down | Up) -> bytes:
    """The message as it travels."""
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


class Unframer:
    """Cuts a stream of bytes into message bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Bodies that `data` completes. Raises ValueError for a length that no message has."""
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, at)
            if length > MAX_MESSAGE:
                raise ValueError(f"a message of {length} bytes")
            end = at + _LENGTH.size + length
            if len(buffer) < end:
                break
            yield bytes(buffer[at + _LENGTH.size : end])
            at = end
        del buffer[:at]
