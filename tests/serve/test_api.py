"""The HTTP API over the fake engine: answers, streams, counts, and what ends them."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from semipd.config import Config, from_mapping
from semipd.core.errors import ConfigError
from semipd.model.folder import default_model
from semipd.serve.gate import Limits
from semipd.serve.model_folder import read_model_folder
from tests.serve.fakes import LiveFake, eventually, make_folder, make_tokenizer
from tests.serve.serving import Serving, serving

TEXT = "the café 🦊 costs 日本 naïve 👩‍👩‍👧 hello world 🐍 xyzzy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Serving]:
    with serving(folder, LiveFake()) as running:
        yield running


@pytest.fixture
def client(server: Serving) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def scripted(folder: Path) -> Iterator[Serving]:
    """Every sequence says TEXT, then ends."""
    script = [*make_tokenizer().encode(TEXT).ids, 0]
    with serving(folder, LiveFake(script=script)) as running:
        yield running


def events(response: httpx.Response) -> list[Any]:
    """The chunks of a stream; the last line must be [DONE]."""
    lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1]]


def stream(client: httpx.Client, path: str, body: dict[str, Any]) -> list[Any]:
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response)


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_completion_has_text_counts_and_reason(client: httpx.Client) -> None:
    answer = complete(client, model="tiny", prompt="hello world", max_tokens=5)
    choice = answer["choices"][0]
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    assert choice["index"] == 0 and choice["finish_reason"] == "length" and choice["text"]
    prompt = len(make_tokenizer().encode("hello world").ids)
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, 5)
    assert usage["total_tokens"] == prompt + 5


def test_without_max_tokens_a_completion_has_16(client: httpx.Client) -> None:
    assert complete(client, prompt="hello")["usage"]["completion_tokens"] == 16


def test_all_four_forms_of_a_prompt(client: httpx.Client) -> None:
    ids = make_tokenizer().encode("hello world").ids
    text = complete(client, prompt="hello world", seed=1)["choices"][0]["text"]
    assert complete(client, prompt=ids, seed=1)["choices"][0]["text"] == text
    for prompt in (["hello world", "hello"], [ids, [7, 8]]):
        answer = complete(client, prompt=prompt, seed=1)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert answer["choices"][0]["text"] == text
        assert answer["usage"]["completion_tokens"] == 32


def test_streamed_text_is_the_whole_text(client: httpx.Client) -> None:
    """Hashed tokens are mostly broken UTF-8, the worst case for cutting text into pieces."""
    for seed in range(5):
        body = {"prompt": "hello", "max_tokens": 60, "seed": seed}
        chunks = stream(client, "/v1/completions", body)
        whole = complete(client, **body)["choices"][0]["text"]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])
        assert len({chunk["id"] for chunk in chunks}) == 1


def test_characters_are_never_split(scripted: Serving) -> None:
    with scripted.client() as client:
        chunks = stream(client, "/v1/completions", {"prompt": "x", "max_tokens": 200})
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_end_of_sequence_counts_as_a_token_but_has_no_text(scripted: Serving) -> None:
    with scripted.client() as client:
        answer = complete(client, prompt="x", max_tokens=200)
        ignoring = complete(client, prompt="x", max_tokens=200, ignore_eos=True)
    tokens = len(make_tokenizer().encode(TEXT).ids)
    assert answer["usage"]["completion_tokens"] == tokens + 1
    assert answer["choices"][0]["text"] == TEXT
    assert ignoring["usage"]["completion_tokens"] == 200
    assert ignoring["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stop", ["costs", ["nothing", "🦊 co"], "é 🦊", "o wo", ["ld", "lo"]])
def test_a_stop_string_ends_the_text_before_itself(scripted: Serving, stop: Any) -> None:
    stops = [stop] if isinstance(stop, str) else stop
    expected = TEXT[: min(TEXT.find(text) for text in stops if text in TEXT)]
    body = {"prompt": "x", "max_tokens": 200, "stop": stop}
    with scripted.client() as client:
        answer = complete(client, **body)
        chunks = stream(client, "/v1/completions", body)
    assert answer["choices"][0] == {
        "index": 0, "text": expected, "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
    # Counted up to the token that completed the stop string, which is not the end of the script.
    assert answer["usage"]["completion_tokens"] < len(make_tokenizer().encode(TEXT).ids)


def test_stop_token_ids_and_min_tokens(scripted: Serving) -> None:
    script = make_tokenizer().encode(TEXT).ids
    with scripted.client() as client:
        stopped = complete(client, prompt="x", max_tokens=50, stop_token_ids=[script[4]])
        kept = complete(client, prompt="x", max_tokens=50, stop_token_ids=[script[4]], min_tokens=5)
    assert stopped["usage"]["completion_tokens"] == 5 and stopped["choices"][0]["finish_reason"] == "stop"
    assert kept["usage"]["completion_tokens"] > 5


def test_the_usage_chunk_comes_last(client: httpx.Client) -> None:
    body = {"prompt": "hello", "max_tokens": 4, "stream_options": {"include_usage": True}}
    chunks = stream(client, "/v1/completions", body)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    body["stream_options"]["continuous_usage_stats"] = True  # type: ignore[index]
    counts = [chunk["usage"]["completion_tokens"] for chunk in stream(client, "/v1/completions", body)]
    assert counts == sorted(counts) and counts[-1] == 4 and counts[0] >= 1


def test_choices_differ_and_seeds_repeat(client: httpx.Client) -> None:
    def texts(**body: Any) -> list[str]:
        answer = complete(client, prompt=["hello", "world"], n=3, max_tokens=12, **body)
        assert [choice["index"] for choice in answer["choices"]] == list(range(6))
        assert answer["usage"]["completion_tokens"] == 72
        return [choice["text"] for choice in answer["choices"]]

    seeded = texts(seed=-5)
    assert texts(seed=-5) == seeded and len(set(seeded)) == 6
    assert texts() != texts()
    alone = complete(client, prompt="hello", max_tokens=12, seed=-5)["choices"][0]["text"]
    assert alone == seeded[0]


def test_streams_of_several_choices_are_told_apart(client: httpx.Client) -> None:
    body = {"prompt": ["hello", "world"], "n": 2, "max_tokens": 9, "seed": 3}
    texts = ["", "", "", ""]
    for chunk in stream(client, "/v1/completions", body):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in complete(client, **body)["choices"]]


def test_chat_uses_the_template(client: httpx.Client, server: Serving) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]},
    ]
    body = {"messages": messages, "max_completion_tokens": 6, "seed": 2}
    answer = client.post("/v1/chat/completions", json=body).json()
    rendered = "<|begin|><|system|>be brief<|end|>\n<|user|>hello\nworld<|end|>\n<|assistant|>"
    ids = server.service.tokenizer.encode_trusted(rendered)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    content = answer["choices"][0]["message"]["content"]
    assert content == complete(client, prompt=ids, max_tokens=6, seed=2)["choices"][0]["text"]
    chunks = stream(client, "/v1/chat/completions", body)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == content
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_chat_without_max_tokens_goes_to_the_limit(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    usage = client.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["total_tokens"] == 256


def test_the_openai_client_works(server: Serving) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert client.models.list().data[0].id == "tiny"
        answer = client.completions.create(model="tiny", prompt="hello", max_tokens=8, seed=1)
        pieces = [
            chunk.choices[0].text
            for chunk in client.completions.create(
                model="tiny", prompt="hello", max_tokens=8, seed=1, stream=True
            )
        ]
        assert "".join(pieces) == answer.choices[0].text
        chat = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=8, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(chat)
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 8
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt="hello", max_tokens=8, temperature=-1)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="hello")


def test_tokenize_and_back(client: httpx.Client, server: Serving) -> None:
    text = "grüße 😀 <|end|>"
    answer = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert 0 not in answer["tokens"], "user text was parsed for special tokens"
    back = client.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": text}
    messages = [{"role": "user", "content": "hi"}]
    chat = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert chat[0] == 1 and chat[-1] == 4


def test_long_texts_to_tokenize_hold_up_no_request(
    client: httpx.Client, server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They shared their threads with requests: thirty such texts made a request wait for half a minute."""
    begun, over = threading.Semaphore(0), threading.Event()

    def encode(text: str, add_special: bool) -> list[int]:
        begun.release()
        over.wait(20.0)
        return []

    monkeypatch.setattr(server.service, "_encode_any", encode)
    with ThreadPoolExecutor(8) as pool:
        try:
            for _ in range(8):
                pool.submit(client.post, "/tokenize", json={"prompt": "long"})
            assert begun.acquire(timeout=20.0)
            assert client.post("/v1/completions", json={"prompt": "hello"}).status_code == 200
        finally:
            over.set()


