"""/v1/responses: answers of the chat API as items, whole and as typed events, by OpenAI's own client."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest

from tests.serve.fakes import LiveFake, eventually, make_folder, make_tokenizer
from tests.serve.serving import Serving, script_of, serving, speaking

RESPONSES = "/v1/responses"
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}<|{{ 'user' if message.role == 'tool' else message.role }}|>"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    "{% if reasoning_effort is defined %}{{ reasoning_effort }}{% endif %}"
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "köln"}}\n</tool_call>'
THOUGHT = "<think>\nköln? 😀\n</think>\n\n"
SAID = f"{THOUGHT}let me see.\n{CALL}\n{CALL}"
ASKED: dict[str, Any] = {"model": "tiny", "input": "and köln?", "tools": [WEATHER]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Serving]:
    with speaking(folder, SAID) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def theirs(server: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post(RESPONSES, json={"input": "and köln?", **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events_of(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """All events of a stream, of which the form is checked."""
    response = client.post(RESPONSES, json={"input": "and köln?", "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    events = []
    for number, block in enumerate(blocks):
        head, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert head == f"event: {event['type']}" and event["sequence_number"] == number
        events.append(event)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    return events


def gathered(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that the events build, piece by piece; what ends a piece must repeat it."""
    items: list[dict[str, Any]] = []
    for event in events:
        place = event.get("output_index")
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert place == len(items) and event["item"]["status"] == "in_progress"
                items.append(event["item"])
            case "content_part.added":
                assert event["content_index"] == len(items[place]["content"]) == 0
                items[place]["content"].append(event["part"])
            case "output_text.delta" | "reasoning_text.delta":
                assert event["item_id"] == items[place]["id"]
                items[place]["content"][0]["text"] += event["delta"]
                items[place]["content"][0].get("logprobs", []).extend(event.get("logprobs", ()))
            case "function_call_arguments.delta":
                assert event["item_id"] == items[place]["id"]
                items[place]["arguments"] += event["delta"]
            case "output_text.done" | "reasoning_text.done":
                assert event["text"] == items[place]["content"][0]["text"]
            case "content_part.done":
                assert event["part"] == items[place]["content"][0]
            case "function_call_arguments.done":
                assert event["arguments"] == items[place]["arguments"]
            case "output_item.done":
                items[place]["status"] = event["item"]["status"]
                assert event["item"] == items[place]
    assert events[-1]["response"]["output"] == items
    return items


