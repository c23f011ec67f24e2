"""The answers of the OpenAI-compatible API, as bytes: whole, or one server-sent event at a time."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from semipd.core.types import Score
from semipd.serve.alignment import Told
from semipd.serve.call_parts import Call, CallPart, joined
from semipd.serve.errors import body_of
from semipd.serve.messages import Submit
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
    """One continuation as it stands. texts: to be joined. prompt_scores: where asked for."""

    texts: list[str] = field(default_factory=list)
    finish: str | None = None
    tokens: list[int] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    prompt_scores: list[Score] = field(default_factory=list)
    calls: list[CallPart] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.finish = delta.finish
        self.tokens += delta.tokens
        self.told += delta.told
        self.prompt_scores += delta.prompt_scores
        self.calls += delta.calls
        self.thoughts.append(delta.reasoning)

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True)
class Extras:
    """What is told besides the text. logprobs, prompt_logprobs: how; None: they are not.
    reasoning: if it was told from the answer."""

    logprobs: ScoreForms | None = None
    prompt_logprobs: ScoreForms | None = None
    token_ids: bool = False
    reasoning: bool = True


class Reply(Protocol):
    """An answer as bytes, whole or as events."""

    def complete(self, choices: list[Choice], usage: Usage) -> bytes:
        """The whole answer."""

    def first(self, usage: Usage) -> bytes:
        """Events before the first token."""

    def event(self, delta: Delta, usage: Usage) -> bytes:
        """Those of a delta."""

    def last(self, usage: Usage) -> bytes:
        """Events after the last token."""

    def failed(self, error: Exception) -> bytes:
        """Events after those that were sent, where it went wrong then."""


class CompletionReply:
    """/v1/completions. submits: the requests whose tokens these are, by index of their choices.

    usage: "none", "last" (in a chunk of its own), or "all" (in every chunk too)."""

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"
    gain = b'"text":%s'  # what a chunk adds

    def __init__(
        self,
        model: str,
        submits: Sequence[Submit],
        usage: str = "none",
        extras: Extras = Extras(),
        request_id: str | None = None,
    ) -> None:
        """request_id: the client's own, instead of a random one."""
        self._submits = submits
        self._usage = usage
        self._extras = extras
        self._begun: set[int] = set()  # choices of which something was told
        self._head = {
            "id": self.prefix + (request_id or secrets.token_hex(12)),
            "object": self.chunk,
            "created": int(time.time()),
            "model": model,
        }
        # Everything up to a chunk's choices is the same in all chunks of a stream.
        self._start = b"data: " + _encode(self._head)[:-1] + b',"choices":['
        head = self._start.replace(b"%", b"%%")
        self._chunk = head + b'{"index":%d,' + self.gain + b',"logprobs":%s,"finish_reason":%s%s}%s'
        self._telling = extras.token_ids or extras.prompt_logprobs is not None

    def complete(self, choices: list[Choice], usage: Usage) -> bytes:
        """The whole answer."""
        entries = [self._whole_choice(index, choice) for index, choice in enumerate(choices)]
        head = self._head | {"object": self.whole, "choices": entries, "usage": usage.plain()}
        return _encode(head | self._prompt_of_all())

    def first(self, usage: Usage) -> bytes:
        """Events before the first token."""
        return b""

    def failed(self, error: Exception) -> bytes:
        """Events after those that were sent, where it went wrong then."""
        _, body = body_of(error)
        return b"data: " + body + b"\n\n" + DONE

    def event(self, delta: Delta, usage: Usage) -> bytes:
        """One chunk; more where calls or reasoning went on."""
        ahead = self._events_ahead(delta, usage) if delta.calls or delta.reasoning else b""
        if ahead and delta.finish is None and not delta.told and not self._telling:
            return ahead
        return ahead + self._chunk % (
            delta.index,
            _encode(delta.text) if not ahead else b'""',
            _encode(self._logprobs(delta.told)) if delta.told else b"null",
            b"null" if delta.finish is None else b'"%s"' % delta.finish.encode(),
            self._chunk_extras(delta) if self._telling else b"",
            self._end(usage),
        )

    def _events_ahead(self, delta: Delta, usage: Usage) -> bytes:
        """Those of a delta's reasoning, text and calls, where this API has more than text."""
        return b""

    def last(self, usage: Usage) -> bytes:
        """Events after the last token."""
        if self._usage == "none":
            return DONE
        return b'%s],"usage":%s}\n\n%s' % (self._start, _encode(usage.plain()), DONE)

    def _end(self, usage: Usage, more: bytes = b"") -> bytes:
        if self._usage == "none":
            return b"]%s}\n\n" % more
        counts = _encode(usage.plain()) if self._usage == "all" else b"null"
        return b']%s,"usage":%s}\n\n' % (more, counts)

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        entry = {
            "index": index,
            **self._said(choice),
            "logprobs": self._logprobs(choice.told),
            "finish_reason": choice.finish,
        }
        return entry | self._choice_extras(index, choice.tokens, choice.prompt_scores, first=True)

    def _said(self, choice: Choice) -> dict[str, Any]:
        """The text, where this API has it."""
        return {"text": choice.text}

    def _logprobs(self, told: Sequence[Told]) -> dict[str, Any] | None:
        forms = self._extras.logprobs
        return None if forms is None else forms.completion(told)

    def _chunk_extras(self, delta: Delta) -> bytes:
        first = delta.index not in self._begun
        self._begun.add(delta.index)
        extras = self._choice_extras(delta.index, delta.tokens, delta.prompt_scores, first)
        return b"," + _encode(extras)[1:-1] if extras else b""

    def _choice_extras(
        self, index: int, tokens: Sequence[int], prompt_scores: Sequence[Score], first: bool
    ) -> dict[str, Any]:
        """first: whether nothing was told of this choice before."""
        entry: dict[str, Any] = {}
        forms = self._extras.prompt_logprobs
        if first and forms is not None:
            entry["prompt_logprobs"] = forms.prompt(self._submits[index].prompt_ids, prompt_scores)
        if self._extras.token_ids:
            if first:
                entry |= self._prompt_of_choice(index)
            entry["token_ids"] = tokens
        return entry

    def _prompt_of_choice(self, index: int) -> dict[str, Any]:
        return {"prompt_token_ids": self._submits[index].prompt_ids.tolist()}

    def _prompt_of_all(self) -> dict[str, Any]:
        """The prompt, where this API has one for all choices."""
        return {}


