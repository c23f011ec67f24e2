"""What a chat request wants of tools: which the model is told of, and how its calls are found."""

from __future__ import annotations

from typing import Any

from semipd.core.errors import Refused
from semipd.serve.calls import CallRule, format_of
from semipd.serve.chat import ChatTemplate
from semipd.serve.conversation import NamedChoice, tools_of
from semipd.serve.schema import ChatBody


class ToolUse:
    """By one model's chat template. parser: the name of a format of calls, "auto" for the template's own,
    or "none" to leave calls in the text."""

    def __init__(self, chat: ChatTemplate | None, parser: str = "auto") -> None:
        self._takes_tools = chat is not None and chat.tool_source is not None
        self._form = format_of(parser, chat.tool_source if chat is not None else None)
        self._parser = parser

    def of(self, body: ChatBody) -> tuple[list[dict[str, Any]], CallRule | None]:
        """Tools for the template, and what to look for in the answer. Raises Refused."""
        tools = tools_of(body.tools)
        choice = body.tool_choice or "auto"
        if not tools:
            if choice not in ("none", "auto"):
                raise Refused("tool_choice needs tools", "tool_choice")
            return [], None
        self.check()
        if choice == "none":
            return [], None
        if isinstance(choice, NamedChoice) or choice == "required":
            raise Refused("tool_choice: only none and auto are supported", "tool_choice")
        if self._form is None:
            return tools, None
        names = frozenset(tool["function"]["name"] for tool in tools)
        return tools, CallRule(self._form, names, body.parallel_tool_calls is False)

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