def test_state_routes(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    assert client.get("/version").json() == {"version": "1.2.3"}
    model = client.get("/v1/models").json()["data"][0]
    assert (model["id"], model["max_model_len"]) == ("tiny", 256)
    assert (model["vocab_size"], model["suggestions"]) == (400, [])
    assert client.get("/v1/models/tiny").status_code == 200
    description = client.get("/openapi.json").json()
    body = description["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].rpartition("/")[2]
    assert "max_tokens" in description["components"]["schemas"][name]["properties"]


def test_a_folder_may_say_what_to_ask(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    texts = ["What is 17 + 25?", 5, "", "x" * 201, *(f"question {number}" for number in range(9))]
    (folder / "suggestions.json").write_text(json.dumps({"suggestions": texts}))
    assert read_model_folder(folder).suggestions == (
        "What is 17 + 25?",
        *(f"question {number}" for number in range(7)),
    )
    (folder / "suggestions.json").write_text("[")
    with pytest.raises(ConfigError, match=r"suggestions\.json"):
        read_model_folder(folder)
    assert len(read_model_folder(default_model()).suggestions) == 3


def test_metrics_count_exactly(folder: Path) -> None:
    script = [*make_tokenizer().encode(TEXT).ids, 0]
    with serving(folder, LiveFake(script=script)) as running, running.client() as client:
        for _ in range(3):
            complete(client, prompt="hello", max_tokens=7)
        complete(client, prompt="hello", max_tokens=50, stop="café")
        page = client.get("/metrics").text
        usage = client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 1}).json()["usage"]
    values = {
        re.sub(r'model_name="tiny",?', "", name): float(value)
        for name, _, value in (line.rpartition(" ") for line in page.splitlines())
        if not name.startswith("#")
    }
    assert values["semipd:time_to_first_token_seconds_count{}"] == 4
    assert values['semipd:request_success_total{finished_reason="length"}'] == 3
    assert values['semipd:request_success_total{finished_reason="stop"}'] == 1, (
        "a stop string is a success, not an abort"
    )
    assert values['semipd:request_success_total{finished_reason="abort"}'] == 0
    produced = values["semipd:generation_tokens_total{}"]
    assert values["semipd:inter_token_latency_seconds_count{}"] == produced - 4
    assert values["semipd:prompt_tokens_total{}"] == 4 * usage["prompt_tokens"]
    assert 'semipd:time_to_first_token_seconds_bucket{model_name="tiny",le="0.001"}' in page


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_frees_its_request(folder: Path, streaming: bool) -> None:
    with serving(folder, LiveFake(pace=0.02)) as running, eventually(60.0) as wait_for:
        engine = running.thread.planner
        body = {"prompt": ["hello", "world"], "max_tokens": 200, "ignore_eos": True, "stream": streaming}
        with running.client() as client:
            if streaming:
                with client.stream("POST", "/v1/completions", json=body) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=body, timeout=0.3)
        live = engine._engine.live  # type: ignore[union-attr]
        wait_for(lambda: len(live) == 0 and running.service.gate.active == 0)
        wait_for(lambda: not live.by_slot)
        assert engine._metrics.snapshot().finished["length"] == 0, "they were not cut short"
        assert running.service.gate.queued_requests == running.service.gate.queued_tokens == 0


