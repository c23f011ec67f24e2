"""Calls as Qwen3-Coder writes them: tags around the name and each argument, which is read by its schema.

<function=NAME>
<parameter=KEY>
VALUE
</parameter>
</function>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from semipd.serve.call_json import Named, read_hermes, text_of, value_of
from semipd.serve.call_parts import Gain, Head, partial

Schema = Mapping[str, Any]

TEXT = frozenset(("string",))
CLOSE = "</parameter>"
_CLOSES = "\n" + CLOSE
_END = "</function>"
_FUNCTION = re.compile(r"(?:<tool_call>)?\s*<function=([^<>\s]{1,128})>")
_PARAMETER = re.compile(r"<parameter=([^<>\n]{1,256})>")
_PARTIAL = re.compile(r"<parameter=[^<>\n]{0,256}")
_OPEN = "<parameter="
_TAG = re.compile(r"</?tool_call>")
_REFERENCES = 16  # that one leads to another
_TYPES = {
    str: ("string",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    list: ("array",),
    dict: ("object",),
    type(None): ("null",),
}
_WORDS = {"true": True, "false": False, "null": None, "none": None}  # however they are written


class XmlArguments:
    """The arguments as a JSON object. What can only be a string is told as it comes, others when whole."""

    def __init__(self, schema: Schema) -> None:
        """schema: of the arguments."""
        self._schema = schema
        self._some = False  # the object is open
        self._types: frozenset[str] | None = None  # of the parameter that is being read
        self._fresh = False  # nothing of its value was read
        self._searched = 0  # characters of a value that is held back, without its end

    def feed(self, text: str, last: bool) -> Gain:
        at, gained, over, before = 0, "", False, -1
        while not over and at > before:
            before = at
            step = self._value(text[at:]) if self._types is not None else self._between(text[at:], last)
            at += step.used
            gained += step.arguments
            over = step.over
        return Gain(at, gained, over)

    def _between(self, text: str, last: bool) -> Gain:
        """A tag: of a parameter, or of the function's end. Without one the call ends."""
        rest = text.lstrip()
        used = len(text) - len(rest)
        if match := _PARAMETER.match(rest):
            key = match[1]
            head = ", " if self._some else "{"
            properties = self._schema.get("properties")
            part = properties.get(key) if isinstance(properties, Mapping) else None
            self._types = types_of(part, self._schema)
            self._some = self._fresh = True
            self._searched = 0
            quote = '"' if self._types == TEXT else ""
            return Gain(used + match.end(), f"{head}{_quoted(key)}: {quote}", False)
        ended = rest.startswith(_END)
        if not ended and (_END.startswith(rest) or _OPEN.startswith(rest) or _PARTIAL.fullmatch(rest)):
            return Gain(len(text) if last else used, "", False)
        return Gain(used + len(_END) * ended, "}" if self._some else "{}", True)

    def _value(self, text: str) -> Gain:
        start = 0
        if self._fresh:
            if not text:
                return Gain(0, "", False)
            start = int(text[0] == "\n")  # both line breaks are the format's
            self._fresh = False
        end = text.find(CLOSE, max(start, self._searched))
        if self._types != TEXT:
            if end < 0:
                self._searched = max(len(text) - start - len(CLOSE), 0)
                return Gain(start, "", False)
            value = json_of(text[start:end].removesuffix("\n"), self._types or TEXT)
            self._types = None
            return Gain(end + len(CLOSE), value, False)
        if end >= 0:
            self._types = None
            return Gain(end + len(CLOSE), _quoted(text[start:end].removesuffix("\n"))[1:], False)
        held = [place for tag in (CLOSE, _CLOSES) if (place := partial(text[start:], tag)) is not None]
        end = start + min(held) if held else len(text)
        return Gain(end, _quoted(text[start:end])[1:-1], False)


def head_of_xml(text: str, again: bool) -> Head | None:
    match = _FUNCTION.match(text)
    return Head(match[1], match.end(), "<function=", "</tool_call>") if match else None


def read_xml(block: str) -> list[Named]:
    """Of a block that is not written so: as JSON, if it is that."""
    return read_hermes(block)


class XmlBlock:
    """Looks for the end of a block that is no call. Reads every character once."""

    def __init__(self, opening: str, closing: str) -> None:
        self._closing = closing
        self._at = len(opening)

    def end(self, buffer: str, last: bool) -> int | None:
        """Where the block ends in the buffer, which begins with its opening; None: not yet."""
        if match := _TAG.search(buffer, self._at):
            return match.end() if match[0] == self._closing else match.start()
        self._at = max(self._at, len(buffer) - len(self._closing))
        return len(buffer) if last else None


def types_of(schema: Any, root: Schema) -> frozenset[str]:
    """The JSON types of the values that a parameter's schema allows; where it says nothing, text. root: of
    all arguments, where references lead, also to and fro: each part is looked at once."""
    found: set[str] = set()
    seen: set[int] = set()
    rest = [schema]
    while rest:
        part = resolved(rest.pop(), root)
        if id(part) not in seen:
            seen.add(id(part))
            types, parts = _types(part)
            found |= types
            rest += parts
    return frozenset(found) or TEXT


def resolved(schema: Any, root: Schema) -> Schema:
    """A parameter's schema, or what it refers to; one that says nothing if that is nowhere."""
    for _ in range(_REFERENCES):
        if not isinstance(schema, Mapping):
            break
        if not isinstance(reference := schema.get("$ref"), str):
            return schema
        schema = _referred(reference, root)
    return {}


def _types(schema: Schema) -> tuple[set[str], list[Any]]:
    """Those that it names, and the parts that may name others."""
    if isinstance(named := schema.get("type"), (str, list)):
        names = {named} if isinstance(named, str) else {name for name in named if isinstance(name, str)}
        return names | ({"integer"} if "number" in names else set()), []
    values = schema.get("enum") if "const" not in schema else [schema["const"]]
    if isinstance(values, list):
        return {name for value in values for name in _TYPES.get(type(value), ())}, []
    several = (schema.get(word) for word in ("anyOf", "oneOf", "allOf"))
    return set(), [part for parts in several if isinstance(parts, list) for part in parts]


def _referred(reference: str, root: Schema) -> Any:
    found: Any = root
    for name in reference.removeprefix("#/").split("/") if reference.startswith("#/") else [""]:
        found = (
            found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        )
    return found


def json_of(text: str, types: frozenset[str]) -> str:
    """The JSON of a value of one of these types that is written like this; of a string, if it is none."""
    if types != TEXT:
        bare = text.strip()
        value = _WORDS[bare.lower()] if bare.lower() in _WORDS else value_of(bare)
        known = bare.lower() in _WORDS or value is not None
        if known and not types.isdisjoint(_TYPES[type(value)]) and not isinstance(value, str):
            found = text_of(value)
            if found is not None:
                return found
    return _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
