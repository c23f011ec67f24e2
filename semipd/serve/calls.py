"""Calls of tools in a model's text: found as the text comes, and only where they are whole.

What a call is made of is held back until it is complete. Text that turns out to be none stays text. What is
found does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ALPHANUMERIC = string.ascii_letters + string.digits
_ENDS_JSON = re.compile(r'\\.|["{}\[\]]', re.DOTALL)
_ENDS_HERMES = re.compile(r'\\.|"|</?tool_call>', re.DOTALL)
_MISTRAL_NAME = re.compile(r"\s*([^\s{\[]{1,128})\s*(?:\[CALL_ID\][^{\[]{0,128})?(?:\[ARGS\])?\s*")
_ONE_AFTER_ANOTHER = re.compile(r"[\s;]*")
_BLANK = re.compile(r"\s*")

Named = tuple[str, str]  # a function's name, and its arguments as JSON


@dataclass(frozen=True, slots=True)
class Call:
    """index: its place among the calls of one answer. arguments: a JSON object, as text."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class CallFormat:
    """How a model writes calls. opening: what begins a block of them; "": a text that begins with a brace
    is one. marks: tokens that belong to the text, even if they are special ones.

    read: the calls in a block, without its opening and closing; none if it holds anything else."""

    name: str
    opening: str
    closing: str  # what ends a block, outside of strings; "": the end of the JSON value in it
    marks: tuple[str, ...]
    read: Callable[[str], list[Named]]
    new_id: Callable[[], str]


def format_of(parser: str, template: str | None) -> CallFormat | None:
    """The format that is named, or ("auto") the one that a chat template writes; None if there is none."""
    if parser != "auto":
        return FORMATS.get(parser)
    source = template or ""
    if "[TOOL_CALLS]" in source:
        return FORMATS["mistral"]
    if "<tool_call>" in source:  # some put XML there
        return None if "<function=" in source or "<arg_key>" in source else FORMATS["hermes"]
    return FORMATS["llama3"] if "ipython" in source and '"parameters"' in source else None


class CallFinder:
    """Takes one answer's text apart. known: names of the tools, which a format without marks must name.

    single: the first call is the last."""

    def __init__(self, form: CallFormat, known: frozenset[str], single: bool = False) -> None:
        self._form = form
        self._known = known
        self._single = single
        self._buffer = ""  # not yet understood
        self._blank = ""  # blanks that belong to a call, if one comes next
        self._block: _Block | None = None
        self._fresh = True  # nothing was said but calls and blanks
        self.count = 0

    @property
    def done(self) -> bool:
        """Whether no more text is wanted."""
        return self._single and self.count > 0

    def feed(self, text: str, last: bool = False) -> tuple[str, list[Call]]:
        """The text that is certain to be none of a call, and the calls that became complete."""
        self._buffer += text
        said: list[str] = []
        calls: list[Call] = []
        while not self.done:
            before = len(self._buffer)
            if self._block is None:
                self._outside(said, last)
            if self._block is not None:
                self._inside(said, calls, last)
            if self._block is not None or len(self._buffer) == before:
                break
        if last and not self.done:
            said.append(self._blank if self.count == 0 or not self._fresh else "")
            self._blank = ""
        return "".join(said), calls

    def _outside(self, said: list[str], last: bool) -> None:
        """Say what comes before the next block, and enter that."""
        place = self._opening(last)
        if place is None:
            self._say(self._buffer, said)
            self._buffer = ""
            return
        if self._fresh and not self._form.opening:
            self._blank += self._buffer[:place]  # what stands between calls
        else:
            self._say(self._buffer[:place], said)
        self._buffer = self._buffer[place:]
        if self._buffer.startswith(self._form.opening or "{"):
            self._block = _Block(self._form)

    def _opening(self, last: bool) -> int | None:
        """Where a block begins or may begin; None: nowhere in the buffer."""
        if opening := self._form.opening:
            place = self._buffer.find(opening)
            return place if place >= 0 else None if last else _partial(self._buffer, opening)
        if not self._fresh:
            return None
        between = (_ONE_AFTER_ANOTHER if self.count else _BLANK).match(self._buffer)
        assert between is not None
        if between.end() == len(self._buffer):
            return None if last else 0
        return between.end() if self._buffer[between.end()] == "{" else None

    def _inside(self, said: list[str], calls: list[Call], last: bool) -> None:
        assert self._block is not None
        end = self._block.end(self._buffer, last)
        if end is None:
            return
        block, self._buffer, self._block = self._buffer[:end], self._buffer[end:], None
        found = self._form.read(block.removeprefix(self._form.opening).removesuffix(self._form.closing))
        if not self._form.opening and not self._known.issuperset(name for name, _ in found):
            found = []
        if not found:
            self._say(block, said)
            return
        self._blank, self._fresh = "", True
        for name, arguments in found[:1] if self._single else found:
            calls.append(Call(self.count, self._form.new_id(), name, arguments))
            self.count += 1

    def _say(self, text: str, said: list[str]) -> None:
        """Let text out, but for blanks at its end; those next to a call belong to it."""
        text = self._blank + text
        bare = text.rstrip()
        self._blank = text[len(bare) :]
        if bare:
            said.append(bare if not (self._fresh and self.count) else bare.lstrip())
            self._fresh = False


