"""Calls of tools in a model's text, found as the text comes.

The beginning of a call is held back until its function is known; then its arguments are told as they come.
Text that turns out to be no call stays text. What is found does not depend on how the text was cut into
pieces, but for the parts in which arguments are told.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from semipd.serve import call_json, call_xml
from semipd.serve.call_parts import CallPart, Head, Reader, partial

ALPHANUMERIC = string.ascii_letters + string.digits
_MOST_HEAD = 1024  # characters; a call whose arguments begin later is told when it is whole
_ONE_AFTER_ANOTHER = re.compile(r"[\s;]*")
_BLANK = re.compile(r"\s*")

Schemas = Mapping[str, Mapping[str, Any]]  # of the arguments of functions, by name
Block = call_json.JsonBlock | call_xml.XmlBlock


@dataclass(frozen=True)
class CallFormat:
    """How a model writes calls. opening: what begins a block of them; "": a text that begins with a brace
    is one. closing: what ends a block; "": the end of the JSON value in it. marks: tokens that belong to
    the text, even if they are special ones.

    head: the beginning of a call, at the beginning of a text; again: not the first one of its block.
    reader: follows one whose head was found, by the schema of its arguments.
    read: the calls in a whole block, without its opening and closing; none if it holds anything else."""

    name: str
    opening: str
    closing: str
    marks: tuple[str, ...]
    head: Callable[[str, bool], Head | None]
    reader: Callable[[Head, Mapping[str, Any]], Reader]
    read: Callable[[str], list[call_json.Named]]
    new_id: Callable[[], str]
    block: Callable[[str, str], Block] = call_json.JsonBlock


def format_of(parser: str, template: str | None) -> CallFormat | None:
    """The format that is named, or ("auto") the one that a chat template writes; None if there is none."""
    if parser != "auto":
        return FORMATS.get(parser)
    source = template or ""
    if "[TOOL_CALLS]" in source:
        return FORMATS["mistral"]
    if "<tool_call>" in source:
        if "<arg_key>" in source:  # tags that nobody here reads
            return None
        return FORMATS["qwen3_coder" if "<function=" in source else "hermes"]
    return FORMATS["llama3"] if "ipython" in source and '"parameters"' in source else None


@dataclass
class _Gained:
    """What a piece of text came to."""

    said: list[str] = field(default_factory=list)
    parts: list[CallPart] = field(default_factory=list)


class CallFinder:
    """Takes one answer's text apart. schemas: of the tools, of which a call must be in a format without
    marks. single: the first call is the last."""

    def __init__(self, form: CallFormat, schemas: Schemas, single: bool = False) -> None:
        self._form = form
        self._schemas = schemas
        self._single = single
        self._buffer = ""  # not yet understood
        self._blank = ""  # blanks that belong to a call, if one comes next
        self._block: Block | None = None  # that the buffer begins with
        self._tried = False  # to find a head at its beginning
        self._head: Head | None = None  # of the last call in the block
        self._reader: Reader | None = None  # of the call that the buffer goes on with
        self._fresh = True  # nothing was said but calls and blanks
        self.count = 0

    @property
    def done(self) -> bool:
        """Whether no more text is wanted."""
        return self._single and self.count > 0 and self._reader is None

    def feed(self, text: str, last: bool = False) -> tuple[str, list[CallPart]]:
        """The text that is certain to be none of a call, and what came of calls."""
        self._buffer += text
        gained = _Gained()
        while not self.done and self._advance(gained, last):
            pass
        if last and not self.done:
            gained.said.append(self._blank if self.count == 0 or not self._fresh else "")
            self._blank = ""
        return "".join(gained.said), gained.parts

    def _advance(self, gained: _Gained, last: bool) -> bool:
        """One step further; whether there may be another."""
        if self._reader is not None:
            return self._follow(self._reader, gained, last)
        if self._block is not None:
            return self._inside(self._block, gained, last)
        if self._head is not None:
            return self._behind(self._head, last)
        return self._outside(gained, last)

    def _outside(self, gained: _Gained, last: bool) -> bool:
        """Say what comes before the next block, and enter that."""
        place = self._opening(last)
        if place is None:
            self._say(self._buffer, gained)
            self._buffer = ""
            return False
        if self._fresh and not self._form.opening:
            self._blank += self._buffer[:place]  # what stands between calls
        else:
            self._say(self._buffer[:place], gained)
        self._buffer = self._buffer[place:]
        if not self._buffer.startswith(self._form.opening or "{"):
            return False
        self._enter(self._form.opening)
        return True

    def _opening(self, last: bool) -> int | None:
        """Where a block begins or may begin; None: nowhere in the buffer."""
        if opening := self._form.opening:
            place = self._buffer.find(opening)
            return place if place >= 0 else None if last else partial(self._buffer, opening)
        if not self._fresh:
            return None
        between = (_ONE_AFTER_ANOTHER if self.count else _BLANK).match(self._buffer)
        assert between is not None
        if between.end() == len(self._buffer):
            return None if last else 0
        return between.end() if self._buffer[between.end()] == "{" else None

    def _enter(self, opening: str) -> None:
        self._block, self._tried = self._form.block(opening, self._form.closing), False

    def _inside(self, block: Block, gained: _Gained, last: bool) -> bool:
        """Find a call's head, or else the end of the block."""
        if not self._tried:
            head = self._form.head(self._buffer[:_MOST_HEAD], self._head is not None)
            if head is not None and (self._form.opening or head.name in self._schemas):
                self._block, self._head, self._buffer = None, head, self._buffer[head.end :]
                self._reader = self._form.reader(head, self._schemas.get(head.name, {}))
                self._begin(head.name, gained)
                return True
            self._tried = len(self._buffer) >= _MOST_HEAD
        end = block.end(self._buffer, last)
        if end is None:
            return False
        whole, self._buffer, self._block = self._buffer[:end], self._buffer[end:], None
        found = self._form.read(whole.removeprefix(self._form.opening).removesuffix(self._form.closing))
        if not self._form.opening and not all(name in self._schemas for name, _ in found):
            found = []
        if not found:
            self._head = None
            self._say(whole, gained)
        for name, arguments in found[:1] if self._single else found:
            self._begin(name, gained)
            gained.parts.append(CallPart(self.count - 1, arguments))
        return True

    def _begin(self, name: str, gained: _Gained) -> None:
        gained.parts.append(CallPart(self.count, id=self._form.new_id(), name=name))
        self.count += 1
        self._blank, self._fresh = "", True

    def _follow(self, reader: Reader, gained: _Gained, last: bool) -> bool:
        """Go on with a call."""
        used, arguments, over = reader.feed(self._buffer, last)
        self._buffer = self._buffer[used:]
        if arguments:
            gained.parts.append(CallPart(self.count - 1, arguments))
        if over:
            self._reader = None
        return over

    def _behind(self, head: Head, last: bool) -> bool:
        """Behind a call: what ends its block, or another one in it."""
        rest = self._buffer.lstrip()
        tags = [tag for tag in (head.again, head.closing) if tag]
        if not last and any(tag.startswith(rest) and tag != rest for tag in tags):
            return False
        if head.again and rest.startswith(head.again):
            if head.again == ",":  # which is none of the call
                rest = rest[1:].lstrip()
                if not rest and not last:
                    return False
            if rest.startswith(("{", "<")):
                self._buffer = rest
                self._enter("")
                return True
        elif head.closing and rest.startswith(head.closing):
            self._buffer = rest[len(head.closing) :]
        self._head = None
        return True

    def _say(self, text: str, gained: _Gained) -> None:
        """Let text out, but for blanks at its end; those next to a call belong to it."""
        text = self._blank + text
        bare = text.rstrip()
        self._blank = text[len(bare) :]
        if bare:
            gained.said.append(bare if not (self._fresh and self.count) else bare.lstrip())
            self._fresh = False


