"""From a body of /v1/responses to one of /v1/chat/completions, and from refusals of that back to this."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from semipd.core.errors import Refused
from semipd.serve.conversation import (
    CalledFunction,
    ChatMessage,
    FunctionName,
    FunctionSpec,
    NamedChoice,
    Tool,
    ToolCall,
)
from semipd.serve.responses_schema import (
    ITEMS,
    CallItem,
    CallOutputItem,
    FunctionChoice,
    FunctionTool,
    Item,
    MessageItem,
    ReasoningItem,
    ResponsesBody,
    text_of,
    typed,
)
from semipd.serve.schema import ChatBody, ResponseFormat, SamplingBody, SchemaFormat

LOGPROBS = "message.output_text.logprobs"
# Reasoning is told in the clear, which serves the end of the encrypted. The others are of hosted tools.
_INCLUDABLE = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
)
MAX_ITEMS = 4096
MAX_PARTS = 16_384  # of all items
MAX_PAIRS = 16
MAX_KEY, MAX_VALUE = 64, 512
MAX_HINT = 1024
MAX_REPEATED = 2**20  # bytes of what every answer and three events of a stream repeat
_STATELESS = "this server stores no responses"
_PLACE = re.compile(r"messages\[\d+\](?:\.tool_calls\[\d+\])?(?:\.function)?")
_FIELD = re.compile(r"(?<=\])\.(?:tool_call_id|id)\b")
_PARAMS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning",
    "response_format": "text",
    "top_logprobs": "top_logprobs",
}
_WORDS = {
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}


class Translation:
    """A body as one of the chat API. skip: leave out tools that are no functions. Raises Refused."""

    def __init__(self, body: ResponsesBody, skip: bool = False) -> None:
        _check_state(body)
        _check_rest(body)
        turns = _Turns(body)
        self._places = turns.places
        logprobs = LOGPROBS in (body.include or ())
        if body.top_logprobs and not logprobs:
            raise Refused(f"top_logprobs needs include: [{LOGPROBS!r}]", "top_logprobs")
        common = {name: getattr(body, name) for name in SamplingBody.__struct_fields__}
        self.chat = ChatBody(
            **common,
            messages=turns.messages,
            max_completion_tokens=body.max_output_tokens,
            tools=_tools(body, skip),
            tool_choice=_choice(body),
            parallel_tool_calls=body.parallel_tool_calls,
            response_format=_format(body),
            reasoning_effort=body.reasoning.effort if body.reasoning is not None else None,
            chat_template_kwargs=body.chat_template_kwargs,
            logprobs=logprobs,
            top_logprobs=body.top_logprobs,
        )

    def refusal(self, refused: Refused) -> Refused:
        """The same in the names of this API."""
        text = _PLACE.sub(
            lambda place: self._places.get(place[0].removesuffix(".function"), place[0]), str(refused)
        )
        text = _FIELD.sub(".call_id", text)
        for theirs, ours in _WORDS.items():
            text = text.replace(theirs, ours)
        param = refused.param or ""
        return Refused(text, _PARAMS.get(param, refused.param))


class _Turns:
    """The messages of an input. places: what the messages, and the calls in them, were made of.

    What an assistant thinks, says and calls with nothing between is one message, as in answers of the chat
    API."""

    def __init__(self, body: ResponsesBody) -> None:
        self.messages: list[ChatMessage] = []
        self.places: dict[str, str] = {}
        self._turn: ChatMessage | None = None  # the assistant's, which may go on
        if body.instructions is not None:
            self._add(ChatMessage(role="system", content=body.instructions), "instructions")
        if isinstance(body.input, str):
            self._add(ChatMessage(role="user", content=body.input), "input")
            return
        if not body.input:
            raise Refused("input is empty", "input")
        if len(body.input) > MAX_ITEMS:
            raise Refused(f"input has {len(body.input)} items; at most {MAX_ITEMS} are taken", "input")
        lists = [item.get(name) for item in body.input for name in ("content", "output")]
        if (count := sum(len(parts) for parts in lists if isinstance(parts, list))) > MAX_PARTS:
            raise Refused(f"the items of input have {count} parts; at most {MAX_PARTS} are taken", "input")
        for place, value in enumerate(body.input):
            where = f"input[{place}]"
            named = value if "type" in value or "role" not in value else {**value, "type": "message"}
            self._take(typed(named, ITEMS, where, "items"), where)

    def _take(self, item: Item, where: str) -> None:
        match item:
            case ReasoningItem():
                self._think(item, where)
            case CallItem():
                self._call(item, where)
            case CallOutputItem():
                text = text_of(item.output, f"{where}.output")
                message = ChatMessage(role="tool", tool_call_id=item.call_id, content=text, name=item.name)
                self._add(message, where)
            case MessageItem():
                text = text_of(item.content, f"{where}.content")
                if item.role == "assistant":
                    self._say(text, where)
                else:
                    self._add(ChatMessage(role=item.role, content=text), where)

    def _add(self, message: ChatMessage, where: str) -> None:
        self.places[f"messages[{len(self.messages)}]"] = where
        self.messages.append(message)
        self._turn = message if message.role == "assistant" else None

    def _begun(self, where: str, fits: bool) -> ChatMessage:
        """The assistant's message that goes on, where that fits, or a new one."""
        if self._turn is None or not fits:
            self._add(ChatMessage(role="assistant"), where)
        assert self._turn is not None
        return self._turn

    def _think(self, item: ReasoningItem, where: str) -> None:
        thought = text_of(item.content or [], f"{where}.content")
        if not thought:
            return
        turn = self._begun(
            where, self._turn is not None and self._turn.content is None and not self._turn.tool_calls
        )
        turn.reasoning_content = (
            thought if turn.reasoning_content is None else f"{turn.reasoning_content}\n{thought}"
        )

    def _say(self, text: str, where: str) -> None:
        turn = self._begun(
            where, self._turn is not None and (self._turn.content is None or bool(self._turn.tool_calls))
        )
        turn.content = text if turn.content is None else f"{turn.content}\n{text}"

    def _call(self, item: CallItem, where: str) -> None:
        turn = self._begun(where, True)
        turn.tool_calls = turn.tool_calls or []
        self.places[f"messages[{len(self.messages) - 1}].tool_calls[{len(turn.tool_calls)}]"] = where
        function = CalledFunction(name=item.name, arguments=item.arguments)
        turn.tool_calls.append(ToolCall(id=item.call_id, function=function))


