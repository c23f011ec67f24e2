"""vLLM's names for what an answer must be: each gives the grammar that it stands for, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import llguidance
import pytest
from tokenizers import Tokenizer

from semipd.serve.schema import CompletionBody, parse
from semipd.serve.structured import Structure
from tests.serve.fakes import LiveFake, make_folder, make_tokenizer
from tests.serve.serving import Serving, script_of, serving
from tests.serve.test_responses import TEMPLATE

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "json", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = make_folder(tmp_path_factory.mktemp("model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with serving(folder, LiveFake(script=script_of("yes"))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer() -> tuple[Tokenizer, Any]:
    raw = make_tokenizer()
    return raw, llguidance.LLTokenizer(raw.to_str(), eos_token=0)


def send(client: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    about: dict[str, Any] = {
        "completions": {"prompt": "x", "max_tokens": 8},
        "chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "responses": {"input": "x"},
    }[path]
    return client.post(f"/v1/{path}", json={**about, **body})


PATHS = ("completions", "chat/completions", "responses")
CASES = [
    ({"choice": ["yes", "no", "yes"]}, ["yes", "no"], ["", "ye", "yes no", '"yes"']),
    ({"choice": ["a", "a b", 'q"\\', "ü\n"]}, ["a", "a b", 'q"\\', "ü\n"], ["b", "ü", "q"]),
    ({"choice": ["<|end|>"]}, ["<|end|>"], ["<|"]),
    ({"regex": "[0-9]{3}-[a-c]+"}, ["123-a", "000-abc"], ["123-", "12-a", "123-d"]),
    ({"regex": r"a/b|c\/d"}, ["a/b", "c/d"], ["a", "c\\/d"]),
    ({"regex": "[/*]+\n"}, ["/*/\n"], ["", "/*n"]),
    ({"regex": "(?i:yes)+"}, ["yesYES"], ["no", ""]),
    ({"regex": "a/\nstart: /b"}, ["a/\nstart: /b"], ["a", "b"]),
    ({"regex": "a\\\n\\\\"}, ["a\n\\"], ["a", "an\\"]),
    ({"regex": "/b"}, ["/b"], ["", "b"]),
]


@pytest.mark.parametrize(("outputs", "good", "bad"), CASES, ids=lambda value: repr(value)[:40])
def test_just_these_texts(
    tokenizer: tuple[Tokenizer, Any], outputs: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    raw, engine = tokenizer
    ((kind, value),) = outputs.items()
    for asked in ({"structured_outputs": outputs}, {f"guided_{kind}": value}):
        grammar = Structure(parse(json.dumps({"prompt": "x", **asked}).encode(), CompletionBody)).grammar
        assert grammar is not None and grammar.param in asked

        def follows(text: str, lark: str = grammar.text) -> bool:
            matcher = llguidance.LLMatcher(
                engine, llguidance.LLMatcher.grammar_from_lark(lark), log_level=0
            )
            ids = [index for letter in text for index in raw.encode(letter).ids]
            return matcher.consume_tokens(ids) and bool(matcher.is_accepting())

        assert [text for text in good if not follows(text)] == []
        assert [text for text in bad if follows(text)] == []


@pytest.mark.parametrize("path", PATHS)
def test_the_engine_gets_the_grammar(server: Serving, client: httpx.Client, path: str) -> None:
    def grammar(**body: Any) -> str:
        response = send(
            client, path, {"max_output_tokens" if path == "responses" else "max_tokens": 7, **body}
        )
        assert response.status_code == 200, response.text
        constraint = server.executor.sampling[max(server.executor.sampling)].constraint
        assert constraint is not None
        found: str = constraint.grammar
        return found

    wanted = {"response_format": FORMAT}
    if path == "responses":
        wanted = {"text": {"format": {"type": "json_schema", "name": "json", "schema": SCHEMA}}}
    by_schema = grammar(**wanted)
    for value in (SCHEMA, json.dumps(SCHEMA)):
        assert grammar(guided_json=value) == grammar(structured_outputs={"json": value}) == by_schema
    assert grammar(structured_outputs={"json_object": True}) not in ("", by_schema)
    by_choice = grammar(guided_choice=["yes", "no"])
    assert grammar(structured_outputs={"choice": ["yes", "no"], "regex": None}) == by_choice != by_schema
    assert grammar(guided_regex="yes|no") not in (by_choice, by_schema)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        {"guided_json": 7},
        {"guided_json": "{"},
        {"guided_json": "[]"},
        {"guided_json": "[" * 100_000},
        {"guided_json": {"not": {}}},
        {"guided_json": {"type": "string", "pattern": "(("}},
        {"guided_regex": ""},
        {"guided_regex": "(("},
        {"guided_regex": "(?=a)b"},
        {"guided_regex": "a\\"},
        {"guided_regex": "a\\\\\\"},
        {"guided_regex": "a{1000000000}"},
        {"guided_regex": "a" * 70_000},
        {"guided_regex": ["a"]},
        {"guided_choice": []},
        {"guided_choice": ["a", ""]},
        {"guided_choice": ["a", 7]},
        {"guided_choice": "a"},
        {"guided_choice": ["x"] * 1025},
        {"guided_choice": ["x" * 70_000]},
        {"guided_choice": ["a"], "guided_regex": "a"},
        {"guided_choice": ["a"], "structured_outputs": {"choice": ["a"]}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False}},
        {"structured_outputs": {"json": SCHEMA, "regex": "a"}},
        {"structured_outputs": {"json": {"not": {}}}},
        {"structured_outputs": {"grammar": "root ::= 'a'"}},
        {"structured_outputs": {"structural_tag": {}}},
        {"structured_outputs": {"whitespace_pattern": " "}},
        {"structured_outputs": {"regex": "a", "more": 1}},
        {"structured_outputs": "json"},
    ],
    ids=lambda body: json.dumps(body)[:50],
)
def test_refusals_name_the_parameter(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    response = send(client, path, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] in body and len(error["message"]) < 600
    assert "response_format" not in error["message"]


def test_not_two_at_once(client: httpx.Client) -> None:
    formats = {"response_format": FORMAT, "guided_choice": ["a"]}
    assert "not both" in send(client, "chat/completions", formats).json()["error"]["message"]
    as_text = {"text": {"format": {"type": "json_object"}}, "guided_choice": ["a"]}
    assert "text.format" in send(client, "responses", as_text).json()["error"]["message"]
    with_tools: dict[str, Any] = {"tools": [TOOL], "guided_choice": ["yes"]}
    error = send(client, "chat/completions", with_tools).json()["error"]
    assert error["param"] == "guided_choice" and "tool_choice" in error["message"]
    assert send(client, "chat/completions", {**with_tools, "tool_choice": "none"}).status_code == 200
    plain = {"response_format": {"type": "text"}, "guided_choice": ["yes"]}
    assert send(client, "completions", plain).status_code == 200


def test_best_of_is_n(client: httpx.Client) -> None:
    for path in PATHS[:2]:
        for body in ({"best_of": 1}, {"best_of": 2, "n": 2}, {"best_of": None, "n": 2}):
            assert send(client, path, body).status_code == 200
        for body in ({"best_of": 2}, {"best_of": 1, "n": 2}, {"best_of": True}, {"best_of": 0}):
            assert send(client, path, body).json()["error"]["param"] == "best_of"
