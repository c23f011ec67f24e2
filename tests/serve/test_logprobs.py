"""What the API tells of tokens: in step with the text, the same streamed and whole, in its own forms."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semipd.core.types import FinishReason, Score
from semipd.llm import LLM
from semipd.serve import service
from semipd.serve.alignment import Alignment, Told
from semipd.serve.params import SamplingParams
from semipd.serve.session import Piece
from semipd.serve.text import TextStream
from semipd.serve.tokenizer import Tokenizer
from tests.serve.fakes import LiveFake, made_up_score, make_folder, make_tokenizer
from tests.serve.serving import Serving, serving
from tests.serve.test_api import TEXT, complete, stream
from tests.serve.test_llm import over

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
IDS = make_tokenizer().encode(TEXT).ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Serving]:
    """Every sequence says TEXT, then ends."""
    with serving(folder, LiveFake(script=[*IDS, 0])) as running:
        yield running


@pytest.fixture
def client(server: Serving) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def only(answer: dict[str, Any]) -> dict[str, Any]:
    (choice,) = answer["choices"]
    choice_: dict[str, Any] = choice
    return choice_


def as_bytes(token: str) -> bytes:
    """Of a token as the API spells it."""
    if token.startswith("bytes:"):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()


def test_a_completion_tells_of_every_token_of_its_text(client: httpx.Client) -> None:
    answer = complete(client, prompt="x", max_tokens=200, logprobs=2)
    choice, told = only(answer), only(answer)["logprobs"]
    assert choice["text"] == TEXT and answer["usage"]["completion_tokens"] == len(IDS) + 1
    assert {len(values) for values in told.values()} == {len(IDS)}, "the stop token has no text"
    assert b"".join(map(as_bytes, told["tokens"])).decode() == TEXT
    assert told["token_logprobs"] == [made_up_score(token, 2, 400)[0] for token in IDS]
    for token, logprob, top in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        assert top[token] == logprob and 2 <= len(top) <= 3
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert TEXT[offset:].startswith(token)


def test_the_greedy_token_has_the_maximum_bit_for_bit(client: httpx.Client) -> None:
    for best in (1, 0):
        told = only(complete(client, prompt="x", max_tokens=20, logprobs=best))["logprobs"]
        for token, logprob, top in zip(IDS, told["token_logprobs"], told["top_logprobs"], strict=False):
            assert (logprob == max(top.values())) is (token % 3 > 0 or best == 0)


def test_chat_tells_of_tokens_one_by_one(client: httpx.Client) -> None:
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    content = only(client.post(CHAT, json=body).json())["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == TEXT
    assert [entry["logprob"] for entry in content] == [made_up_score(t, 2, 400)[0] for t in IDS]
    assert {len(entry["top_logprobs"]) for entry in content} == {2}
    assert all(as_bytes(entry["token"]) == bytes(entry["bytes"]) for entry in content)
    plain = only(client.post(CHAT, json={"messages": MESSAGES, "logprobs": True}).json())
    assert {len(entry["top_logprobs"]) for entry in plain["logprobs"]["content"]} == {0}
    assert only(client.post(CHAT, json={"messages": MESSAGES}).json())["logprobs"] is None


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stop": "日"},
        {"stop": ["costs 日x", "naïve 👩"]},
        {"stop": "the café", "min_tokens": 5},
        {"max_tokens": 9},
        {"n": 2},
    ],
    ids=str,
)
def test_streams_tell_the_same(client: httpx.Client, more: dict[str, Any]) -> None:
    """Text that a stop string holds back holds back its tokens; what a stop string cuts off is not told."""
    body = {"max_tokens": 200, "prompt": "x", "logprobs": 1, "echo": True, **more}
    whole = complete(client, **body)["choices"]
    chunks = stream(client, COMPLETIONS, body)
    for choice in whole:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]
        for name, expected in choice["logprobs"].items():
            parts = [chunk["logprobs"][name] for chunk in mine if chunk["logprobs"]]
            assert [value for part in parts for value in part] == expected
        told = b"".join(map(as_bytes, choice["logprobs"]["tokens"]))
        assert told.startswith(choice["text"].encode())
        last = as_bytes(choice["logprobs"]["tokens"][-1])
        assert len(told) - len(choice["text"].encode()) < len(last), "a token beyond the text"
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1, **more}
    whole = client.post(CHAT, json=body).json()["choices"]
    chunks = stream(client, CHAT, body)
    for choice in whole:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        parts = [chunk["logprobs"]["content"] for chunk in mine if chunk["logprobs"]]
        assert [entry for part in parts for entry in part] == choice["logprobs"]["content"]


def test_echo_repeats_the_prompt(client: httpx.Client, server: Serving) -> None:
    prompt = "grüße 😀"
    ids = server.service.tokenizer.encode(prompt)
    answer = complete(client, prompt=prompt, max_tokens=200, echo=True, logprobs=1)
    told = only(answer)["logprobs"]
    assert only(answer)["text"] == prompt + TEXT
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:] == [made_up_score(t, 1, 400)[0] for t in [*ids[1:], *IDS]]
    assert b"".join(map(as_bytes, told["tokens"])).decode() == prompt + TEXT
    assert told["text_offset"][len(ids)] == len(prompt)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert only(complete(client, prompt=ids, echo=True, max_tokens=200))["text"] == prompt + TEXT
    texts = complete(client, prompt=["a", "b"], n=2, echo=True, max_tokens=200)["choices"]
    assert [choice["text"] for choice in texts] == ["a" + TEXT, "a" + TEXT, "b" + TEXT, "b" + TEXT]


def test_echo_alone_scores_a_prompt(client: httpx.Client) -> None:
    body = {"prompt": "hello world", "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = complete(client, **body)
    count = answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0
    assert only(answer)["text"] == "hello world" and only(answer)["finish_reason"] == "length"
    assert len(only(answer)["logprobs"]["token_logprobs"]) == count
    (chunk,) = stream(client, COMPLETIONS, body)
    assert chunk["choices"] == answer["choices"]


def test_prompt_logprobs_are_by_token_id(client: httpx.Client, server: Serving) -> None:
    ids = server.service.tokenizer.encode("hello world")
    choice = only(complete(client, prompt="hello world", prompt_logprobs=2, max_tokens=1))
    first, *others = choice["prompt_logprobs"]
    assert first is None and len(others) == len(ids) - 1 and choice["logprobs"] is None
    for token, entry in zip(ids[1:], others, strict=True):
        assert entry[str(token)]["logprob"] == made_up_score(token, 2, 400)[0]
        assert 2 <= len(entry) <= 3
    chat = only(client.post(CHAT, json={"messages": MESSAGES, "prompt_logprobs": 0}).json())
    assert len(chat["prompt_logprobs"]) > 5 and {len(e) for e in chat["prompt_logprobs"][1:]} == {1}
    assert "prompt_logprobs" not in only(complete(client, prompt="x", echo=True, logprobs=1))


def test_numbers_of_one_answer_are_bounded(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bytes of a request must not ask for gigabytes of an answer."""
    monkeypatch.setattr(service, "MAX_PROMPT_NUMBERS", 60)
    monkeypatch.setattr(service, "MAX_NUMBERS", 60)
    ids = [5] * 10
    for body, param in (
        ({"prompt": [ids] * 2, "prompt_logprobs": 2}, None),
        ({"prompt": [ids] * 2, "prompt_logprobs": 3}, "prompt_logprobs"),
        ({"prompt": ids, "n": 3, "logprobs": 2, "echo": True, "max_tokens": 1}, "prompt_logprobs"),
        ({"prompt": ids, "n": 2, "logprobs": 2, "max_tokens": 10}, None),
        ({"prompt": ids, "n": 2, "logprobs": 2, "max_tokens": 11}, "logprobs"),
    ):
        answer = client.post(COMPLETIONS, json=body)
        assert answer.status_code == (400 if param else 200)
        assert answer.json().get("error", {}).get("param") == param


