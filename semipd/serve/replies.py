"""The answers of the OpenAI-compatible API, as bytes: whole, or one server-sent event at a time."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from semipd.core.types import Score
from semipd.serve.alignment import Told
from semipd.serve.scores import ScoreForms
from semipd.serve.text import Delta

_encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Usage:
    """Counts of one HTTP request: each prompt once, and every token that was produced for it.

    cached_tokens: prompt tokens found in the prefix cache; None as long as that is not known."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None

    def plain(self) -> dict[str, Any]:
        cached = None if self.cached_tokens is None else {"cached_tokens": self.cached_tokens}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": cached,
        }


@dataclass(slots=True)
class Choice:
    """One continuation as it stands. texts: to be joined. prompt_scores: of `prompt`, where asked for."""

    texts: list[str] = field(default_factory=list)
    finish: str | None = None
    told: list[Told] = field(default_factory=list)
    prompt: Sequence[int] = ()
    prompt_scores: list[Score] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.finish = delta.finish
        self.told += delta.told
        self.prompt_scores += delta.prompt_scores

    @property
    def text(self) -> str:
        return "".join(self.texts)


class CompletionReply:
    """/v1/completions. usage: "none", "last" (in a chunk of its own), or "all" (in every chunk too).

    logprobs, prompt_logprobs: how those are told; None: they are not."""

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def __init__(
        self,
        model: str,
        usage: str = "none",
        logprobs: ScoreForms | None = None,
        prompt_logprobs: ScoreForms | None = None,
    ) -> None:
        self._usage = usage
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs
        self._head = {
            "id": self.prefix + secrets.token_hex(12),
            "object": self.chunk,
            "created": int(time.time()),
            "model": model,
        }
        # Everything up to a chunk's choices is the same in all chunks of a stream.
        self._start = b"data: " + _encode(self._head)[:-1] + b',"choices":['

    def complete(self, choices: list[Choice], usage: Usage) -> bytes:
        """The whole answer."""
        entries = [self._whole_choice(index, choice) for index, choice in enumerate(choices)]
        return _encode(self._head | {"object": self.whole, "choices": entries, "usage": usage.plain()})

    def first(self, count: int, usage: Usage) -> bytes:
        """Events before the first token."""
        return b""

    def event(self, delta: Delta, usage: Usage) -> bytes:
        """One chunk."""
        finish = b"null" if delta.finish is None else b'"%s"' % delta.finish.encode()
        return b"%s%s%s" % (self._start, self._chunk_choice(delta, finish), self._end(usage))

    def last(self, usage: Usage) -> bytes:
        """Events after the last token."""
        if self._usage == "none":
            return DONE
        return b'%s],"usage":%s}\n\n%s' % (self._start, _encode(usage.plain()), DONE)

    def _end(self, usage: Usage) -> bytes:
        if self._usage == "none":
            return b"]}\n\n"
        counts = _encode(usage.plain()) if self._usage == "all" else b"null"
        return b'],"usage":%s}\n\n' % counts

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        told = self._told(choice.told)
        entry = {"index": index, "text": choice.text, "logprobs": told, "finish_reason": choice.finish}
        return entry | self._prompt_told(choice)

    def _chunk_choice(self, delta: Delta, finish: bytes) -> bytes:
        text, told = _encode(delta.text), self._chunk_told(delta)
        return b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s}' % (
            delta.index,
            text,
            told,
            finish,
        )

    def _told(self, told: Sequence[Told]) -> dict[str, Any] | None:
        return None if self._logprobs is None else self._logprobs.completion(told)

    def _chunk_told(self, delta: Delta) -> bytes:
        return _encode(self._told(delta.told)) if delta.told else b"null"

    def _prompt_told(self, choice: Choice) -> dict[str, Any]:
        forms = self._prompt_logprobs
        return (
            {} if forms is None else {"prompt_logprobs": forms.prompt(choice.prompt, choice.prompt_scores)}
        )


class ChatReply(CompletionReply):
    """/v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first(self, count: int, usage: Usage) -> bytes:
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        end = self._end(usage)
        return b"".join(b'%s{"index":%d,%s%s' % (self._start, i, delta, end) for i in range(count))

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text}
        told = self._told(choice.told)
        entry = {"index": index, "message": message, "logprobs": told, "finish_reason": choice.finish}
        return entry | self._prompt_told(choice)

    def _chunk_choice(self, delta: Delta, finish: bytes) -> bytes:
        text, told = _encode(delta.text), self._chunk_told(delta)
        return b'{"index":%d,"delta":{"content":%s},"logprobs":%s,"finish_reason":%s}' % (
            delta.index,
            text,
            told,
            finish,
        )

    def _told(self, told: Sequence[Told]) -> dict[str, Any] | None:
        return None if self._logprobs is None else self._logprobs.chat(told)
