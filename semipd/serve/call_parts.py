"""Calls of tools, whole and as they come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class CallPart:
    """What an answer gained of a call. index: the call's place among those of the answer. id, name: of the
    call, with its first part, which has no arguments. arguments: more of their text."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Call:
    """A call. arguments: a JSON object, as text; less than that if the answer was cut off in it, and no
    JSON if the model wrote none."""

    index: int
    id: str
    name: str
    arguments: str = ""


def joined(parts: Iterable[CallPart]) -> list[Call]:
    """The calls that these are all parts of, in their order."""
    calls: list[Call] = []
    for part in parts:
        if part.id is not None and part.name is not None:
            calls.append(Call(part.index, part.id, part.name))
        calls[part.index].arguments += part.arguments
    return calls


class Gain(NamedTuple):
    """used: characters of a text that are done with. arguments: the JSON text that they are. over: whether
    the call ends there; it does not where it was cut off."""

    used: int
    arguments: str
    over: bool


class Reader(Protocol):
    """Follows a call behind its head: the arguments, and what else belongs to the call."""

    def feed(self, text: str, last: bool) -> Gain:
        """text: what was not used yet, and what came since. last: no more comes."""


class Head(NamedTuple):
    """The beginning of a call: all before its arguments. end: where those begin. again: what brings
    another call into the same block. closing: what else ends the block; "": nothing has to. bare: the
    arguments are not part of an object."""

    name: str
    end: int
    again: str = ""
    closing: str = ""
    bare: bool = False


def partial(text: str, tag: str) -> int | None:
    """Where the longest end of the text starts that begins the tag."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return len(text) - length
    return None