def bare(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without their random names."""
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in items]


def test_a_whole_answer(client: httpx.Client) -> None:
    answer = ask(
        client, tools=[WEATHER], instructions="be brief", metadata={"a": "b"}, user="me", temperature=0.5
    )
    thought, message, first, second = answer["output"]
    assert (
        thought["content"] == [{"type": "reasoning_text", "text": "köln? 😀"}] and thought["summary"] == []
    )
    assert message["content"] == [
        {"type": "output_text", "text": "let me see.", "annotations": [], "logprobs": []}
    ]
    assert first["name"] == "get_weather" and first["arguments"] == '{"city": "köln"}'
    assert first["call_id"] != second["call_id"] and first["id"] != first["call_id"]
    assert {item["status"] for item in answer["output"]} == {"completed"} == {answer["status"]}
    assert answer["object"] == "response" and answer["id"].startswith("resp_")
    assert answer["error"] is answer["incomplete_details"] is answer["previous_response_id"] is None
    repeated = {"instructions": "be brief", "metadata": {"a": "b"}, "user": "me", "temperature": 0.5}
    assert {name: answer[name] for name in repeated} == repeated
    assert answer["tools"] == [WEATHER] and answer["tool_choice"] == "auto" and answer["store"] is False
    assert answer["text"] == {"format": {"type": "text"}} and answer["parallel_tool_calls"] is True
    tokens, usage = make_tokenizer().encode(THOUGHT.rstrip()).ids, answer["usage"]
    assert usage["output_tokens_details"] == {"reasoning_tokens": len(tokens)}
    assert usage["output_tokens"] == len(script_of(SAID))
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@pytest.mark.parametrize("tools", [[], [WEATHER]], ids=["text", "calls"])
def test_a_stream_says_the_same(client: httpx.Client, tools: list[Any]) -> None:
    whole = ask(client, tools=tools)
    events = events_of(client, tools=tools)
    assert bare(gathered(events)) == bare(whole["output"])
    final = events[-1]["response"]
    assert events[-1]["type"] == "response.completed" and final["status"] == "completed"
    assert {key: final["usage"][key] for key in final["usage"] if key != "input_tokens_details"} == {
        key: whole["usage"][key] for key in whole["usage"] if key != "input_tokens_details"
    }
    assert final["id"] == events[0]["response"]["id"] and set(final) == set(whole)


def test_an_answer_that_is_cut_off_is_incomplete(client: httpx.Client) -> None:
    for most in (1, 3, len(script_of(THOUGHT)) + 2, len(script_of(SAID)) - 15):
        whole = ask(client, tools=[WEATHER], max_output_tokens=most)
        events = events_of(client, tools=[WEATHER], max_output_tokens=most)
        assert bare(gathered(events)) == bare(whole["output"])
        assert events[-1]["type"] == "response.incomplete"
        for answer in (whole, events[-1]["response"]):
            assert answer["status"] == "incomplete" == answer["output"][-1]["status"]
            assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
            assert {item["status"] for item in answer["output"][:-1]} <= {"completed"}
            assert answer["usage"]["output_tokens"] == most == answer["max_output_tokens"]
            assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] <= most


def test_text_behind_calls_is_an_item_of_its_own_in_streams(folder: Path) -> None:
    with speaking(folder, f"a {CALL} b") as running, running.client() as client:
        items = gathered(events_of(client, tools=[WEATHER]))
        whole = ask(client, tools=[WEATHER])["output"]
    texts = ["".join(part["text"] for part in item.get("content", ())) for item in items]
    assert "".join(texts) == whole[0]["content"][0]["text"]
    assert sum(item["type"] == "function_call" for item in items) == 1


def test_an_empty_answer_has_a_message(tmp_path: Path) -> None:
    with speaking(make_folder(tmp_path), "") as running, running.client() as client:
        whole = ask(client)["output"]
        assert bare(gathered(events_of(client))) == bare(whole) and whole[0]["content"][0]["text"] == ""


def test_log_probabilities(client: httpx.Client) -> None:
    asked: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = ask(client, **asked)
    (_, item), streamed = whole["output"], gathered(events_of(client, **asked))
    entries = item["content"][0]["logprobs"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == SAID
    assert {len(entry["top_logprobs"]) for entry in entries} == {2} and whole["top_logprobs"] == 2
    assert bare(streamed) == bare(whole["output"])


def test_the_openai_client_reads_both_ways(theirs: openai.OpenAI) -> None:
    whole = theirs.responses.create(**ASKED)
    assert whole.output_text == "let me see." and whole.usage is not None
    assert [item.type for item in whole.output] == ["reasoning", "message", *["function_call"] * 2]
    with theirs.responses.stream(**ASKED) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "let me see." and kinds[-1] == "response.completed"
    assert kinds.count("response.function_call_arguments.done") == 2
    plain = list(theirs.responses.create(**ASKED, stream=True))
    assert "".join(event.delta for event in plain if event.type == "response.output_text.delta") == (
        "let me see."
    )


def test_the_turns_after_a_call(theirs: openai.OpenAI) -> None:
    """As OpenAI's guide has it: the output goes back as it is, and then what the tools say."""
    turns: list[Any] = [{"role": "user", "content": "and köln?"}]
    lengths = []
    for _ in range(3):
        answer = theirs.responses.create(**{**ASKED, "input": turns})
        turns += answer.output
        turns += [
            {"type": "function_call_output", "call_id": item.call_id, "output": "sun"}
            for item in answer.output
            if item.type == "function_call"
        ]
        assert answer.usage is not None
        lengths.append(answer.usage.input_tokens)
    assert lengths[0] < lengths[1] < lengths[2]
    dumped = [turn if isinstance(turn, dict) else turn.model_dump() for turn in turns]
    again = theirs.responses.create(**{**ASKED, "input": dumped})
    assert again.usage is not None and again.usage.input_tokens > lengths[2]


def test_pydantic_models(folder: Path, theirs: openai.OpenAI) -> None:
    class Weather(pydantic.BaseModel):
        city: str

    class GetWeather(pydantic.BaseModel):
        city: str

    with speaking(folder, '<think>a</think>{"city": "köln"}') as running:
        other = openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0)
        answer = other.responses.parse(model="tiny", input="and köln?", text_format=Weather)
        with other.responses.stream(model="tiny", input="and köln?", text_format=Weather) as stream:
            streamed = stream.get_final_response()
    assert answer.output_parsed == streamed.output_parsed == Weather(city="köln")
    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")["function"]
    called = theirs.responses.parse(
        model="tiny",
        input="and köln?",
        tools=[{"type": "function", **tool}],  # type: ignore[list-item]
    )
    calls = [item for item in called.output if item.type == "function_call"]
    assert [call.parsed_arguments for call in calls] == [{"city": "köln"}] * 2
    again = theirs.responses.parse(**{**ASKED, "input": called.output})
    assert again.output_text == "let me see."