def test_a_client_that_leaves_in_the_middle_of_its_body(folder: Path, caplog: Any) -> None:
    limits = Limits(body_seconds=0.5)
    with serving(folder, LiveFake(), limits=limits) as running, eventually() as wait_for:
        gate = running.service.gate
        port = int(running.url.rpartition(":")[2])
        half = b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"prompt": '
        with socket.create_connection(("127.0.0.1", port)) as leaving:
            leaving.sendall(half)
            wait_for(lambda: gate.active == 1)
        wait_for(lambda: gate.active == 0)
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(half)
            assert b" 408 " in slow.recv(4096)
        wait_for(lambda: gate.active == gate.queued_requests == gate.body_bytes == 0)
    assert not caplog.records, "neither is an error of the server"


def test_bodies_that_wait_are_bounded_together(folder: Path) -> None:
    limits = Limits(bodies=1000)
    with serving(folder, LiveFake(), limits=limits) as running, running.client() as client:
        assert client.post("/v1/completions", json={"prompt": "x " * 800}).status_code == 429
        assert client.post("/tokenize", json={"prompt": "x " * 800}).status_code == 429
        assert running.service.gate.body_bytes == 0
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_a_deadline_ends_a_request(folder: Path) -> None:
    with serving(folder, LiveFake(pace=0.02)) as running, running.client() as client:
        body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True}
        headers = {"X-Request-Timeout": "300ms"}
        late = client.post("/v1/completions", json=body, headers=headers)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        chunks: list[Any] = []
        for seconds in (0.3, 1, 2, 3):  # less than 200 steps take, more than a busy machine's first
            headers = {"X-Request-Timeout": f"{seconds}s"}
            content = json.dumps({**body, "stream": True})
            with client.stream("POST", "/v1/completions", content=content, headers=headers) as response:
                if response.status_code == 200:
                    chunks = events(response)
                    break
        assert chunks[-1]["error"]["code"] == "timeout" and len(chunks) > 1
        for bad in ("soon", "-1", "0", "1e9"):
            refused = client.post("/v1/completions", json=body, headers={"X-Request-Timeout": bad})
            assert refused.json()["error"]["param"] == "X-Request-Timeout"
        with eventually() as wait_for:
            wait_for(lambda: running.service.gate.active == 0)