class ChatReply(CompletionReply):
    """/v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    gain = b'"delta":{"content":%s}'

    def first(self, usage: Usage) -> bytes:
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        events = []
        for index in range(len(self._submits)):
            prompt = _encode(self._prompt_of_all())[1:-1] if index == 0 else b""
            end = self._end(usage, b"," + prompt if prompt else b"")
            events.append(b'%s{"index":%d,%s%s' % (self._start, index, delta, end))
        return b"".join(events)

    def _said(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        thought = "".join(choice.thoughts)
        if thought:
            message["content"] = choice.text or None
            message |= {"reasoning_content": thought} if self._extras.reasoning else {}
        if choice.calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [_call(call) for call in joined(choice.calls)]
        return {"message": message}

    def _events_ahead(self, delta: Delta, usage: Usage) -> bytes:
        """Each part of a call is a chunk of its own, and not the one with the finish: OpenAI's client reads
        a chunk's finish before its calls."""
        told = delta.reasoning if self._extras.reasoning else ""
        gains: list[dict[str, Any]] = [{"reasoning_content": told}] if told else []
        gains += [{"content": delta.text}] if delta.text else []
        gains += [{"tool_calls": [_part(part)]} for part in delta.calls]
        form = b'%s{"index":%d,"delta":%s,"logprobs":null,"finish_reason":null}%s'
        end = self._end(usage)
        return b"".join(form % (self._start, delta.index, _encode(gain), end) for gain in gains)

    def _logprobs(self, told: Sequence[Told]) -> dict[str, Any] | None:
        forms = self._extras.logprobs
        return None if forms is None else forms.chat(told)

    def _prompt_of_choice(self, index: int) -> dict[str, Any]:
        return {}

    def _prompt_of_all(self) -> dict[str, Any]:
        return super()._prompt_of_choice(0) if self._extras.token_ids else {}


def _part(part: CallPart) -> dict[str, Any]:
    if part.id is None or part.name is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    return {"index": part.index, **_call(Call(part.index, part.id, part.name, part.arguments))}


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
