"""The items of an answer of /v1/responses, whole, and as events while they come."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from semipd.serve.call_parts import Call, CallPart

_encode = msgspec.json.Encoder().encode
COMPLETED, INCOMPLETE, IN_PROGRESS = "completed", "incomplete", "in_progress"


def message_item(name: str, text: str, status: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
    """What the model said."""
    return {
        "id": name,
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [_text_part(text, logprobs)],
    }


def reasoning_item(name: str, text: str, status: str) -> dict[str, Any]:
    """What it thought: all of it, no summary."""
    return {
        "id": name,
        "type": "reasoning",
        "status": status,
        "summary": [],
        "content": [_thought_part(text)],
        "encrypted_content": None,
    }


def call_item(name: str, call: Call, status: str) -> dict[str, Any]:
    """A call that it made."""
    return {
        "id": name,
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def new_id(prefix: str) -> str:
    """A name for an item, or for an answer."""
    return f"{prefix}_{secrets.token_hex(24)}"


def _text_part(text: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _thought_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


class Events:
    """Numbers the events of one stream, and keeps them until they are taken."""

    def __init__(self) -> None:
        self._count = 0
        self._bytes: list[bytes] = []

    def add(self, kind: str, fields: dict[str, Any]) -> None:
        body = _encode({"type": kind, "sequence_number": self._count, **fields})
        self._bytes.append(b"event: %s\ndata: %s\n\n" % (kind.encode(), body))
        self._count += 1

    def take(self) -> bytes:
        """All that were added since."""
        taken, self._bytes = b"".join(self._bytes), []
        return taken


class _Item:
    """One that is coming. place: its index in the output."""

    prefix = ""

    def __init__(self, events: Events, place: int) -> None:
        self.name = new_id(self.prefix)
        self._events = events
        self._where = {"item_id": self.name, "output_index": place}
        self._place = place
        events.add("response.output_item.added", {"output_index": place, "item": self.begun()})

    def begun(self) -> dict[str, Any]:
        """As it is announced."""
        raise AssertionError("of the kinds of items")

    def plain(self, status: str) -> dict[str, Any]:
        """As it stands."""
        raise AssertionError("of the kinds of items")

    def close(self, status: str) -> dict[str, Any]:
        """Its last events; the item."""
        item = self.plain(status)
        self._events.add("response.output_item.done", {"output_index": self._place, "item": item})
        return item


class _Text(_Item):
    """A message, or reasoning."""

    def __init__(self, events: Events, place: int, thought: bool) -> None:
        self.thought = thought
        self.prefix = "rs" if thought else "msg"
        self._kind = "response.reasoning_text" if thought else "response.output_text"
        self._texts: list[str] = []
        self._logprobs: list[Any] = []
        super().__init__(events, place)
        self._where = {**self._where, "content_index": 0}
        events.add("response.content_part.added", {**self._where, "part": self._part()})

    def begun(self) -> dict[str, Any]:
        return {**self.plain(IN_PROGRESS), "content": []}

    def plain(self, status: str) -> dict[str, Any]:
        text = "".join(self._texts)
        if self.thought:
            return reasoning_item(self.name, text, status)
        return message_item(self.name, text, status, self._logprobs)

    def feed(self, text: str, logprobs: Sequence[Any]) -> None:
        self._texts.append(text)
        self._logprobs += logprobs
        self._add("delta", {"delta": text}, logprobs)

    def close(self, status: str) -> dict[str, Any]:
        self._add("done", {"text": "".join(self._texts)}, self._logprobs)
        self._events.add("response.content_part.done", {**self._where, "part": self._part()})
        return super().close(status)

    def _add(self, event: str, fields: dict[str, Any], logprobs: Sequence[Any]) -> None:
        more = {} if self.thought else {"logprobs": logprobs}
        self._events.add(f"{self._kind}.{event}", {**self._where, **fields, **more})

    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = self.plain(IN_PROGRESS)["content"][0]
        return part


class _Called(_Item):
    """A call."""

    prefix = "fc"

    def __init__(self, events: Events, place: int, call: Call) -> None:
        self.call = call
        super().__init__(events, place)

    def begun(self) -> dict[str, Any]:
        return self.plain(IN_PROGRESS)

    def plain(self, status: str) -> dict[str, Any]:
        return call_item(self.name, self.call, status)

    def feed(self, arguments: str) -> None:
        self.call.arguments += arguments
        self._events.add("response.function_call_arguments.delta", {**self._where, "delta": arguments})

    def close(self, status: str) -> dict[str, Any]:
        fields = {**self._where, "name": self.call.name, "arguments": self.call.arguments}
        self._events.add("response.function_call_arguments.done", fields)
        return super().close(status)


class ComingItems:
    """The items of an answer, one after another: reasoning, text and calls as they come."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._done: list[dict[str, Any]] = []
        self._open: _Text | _Called | None = None

    def think(self, text: str) -> None:
        self._text(thought=True).feed(text, ())

    def say(self, text: str, logprobs: Sequence[Any] = ()) -> None:
        self._text(thought=False).feed(text, logprobs)

    def call(self, part: CallPart) -> None:
        """A part of a call: of a new one, or of the one that is coming."""
        if part.id is not None and part.name is not None:
            self._close(COMPLETED)
            self._open = _Called(self._events, len(self._done), Call(part.index, part.id, part.name))
        if part.arguments:
            assert isinstance(self._open, _Called)
            self._open.feed(part.arguments)

    def is_coming(self, part: CallPart) -> bool:
        """Whether the part is more of the call that is coming."""
        return isinstance(self._open, _Called) and part.id is None and part.index == self._open.call.index

    def end(self, status: str) -> list[dict[str, Any]]:
        """Close the last item, which is what was cut off if anything was; all of them, at least one."""
        if self._open is None and not self._done:
            self._text(thought=False)
        self._close(status)
        return self._done

    def so_far(self) -> list[dict[str, Any]]:
        """All of them, the last as it stands."""
        return self._done if self._open is None else [*self._done, self._open.plain(INCOMPLETE)]

    def _text(self, thought: bool) -> _Text:
        """The item that is coming, where it is such a one, or a new one."""
        if isinstance(self._open, _Text) and self._open.thought == thought:
            return self._open
        self._close(COMPLETED)
        self._open = _Text(self._events, len(self._done), thought)
        return self._open

    def _close(self, status: str) -> None:
        if self._open is not None:
            self._done.append(self._open.close(status))
            self._open = None
