"""Grammars, in llguidance's dialect of Lark, of arguments in tags, as `call_xml` reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from semipd.core.errors import Refused
from semipd.serve.call_xml import CLOSE, Schema, resolved, types_of
from semipd.serve.constraint import MAX_SCHEMA_BYTES

_CLOSED = r"\n<\/parameter>"
_ONCE = r"~/(?s:.*)<\/parameter>(?s:.+)/"  # the tag is not in the value
_ANY = "(?s:.*)"
_ANCHORED = re.compile(r"\^((?:[^\\^$|()]|\\.|\(\?:[^()^$]*\)|\([^()^$]*\))*)\$", re.DOTALL)
# Of an object: what goes beyond properties of their own. Of a text: what only JSON's grammar knows.
_OF_OBJECTS = (
    *("$ref", "anyOf", "oneOf", "allOf", "not", "if", "patternProperties", "propertyNames"),
    *("minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies"),
)
_OF_TEXTS = ("format", "not", "allOf", "if")


def arguments_grammar(rule: str, schema: Schema, json_of: Callable[[Mapping[str, Any]], str]) -> str:
    """Rules of `rule`, which is all arguments of one function. json_of: the rule of a schema's JSON.

    Raises Refused for what cannot be followed in this form."""
    for word in _OF_OBJECTS:
        if word in schema:
            raise Refused(f"tools: {word} cannot be followed in this model's form of calls", "tools")
    properties, given = schema.get("properties") or {}, schema.get("required") or []
    if not isinstance(properties, Mapping) or not isinstance(given, list):
        raise Refused("tools: properties must be an object, and required a list", "tools")
    required = [key for key in given if isinstance(key, str)]
    if not properties and not required and schema.get("additionalProperties") is not False:
        name, close = rule.upper(), _terminal([_ANY])
        return (
            f"{rule}: {rule}any*\n"
            f"{rule}any: {name}KEY {rule}text {_literal(chr(10))}\n"
            f"{name}KEY: /<parameter=[^<>\\n]{{1,64}}>\\n/\n"
            f"{rule}text[lazy]: {name}TEXT\n{name}TEXT: {close}\n"
        )
    wanted = dict(properties) | {key: {} for key in required if key not in properties}
    marks = [f"{rule}p{place}" + "?" * (key not in required) for place, key in enumerate(wanted)]
    rules = [f"{rule}: {' '.join(marks) or _literal('')}\n"]
    for place, (key, part) in enumerate(wanted.items()):
        if re.search(r"[<>\n]", key):
            raise Refused(f"tools: {key[:40]!r} cannot name a parameter in this model's calls", "tools")
        name = f"{rule}p{place}"
        values = _bounded(_values(f"{name}v", part, schema, json_of))
        ways = " | ".join(way for way, _ in values)
        rules.append(f"{name}: {_literal(f'<parameter={key}>{chr(10)}')} ({ways}) {_literal(chr(10))}\n")
        rules += [text for _, text in values]
    return "".join(rules)


def _bounded(values: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
    """All of them; there may be any number, where choices refer to choices."""
    some, size = [], 0
    for value in values:
        some.append(value)
        size += sum(map(len, value))
        if size > MAX_SCHEMA_BYTES:
            raise Refused(f"tools: a grammar of more than {MAX_SCHEMA_BYTES} bytes", "tools")
    return some


def _values(
    rule: str, part: Any, root: Schema, json_of: Callable[[Mapping[str, Any]], str], depth: int = 8
) -> Iterator[tuple[str, str]]:
    """(what to write for it, its rules) for each way to write a parameter's value and the tag behind it."""
    part = resolved(part, root)
    choices = part.get("anyOf") or part.get("oneOf")
    if isinstance(choices, list) and choices:
        if not depth:
            raise Refused("tools: choices of choices in a parameter's schema, too deep to follow", "tools")
        for place, choice in enumerate(choices):
            yield from _values(f"{rule}{place}x", choice, root, json_of, depth - 1)
        return
    if "string" not in types_of(part, root):
        defined = {word: root[word] for word in ("$defs", "definitions") if word in root}
        yield f"{rule} {_literal(chr(10) + CLOSE)}", f"{rule}: {json_of({**part, **defined})}"
        return
    for word in _OF_TEXTS:
        if word in part:
            raise Refused(f"tools: {word} of a text cannot be followed in this model's calls", "tools")
    values = [part["const"]] if "const" in part else part.get("enum")
    if isinstance(values, list):
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
        if any(CLOSE in text for text in texts):
            raise Refused(f"tools: {CLOSE} cannot be part of an argument in this model's calls", "tools")
        yield from ((_literal(f"{text}\n{CLOSE}"), "") for text in texts)
        return
    yield rule, f"{rule}[lazy]: {rule.upper()}\n{rule.upper()}: {_terminal(_bodies(part))}\n"


def _bodies(part: Schema) -> list[str]:
    """Regular expressions, all of which a text must match."""
    bodies = [_ANY]
    least, most = part.get("minLength"), part.get("maxLength")
    if least is not None or most is not None:
        if not all(
            value is None or (type(value) is int and 0 <= value <= 2**16) for value in (least, most)
        ):
            raise Refused("tools: minLength and maxLength must be counts of at most 65536", "tools")
        bodies.append(f"(?s:.{{{least or 0},{'' if most is None else most}}})")
    if isinstance(pattern := part.get("pattern"), str):
        bodies.append(_searched(pattern))
    return bodies


def _searched(pattern: str) -> str:
    """A regular expression of all texts in which this one is found."""
    if whole := _ANCHORED.fullmatch(pattern):
        body = whole[1]
    elif re.search(r"[\^$]", pattern):
        raise Refused(
            f"tools: the pattern {pattern[:60]!r} cannot be followed here: ^...$ or neither", "tools"
        )
    else:
        body = f"{_ANY}(?:{pattern}){_ANY}"
    return re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", body).replace("\n", r"\n")


def _terminal(bodies: list[str]) -> str:
    """The text of a value and the tag behind it."""
    return " & ".join([*(f"/{body}{_CLOSED}/" for body in bodies), _ONCE])


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
