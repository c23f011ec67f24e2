"""What /v1/responses makes of its input, and what it refuses, by the names of its own parameters."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from semipd.core.errors import Refused
from semipd.serve.responses_input import Translation
from semipd.serve.responses_schema import ResponsesBody
from semipd.serve.schema import parse
from tests.serve.fakes import MAX_LENGTH, LiveFake, make_folder
from tests.serve.serving import Serving, serving
from tests.serve.test_responses import TEMPLATE

USER = {"role": "user", "content": "x"}
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
ANSWER = {"type": "function_call_output", "call_id": "1", "output": "y"}
PART = {"type": "input_text", "text": "x"}
TOOL = {"type": "function", "name": "f"}
FORMAT = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}


def thought(text: str) -> dict[str, Any]:
    return {
        "type": "reasoning",
        "id": "r",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
    }


def said(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [part]}


def messages_of(items: Any, **more: Any) -> list[dict[str, Any]]:
    """As the chat API gets them, without what is not there."""
    body = parse(json.dumps({"input": items, **more}).encode(), ResponsesBody)
    plain: list[dict[str, Any]] = msgspec.to_builtins(Translation(body).chat.messages)
    return plain


@pytest.mark.parametrize(
    ("items", "kinds"),
    [
        ([USER, said("a"), USER], "user, assistant(a), user"),
        (
            [USER, thought("t"), said("a"), CALL, CALL, ANSWER, ANSWER],
            "user, assistant(t, a, 2), tool, tool",
        ),
        ([USER, CALL, said("a"), ANSWER, said("b")], "user, assistant(a, 1), tool, assistant(b)"),
        ([USER, CALL, said("a"), said("b"), ANSWER], "user, assistant(a\nb, 1), tool"),
        ([said("a"), said("b")], "assistant(a), assistant(b)"),
        ([thought("t"), thought("u"), CALL], "assistant(t\nu, 1)"),
        ([thought("t"), CALL, thought("u"), CALL], "assistant(t, 1), assistant(u, 1)"),
        ([said("a"), thought("t"), said("b")], "assistant(a), assistant(t, b)"),
        ([{"type": "reasoning", "summary": [], "encrypted_content": "x"}, said("a")], "assistant(a)"),
    ],
)
def test_what_belongs_together_is_one_turn(items: list[Any], kinds: str) -> None:
    shown = []
    for message in messages_of(items):
        parts = [
            message.get("reasoning_content"),
            message.get("content"),
            len(message.get("tool_calls", ())),
        ]
        told = ", ".join(str(part) for part in parts if part)
        shown.append(f"assistant({told})" if message["role"] == "assistant" else message["role"])
    assert ", ".join(shown) == kinds


def test_text_in_all_its_forms() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert messages_of("x") == [{"role": "user", "content": "x"}]
    assert messages_of([{"role": "developer", "content": parts}]) == [
        {"role": "developer", "content": "a\nb"}
    ]
    assert messages_of("x", instructions="i")[0] == {"role": "system", "content": "i"}
    tool = {"role": "tool", "content": "a\nb", "tool_call_id": "1"}
    assert messages_of([{**ANSWER, "output": parts}]) == [tool]
    refusal = [{"type": "refusal", "refusal": "no"}]
    assert messages_of([{"role": "assistant", "content": refusal}]) == [
        {"role": "assistant", "content": "no"}
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = make_folder(tmp_path_factory.mktemp("model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("reasoning_effort", "no_such_thing"))
    with serving(folder, LiveFake()) as running:
        yield running
        with running.client() as client:
            assert (
                client.post("/v1/responses", json={"input": "x", "max_output_tokens": 2}).status_code == 200
            )


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def refusal(client: httpx.Client, body: Any) -> dict[str, Any]:
    response = client.post("/v1/responses", content=json.dumps(body))
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 500
    for name in ("messages[", "response_format", "max_completion_tokens", "reasoning_effort"):
        assert name not in error["message"]
    return error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": 7}, "input"),
        ({"input": {}}, "input"),
        ({"input": ["x"]}, "input"),
        ({"input": [{}]}, "input"),
        ({"input": [USER] * 4097}, "input"),
        ({"input": "x " * 20_000}, "input"),
        ({"input": [{"type": "item_reference", "id": "m"}]}, "input"),
        ({"input": [{"type": "web_search_call", "id": "w", "status": "completed"}]}, "input"),
        ({"input": [{"type": 7, "role": "user", "content": "x"}]}, "input"),
        ({"input": [{"type": [], "role": "user", "content": "x"}]}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input"),
        ({"input": [{"role": "<|end|>", "content": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": None}]}, "input"),
        ({"input": [{"role": "user", "content": 7}]}, "input"),
        ({"input": [{"role": "user", "content": ["x"]}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 7}]}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"role": "user", "content": [PART] * 20}] * 1000}, "input"),
        ({"input": [{**ANSWER, "output": [PART] * 20_000}]}, "input"),
        ({"input": [{**USER, "more": 1}]}, "input"),
        ({"input": [{**CALL, "arguments": {}}]}, "input"),
        ({"input": [{**CALL, "arguments": "{"}]}, "input"),
        ({"input": [{**CALL, "arguments": "[]"}]}, "input"),
        ({"input": [{**CALL, "call_id": ""}]}, "input"),
        ({"input": [{**CALL, "name": "a b"}]}, "input"),
        ({"input": [CALL] * 129}, "input"),
        ({"input": [{**ANSWER, "call_id": "a b"}]}, "input"),
        ({"input": [{**ANSWER, "output": None}]}, "input"),
        ({"input": [{**ANSWER, "output": {"a": 1}}]}, "input"),
        ({"input": [{**thought("x"), "content": "x"}]}, "input"),
        ({"instructions": 7}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": MAX_LENGTH}, "max_output_tokens"),
        ({"max_output_tokens": True}, "max_output_tokens"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"tools": "all"}, "tools"),
        ({"tools": [7]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools"),
        ({"tools": [{"type": 7}]}, "tools"),
        ({"tools": [{"type": ["x"]}]}, "tools"),
        ({"tools": [{"name": "f"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tools": [{**TOOL, "parameters": []}]}, "tools"),
        ({"tools": [{**TOOL, "parameters": {"type": "array"}}]}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{**TOOL, "name": f"f{i}"} for i in range(129)]}, "tools"),
        ({"tools": [{**TOOL, "strict": True, "parameters": {"not": {}}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"text": "json"}, "text"),
        ({"text": {"format": {"type": "yaml"}}}, "text"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"text": {"format": {**FORMAT, "name": "a b"}}}, "text"),
        ({"text": {"format": {**FORMAT, "schema": {"not": {}}}}}, "text"),
        ({"text": {"format": {"type": "json_object", "schema": {}}}}, "text"),
        ({"text": {"format": FORMAT}, "ignore_eos": True}, "ignore_eos"),
        ({"text": {"verbosity": "low"}}, "text"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning"),
        ({"include": ["everything"]}, "include"),
        ({"include": "reasoning.encrypted_content"}, "include"),
        ({"include": ["reasoning.encrypted_content"] * 50_000}, "include"),
        ({"tools": [{**TOOL, "description": "x" * 2**20}], "tool_choice": "none"}, "tools"),
        ({"text": {"format": {**FORMAT, "description": "x" * 2**20}}}, "text"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"user": "u" * 1025}, "user"),
        ({"prompt_cache_key": "u" * 1025}, "prompt_cache_key"),
        ({"store": True}, "store"),
        ({"store": "no"}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"n": 2}, "n"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"request_id": "a b"}, "request_id"),
        ({"no_such_thing": 1}, "no_such_thing"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_bad_request_names_its_parameter(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    error = refusal(client, {"input": "x", **body})
    assert error["param"] == param


def test_the_place_is_named(client: httpx.Client) -> None:
    """In the input as it was sent, not in the messages that were made of it."""
    for item, words in (
        ({**CALL, "arguments": "{"}, "input[3].arguments must be a JSON object"),
        ({**CALL, "call_id": "a b"}, "input[3].call_id must have"),
        ({**ANSWER, "call_id": "a b"}, "input[3].call_id must have"),
        ({**USER, "content": [{"type": "input_image"}]}, "input[3].content[0]: parts are of the types"),
        ({"type": "message", "role": "user"}, "input[3].content is missing"),
        ({"type": "item_reference", "id": "m"}, "input[3]: items are of the types"),
    ):
        body = {"input": [USER, thought("t"), CALL, item], "instructions": "i"}
        assert refusal(client, body)["message"].startswith(words)
    assert "stores no responses" in refusal(client, {"input": "x", "previous_response_id": "r"})["message"]
    hosted = refusal(client, {"input": "x", "tools": [{"type": "web_search"}]})["message"]
    assert "'web_search' are not supported" in hosted and "--skip-hosted-tools" in hosted


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"input": "\xff"}', b"[" * 50_000])
def test_malformed_bodies(client: httpx.Client, content: bytes) -> None:
    response = client.post("/v1/responses", content=content)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_nothing_is_stored(client: httpx.Client) -> None:
    answer = client.post("/v1/responses", json={"input": "x", "max_output_tokens": 2, "request_id": "mine"})
    assert answer.json()["id"] == "resp_mine"
    assert client.get("/v1/responses/resp_mine").status_code == 404
    assert client.get("/v1/responses").status_code == 405
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert {"ResponsesBody", "MessageItem", "CallItem", "CallOutputItem", "ReasoningItem"} <= set(schemas)


RICH: dict[str, Any] = {
    "instructions": "i",
    "input": [USER, {**USER, "content": [PART]}, thought("t"), said("a"), CALL, ANSWER],
    "tools": [{**TOOL, "description": "d", "parameters": {"type": "object"}, "strict": True}],
    "tool_choice": {"type": "function", "name": "f"},
    "text": {"format": {**FORMAT, "strict": True}, "verbosity": "medium"},
    "reasoning": {"effort": "high", "summary": "auto"},
    "include": ["message.output_text.logprobs"],
    "metadata": {"a": "b"},
    "stream": True,
    "stream_options": {"include_obfuscation": False},
    "structured_outputs": {"choice": ["a"]},
}
JUNK = [
    None,
    True,
    0,
    -1,
    2**70,
    1.5,
    "",
    "x",
    [],
    {},
    [None],
    {"type": "message"},
    {"a": {"b": []}},
    "\ud83d",
]


def places_in(value: Any) -> Iterator[tuple[Any, ...]]:
    """Ways to all values in it."""
    pairs = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, part in pairs:
        yield (key,)
        yield from ((key, *rest) for rest in places_in(part))


def refused_of(body: dict[str, Any]) -> Refused | None:
    try:
        translation = Translation(parse(json.dumps(body).encode(), ResponsesBody))
    except Refused as refused:
        return refused
    assert all(isinstance(message.role, str) for message in translation.chat.messages)
    return None


@pytest.mark.parametrize("name", RICH)
def test_junk_anywhere_is_understood_or_refused_by_name(name: str) -> None:
    for place in places_in({name: RICH[name]}):
        for junk in [*JUNK, ...]:
            body = copy.deepcopy(RICH)
            inner: Any = body
            for key in place[:-1]:
                inner = inner[key]
            if junk is ...:
                del inner[place[-1]]
            else:
                inner[place[-1]] = junk
            refused = refused_of(body)
            assert refused is None or (refused.param in RICH and len(str(refused)) < 500), (place, junk)
