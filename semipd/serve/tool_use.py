"""What a chat request wants of tools: which the model is told of, how its calls are found, and which it
must make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from semipd.core.errors import Refused
from semipd.serve.call_grammar import CallGrammar, schemas_of
from semipd.serve.calls import CallFormat, CallRule, format_of
from semipd.serve.chat import ChatTemplate
from semipd.serve.constraint import Lark, check_schema, schema_of
from semipd.serve.conversation import NamedChoice, strict_of, tools_of
from semipd.serve.schema import ChatBody
from semipd.serve.structured import Structure
from semipd.serve.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tools:
    """told: for the template. calls: what to look for in the answer. grammar: what that has to follow,
    where calls or their arguments are not up to the model, or no response format says it; it allows what
    the response format does, too.
    free: it allows any text without calls."""

    told: Sequence[dict[str, Any]] = ()
    calls: CallRule | None = None
    grammar: Lark | None = None
    free: bool = False


class ToolUse:
    """By one model's chat template. parser: the name of a format of calls, "auto" for the template's own,
    or "none" to leave calls in the text."""

    def __init__(self, chat: ChatTemplate | None, tokenizer: Tokenizer, parser: str = "auto") -> None:
        source = chat.tool_source if chat is not None else None
        self._takes_tools = source is not None
        self._form = format_of(parser, source)
        self._parser = parser
        if self._form is not None:
            by_name = "[ARGS]" in (source or "")
            marks = {text: tokenizer.tags[text] for text in self._form.marks if text in tokenizer.tags}
            self._grammars = CallGrammar(self._form, marks, by_name), CallGrammar(self._form, {}, by_name)

    def of(self, body: ChatBody, structure: Structure) -> Tools:
        """structure: of the body. Raises Refused."""
        told = tools_of(body.tools)
        choice = body.tool_choice or "auto"
        if not told:
            if choice not in ("none", "auto"):
                raise Refused("tool_choice needs tools", "tool_choice")
            return Tools(grammar=structure.grammar)
        self.check()
        if choice == "none":
            return Tools(grammar=structure.grammar)
        if choice == "auto" and structure.grammar is not None:
            raise Refused(f"{structure.name} does not go with tools; give tool_choice", structure.name)
        strict = strict_of(body.tools)
        if self._form is None:
            if choice != "auto" or strict:
                param = "tools" if strict else "tool_choice"
                raise Refused("this server does not look for calls (--tool-call-parser none)", param)
            return Tools(told)
        with structure.own_words():
            answer = schema_of(structure.response_format)
            return self._with(self._form, told, choice, answer, strict, body.parallel_tool_calls is False)

    def _with(
        self,
        form: CallFormat,
        told: list[dict[str, Any]],
        choice: str | NamedChoice,
        answer: str | None,
        strict: frozenset[str],
        single: bool,
    ) -> Tools:
        """answer: the JSON schema of an answer without calls, as text; None: it is free."""
        whole = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in told}
        wanted = told
        if isinstance(choice, NamedChoice):
            single = True
            wanted = [tool for tool in told if tool["function"]["name"] == choice.function.name]
            if not wanted:
                raise Refused("tool_choice names none of the tools", "tool_choice")
        rule = CallRule(form, whole, single)
        schemas = schemas_of(wanted, followed=strict if choice == "auto" else frozenset(whole))
        for schema in schemas.values():
            check_schema(schema, "tools")
        if choice == "auto" and answer is None:
            if not strict:
                return Tools(told, rule)
            grammar = Lark(*(grammar.allowed(schemas) for grammar in self._grammars))
            return Tools(told, rule, grammar, free=True)
        answer = answer if choice == "auto" else None
        if answer is not None and not self._grammars[0].takes_answers:
            message = "this model's calls look like JSON; with a response_format give tool_choice"
            raise Refused(message, "response_format")
        texts = (grammar.required(schemas, single, answer) for grammar in self._grammars)
        return Tools(told, rule, Lark(*texts))

    def check(self) -> None:
        """Refuse tools where the model knows none, or nobody knows how it writes calls."""
        if not self._takes_tools:
            raise Refused("this model's chat template takes no tools", "tools")
        if self._form is None and self._parser == "auto":
            raise Refused(
                "the chat template does not show how this model writes calls of tools; the server's "
                "--tool-call-parser says it",
                "tools",
            )
