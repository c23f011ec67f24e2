"""Messages and tools of the chat API: strictly typed, bounded, and as chat templates take them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from semipd.core.errors import Refused

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_CALLS = 128  # of one message
MAX_DEPTH = 64  # of a tool's schema, and of a call's arguments
ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = re.compile(r"[^\s\x00-\x20]{1,128}")
_THOUGHTS = (("reasoning_content", "assistant"), ("reasoning", "assistant"))
_ID = re.compile(r"[!-~]{1,128}")


class _Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class TextPart(_Strict, kw_only=True):
    """A part of a message's content."""

    type: str
    text: str


class CalledFunction(_Strict, kw_only=True):
    """arguments: a JSON object, as text. parsed_arguments: the same again, by OpenAI's client; not read."""

    name: str
    arguments: str
    parsed_arguments: Any = None


class ToolCall(_Strict, kw_only=True):
    """A call that the model made. index: its place; in copies of streams."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(_Strict, kw_only=True):
    """One turn. tool_calls: of the role assistant, whose content may then be null. tool_call_id, name: of
    the role tool; the call that it answers. parsed: what OpenAI's client makes of the content; not read.
    reasoning_content (reasoning is the same): what the role assistant thought before its content.
    The other fields are in answers that clients send back; here they hold nothing."""

    role: str
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    parsed: Any = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    refusal: None = None


class FunctionSpec(_Strict, kw_only=True):
    """A function that the model may call. parameters: a JSON schema of its arguments, an object."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict, kw_only=True):
    """What the model may use."""

    type: Literal["function"]
    function: FunctionSpec


class FunctionName(_Strict, kw_only=True):
    """Names a function among the tools."""

    name: str


class NamedChoice(_Strict, kw_only=True):
    """The model must call this function."""

    type: Literal["function"]
    function: FunctionName


def messages_of(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as a chat template takes them: content as one text, arguments of calls as objects.

    Raises Refused."""
    if not messages:
        raise Refused("messages is empty", "messages")
    if len(messages) > MAX_MESSAGES:
        raise Refused(f"at most {MAX_MESSAGES} messages", "messages")
    return [_plain(message, f"messages[{place}]") for place, message in enumerate(messages)]


def without_developer(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for a template that does not know the role developer, and would leave it out or refuse it:
    it is the system that speaks, or goes on where it spoke just before."""
    known: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] != "developer":
            known.append(message)
        elif known and known[-1]["role"] == "system":
            known[-1] = {**known[-1], "content": f"{known[-1]['content']}\n\n{message['content']}"}
        else:
            known.append({**message, "role": "system"})
    return known


def tools_of(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """Tools as a chat template takes them. Raises Refused."""
    if len(tools or ()) > MAX_TOOLS:
        raise Refused(f"at most {MAX_TOOLS} tools", "tools")
    names = [tool.function.name for tool in tools or ()]
    for place, name in enumerate(names):
        if not _NAME.fullmatch(name):
            raise Refused(f"tools[{place}]: a function's name has 1 to 128 characters, no blanks", "tools")
    for place, tool in enumerate(tools or ()):
        if (tool.function.parameters or {}).get("type", "object") != "object":
            raise Refused(f"tools[{place}]: parameters must be of type object", "tools")
    if len(set(names)) < len(names):
        raise Refused("two tools have the same name", "tools")
    plain = [_plain_tool(tool.function) for tool in tools or ()]
    if not _is_flat(plain):
        raise Refused(f"tools are nested deeper than {MAX_DEPTH}", "tools")
    return plain


def strict_of(tools: Sequence[Tool] | None) -> frozenset[str]:
    """Names of the tools whose arguments have to follow their schemas."""
    return frozenset(tool.function.name for tool in tools or () if tool.function.strict)


def texts_of(value: Any) -> list[str]:
    """All strings in a JSON value, keys too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in texts_of(part)]
    return [text for part in value for text in texts_of(part)] if isinstance(value, list) else []


def _plain_tool(function: FunctionSpec) -> dict[str, Any]:
    fields = {"description": function.description, "parameters": function.parameters}
    given = {name: value for name, value in fields.items() if value is not None}
    return {"type": "function", "function": {"name": function.name, **given}}


def _plain(message: ChatMessage, where: str) -> dict[str, Any]:
    role = message.role
    if role not in ROLES:
        raise Refused(f"the role of a message must be one of {', '.join(ROLES)}", "messages")
    for name, owner in (
        ("tool_calls", "assistant"),
        ("tool_call_id", "tool"),
        ("name", "tool"),
        *_THOUGHTS,
    ):
        if getattr(message, name) and role != owner:
            raise Refused(f"{where}.{name} is for the role {owner}", "messages")
    thought = message.reasoning_content or message.reasoning
    if message.content is None and not message.tool_calls and not thought:
        raise Refused(f"{where}.content is missing", "messages")
    plain: dict[str, Any] = {"role": role, "content": _text(message.content)}
    if thought:
        plain["reasoning_content"] = thought
    if message.tool_calls:
        plain["tool_calls"] = _calls(message.tool_calls, f"{where}.tool_calls")
    if role == "tool":
        plain["tool_call_id"] = _identifier(message.tool_call_id or "", f"{where}.tool_call_id")
        if message.name is not None:
            plain["name"] = _name(message.name, f"{where}.name")
    return plain


def _text(content: str | list[TextPart] | None) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    for part in content:
        if part.type != "text":
            raise Refused(f"content of type {part.type[:40]!r} is not supported", "messages")
    return "\n".join(part.text for part in content)


def _calls(calls: Sequence[ToolCall], where: str) -> list[dict[str, Any]]:
    if len(calls) > MAX_CALLS:
        raise Refused(f"{where}: at most {MAX_CALLS} calls", "messages")
    return [
        {
            "id": _identifier(call.id, f"{where}[{place}].id"),
            "type": "function",
            "function": {
                "name": _name(call.function.name, f"{where}[{place}].function.name"),
                "arguments": _arguments(call.function.arguments, f"{where}[{place}].function.arguments"),
            },
        }
        for place, call in enumerate(calls)
    ]


def _arguments(text: str, where: str) -> dict[str, Any]:
    """What templates expect, which render it as JSON again."""
    try:
        value = msgspec.json.decode(text) if text.strip() else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not _is_flat(value):
        raise Refused(f"{where} must be a JSON object, as text", "messages")
    return value


def _identifier(text: str, where: str) -> str:
    if not _ID.fullmatch(text):
        raise Refused(f"{where} must have 1 to 128 characters, of ASCII without blanks", "messages")
    return text


def _name(text: str, where: str) -> str:
    if not _NAME.fullmatch(text):
        raise Refused(f"{where} must have 1 to 128 characters, no blanks", "messages")
    return text


def _is_flat(value: Any) -> bool:
    """Whether a JSON value is nested no deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for outer in level
            if isinstance(outer, (dict, list))
            for part in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return True
    return False
