"""What vLLM's clients ask for besides the text: ids, cut prompts, stop strings and special tokens in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from semipd.core.errors import Refused
from semipd.serve.params import SamplingParams
from semipd.serve.stops import StopFinder
from tests.serve.fakes import MAX_LENGTH, LiveFake, make_folder, make_tokenizer
from tests.serve.serving import Serving, serving
from tests.serve.test_api import stream

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEXT = "naïve café, hello world 🐍 and more"
SCRIPT = [*make_tokenizer().encode(TEXT).ids, 0]
PROMPT = "the quick brown fox"
IDS = make_tokenizer().encode(PROMPT).ids
USER: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Serving]:
    with serving(folder, LiveFake(script=SCRIPT)) as running:
        yield running


@pytest.fixture
def client(server: Serving) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def post(client: httpx.Client, path: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    prompt = {"prompt": PROMPT} if path == COMPLETIONS else USER
    response = client.post(path, json={"max_tokens": 99, **prompt, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_ids_of_a_completion(client: httpx.Client) -> None:
    assert "token_ids" not in post(client)["choices"][0]
    prompts = [PROMPT, [7, 8, 9]]
    answer = post(client, prompt=prompts, n=2, return_token_ids=True)
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [IDS, IDS, [7, 8, 9], [7, 8, 9]]
    assert all(choice["token_ids"] == SCRIPT for choice in answer["choices"])
    body = {"prompt": prompts, "max_tokens": 99, "return_token_ids": True}
    choices = [chunk["choices"][0] for chunk in stream(client, COMPLETIONS, body)]
    for index, ids in enumerate((IDS, [7, 8, 9])):
        mine = [choice for choice in choices if choice["index"] == index]
        assert [token for choice in mine for token in choice["token_ids"]] == SCRIPT
        assert [choice.get("prompt_token_ids") for choice in mine] == [ids] + [None] * (len(mine) - 1)


def test_ids_of_a_chat(client: httpx.Client) -> None:
    ids = client.post("/tokenize", json=USER).json()["tokens"]
    answer = post(client, CHAT, n=2, return_token_ids=True)
    assert answer["prompt_token_ids"] == ids
    assert [choice["token_ids"] for choice in answer["choices"]] == [SCRIPT, SCRIPT]
    options = {"include_usage": True}
    body = {**USER, "max_tokens": 99, "return_token_ids": True, "n": 2, "stream_options": options}
    chunks = stream(client, CHAT, body)
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [ids] + [None] * (len(chunks) - 1)
    told = [
        choice.get("token_ids", []) for chunk in chunks for choice in chunk["choices"] if choice["index"]
    ]
    assert list(itertools.chain(*told)) == SCRIPT


def test_scores_of_a_prompt_come_first_in_a_stream(client: httpx.Client) -> None:
    for path, prompt in ((COMPLETIONS, {"prompt": PROMPT}), (CHAT, USER)):
        whole = post(client, path, prompt_logprobs=2, temperature=0)["choices"][0]["prompt_logprobs"]
        body = {**prompt, "max_tokens": 99, "prompt_logprobs": 2, "temperature": 0}
        chunks = [chunk["choices"][0] for chunk in stream(client, path, body)]
        assert [chunk["prompt_logprobs"] for chunk in chunks if "prompt_logprobs" in chunk] == [whole]


def test_only_the_end_of_a_prompt_counts(client: httpx.Client) -> None:
    def shown(path: str = COMPLETIONS, **body: Any) -> list[int]:
        answer = post(client, path, return_token_ids=True, **body)
        ids: list[int] = (answer["choices"][0] | answer)["prompt_token_ids"]
        assert answer["usage"]["prompt_tokens"] == len(ids)
        return ids

    long = "hello world, " * 500
    ids = make_tokenizer().encode(long).ids
    assert shown(truncate_prompt_tokens=2) == IDS[-2:]
    assert shown(truncate_prompt_tokens=999) == IDS
    assert shown(prompt=long, truncate_prompt_tokens=50) == ids[-50:]
    assert shown(prompt=long, truncate_prompt_tokens=-1, max_tokens=20) == ids[20 - MAX_LENGTH :]
    assert shown(prompt=ids, truncate_prompt_tokens=-1, max_tokens=20) == ids[20 - MAX_LENGTH :]
    messages = [{"role": "user", "content": long}]
    assert len(shown(CHAT, messages=messages, truncate_prompt_tokens=50)) == 50
    assert len(shown(CHAT, messages=messages, truncate_prompt_tokens=-1, max_tokens=9)) == MAX_LENGTH - 9
    answer = post(client, truncate_prompt_tokens=2, echo=True)
    assert answer["choices"][0]["text"] == make_tokenizer().decode(IDS[-2:]) + TEXT


def test_an_answer_bears_the_clients_id(client: httpx.Client) -> None:
    assert post(client, request_id="mine-1")["id"] == "cmpl-mine-1"
    assert post(client, CHAT, request_id="mine-1")["id"] == "chatcmpl-mine-1"
    assert post(client)["id"] != post(client)["id"]
    body = {"prompt": PROMPT, "max_tokens": 2, "request_id": "50%d%%"}
    assert {chunk["id"] for chunk in stream(client, COMPLETIONS, body)} == {"cmpl-50%d%%"}


def test_a_stop_string_may_stay(client: httpx.Client) -> None:
    stop = {"stop": ["café", "é, h"], "include_stop_str_in_output": True}
    choice = post(client, **stop)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("naïve café", "stop")
    chunks = stream(client, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 99, **stop})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "naïve café"
    token = SCRIPT[5]
    cut = post(client, stop_token_ids=[token])["choices"][0]["text"]
    whole = post(client, stop_token_ids=[token], include_stop_str_in_output=True)["choices"][0]["text"]
    assert whole == make_tokenizer().decode(SCRIPT[:6]) != cut


def test_the_match_that_stays_does_not_depend_on_the_pieces() -> None:
    text, stops = "abcabdabcd!", ["abcd", "cd"]
    for cut in range(len(text) - 1):
        finder = StopFinder(stops, include=True)
        assert finder.feed(text[:cut]) + finder.feed(text[cut:]) == "abcabdabcd" and finder.found


def test_special_tokens_may_have_a_text(folder: Path) -> None:
    with serving(folder, LiveFake(script=[*SCRIPT[:3], 4, 0])) as running, running.client() as client:
        bare = make_tokenizer().decode(SCRIPT[:3])
        assert post(client)["choices"][0]["text"] == bare
        body = {"skip_special_tokens": False, "ignore_eos": True, "max_tokens": 5}
        assert post(client, **body)["choices"][0]["text"] == bare + "<|assistant|><|end|>"
        assert post(client, skip_special_tokens=False)["choices"][0]["text"] == bare + "<|assistant|>"


def test_in_python_they_are_checked() -> None:
    for name in ("skip_special_tokens", "include_stop_str_in_output"):
        with pytest.raises(Refused) as caught:
            SamplingParams(**{name: None})
        assert caught.value.param == name


def test_a_message_may_go_on(client: httpx.Client) -> None:
    """An answer that was begun: the model sees no new turn, and with echo the client gets it whole."""
    messages = [USER["messages"][0], {"role": "assistant", "content": "hello wor"}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    answer = post(client, CHAT, **body, return_token_ids=True)
    shown = make_tokenizer().decode(answer["prompt_token_ids"], skip_special_tokens=False)
    assert shown.endswith("<|assistant|>hello wor")
    assert answer["choices"][0]["message"]["content"] == TEXT
    answer = post(client, CHAT, **body, echo=True, n=2, logprobs=True)
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["hello wor" + TEXT] * 2
    entries = [choice["logprobs"]["content"] for choice in answer["choices"]]
    assert [len(told) for told in entries] == [len(SCRIPT) - 1] * 2
    chunks = stream(client, CHAT, {**body, "echo": True, "max_tokens": 99})
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "hello wor" + TEXT
    assert post(client, CHAT, echo=True)["choices"][0]["message"]["content"] == TEXT, "not of a user"
