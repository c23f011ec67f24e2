"""vLLM's names for what an answer must be: as a response format, or a grammar where that cannot say it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from semipd.core.errors import Refused
from semipd.serve.constraint import MAX_PATTERN, MAX_SCHEMA_BYTES, Lark
from semipd.serve.schema import GenerationBody, ResponseFormat, SchemaFormat

MAX_CHOICES = 1024
_FORMAT, _OUTPUTS = "response_format", "structured_outputs"
_KINDS = ("json", "json_object", "regex", "choice")
_ELSEWHERE = (  # of structured_outputs
    "grammar",
    "structural_tag",
    "whitespace_pattern",
    "disable_any_whitespace",
    "disable_additional_properties",
)


class Structure:
    """What a body says of its answer, which it may do once. Raises Refused.

    response_format: where that can say it. grammar: where it cannot. name: of the parameter that is behind
    the one or the other; None for response_format itself, and where nothing is said."""

    def __init__(self, body: GenerationBody) -> None:
        self.response_format = None if body.response_format is None else body.response_format.plain()
        self.grammar: Lark | None = None
        self.name: str | None = None
        given = _given(body)
        if not given:
            return
        self.name, kind, value = given[0]
        free = self.response_format is None or self.response_format["type"] == "text"
        if len(given) > 1 or not free:
            other = given[1][0] if len(given) > 1 else _FORMAT
            message = (
                f"{self.name} names one way only" if other == self.name else f"give {self.name} or {other}"
            )
            raise Refused(f"{message}, not both", self.name)
        match kind:
            case "json_object":
                self.response_format = ResponseFormat(type="json_object").plain()
            case "json":
                named = SchemaFormat(name="json", schema=_schema(value, self.name))
                self.response_format = ResponseFormat(type="json_schema", json_schema=named).plain()
            case _:
                rule = _choice(value, self.name) if kind == "choice" else _regex(value, self.name)
                self.grammar = Lark(f"start: {rule}\n", f"start: {rule}\n", self.name)

    @contextmanager
    def own_words(self) -> Iterator[None]:
        """In this block, refusals of what it came to name the parameter that is behind it."""
        try:
            yield
        except Refused as refused:
            if self.name is None or refused.param not in (_FORMAT, self.name):
                raise
            text = str(refused).replace(_FORMAT, self.name)
            if self.grammar is not None:
                text = text.replace("this schema is", "this is")
            raise Refused(text, self.name) from None


def _given(body: GenerationBody) -> list[tuple[str, str, Any]]:
    """(parameter, kind, value) of everything besides response_format that says something."""
    found = [
        (f"guided_{kind}", kind, getattr(body, f"guided_{kind}")) for kind in ("json", "regex", "choice")
    ]
    outputs = body.structured_outputs
    if outputs is not None:
        for name in _ELSEWHERE:
            if getattr(outputs, name) not in (None, False):
                raise Refused(f"{_OUTPUTS}.{name} is not supported", _OUTPUTS)
        of_outputs = [(_OUTPUTS, kind, getattr(outputs, kind)) for kind in _KINDS]
        if all(value is None or value is False for _, _, value in of_outputs):
            raise Refused(f"{_OUTPUTS} says nothing; give one of {', '.join(_KINDS)}", _OUTPUTS)
        found += of_outputs
    return [entry for entry in found if entry[2] is not None and entry[2] is not False]


def _schema(given: str | dict[str, Any], name: str) -> dict[str, Any]:
    """A JSON schema, which may come as text."""
    if not isinstance(given, str):
        return given
    _check_size(len(given), name)
    try:
        schema = msgspec.json.decode(given)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{name}: the schema is not valid JSON: {error}", name) from None
    if not isinstance(schema, dict):
        raise Refused(f"{name}: the schema must be an object", name)
    return schema


def _choice(texts: list[str], name: str) -> str:
    """One of these texts, in llguidance's dialect of Lark."""
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise Refused(f"{name}: 1 to {MAX_CHOICES} choices, not {len(texts)}", name)
    if not all(texts):
        raise Refused(f"{name}: a choice is empty", name)
    _check_size(sum(map(len, texts)), name)
    return " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts))


def _regex(pattern: str, name: str) -> str:
    """A text that the pattern matches as a whole, likewise. Nothing in the pattern ends its literal."""
    if not pattern:
        raise Refused(f"{name}: the regular expression is empty", name)
    _check_size(len(pattern), name, MAX_PATTERN)
    parts, escaped = [], False
    for character in pattern:
        if character == "/" and not escaped:
            parts.append("\\/")
        else:
            parts.append(character if character != "\n" else "n" if escaped else "\\n")
        escaped = character == "\\" and not escaped
    if escaped:
        raise Refused(f"{name}: the regular expression ends in the middle of an escape", name)
    return f"/{''.join(parts)}/"


def _check_size(characters: int, name: str, most: int = MAX_SCHEMA_BYTES) -> None:
    if characters > most:
        raise Refused(f"{name} has {characters} characters; at most {most} are taken", name)
