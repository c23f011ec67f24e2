"""Grammars, in llguidance's dialect of Lark, of texts that call tools as they must."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from semipd.core.errors import Refused
from semipd.serve.calls import CallFormat, Schemas
from semipd.serve.xml_grammar import arguments_grammar

# As models and their templates write JSON, and blanks have an end.
_STYLE = {
    "whitespace_pattern": r"( |\n[ \t]{0,40})?",
    "whitespace_flexible": True,
    "coerce_one_of": True,
    "lenient": False,
}
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_ANY_PARAMETERS = {"type": "object"}
_ANY_TEXT = "REST: /(?s:.*)/\n"


class CallGrammar:
    """Of one model's way to write calls. marks: ids of those of its marks that are tokens of their own.

    Each tool's schema stays a root of its own, so that its references stay in it."""

    def __init__(self, form: CallFormat, marks: Mapping[str, int], by_name: bool = False) -> None:
        """by_name: calls of the format "mistral" are a name and its arguments, not a list."""
        self._form = form
        self._marks = marks
        self._by_name = by_name
        self._in_tags = form.name == "qwen3_coder"

    @property
    def takes_answers(self) -> bool:
        """Whether calls and JSON differ in their first character; else no answer can be given."""
        opening = self._form.opening
        return opening in self._marks or opening[:1] not in ("", "[", "{")

    def required(self, schemas: Schemas, single: bool, answer: str | None = None) -> str:
        """Nothing but calls, at least one, all of these functions. single: and no more than one. answer: or
        else JSON of this schema, given as text."""
        blocks = "block"
        if not single and self._form.closing:
            blocks = r'block ("\n" block)*'
        elif not single and self._by_name:
            blocks = "block+"
        opening = f"{self._mark(self._form.opening)} " if self._form.opening else ""
        calls = self._calls(schemas)
        start = f"start: {blocks}\n"
        if answer is not None:
            start = f"start: ({blocks}) | answer\nanswer: {_json_of(json.loads(answer))}"
        return f"{start}block: {opening}{self._block(single)}\n{calls}"

    def allowed(self, schemas: Schemas) -> str:
        """Any text, in which all calls are of these functions."""
        calls = f"block: {self._block(False)}\n{self._calls(schemas)}"
        opening = self._form.opening
        if not opening:  # the whole text is a call, or does not begin like one
            return f"start: block | REST\nREST: /(\\s*[^\\s{{](?s:.*))?/\n{calls}"
        if opening in self._marks:
            return f"start: (REST {self._mark(opening)} block)* REST\n{_ANY_TEXT}{calls}"
        tag = "".join(f"\\{letter}" if letter in "[]/" else letter for letter in opening)
        # What the complement alone matches is no text: broken characters, special tokens.
        said = f"said[lazy]: /(?s:.*){tag}/\nREST: /(?s:.*)/ & ~/(?s:.*){tag}(?s:.*)/\n"
        return f"start: (said block)* REST\n{said}{calls}"

    def _block(self, single: bool) -> str:
        """What follows the opening."""
        if self._form.closing:
            return rf'"\n" call "\n" {self._mark(self._form.closing)}'
        if self._form.opening and not self._by_name:
            return '" "? "[" call "]"' if single else '" "? "[" call (", " call)* "]"'
        return "call"

    def _call(self, name: str, arguments: str) -> str:
        if self._by_name:
            return f"{_literal(name)} {self._mark('[ARGS]')} {arguments}"
        key = "arguments" if self._form.opening else "parameters"
        if self._in_tags:
            if re.search(r"[<>]", name):
                raise Refused(f"tools: {name[:40]!r} cannot name a function in this model's calls", "tools")
            return f"{_literal(f'<function={name}>{chr(10)}')} {arguments} {_literal('</function>')}"
        head = f'{{"name": {_literal(name)}, "{key}": '
        return f'{_literal(head)} {arguments} "}}"'

    def _calls(self, schemas: Schemas) -> str:
        """Rules of `call`, which is one of any of the functions."""
        rules = [f"call: {' | '.join(f'call{place}' for place in range(len(schemas)))}\n"]
        for place, (name, schema) in enumerate(schemas.items()):
            rules.append(f"call{place}: {self._call(name, f'args{place}')}\n")
            if self._in_tags:
                rules.append(arguments_grammar(f"args{place}", schema, _json_of))
            else:
                rules.append(f"args{place}: {_json_of(schema)}")
        return "".join(rules)

    def _mark(self, text: str) -> str:
        return f"<[{self._marks[text]}]>" if text in self._marks else _literal(text)


def answer_grammar(schema: str) -> str:
    """Nothing but JSON of this schema, given as text."""
    return f"start: {_json_of(json.loads(schema))}"


def behind_reasoning(grammar: str, begun: bool, tags: tuple[str, str], marks: Mapping[str, int]) -> str:
    """What this grammar allows, and reasoning before it. begun: which has begun already. tags: what it is
    between. marks: ids of those that are tokens of their own."""
    first, rest = grammar.removeprefix("start: ").split("\n", 1)
    opening, closing = (f"<[{marks[tag]}]>" if tag in marks else _literal(tag) for tag in tags)
    thought = f"THOUGHT {closing}" if tags[1] in marks else "thought"
    start = f"{thought} BLANKS reply" if begun else f"({opening} {thought} BLANKS)? reply"
    pattern = f"/(?s:.*){tags[1].replace('/', chr(92) + '/')}/"
    said = "THOUGHT: /(?s:.*)/" if tags[1] in marks else f"thought[lazy]: {pattern}"
    return f"start: {start}\nBLANKS: /[ \\n]{{0,4}}/\n{said}\nreply: {first}\n{rest}"


def schemas_of(tools: Sequence[Mapping[str, Any]], followed: Container[str]) -> Schemas:
    """Of each of the tools, by name. followed: names of those whose own counts; others take any object."""
    functions = [tool["function"] for tool in tools]
    return {
        function["name"]: {"type": "object", **(function.get("parameters") or _NO_PARAMETERS)}
        if function["name"] in followed
        else _ANY_PARAMETERS
        for function in functions
    }


def _json_of(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _STYLE})}\n"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
