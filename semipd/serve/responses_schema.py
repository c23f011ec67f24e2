"""The body of POST /v1/responses, strictly typed: of the whole, and of each item by its type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec

from semipd.core.errors import Refused
from semipd.serve.schema import SamplingBody, refusal_of

_ABSENT: tuple[Any, ...] = (None,)

# Known elsewhere, not supported here: the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "best_of": (1,),
    "context_management": ([],),
    "conversation": _ABSENT,
    "max_tokens": _ABSENT,
    "messages": _ABSENT,
    "moderation": _ABSENT,
    "n": (1,),
    "prompt": _ABSENT,
    "prompt_cache_options": _ABSENT,
    "prompt_cache_retention": ("in_memory",),
    "response_format": _ABSENT,
    "truncation": ("disabled",),
}


class _Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class Part(_Strict, kw_only=True):
    """Of an item's content. The other fields are in answers that clients send back; they are not read."""

    type: Literal["input_text", "output_text", "text", "reasoning_text"]
    text: str
    annotations: Any = None
    logprobs: Any = None
    parsed: Any = None


class RefusalPart(_Strict, kw_only=True):
    """What an assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


_WRITTEN = ("input_text", "output_text", "text", "reasoning_text")
_PARTS: Mapping[str, type[Part | RefusalPart]] = {**dict.fromkeys(_WRITTEN, Part), "refusal": RefusalPart}
_Parts = list[
    Annotated[dict[str, Any], msgspec.Meta(extra_json_schema={"$ref": "#/components/schemas/Part"})]
]


class MessageItem(_Strict, kw_only=True):
    """A turn. id, status, phase: in copies of answers; not read."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | _Parts
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(_Strict, kw_only=True):
    """A call that the model made. arguments: a JSON object, as text. The optional fields are in copies of
    answers; they are not read, and the last hold nothing."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None
    parsed_arguments: Any = None
    namespace: None = None
    caller: None = None
    async_: None = None
    later: None = msgspec.field(name="async", default=None)


class CallOutputItem(_Strict, kw_only=True):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | _Parts
    id: str | None = None
    status: str | None = None
    name: str | None = None


class ReasoningItem(_Strict, kw_only=True):
    """What the model thought before what follows. summary, encrypted_content: not read."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Any = None
    content: _Parts | None = None
    encrypted_content: str | None = None
    status: str | None = None


class FunctionTool(_Strict, kw_only=True):
    """A function that the model may call. parameters: a JSON schema of its arguments, an object."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(_Strict, kw_only=True):
    """The model must call this function."""

    type: Literal["function"]
    name: str


Item = MessageItem | CallItem | CallOutputItem | ReasoningItem
ITEMS: Mapping[str, type[Item]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
}


class TextFormat(_Strict, kw_only=True):
    """type: text, json_object, or json_schema with name and schema. strict: that is followed anyway."""

    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(_Strict, kw_only=True):
    """What the text of the answer must be."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(_Strict, kw_only=True):
    """effort: a variable of the chat template, where it has that. What is thought is told whole."""

    effort: str | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class StreamFormat(_Strict, kw_only=True):
    """include_obfuscation: padding of events, of which there is none."""

    include_obfuscation: Literal[False] | None = None


def _one_of(kinds: list[type[Any]]) -> msgspec.Meta:
    references = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in kinds]
    return msgspec.Meta(extra_json_schema={"anyOf": references})


class ResponsesBody(SamplingBody, kw_only=True):
    """POST /v1/responses. input: text, or the items of a conversation. instructions: come before it, with
    the role system. Nothing is stored: store must not be true, and the whole conversation comes with each
    request. include: message.output_text.logprobs is what matters here. metadata: comes back.
    prompt_cache_key, safety_identifier, client_metadata and max_tool_calls change nothing."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = _NEUTRAL

    input: str | list[Annotated[dict[str, Any], _one_of(list(ITEMS.values()))]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    tools: list[Annotated[dict[str, Any], _one_of([FunctionTool])]] | None = None
    tool_choice: (
        Literal["none", "auto", "required"] | Annotated[dict[str, Any], _one_of([FunctionChoice])] | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    client_metadata: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    stream_options: StreamFormat | None = None


RESPONSES_KINDS = (ResponsesBody, *ITEMS.values(), Part, FunctionTool, FunctionChoice)  # to be described
Kind = TypeVar("Kind", bound=msgspec.Struct)


def typed(value: Mapping[str, Any], kinds: Mapping[str, type[Kind]], where: str, what: str) -> Kind:
    """The object in the form that its type names. what: such objects in an error. Raises Refused."""
    name = value.get("type")
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        known = ", ".join(kinds)
        raise Refused(f"{where}: {what} are of the types {known}, not {_shown(name)}", param_of(where))
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise refusal_of(str(error), where) from None


def text_of(content: str | list[dict[str, Any]], where: str) -> str:
    """The text of an item. Raises Refused."""
    if isinstance(content, str):
        return content
    parts = [typed(part, _PARTS, f"{where}[{place}]", "parts") for place, part in enumerate(content)]
    return "\n".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in parts)


def param_of(where: str) -> str:
    """The parameter of the body that a place is in."""
    return where.partition("[")[0].partition(".")[0]


def _shown(name: Any) -> str:
    return (
        repr(name[:40]) if isinstance(name, str) else "without one" if name is None else "of another kind"
    )