def test_the_openai_client_reads_them(server: Serving) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        done = client.completions.create(
            model="tiny", prompt="x", max_tokens=5, logprobs=3, echo=True, presence_penalty=1.0,
            frequency_penalty=0.5, logit_bias={"7": -100}, extra_body={"repetition_penalty": 1.2},
        )  # fmt: skip
        logprobs = done.choices[0].logprobs
        assert logprobs is not None and logprobs.token_logprobs is not None
        assert len(logprobs.token_logprobs) == 6
        chunks = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=5, logprobs=True,
            top_logprobs=2, stream=True,
        )  # fmt: skip
        told = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs is not None]
        tokens = [entry for part in told for entry in part.content or []]
        assert len(tokens) == 5 and all(len(entry.top_logprobs) == 2 for entry in tokens)


def test_llm_gives_a_score_for_every_token(folder: Path) -> None:
    """The stop token's, too: one for each of `token_ids`."""
    with over(folder, LiveFake(script=[*IDS, 0])) as llm:
        check_llm(llm)


def check_llm(llm: LLM) -> None:
    params = SamplingParams(max_tokens=200, logprobs=2, prompt_logprobs=1, n=2)
    (result, plain) = llm.generate([[5, 6, 7], [8]], [params, SamplingParams(max_tokens=2)])
    for output in result.outputs:
        assert output.logprobs is not None and output.token_ids == [*IDS, 0]
        assert [score.position for score in output.logprobs] == list(range(3, 4 + len(IDS)))
        assert [score.logprob for score in output.logprobs] == [
            made_up_score(token, 2, 400)[0] for token in output.token_ids
        ]
    assert result.prompt_logprobs is not None and result.prompt_logprobs[0] is None
    assert [score and score.position for score in result.prompt_logprobs[1:]] == [1, 2]
    assert plain.prompt_logprobs is plain.outputs[0].logprobs is None
    stopped = SamplingParams(max_tokens=200, logprobs=0, stop="costs")
    output = llm.generate([[5]], stopped)[0].outputs[0]
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([*set(IDS)]) | st.integers(5, 390), max_size=12),
    st.lists(st.text("thec aé日\ufffd", min_size=1, max_size=3), max_size=2),
    st.integers(0, 6),
    st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
    st.data(),
)
def test_what_is_told_does_not_depend_on_the_grouping(
    tokens: list[int], stops: list[str], min_tokens: int, finish: FinishReason, data: st.DataObject
) -> None:
    if finish is FinishReason.STOP:
        tokens = [*tokens, 0]
    scores = [Score(0, place, -float(place), (), ()) for place in range(len(tokens))]
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(tokens) - 1, 1)))))
    found = []
    for places in ([], cuts, list(range(1, len(tokens)))):
        text, told = run(tokens, scores, places, stops, min_tokens, finish)
        assert [one.token for one in told] == tokens[: len(told)]
        assert all(one.score == score for one, score in zip(told, scores, strict=False))
        found.append((text, told))
    assert found[0] == found[1] == found[2]


TOKENIZER: list[Tokenizer] = []


@pytest.fixture(autouse=True, scope="module")
def tokenizer(folder: Path) -> None:
    TOKENIZER[:] = [Tokenizer(folder)]


def run(
    tokens: list[int],
    scores: list[Score],
    cuts: list[int],
    stops: list[str],
    min_tokens: int,
    finish: FinishReason,
) -> tuple[str, list[Told]]:
    """Text and tokens of a stream that gets the tokens in pieces, cut at these places."""
    stream = TextStream(TOKENIZER[0], stops, min_tokens, alignment=Alignment())
    text, told = "", []
    borders = [0, *[cut for cut in cuts if cut < len(tokens)], len(tokens)]
    for first, end in itertools.pairwise(borders):
        last = end == len(tokens)
        piece = Piece(0, tokens[first:end], finish if last else None, scores=scores[first:end])
        delta = stream.feed(piece)
        text += delta.text
        told += delta.told
        if delta.finish:
            break
    return text, told