def _check_state(body: ResponsesBody) -> None:
    """Nothing is kept from one request to the next."""
    if body.previous_response_id is not None:
        message = f"previous_response_id: {_STATELESS}; send the whole conversation as input"
        raise Refused(message, "previous_response_id")
    if body.store:
        raise Refused(f"store: {_STATELESS}; leave it out, or send false", "store")


def _check_rest(body: ResponsesBody) -> None:
    for name in ("tools", "tool_choice", "text", "include"):
        if len(msgspec.json.encode(getattr(body, name))) > MAX_REPEATED:
            raise Refused(f"{name} has more than {MAX_REPEATED} bytes", name)
    for place, name in enumerate(body.include or ()):
        if name not in _INCLUDABLE:
            raise Refused(f"include[{place}]: {name[:80]!r} is not known", "include")
    pairs = body.metadata or {}
    if len(pairs) > MAX_PAIRS or any(
        len(key) > MAX_KEY or len(value) > MAX_VALUE for key, value in pairs.items()
    ):
        message = f"metadata: at most {MAX_PAIRS} pairs, of {MAX_KEY} and {MAX_VALUE} characters"
        raise Refused(message, "metadata")
    for name in ("prompt_cache_key", "safety_identifier"):
        if len(getattr(body, name) or "") > MAX_HINT:
            raise Refused(f"{name} is longer than {MAX_HINT} characters", name)


def _tools(body: ResponsesBody, skip: bool) -> list[Tool] | None:
    tools = []
    for place, value in enumerate(body.tools or ()):
        if value.get("type") != "function" and isinstance(value.get("type"), str):
            if skip:
                continue
            message = f"tools[{place}]: tools of the type {value['type'][:40]!r} are not supported"
            raise Refused(f"{message}; a server with --skip-hosted-tools leaves them out", "tools")
        tool = typed(value, {"function": FunctionTool}, f"tools[{place}]", "tools of this server")
        spec = FunctionSpec(
            name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
        )
        tools.append(Tool(type="function", function=spec))
    return tools or None


def _choice(body: ResponsesBody) -> Any:
    if not isinstance(body.tool_choice, Mapping):
        return body.tool_choice
    choice = typed(body.tool_choice, {"function": FunctionChoice}, "tool_choice", "choices by name")
    return NamedChoice(type="function", function=FunctionName(name=choice.name))


def _format(body: ResponsesBody) -> ResponseFormat | None:
    given = body.text.format if body.text is not None else None
    if given is None:
        return None
    if given.type != "json_schema":
        if given.name is not None or given.schema is not None:
            raise Refused("text.format.schema needs the type json_schema", "text")
        return ResponseFormat(type=given.type)
    if given.name is None or given.schema is None:
        missing = "name" if given.name is None else "schema"
        raise Refused(f"text.format.{missing} is missing", "text")
    return ResponseFormat(type=given.type, json_schema=SchemaFormat(name=given.name, schema=given.schema))
