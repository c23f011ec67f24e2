"""The whole thing on a real, tiny model: the command line, the API process, the engine, the workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import psutil
import pytest
from pydantic import BaseModel, Field

from semipd import LLM, SamplingParams
from semipd.cli import main
from tests.checkpoints import make_checkpoint
from tests.serve.fakes import eventually
from tests.serve.test_tools import TEMPLATE as TOOL_TEMPLATE

ROOT = Path(__file__).parents[2]
FLAGS = {"kv_blocks": 128, "dtype": "float32", "max_model_len": 512}
PROMPTS = ["hello world", "the quick brown fox", "🦊 jumps", "a b c d " * 20]
PATIENCE = 60.0
GREEDY: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}


class Served:
    """A `semipd serve` of its own. starting: seconds until it served."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        began = time.monotonic()
        assert process.stdout is not None
        self.process = process
        self.url = next(word for word in process.stdout.readline().split() if word.startswith("http://"))
        self.starting = time.monotonic() - began
        self.family = psutil.Process(process.pid).children(recursive=True)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60.0, trust_env=False)

    def named(self, name: str) -> psutil.Process:
        found = psutil.Process(self.process.pid).children(recursive=True)
        return next(process for process in found if process.cmdline()[:1] == [name])


@contextlib.contextmanager
def serve(folder: Path, **more: Any) -> Iterator[Served]:
    flags = [
        part
        for name, value in {**FLAGS, **more}.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "semipd.cli", "serve", str(folder), "--port", "0", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Served(process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=PATIENCE)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serve(folder) as running:
        yield running


@pytest.fixture(scope="module")
def greedy(folder: Path) -> dict[str, str]:
    """What `LLM` makes of each prompt."""
    with LLM(str(folder), **FLAGS) as llm:
        results = llm.generate(PROMPTS, SamplingParams(**GREEDY))
    return {prompt: result.outputs[0].text for prompt, result in zip(PROMPTS, results, strict=True)}


def text_of(client: httpx.Client, prompt: str, **params: Any) -> str:
    response = client.post("/v1/completions", json={"prompt": prompt, **GREEDY, **params})
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def streamed(client: httpx.Client, prompt: str, **params: Any) -> str:
    body = {"prompt": prompt, **GREEDY, **params, "stream": True}
    text = ""
    with client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    return text


def test_http_and_offline_give_the_same_text(served: Served, greedy: dict[str, str]) -> None:
    with served.client() as client, ThreadPoolExecutor(8) as pool:
        assert {prompt: text_of(client, prompt) for prompt in PROMPTS} == greedy
        both = [pool.submit(streamed, client, prompt) for prompt in PROMPTS]
        both += [pool.submit(text_of, client, prompt) for prompt in PROMPTS]
        assert [future.result() for future in both] == [greedy[prompt] for prompt in PROMPTS] * 2


def test_a_seed_repeats_alone_and_in_company(served: Served) -> None:
    with served.client() as client, ThreadPoolExecutor(8) as pool:
        params = {"temperature": 1.0, "seed": 7, "top_k": 50}
        alone = text_of(client, "hello world", **params)
        company = [pool.submit(text_of, client, prompt, **params) for prompt in [*PROMPTS, "hello world"]]
        assert company[0].result() == company[-1].result() == alone
        assert text_of(client, "hello world", **{**params, "seed": 8}) != alone


def test_min_tokens_holds_on_the_device(served: Served) -> None:
    """A fifth of all ids are stop tokens, which may only come after the third token."""
    with served.client() as client:
        body = {"prompt": "hello", "max_tokens": 20, "temperature": 1.0, "seed": 3}
        stops = list(range(40, 100))
        for seed in range(3):
            answer = client.post(
                "/v1/completions", json={**body, "seed": seed, "stop_token_ids": stops, "min_tokens": 3}
            ).json()
            assert answer["usage"]["completion_tokens"] > 3


def test_a_model_that_knows_nothing_calls_the_tools_that_it_must(served: Served) -> None:
    place = {"enum": ["here", "there"]}
    look = {
        "type": "object",
        "properties": {"at": place},
        "required": ["at"],
        "additionalProperties": False,
    }
    functions = [{"name": "look", "parameters": look, "strict": True}, {"name": "wait"}]
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hello"}],
        "tools": [{"type": "function", "function": function} for function in functions],
        "parallel_tool_calls": False,
        "n": 4,
        "seed": 3,
    }
    named = {"type": "function", "function": {"name": "look"}}

    def choices(**more: Any) -> list[dict[str, Any]]:
        response = client.post("/v1/chat/completions", json={**body, **more})
        assert response.status_code == 200, response.text
        found: list[dict[str, Any]] = response.json()["choices"]
        return found

    def calls(choice: dict[str, Any]) -> list[dict[str, Any]]:
        return [call["function"] for call in choice["message"].get("tool_calls", ())]

    with served.client() as client:
        for choice in choices(tool_choice="required"):
            (call,) = calls(choice)
            assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
            assert call["name"] in ("look", "wait")
        for choice in choices(tool_choice=named):
            (call,) = calls(choice)
            assert json.loads(call["arguments"])["at"] in ("here", "there") and call["name"] == "look"
        for choice in choices(tool_choice="auto", max_tokens=20):
            assert not calls(choice), "a model like this one does not know how"
        for choice in choices(response_format={"type": "json_object"}, max_tokens=60):
            text = choice["message"]["content"]
            done = choice["finish_reason"] != "length"
            assert not done or calls(choice) or isinstance(json.loads(text), dict)