@dataclass(frozen=True)
class CallRule:
    """How calls of tools are written, of which tools, and whether only one is wanted."""

    form: CallFormat
    schemas: Schemas
    single: bool = False

    def finder(self) -> CallFinder:
        return CallFinder(self.form, self.schemas, self.single)


def _long_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    """Templates of this family take no other length."""
    return "".join(secrets.choice(ALPHANUMERIC) for _ in range(9))


def _object(head: Head, schema: Mapping[str, Any]) -> Reader:
    return call_json.JsonArguments(wrapped=True)


def _named_or_object(head: Head, schema: Mapping[str, Any]) -> Reader:
    return call_json.JsonArguments(wrapped=not head.bare)


def _tags(head: Head, schema: Mapping[str, Any]) -> Reader:
    return call_xml.XmlArguments(schema)


_TAGS = ("<tool_call>", "</tool_call>")
_MISTRAL_MARKS = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
FORMATS = {
    form.name: form
    for form in (
        CallFormat(
            "hermes", *_TAGS, _TAGS, call_json.head_of_hermes, _object, call_json.read_hermes, _long_id
        ),
        CallFormat(
            "llama3", "", "", (), call_json.head_of_llama3, _object, call_json.read_llama3, _long_id
        ),
        CallFormat(
            "mistral",
            "[TOOL_CALLS]",
            "",
            _MISTRAL_MARKS,
            call_json.head_of_mistral,
            _named_or_object,
            call_json.read_mistral,
            _short_id,
        ),
        CallFormat(
            "qwen3_coder",
            *_TAGS,
            _TAGS,
            call_xml.head_of_xml,
            _tags,
            call_xml.read_xml,
            _long_id,
            call_xml.XmlBlock,
        ),
    )
}
