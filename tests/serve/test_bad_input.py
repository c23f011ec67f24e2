"""What no client may do to the server: each gets an error that names the parameter; the server goes on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from semipd.core.errors import Refused
from semipd.serve.gate import Limits
from semipd.serve.schema import MAX_VALUES, CompletionBody, parse
from tests.serve.fakes import MAX_LENGTH, LiveFake, make_folder
from tests.serve.serving import Serving, serving

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = make_folder(tmp_path_factory.mktemp("model"))
    with serving(folder, LiveFake(), limits=Limits(body=100_000)) as running:
        yield running
        with running.client() as client:
            assert client.post(COMPLETIONS, json={"prompt": "hello"}).status_code == 200
        # The last request's place is given back just after its answer is sent.
        deadline = time.monotonic() + 5
        while running.service.gate.active and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running.service.gate.active == 0


@pytest.fixture
def client(server: Serving) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": ["a", 7]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [400]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [[5, 400]]}, "prompt"),
        ({"prompt": [5] * MAX_LENGTH}, "prompt"),
        ({"prompt": "a " * 20_000}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": MAX_LENGTH}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "12"}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "temperature": -0.1}, "temperature"),
        ({"prompt": "a", "temperature": 2.1}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_p": float("inf")}, "top_p"),
        ({"prompt": "a", "top_k": -2}, "top_k"),
        ({"prompt": "a", "top_k": 2**31}, "top_k"),
        ({"prompt": "a", "min_p": 1.1}, "min_p"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "seed": 0.5}, "seed"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 65}, "n"),
        ({"prompt": ["a"] * 100, "n": 64}, "prompt"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "stop": "x" * 4097}, "stop"),
        ({"prompt": "a", "stop": [7]}, "stop"),
        ({"prompt": "a", "stop": {"a": "b"}}, "stop"),
        ({"prompt": "a", "stop_token_ids": [400]}, "stop_token_ids"),
        ({"prompt": "a", "stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"prompt": "a", "stop_token_ids": 3}, "stop_token_ids"),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens"),
        ({"prompt": "a", "min_tokens": -1}, "min_tokens"),
        ({"prompt": "a", "ignore_eos": 1}, "ignore_eos"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"more": True}}, "stream_options"),
        ({"prompt": "a", "user": "u" * 1025}, "user"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt"),
        ({"prompt": "a", "model": 5}, "model"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "top_logprobs": 3}, "top_logprobs"),
        ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"prompt": "a", "truncate_prompt_tokens": 2**31}, "truncate_prompt_tokens"),
        ({"prompt": "a" * 3_000, "truncate_prompt_tokens": MAX_LENGTH}, "prompt"),
        ({"prompt": "a", "request_id": ""}, "request_id"),
        ({"prompt": "a", "request_id": "a b"}, "request_id"),
        ({"prompt": "a", "request_id": "x" * 129}, "request_id"),
        ({"prompt": "a", "return_token_ids": 1}, "return_token_ids"),
        ({"prompt": "a", "skip_special_tokens": "no"}, "skip_special_tokens"),
        ({"prompt": "a", "include_stop_str_in_output": 1}, "include_stop_str_in_output"),
        ({"prompt": "a", "tools": [{"type": "function"}]}, "tools"),
        ({"prompt": "a", "echo": 1}, "echo"),
        ({"prompt": "a", "echo": True, "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "x"}, "suffix"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"5": "1"}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"hello": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"-5": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"٥": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"400": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"9999999999": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"5": 1, "05": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": [5]}, "logit_bias"),
        ({"prompt": "a", "presence_penalty": 2.1}, "presence_penalty"),
        ({"prompt": "a", "presence_penalty": float("nan")}, "presence_penalty"),
        ({"prompt": "a", "frequency_penalty": -2.1}, "frequency_penalty"),
        ({"prompt": "a", "frequency_penalty": "1"}, "frequency_penalty"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "a", "repetition_penalty": 101}, "repetition_penalty"),
        ({"prompt": "a", "response_format": {"type": "yaml"}}, "response_format"),
        ({"prompt": "a", "no_such_thing": None}, "no_such_thing"),
    ],
)
def test_a_bad_completion_names_its_parameter(
    client: httpx.Client, body: dict[str, Any], param: str
) -> None:
    content = json.dumps(body)
    error = error_of(client.post(COMPLETIONS, content=content))
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "<|end|>", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x " * 20_000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x y z " * 100}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": MAX_LENGTH}, "max_completion_tokens"),
        ({"max_completion_tokens": 3, "max_tokens": 4}, "max_completion_tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"echo": 1}, "echo"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"raise_exception": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_a_bad_chat_names_its_parameter(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    whole = (
        body if "messages" in body or not body else {"messages": [{"role": "user", "content": "x"}], **body}
    )
    assert error_of(client.post(CHAT, json=whole))["param"] == param


def test_neutral_values_of_unsupported_parameters_pass(client: httpx.Client) -> None:
    body = {
        "prompt": "a", "logprobs": None, "echo": False, "best_of": 1, "presence_penalty": 0,
        "logit_bias": {}, "suffix": None, "response_format": {"type": "text"}, "repetition_penalty": 1.0,
        "user": "me", "temperature": None, "n": None, "stop": None, "stream": None,
        "stream_options": None, "seed": None, "top_logprobs": 0, "prompt_logprobs": None,
    }  # fmt: skip
    assert client.post(COMPLETIONS, json=body).status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b'{"prompt": "a"', b'{"prompt": "\xff"}', b"\xff\xfe",
     b"[" * 50_000, b'{"prompt": "a"}}', b"{'prompt': 'a'}"],
)  # fmt: skip
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_malformed_bodies(client: httpx.Client, path: str, content: bytes) -> None:
    error_of(client.post(path, content=content))


def test_half_a_surrogate_pair_is_not_text(client: httpx.Client) -> None:
    error = error_of(client.post(COMPLETIONS, content=b'{"prompt": "a\\ud800b"}'))
    assert error["param"] == "prompt"


def test_unknown_models_and_routes(client: httpx.Client) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        error = error_of(client.post(path, json={**body, "model": "gpt-9"}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
    error_of(client.get("/v1/models/gpt-9"), 404)
    for path in ("/", "/v1", "/docs", "/v1/completions/", "/../etc/passwd"):
        error_of(client.get(path), 404)
    assert "POST" in error_of(client.get(COMPLETIONS), 405)["message"]
    assert "/v1/embeddings" in error_of(client.post("/v1/embeddings"), 404)["message"]
    error_of(client.post("/metrics"), 405)


def test_tokenize_and_detokenize_refuse(client: httpx.Client) -> None:
    assert error_of(client.post("/tokenize", json={}))["param"] == "prompt"
    both = {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}
    error_of(client.post("/tokenize", json=both))
    for tokens in ([-1], [400], ["a"], 5, None):
        assert error_of(client.post("/detokenize", json={"tokens": tokens}))["param"] == "tokens"


def test_a_body_beyond_the_limit(client: httpx.Client) -> None:
    big = b'{"prompt": "' + b"x" * 150_000 + b'"}'
    assert error_of(client.post(COMPLETIONS, content=big), 413)["code"] == "body_too_large"
    chunks = (b"x" * 10_000 for _ in range(20))
    error_of(client.post(COMPLETIONS, content=chunks), 413)


def test_headers_beyond_the_limit(server: Serving) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Big: " + b"x" * 200_000)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
    assert b" 400 " in answer.split(b"\r\n")[0] or not answer


def test_a_body_of_too_many_values_is_refused_unread(client: httpx.Client) -> None:
    """4 million short lists fit 16 MiB, and took the event loop half a minute."""
    for many in (b"[1]," * (MAX_VALUES // 2 + 1), b"1," * (MAX_VALUES + 1)):
        with pytest.raises(Refused, match="values"):
            parse(b'{"prompt": [' + many + b"1]}", CompletionBody)
    with pytest.raises(Refused, match="valid JSON"):  # no long search for the name of the culprit
        parse(b'{"prompt": "' + b"a" * 2**17 + b'", "seed": NaN}', CompletionBody)
    huge = b'{"prompt": "a", "' + b"x" * 50_000 + b'": 1}'
    assert len(client.post(COMPLETIONS, content=huge).content) < 1000, "an error is short"


def test_messages_may_be_copied_from_an_answer(client: httpx.Client) -> None:
    """`message.model_dump()` of the openai client has these fields; people send it back as it is."""
    empty = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls"))
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello", **empty},
        {"role": "user", "content": "go on"},
    ]
    assert client.post(CHAT, json={"messages": messages, "max_tokens": 2}).status_code == 200
    messages[1]["parsed"] = {"what": "OpenAI's client makes of the content"}
    assert client.post(CHAT, json={"messages": messages, "max_tokens": 2}).status_code == 200
    messages[1]["tool_calls"] = [{"id": "1"}]
    assert "tool_calls" in error_of(client.post(CHAT, json={"messages": messages}))["message"]
