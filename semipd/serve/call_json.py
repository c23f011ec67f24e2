"""Calls that are written as JSON: their heads, their arguments as they come, and whole blocks of them."""

from __future__ import annotations

import json
import re
from typing import Any

from semipd.serve.call_parts import Gain, Head

Named = tuple[str, str]  # a function's name, and its arguments as JSON

_ENDS_JSON = re.compile(r'\\.|["{}\[\]]', re.DOTALL)
_ENDS_TAGGED = re.compile(r'\\.|"|</?tool_call>', re.DOTALL)
_LETTERS = re.compile(r'\\.|["{}\[\]<\x00-\x1f]', re.DOTALL)
_OBJECT = (
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*|"id"\s*:\s*"[^"\\]*"\s*,\s*)*'
    r'"name"\s*:\s*(?P<quoted>"(?:[^"\\]|\\.)+")\s*,\s*"%s"\s*:\s*(?=\{)'
)
_NAME = r"\s*(?P<name>[^\s{\[]{1,128})\s*(?:\[CALL_ID\][^{\[]{0,128})?(?:\[ARGS\])?\s*"
_MISTRAL_NAME = re.compile(_NAME)
_HERMES = re.compile(r"<tool_call>\s*" + _OBJECT % "arguments", re.DOTALL)
_LLAMA3 = re.compile(_OBJECT % "(?:parameters|arguments)", re.DOTALL)
_ELEMENT = re.compile(_OBJECT % "arguments", re.DOTALL)
_MISTRAL = re.compile(
    rf"\[TOOL_CALLS\](?:\s*(?P<list>\[?)\s*{_OBJECT % 'arguments'}|{_NAME}(?=\{{))", re.DOTALL
)


class JsonArguments:
    """The text of an object, let through as it comes; a control character in a string is escaped.

    wrapped: the call is an object around it, and belongs to the call to its end."""

    def __init__(self, wrapped: bool) -> None:
        self._wrapped = wrapped
        self._depth = 0
        self._quoted = False
        self._told = True  # in the arguments, not in what the object around them holds besides
        self._between = False  # behind the arguments

    def feed(self, text: str, last: bool) -> Gain:
        at, arguments, over = 0, "", False
        if not self._between:
            at, arguments, over = self._read(text, last)
            if over and self._told and self._wrapped and self._depth <= 0:
                self._between, over = True, False
        if self._between:
            rest = text[at:].lstrip()
            at = len(text) - len(rest)
            if rest[:1] != ",":
                return Gain(at + rest.startswith("}"), arguments, bool(rest))
            self._told = self._between = False
            self._depth = 1
            used, _, over = self._read(rest, last)
            at += used
        return Gain(at, arguments, over)

    def _read(self, text: str, last: bool) -> Gain:
        """Up to the end of the object. Where "<" is in no string, a tag begins: the object is broken."""
        gained: list[str] = []
        at = 0
        while match := _LETTERS.search(text, at):
            gained.append(text[at : match.start()])
            at, letter = match.end(), match[0]
            if letter == "<" and not self._quoted:
                return Gain(match.start(), self._said(gained), True)
            gained.append(self._escaped(letter))
            if letter == '"':
                self._quoted = not self._quoted
            elif letter in "{}[]" and not self._quoted:
                self._depth += 1 if letter in "{[" else -1
                if self._depth <= 0:
                    return Gain(at, self._said(gained), True)
        end = len(text) - (text.endswith("\\") and at < len(text) and not last)  # an escape may have begun
        gained.append(text[at:end])
        return Gain(end, self._said(gained), False)

    def _said(self, gained: list[str]) -> str:
        return "".join(gained) if self._told else ""

    def _escaped(self, letter: str) -> str:
        if letter[-1] >= " " or not self._quoted:
            return letter
        return json.dumps(letter[-1])[1:-1]


