"""The bodies of the OpenAI-compatible API, strictly typed. Bounds on values are in `params`.

A parameter that is not supported is refused by name, unless it holds the value that changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

import msgspec

from semipd.core.errors import Refused
from semipd.serve.conversation import ChatMessage, NamedChoice, Tool
from semipd.serve.params import MAX_BIASES, MAX_LOGPROBS

MAX_VALUES = 2**20  # commas and brackets of a body: no list in it is longer
MAX_NEUTRAL_BYTES = 1024
MAX_SEARCHED_BYTES = 2**16
MAX_PROMPTS = 1024

_ABSENT: tuple[Any, ...] = (None,)

# Known elsewhere, not supported here: the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "audio": _ABSENT,
    "chat_template": _ABSENT,
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_decoding_backend": _ABSENT,
    "guided_grammar": _ABSENT,
    "guided_whitespace_pattern": _ABSENT,
    "kv_transfer_params": _ABSENT,
    "length_penalty": (1,),
    "logits_processors": ([],),
    "metadata": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": _ABSENT,
    "prompt_cache_key": _ABSENT,
    "prompt_embeds": _ABSENT,
    "reasoning_effort": _ABSENT,
    "return_tokens_as_token_ids": (False,),
    "safety_identifier": _ABSENT,
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": _ABSENT,
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "verbosity": _ABSENT,
    "web_search_options": _ABSENT,
}


class _Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL


class StreamOptions(_Body, kw_only=True):
    """include_usage: a last chunk with the counts. continuous_usage_stats: counts in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SchemaFormat(_Body, kw_only=True):
    """What a text must be. strict: true or false, the schema is followed."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Body, kw_only=True):
    """type: text, json_object, or json_schema with one."""

    type: str
    json_schema: SchemaFormat | None = None

    def plain(self) -> dict[str, Any]:
        """As `SamplingParams` takes it. Does not go into the schema, which may be nested too deeply."""
        given = self.json_schema
        named = None if given is None else {"name": given.name, "schema": given.schema}
        return {"type": self.type, "json_schema": named}


class StructuredOutputs(_Body, kw_only=True):
    """What a text must be, as vLLM has it: one of json (a schema, or JSON text of one), json_object, regex
    and choice. disable_fallback: changes nothing. The other fields hold nothing here."""

    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    disable_fallback: bool | None = None
    grammar: Any = None
    structural_tag: Any = None
    whitespace_pattern: Any = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


class SamplingBody(_Body, kw_only=True):
    """What all that generate have in common. null means the default. request_id: becomes part of the
    answer's id. guided_json, guided_regex, guided_choice: as in structured_outputs."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stream: bool | None = None
    cache_salt: str | None = None
    user: str | None = None
    service_tier: str | None = None
    priority: int | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    request_id: str | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None


class GenerationBody(SamplingBody, kw_only=True):
    """What completions and chat completions have in common. truncate_prompt_tokens: at most so many of the
    prompt's last tokens count; -1: as many as there is room for. best_of: n, or nothing."""

    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions. prompt: text, token ids, or a list of either. logprobs: how many of the
    likeliest tokens to tell of at each position. echo: repeat the prompt before its continuation;
    max_tokens may then be 0."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions. top_logprobs: how many of the likeliest tokens to tell of at each
    position; needs logprobs. parallel_tool_calls: false ends the answer with its first call.
    continue_final_message: go on with the last message instead of answering it (add_generation_prompt must
    then be false). echo: an assistant's last message comes before its continuation.
    chat_template_kwargs: variables of the model's chat template; reasoning_effort is one of them, where it
    has that. include_reasoning: false leaves out what the model thinks before its answer."""

    messages: list[ChatMessage]
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TokenizeBody(_Body, kw_only=True):
    """POST /tokenize. Either prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeBody(_Body, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


Body = TypeVar("Body", bound=_Body)

_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_TOKEN_ID = re.compile(r"[0-9]{1,10}", re.ASCII)
_MISSING = re.compile(r"missing required field `([^`]*)`")


def parse(data: bytes, kind: type[Body]) -> Body:
    """The body, or Refused naming the parameter that is wrong.

    Takes no more time than the event loop can spare: what would be large is refused unread."""
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise Refused(f"the body has more than {MAX_VALUES} values")
    try:
        body = _decoder(kind)(data)
    except msgspec.ValidationError as error:
        raise refusal_of(str(error)) from None
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        if culprit := _culprit(data):
            raise Refused(f"{culprit} holds NaN, an infinity or broken Unicode", culprit) from None
        raise Refused(f"the body is not valid JSON: {error}") from None
    for name in _unsupported(kind):
        if raw := getattr(body, name):
            _check_neutral(name, bytes(raw), kind.neutral[name])
    return body  # type: ignore[no-any-return]


def _unsupported(kind: type[_Body]) -> list[str]:
    return [name for name in kind.neutral if name not in kind.__struct_fields__]


@functools.cache
def _decoder(kind: type[_Body]) -> Callable[[bytes], Any]:
    """Of bodies of this kind in which unsupported parameters may occur too; those stay JSON text."""
    fields = [(name, msgspec.Raw, msgspec.Raw()) for name in _unsupported(kind)]
    wider = msgspec.defstruct(
        kind.__name__, fields, bases=(kind,), kw_only=True, forbid_unknown_fields=True
    )
    return msgspec.json.Decoder(wider).decode


_KINDS: tuple[type[_Body], ...] = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody)