def test_what_is_asked_for_reaches_the_engine(folder: Path) -> None:
    executor = LiveFake(script=script_of("{}"))
    body = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 7, "presence_penalty": 1.0,
        "text": {"format": {"type": "json_object"}}, "reasoning": {"effort": "high", "summary": "auto"},
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "store": False,
        "truncation": "disabled", "background": False, "tool_choice": "none", "parallel_tool_calls": False,
        "stream_options": {"include_obfuscation": False}, "service_tier": "auto",
    }  # fmt: skip
    with serving(folder, executor, length=1024) as running, running.client() as client:
        answer = ask(client, **body)
        events_of(client, **body)
    assert answer["text"] == {"format": {"type": "json_object"}}
    assert answer["reasoning"]["effort"] == "high" and answer["temperature"] == 0.7
    (rule,) = set(executor.sampling.values())
    assert (rule.temperature, rule.top_p, rule.top_k, rule.presence_penalty) == (0.7, 0.9, 5, 1.0)
    assert rule.constraint is not None and rule.constraint.grammar


def test_a_required_call_is_all_that_may_come(folder: Path) -> None:
    executor = LiveFake(script=script_of(CALL))
    choices: tuple[Any, ...] = ("required", {"type": "function", "name": "get_weather"})
    with serving(folder, executor, length=1024) as running, running.client() as client:
        for choice in choices:
            answer = ask(client, tools=[WEATHER], tool_choice=choice)
            assert [item["type"] for item in answer["output"]] == ["function_call"]
            assert answer["tool_choice"] == choice
    assert all(rule.constraint is not None for rule in executor.sampling.values())


def test_a_stream_that_fails_says_so(folder: Path) -> None:
    executor = LiveFake(pace=0.01)
    with serving(folder, executor, length=1024) as running, running.client() as client:
        asked = {"input": "x", "stream": True, "max_output_tokens": 900}
        with client.stream("POST", RESPONSES, json=asked) as response:
            lines = response.iter_lines()
            assert "response.created" in next(lines)
            assert any("output_text.delta" in line for line in lines)
            executor.fail_next = True
            last = [line for line in lines if line.startswith("data: ")][-1]
    event = json.loads(last.removeprefix("data: "))
    assert event["type"] == "response.failed" and event["response"]["status"] == "failed"
    assert event["response"]["error"]["message"] and event["response"]["error"]["code"] == "server_error"
    (item,) = event["response"]["output"]
    assert item["status"] == "incomplete" and item["content"][0]["text"]