@dataclass(frozen=True)
class CallRule:
    """How calls of tools are written, of which tools, and whether only one is wanted."""

    form: CallFormat
    known: frozenset[str]
    single: bool = False

    def finder(self) -> CallFinder:
        return CallFinder(self.form, self.known, self.single)


class _Block:
    """Looks for the end of one block. Reads every character once."""

    def __init__(self, form: CallFormat) -> None:
        self._form = form
        self._at = len(form.opening)
        self._begun = bool(form.closing)  # whether the JSON is there, for those that end with it
        self._quoted = False
        self._depth = 0

    def end(self, buffer: str, last: bool) -> int | None:
        """Where the block ends in the buffer, which begins with its opening; None: not yet."""
        if not self._begun:
            self._begin(buffer)
        pattern = _ENDS_HERMES if self._form.closing else _ENDS_JSON
        while self._begun and (match := pattern.search(buffer, self._at)):
            self._at = match.end()
            token = match[0]
            if token == '"':
                self._quoted = not self._quoted
            elif self._quoted or token[0] == "\\":
                continue
            elif len(token) > 1:
                return match.end() if token == self._form.closing else match.start()
            else:
                self._depth += 1 if token in "{[" else -1
                if self._depth <= 0:
                    return match.end()
        if self._begun:
            unsure = max(len(self._form.closing) - 1, 1)  # a tag, or an escape, may have begun
            self._at = max(self._at, len(buffer) - unsure)
        return len(buffer) if last else None

    def _begin(self, buffer: str) -> None:
        """Find where the JSON starts: with a bracket if that comes first, else with the first brace."""
        opened = len(self._form.opening)
        rest = buffer[opened:].lstrip()
        at = len(buffer) - len(rest) if rest[:1] == "[" else buffer.find("{", max(self._at, opened))
        self._begun = at >= 0
        self._at = at if self._begun else len(buffer)


def _partial(text: str, tag: str) -> int | None:
    """Where the longest end of the text starts that begins the tag."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return len(text) - length
    return None


def _read_hermes(block: str) -> list[Named]:
    return _named([_json(block)], "arguments", needed=False)


def _read_llama3(block: str) -> list[Named]:
    value = _json(block)
    key = "arguments" if isinstance(value, dict) and "parameters" not in value else "parameters"
    return _named([value], key, needed=True)


def _read_mistral(block: str) -> list[Named]:
    """A list of calls, or a name and its arguments."""
    if block.lstrip()[:1] in ("[", "{"):
        value = _json(block)
        return _named(value if isinstance(value, list) else [value], "arguments", needed=False)
    head = _MISTRAL_NAME.match(block)
    if head is None:
        return []
    return _named([{"name": head[1], "arguments": _json(block[head.end() :])}], "arguments", needed=True)


def _named(values: list[Any], key: str, needed: bool) -> list[Named]:
    """The calls if all of them are; else none. needed: whether there must be arguments."""
    found = []
    for value in values:
        if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
            return []
        arguments = value.get(key, None if needed else {})
        if isinstance(arguments, str):  # encoded twice
            arguments = _json(arguments)
        text = _text(arguments) if isinstance(arguments, dict) else None
        if text is None or _text(name) is None:
            return []
        found.append((name, text))
    return found


def _json(text: str) -> Any:
    """The value; None for what is no JSON. Line breaks in strings are let through, as models write them."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _text(value: Any) -> str | None:
    """As JSON; None where that is no Unicode: half a surrogate pair, escaped."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError):
        return None
    return text


def _long_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    """Templates of this family take no other length."""
    return "".join(secrets.choice(ALPHANUMERIC) for _ in range(9))


FORMATS = {
    form.name: form
    for form in (
        CallFormat(
            "hermes", "<tool_call>", "</tool_call>", ("<tool_call>", "</tool_call>"), _read_hermes, _long_id
        ),
        CallFormat("llama3", "", "", (), _read_llama3, _long_id),
        CallFormat(
            "mistral",
            "[TOOL_CALLS]",
            "",
            ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
            _read_mistral,
            _short_id,
        ),
    )
}