def _check_neutral(name: str, raw: bytes, neutral: tuple[Any, ...]) -> None:
    value: Any = ...
    if len(raw) <= MAX_NEUTRAL_BYTES:
        with contextlib.suppress(ValueError, RecursionError):
            value = msgspec.json.decode(raw)
    same = any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)
    if value is not None and not same:
        raise Refused(f"{name} is not supported", name)


def _culprit(data: bytes) -> str | None:
    """The parameter whose value only a lax reader takes: NaN, an infinity, half a surrogate pair. None when
    it cannot be found, or not quickly."""
    if len(data) > MAX_SEARCHED_BYTES:
        return None
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(data)
        for name, value in values.items() if isinstance(values, dict) else ():
            text = json.dumps(value, ensure_ascii=False)
            if "NaN" in text or "Infinity" in text or not _is_unicode(text):
                return name if _is_unicode(name) else None
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def refusal_of(text: str, where: str = "") -> Refused:
    """msgspec's message, with the field that it is about. where: of the value in the body."""
    path = match[1] if (match := _PATH.search(text)) else ""
    if not path and not where and text.startswith("Expected"):
        return Refused("the body must be a JSON object")
    path = f"{where}.{path}".strip(".")
    message = _PATH.sub("", text)
    if field := _MISSING.search(text):
        path = f"{path}.{field[1]}".lstrip(".")
        message = f"{path} is missing"
    elif field := _UNKNOWN.search(text):
        path = f"{path}.{field[1]}".lstrip(".")
        message = f"unknown parameter: {path}"
    else:
        message = f"{path}: {message[:1].lower()}{message[1:]}"
    param = re.split(r"[.\[]", path, maxsplit=1)[0][:100] or None
    return Refused(message.replace("`", "")[:300], param)


def prompts_of(body: CompletionBody) -> list[str | list[int]]:
    """The prompts, in any of the four forms, as a list. Raises Refused."""
    prompt = body.prompt
    if isinstance(prompt, str):
        batch: list[Any] = [prompt]
    elif prompt and all(isinstance(item, int) for item in prompt):
        batch = [prompt]
    else:
        batch = prompt
    if len(batch) * (body.n or 1) > MAX_PROMPTS:
        raise Refused(f"more than {MAX_PROMPTS} continuations in one request", "prompt")
    if not all(isinstance(item, (str, list)) for item in batch):
        raise Refused("a prompt is text, or token ids, or a list of either", "prompt")
    if not batch or not all(batch):
        raise Refused("the prompt is empty", "prompt")
    return batch


def logprobs_of(body: GenerationBody) -> int | None:
    """How many of the likeliest tokens to tell of at each position; None: tell of none. Raises Refused."""
    if isinstance(body, CompletionBody):
        return body.logprobs
    assert isinstance(body, ChatBody)
    if not body.logprobs:
        if body.top_logprobs:
            raise Refused("top_logprobs needs logprobs: true", "top_logprobs")
        return None
    most = body.top_logprobs or 0
    if not 0 <= most <= MAX_LOGPROBS:
        raise Refused(f"top_logprobs must be between 0 and {MAX_LOGPROBS}, not {most}", "top_logprobs")
    return most


def biases_of(body: GenerationBody) -> tuple[tuple[int, float], ...]:
    """The logit biases by token id. Raises Refused."""
    given = body.logit_bias or {}
    if len(given) > MAX_BIASES:
        raise Refused(f"at most {MAX_BIASES} logit biases, not {len(given)}", "logit_bias")
    for name in given:
        if not _TOKEN_ID.fullmatch(name):
            raise Refused(f"logit_bias names {name[:20]!r}, not a token id", "logit_bias")
    return tuple((int(name), bias) for name, bias in given.items())


def body_schemas(*answers: type[msgspec.Struct]) -> Mapping[str, Any]:
    """JSON schemas of all bodies and of these answers, by name, for the API's description."""
    _, schemas = msgspec.json.schema_components(
        (*_KINDS, *answers), ref_template="#/components/schemas/{name}"
    )
    return schemas