def test_chat_and_prefix_cache(served: Served) -> None:
    messages = [{"role": "user", "content": "the quick brown fox " * 6}]
    with served.client() as client:
        body = {"messages": messages, **GREEDY}
        first, second = (client.post("/v1/chat/completions", json=body).json() for _ in range(2))
        assert first["choices"] == second["choices"]
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        salted = client.post("/v1/chat/completions", json={**body, "cache_salt": "mine"}).json()
        assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def under_way(client: httpx.Client) -> int:
    """HTTP requests that the server works on."""
    return int(client.get("/load").json()["server_load"])


def waiting(client: httpx.Client) -> int:
    """Requests without a first token."""
    return int(client.get("/load").json()["queued_requests"])


def test_a_disconnect_frees_everything(served: Served) -> None:
    with served.client() as client:
        body = {"prompt": PROMPTS, "n": 4, "max_tokens": 400, "temperature": 1.0, "ignore_eos": True}
        with pytest.raises(httpx.ReadTimeout):  # 400 steps take longer than that on any machine
            client.post("/v1/completions", json=body, timeout=httpx.Timeout(PATIENCE, read=0.05))
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            next(response.iter_lines())

        def idle() -> bool:
            page = client.get("/metrics").text
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            values = [
                line for line in page.splitlines() if line.startswith(tuple(f"semipd:{n}" for n in names))
            ]
            return len(values) == 3 and all(float(line.rpartition(" ")[2]) == 0 for line in values)

        with eventually(PATIENCE) as wait_for:
            wait_for(idle)


def test_a_killed_worker_changes_no_token(served: Served, greedy: dict[str, str]) -> None:
    with served.client() as client, ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(streamed, client, prompt, max_tokens=200) for prompt in PROMPTS]
        with eventually(PATIENCE) as wait_for:
            wait_for(lambda: (under_way(client) and not waiting(client)) or all(f.done() for f in futures))
        served.named("semipd-decode").kill()
        texts = [future.result() for future in futures]
        assert [text_of(client, prompt, max_tokens=200) for prompt in PROMPTS] == texts
        assert all(
            text.startswith(greedy[prompt][:-1]) for prompt, text in zip(PROMPTS, texts, strict=True)
        )
        assert client.get("/health").status_code == 200


class Animal(BaseModel):
    """What random weights are asked to say."""

    name: str = Field(max_length=6)
    legs: int = Field(ge=0, le=1000)
    sounds: list[Literal["miau", "wuff"]] = Field(max_length=2)
    wild: bool | None