class JsonBlock:
    """Looks for the end of a block of JSON. Reads every character once. closing: what ends it, outside of
    strings; "": the end of the JSON value in it."""

    def __init__(self, opening: str, closing: str) -> None:
        self._closing = closing
        self._opened = self._at = len(opening)
        self._begun = bool(closing)  # whether the JSON is there, for those that end with it
        self._quoted = False
        self._depth = 0

    def end(self, buffer: str, last: bool) -> int | None:
        """Where the block ends in the buffer, which begins with its opening; None: not yet."""
        if not self._begun:
            self._begin(buffer)
        pattern = _ENDS_TAGGED if self._closing else _ENDS_JSON
        while self._begun and (match := pattern.search(buffer, self._at)):
            self._at = match.end()
            token = match[0]
            if token == '"':
                self._quoted = not self._quoted
            elif self._quoted or token[0] == "\\":
                continue
            elif len(token) > 1:
                return match.end() if token == self._closing else match.start()
            else:
                self._depth += 1 if token in "{[" else -1
                if self._depth <= 0:
                    return match.end()
        if self._begun:
            unsure = max(len(self._closing) - 1, 1)  # a tag, or an escape, may have begun
            self._at = max(self._at, len(buffer) - unsure)
        return len(buffer) if last else None

    def _begin(self, buffer: str) -> None:
        """Find where the JSON starts: with a bracket if that comes first, else with the first brace."""
        rest = buffer[self._opened :].lstrip()
        at = len(buffer) - len(rest) if rest[:1] == "[" else buffer.find("{", max(self._at, self._opened))
        self._begun = at >= 0
        self._at = at if self._begun else len(buffer)


def head_of_hermes(text: str, again: bool) -> Head | None:
    match = _HERMES.match(text)
    return _head(match, closing="</tool_call>") if match else None


def head_of_llama3(text: str, again: bool) -> Head | None:
    match = _LLAMA3.match(text)
    return _head(match) if match else None


def head_of_mistral(text: str, again: bool) -> Head | None:
    """again: the text is behind a comma of a list."""
    if again:
        match = _ELEMENT.match(text)
        return _head(match, ",", "]") if match else None
    match = _MISTRAL.match(text)
    if match is None:
        return None
    if match["name"] is not None:
        return Head(match["name"], match.end(), bare=True)
    return _head(match, ",", "]") if match["list"] else _head(match)


def _head(match: re.Match[str], again: str = "", closing: str = "") -> Head | None:
    name = value_of(match["quoted"])
    return Head(name, match.end(), again, closing) if name and text_of(name) is not None else None


def read_hermes(block: str) -> list[Named]:
    return _named([value_of(block)], "arguments", needed=False)


def read_llama3(block: str) -> list[Named]:
    value = value_of(block)
    key = "arguments" if isinstance(value, dict) and "parameters" not in value else "parameters"
    return _named([value], key, needed=True)


def read_mistral(block: str) -> list[Named]:
    """A list of calls, or a name and its arguments."""
    if block.lstrip()[:1] in ("[", "{"):
        value = value_of(block)
        return _named(value if isinstance(value, list) else [value], "arguments", needed=False)
    head = _MISTRAL_NAME.match(block)
    if head is None:
        return []
    call = {"name": head["name"], "arguments": value_of(block[head.end() :])}
    return _named([call], "arguments", needed=True)


def _named(values: list[Any], key: str, needed: bool) -> list[Named]:
    """The calls if all of them are; else none. needed: whether there must be arguments."""
    found = []
    for value in values:
        if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
            return []
        arguments = value.get(key, None if needed else {})
        if isinstance(arguments, str):  # encoded twice
            arguments = value_of(arguments)
        text = text_of(arguments) if isinstance(arguments, dict) else None
        if text is None or text_of(name) is None:
            return []
        found.append((name, text))
    return found


def value_of(text: str) -> Any:
    """The value; None for what is no JSON. Line breaks in strings are let through, as models write them."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def text_of(value: Any) -> str | None:
    """As JSON; None where that is none, or no Unicode: half a surrogate pair, escaped."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError):
        return None
    return text
