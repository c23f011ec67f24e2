"""What goes over the wire: request bodies made from arrivals, and the chunks of an answer's stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from semipd.bench.measure import Record
from semipd.trace import Arrival

COMPLETIONS, CHAT = "completions", "chat"
PATHS = {COMPLETIONS: "/v1/completions", CHAT: "/v1/chat/completions"}
LOWEST_ID = 10  # below it, vocabularies like to keep their special tokens

# Common enough to be one token each in most vocabularies.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work number night point home water "
    "room mother area money story fact month lot right study book eye job word business issue side kind "
    "head house service friend father power hour game line end law car city name team"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Prompts:
    """Random prompts of a given length, reproducible by (seed, number of the request).

    Prompts whose arrivals share leading keys share those blocks' tokens, so a prefix cache can hit.
    vocabulary: ids are drawn below it. As text, a token is a common word (roughly one token each)."""

    kind: str  # "ids" or "text"
    vocabulary: int
    seed: int

    def make(self, number: int, arrival: Arrival) -> list[int] | str:
        ids: list[int] = self._ids(number, arrival).tolist()
        if self.kind == "ids":
            return ids
        return " ".join(_WORDS[token % len(_WORDS)] for token in ids)

    def _ids(self, number: int, arrival: Arrival) -> np.ndarray:
        left = arrival.prompt_tokens
        parts = []
        for key in arrival.keys:
            parts.append(self._draw((self.seed, 1, key), arrival.block_size)[:left])
            left -= len(parts[-1])
        parts.append(self._draw((self.seed, 0, number), left))
        return np.concatenate(parts)

    def _draw(self, seed: tuple[int, ...], count: int) -> np.ndarray:
        low = min(LOWEST_ID, self.vocabulary - 1)
        return np.random.default_rng(seed).integers(low, self.vocabulary, count)


def body(endpoint: str, model: str, prompt: list[int] | str, max_tokens: int, ignore_eos: bool) -> bytes:
    """The JSON of a greedy streaming request."""
    fields: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if endpoint == CHAT:
        fields["messages"] = [{"role": "user", "content": prompt}]
    else:
        fields["prompt"] = prompt
    if ignore_eos:
        fields["ignore_eos"] = True
    return msgspec.json.encode(fields)


# The stream


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None

    @property
    def empty(self) -> bool:
        return not (self.content or self.reasoning_content or self.reasoning or self.tool_calls)


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Chunk)


class Stream:
    """Reads server-sent events of one answer into its record; `feed` is called for every received piece.

    A chunk counts as output when it carries text, or when it carries none but neither opens nor closes
    the answer (a token may have no text of its own: half a character, a special token). An empty closing
    chunk counts only if the usage then states exactly one token more than there were chunks: the last token
    came with it.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.ended = False  # a finish reason or [DONE] was seen
        self._tail = b""
        self._closing: float | None = None  # when an empty closing chunk came

    def feed(self, data: bytes, now: float) -> None:
        """Take in a piece of the body received at `now`."""
        if self._tail:
            data = self._tail + data
        *lines, self._tail = data.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def finish(self) -> None:
        """The body has ended: settle the closing chunk and what is missing."""
        record = self.record
        if self._closing is not None and record.stated_output == len(record.chunks) + 1:
            record.chunks.append(self._closing)
        if record.error is None and not self.ended:
            record.error = "stream ended early"
        if record.error is None and not record.chunks:
            record.error = "no output"

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self.ended = True
            return
        try:
            chunk = _DECODER.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.record.error = "bad stream: a chunk is not a completion"
            return
        if chunk.error is not None:
            kind, self.record.detail = error_of(chunk.error)
            self.record.error = f"error in the stream: {kind}".rstrip(": ")
        for choice in chunk.choices:
            self._choice(choice, now)
        if chunk.usage is not None and chunk.usage.completion_tokens is not None:
            self.record.stated_output = chunk.usage.completion_tokens
            stated = chunk.usage.prompt_tokens
            self.record.stated_prompt = -1 if stated is None else stated

    def _choice(self, choice: _Choice, now: float) -> None:
        delta = choice.delta
        empty = not choice.text if delta is None else delta.empty
        if choice.finish_reason is not None:
            self.ended = True
            if empty:
                self._closing = now
                return
        elif empty and delta is not None and delta.role is not None:
            return
        self.record.chunks.append(now)


def error_of(error: object) -> tuple[str, str]:
    """(kind, message) of an OpenAI error, given as an answer's body or as the decoded object; the kind is
    short, so that like errors are counted together. Both are empty when there is nothing to be read."""
    if isinstance(error, bytes):
        try:
            error = msgspec.json.decode(error)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return "", ""
    if isinstance(error, dict) and "error" in error:
        error = error["error"]
    if not isinstance(error, dict):
        return "", _printable(error)
    kind = error.get("type") or error.get("code") or ""
    return _printable(kind)[:40], _printable(error.get("message") or error.get("detail") or "")


def _printable(value: object) -> str:
    """At most 200 characters, none of which can steer a terminal."""
    text = value if isinstance(value, str) else str(value)
    return "".join(character if character.isprintable() else " " for character in text[:200])