def openai_of(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


def test_random_weights_speak_json_in_the_openai_client(served: Served) -> None:
    """Parsed into the caller's own class, each of several choices; the same from a stream, by the seed."""
    messages: Any = [{"role": "user", "content": "Which animal?"}]
    with openai_of(served) as client:
        model = client.models.list().data[0].id
        asked: Any = {
            "model": model,
            "messages": messages,
            "max_tokens": 300,
            "temperature": 0.8,
            "seed": 5,
        }
        found = client.chat.completions.parse(**asked, n=3, response_format=Animal).choices
        assert [choice.finish_reason for choice in found] == ["stop"] * 3
        assert all(isinstance(choice.message.parsed, Animal) for choice in found)
        assert len({choice.message.content for choice in found}) == 3
        with client.chat.completions.stream(**asked, response_format=Animal) as stream:
            streamed = stream.get_final_completion().choices[0].message
        assert streamed.parsed == found[0].message.parsed and streamed.content == found[0].message.content
        asked |= {"temperature": 0.0, "logit_bias": {str(token): 8 for token in (95, 97)}}
        (free,) = client.chat.completions.create(**asked, response_format={"type": "json_object"}).choices
        assert isinstance(json.loads(free.message.content or ""), dict) and free.finish_reason == "stop"
        (cut,) = client.chat.completions.create(**asked | {"max_tokens": 3}, response_format=FORM).choices
        assert cut.finish_reason == "length"


FORM: Any = {"type": "json_schema", "json_schema": {"name": "animal", "schema": Animal.model_json_schema()}}


def test_grammars_beside_free_texts_and_a_death(served: Served, greedy: dict[str, str]) -> None:
    """In the same batches, with the decode worker killed under them; nobody's text changes, and what cannot
    be is an error of its own."""
    ruled = {"response_format": FORM, "ignore_eos": False, "max_tokens": 300}

    def impossible(client: httpx.Client) -> int:
        body = {"prompt": "a", "allowed_token_ids": [70, 71], "bad_words": ["b", "c"]}
        return client.post("/v1/completions", json=body).status_code

    with served.client() as client, ThreadPoolExecutor(16) as pool:
        alone = [text_of(client, prompt, **ruled) for prompt in PROMPTS]
        for prompt, text in zip(PROMPTS, alone, strict=True):
            assert isinstance(Animal.model_validate_json(text), Animal), prompt
        free = [pool.submit(text_of, client, prompt) for prompt in PROMPTS]
        bound = [pool.submit(streamed, client, prompt, **ruled) for prompt in PROMPTS * 2]
        failing = pool.submit(impossible, client)
        with eventually(PATIENCE) as wait_for:
            wait_for(lambda: (under_way(client) and not waiting(client)) or all(f.done() for f in bound))
        served.named("semipd-decode").kill()
        assert [future.result() for future in free] == [greedy[prompt] for prompt in PROMPTS]
        assert [future.result() for future in bound] == alone * 2
        assert failing.result() == 400


def test_torch_is_where_it_belongs(served: Served) -> None:
    def has_torch(pid: int) -> bool:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()

    assert not has_torch(served.process.pid)
    assert not has_torch(served.named("semipd-engine").pid)
    assert has_torch(served.named("semipd-prefill").pid)


def test_ctrl_c_leaves_nothing_behind(folder: Path) -> None:
    with serve(folder) as running, running.client() as client, ThreadPoolExecutor(2) as pool:
        assert len(running.family) >= 4, "engine, resident and two workers"
        body = {"prompt": "hello", "max_tokens": 450, "ignore_eos": True}
        cut = pool.submit(client.post, "/v1/completions", json=body)
        with eventually(PATIENCE) as wait_for:
            wait_for(lambda: under_way(client) or cut.done())
            began = time.monotonic()
            os.kill(running.process.pid, signal.SIGINT)
            assert running.process.wait(PATIENCE) == 0
            wait_for(lambda: not any(map(_runs, running.family)))
        # Five seconds, or longer on a machine that also takes longer to start it.
        assert time.monotonic() - began < max(5.0, running.starting)
        assert cut.result(PATIENCE).status_code in (200, 503)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def test_a_recorded_trace_is_replayed_by_the_simulator(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    long = "the quick brown fox jumps over the lazy dog " * 4
    with serve(folder, record_trace=path) as running, running.client() as client:
        usages = [
            client.post("/v1/completions", json={"prompt": prompt, **GREEDY, "max_tokens": 8}).json()[
                "usage"
            ]
            for prompt in (long, long, "hello world")
        ]
        lines = path.read_text().splitlines()  # every row is there as soon as its request has ended
    rows = [json.loads(line) for line in lines]
    assert [row["prompt_tokens"] for row in rows] == [usage["prompt_tokens"] for usage in usages]
    assert [row["output_tokens"] for row in rows] == [8, 8, 8]
    assert rows[0]["keys"] == rows[1]["keys"] and len(rows[0]["keys"]) == usages[0]["prompt_tokens"] // 16
    assert abs(rows[0]["time"] - time.time()) < 600 and rows[0]["time"] < rows[1]["time"]
    assert "quick" not in path.read_text()
    assert main(["simulate", "--trace", str(path), "--trace-format", "semipd", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert replayed["requests"] == 3
    assert replayed["output_throughput"] * replayed["simulated_s"] == pytest.approx(24)