def test_clients_that_leave_and_many_at_once(folder: Path) -> None:
    executor = LiveFake(pace=0.002)
    with serving(folder, executor, length=1024) as running, running.client() as client:
        asked = {"input": "x", "stream": True, "max_output_tokens": 900, "temperature": 0}
        streams = [client.stream("POST", RESPONSES, json=asked) for _ in range(4)]
        opened = [stream.__enter__() for stream in streams]
        lines = [response.iter_lines() for response in opened]
        for several in itertools.islice(zip(*lines, strict=False), 12):
            assert len(set(several)) <= 4
        for stream in streams:
            stream.__exit__(None, None, None)
        with eventually() as wait_for:
            wait_for(lambda: running.service.gate.active == 0)
        assert ask(client, max_output_tokens=2)["status"] == "incomplete"


def test_a_coding_agent_brings_more_than_functions(folder: Path) -> None:
    """As Codex asks: tools of other kinds are left out where the server was told so, else refused."""

    def text(said: str) -> list[dict[str, str]]:
        return [{"type": "input_text", "text": said}]

    body: dict[str, Any] = {
        "model": "tiny", "instructions": "you are an agent", "store": False, "parallel_tool_calls": False,
        "input": [
            {"type": "message", "role": "developer", "content": text("sandbox")},
            {"type": "message", "role": "user", "content": text("go")},
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": None},
            {"type": "function_call", "name": "get_weather", "arguments": "{}", "call_id": "call_1"},
            {"type": "function_call_output", "call_id": "call_1", "output": text("sun")},
        ],
        "tools": [
            {**WEATHER, "description": "runs a command", "strict": False},
            {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark"}},
            {"type": "web_search", "external_web_access": False},
            {"type": "namespace", "name": "mcp", "tools": [WEATHER]},
        ],
        "tool_choice": "auto", "reasoning": None, "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "a-b-c", "client_metadata": {"x-id": "d"}, "text": {"verbosity": "medium"},
    }  # fmt: skip
    with speaking(folder, SAID, skip_hosted_tools=True) as running, running.client() as client:
        events = events_of(client, **body)
        assert [item["type"] for item in gathered(events)] == ["reasoning", "message", "function_call"]
        assert [tool["type"] for tool in events[0]["response"]["tools"]] == ["function"]
        required = {**body, "tools": body["tools"][1:], "tool_choice": "required"}
        assert client.post(RESPONSES, json=required).json()["error"]["param"] == "tool_choice"
    with speaking(folder, SAID) as running, running.client() as client:
        assert "tools[1]" in client.post(RESPONSES, json=body).json()["error"]["message"]


def test_names_of_a_model(folder: Path) -> None:
    with (
        serving(folder, LiveFake(script=script_of("hi")), names=("one", "two/2")) as running,
        running.client() as client,
    ):
        listed = client.get("/v1/models").json()["data"]
        assert [card["id"] for card in listed] == ["one", "two/2"]
        assert client.get("/v1/models/two/2").json()["id"] == "two/2"
        for asked, told in ((None, "one"), ("one", "one"), ("two/2", "two/2")):
            more = {} if asked is None else {"model": asked}
            message = {"messages": [{"role": "user", "content": "x"}], **more}
            assert ask(client, **more)["model"] == told
            assert client.post("/v1/chat/completions", json=message).json()["model"] == told
            assert client.post("/v1/completions", json={"prompt": "x", **more}).json()["model"] == told
            assert events_of(client, **more)[-1]["response"]["model"] == told
        refused = client.post(RESPONSES, json={"input": "x", "model": "three"})
        assert refused.status_code == 404 and "'one', 'two/2'" in refused.json()["error"]["message"]