def test_a_full_queue_refuses_before_tokenising(folder: Path) -> None:
    limits = Limits(queued_requests=2)
    with (
        serving(folder, LiveFake(pace=0.02), limits=limits, sequences=1) as running,
        running.client() as client,
        ThreadPoolExecutor(3) as pool,
        eventually() as wait_for,
    ):
        body = {"prompt": "hello", "max_tokens": 15, "ignore_eos": True}
        gate = running.service.gate
        running_one = pool.submit(lambda: complete(client, **body))
        wait_for(lambda: gate.active == 1 and gate.queued_requests == 0)
        queued = [pool.submit(lambda: complete(client, **body)) for _ in range(2)]
        wait_for(lambda: gate.queued_requests == 2)
        refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        load = client.get("/load").json()
        assert (load["server_load"], load["queued_requests"], load["max_queued_requests"]) == (3, 2, 2)
        assert [f.result()["usage"]["completion_tokens"] for f in (running_one, *queued)] == [15] * 3


def test_bounds_of_the_queue_are_settings() -> None:
    words = {"max-queued-requests": 7, "max-queued-tokens": "4K", "shutdown-timeout": "2m"}
    limits = Limits.of(from_mapping(words).server)
    assert (limits.queued_requests, limits.queued_tokens, limits.drain) == (7, 4096, 120.0)
    assert Limits.of(Config().server) == Limits()


def test_queued_prompt_tokens_are_bounded_too(folder: Path) -> None:
    limits = Limits(queued_tokens=10)
    with (
        serving(folder, LiveFake(pace=0.02), limits=limits, sequences=1) as running,
        running.client() as client,
        ThreadPoolExecutor(2) as pool,
        eventually() as wait_for,
    ):
        prompt = list(range(10, 30))
        gate = running.service.gate
        first = pool.submit(lambda: complete(client, prompt=prompt, max_tokens=30))
        wait_for(lambda: gate.active == 1 and gate.queued_requests == 0)
        second = pool.submit(lambda: complete(client, prompt=prompt, max_tokens=3))
        wait_for(lambda: gate.queued_tokens == 20)
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 429
        assert [first.result()["usage"]["prompt_tokens"], second.result()["usage"]["prompt_tokens"]] == [
            20
        ] * 2
        assert gate.queued_tokens == 0


def test_a_key_is_needed_everywhere_but_for_probes(folder: Path) -> None:
    with serving(folder, LiveFake(), api_key="sésame") as running:
        key = b"Bearer s\xc3\xa9same"
        with running.client() as client:
            for path in (
                "/v1/models",
                "/metrics",
                "/load",
                "/version",
                "/openapi.json",
                "/health/",
                "/none",
                "//health",
            ):
                response = client.get(path)
                assert (response.status_code, response.json()["error"]["code"]) == (
                    401,
                    "invalid_api_key",
                ), path
            assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 401
            assert client.get("/health").status_code == client.get("/ready").status_code == 200
            for wrong in (b"Bearer sesame", b"Bearer", b"", b"Basic s\xc3\xa9same", key + b"x", b"\xff"):
                response = client.get("/v1/models", headers=[(b"authorization", wrong)])
                assert response.status_code == 401
            assert client.get("/v1/models", headers=[(b"authorization", key)]).status_code == 200


def test_a_failed_step_ends_its_requests_and_no_others(folder: Path) -> None:
    executor = LiveFake()
    with serving(folder, executor) as running, running.client() as client:
        executor.fail_next = True
        failed = client.post("/v1/completions", json={"prompt": "hello"})
        assert failed.status_code == 500 and "made to fail" in failed.json()["error"]["message"]
        assert complete(client, prompt="hello")["usage"]["completion_tokens"] == 16


def test_the_engines_death_answers_everyone_at_once(folder: Path) -> None:
    executor = LiveFake(pace=0.02)
    with (
        serving(folder, executor) as running,
        running.client() as client,
        ThreadPoolExecutor(2) as pool,
        eventually() as wait_for,
    ):
        body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True}
        whole = pool.submit(lambda: client.post("/v1/completions", json=body))
        streamed = pool.submit(lambda: stream(client, "/v1/completions", body))
        wait_for(lambda: running.service.gate.active == 2 and running.service.gate.queued_requests == 0)
        executor.kill_all("the machine caught fire")
        answer = whole.result(5)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
        assert "caught fire" in answer.text
        assert streamed.result(5)[-1]["error"]["code"] == "engine_dead"
        assert client.post("/v1/completions", json=body).json()["error"]["code"] == "engine_dead"
        assert client.get("/health").status_code == client.get("/ready").status_code == 503
        assert client.get("/metrics").status_code == 503
