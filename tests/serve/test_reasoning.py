"""What a model thinks is told from what it answers, however the text comes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd.core.types import Sampling
from semipd.serve.reasoning import ReasoningFinder
from tests.serve.fakes import LiveFake, make_folder, make_tokenizer
from tests.serve.serving import Serving, speaking

CHAT = "/v1/chat/completions"
USER: dict[str, Any] = {"role": "user", "content": "and köln?"}
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}{% if not loop.last or message.role == 'user' %}<|end|>\n{% endif %}{% endfor %}"
    "{% if tools %}<tool_call>{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% elif reasoning_effort == 'high' %}<think>\n{% endif %}{% endif %}"
)


def split(text: str, begun: bool, cuts: list[int]) -> tuple[str, str]:
    places = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)] or [""]
    finder = ReasoningFinder(begun)
    found = [finder.feed(piece, last=place == len(pieces) - 1) for place, piece in enumerate(pieces)]
    return "".join(thought for thought, _ in found), "".join(answer for _, answer in found)


@pytest.mark.parametrize(
    ("text", "begun", "thought", "answer"),
    [
        ("<think>\na b\n</think>\n\n  c\n", False, "a b", "c\n"),
        (" <think>a</think>", False, "a", ""),
        ("<think>\n\n</think>\n\nc", False, "", "c"),
        (" c <think>a</think>", False, "", " c <think>a</think>"),
        ("<thin", False, "", "<thin"),
        ("<think> a </thi", False, "a </thi", ""),  # cut off
        ("a\n</think>c</think>", True, "a", "c</think>"),
        ("\n<think>a</think>c", True, "a", "c"),
        ("a", True, "a", ""),
        ("", False, "", ""),
    ],
)
def test_what_is_reasoning(text: str, begun: bool, thought: str, answer: str) -> None:
    assert split(text, begun, []) == split(text, begun, list(range(len(text)))) == (thought, answer)


scraps = st.lists(st.sampled_from(["<think>", "</think>", "<", "</th", "a", " ", "\n"]), max_size=9).map(
    "".join
)


@given(scraps, st.booleans(), st.lists(st.integers(0, 40), max_size=9))
def test_pieces_do_not_matter(text: str, begun: bool, cuts: list[int]) -> None:
    assert split(text, begun, cuts) == split(text, begun, [])


CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
SAID = f"<think>\nköln, {CALL}?\n</think>\n\nlet me see.\n{CALL}"
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Serving]:
    with speaking(folder, SAID) as running:
        yield running


def message_of(server: Serving, **body: Any) -> dict[str, Any]:
    with server.client() as client:
        response = client.post(CHAT, json={"messages": [USER], **body})
        assert response.status_code == 200, response.text
        message: dict[str, Any] = response.json()["choices"][0]["message"]
        return message


def test_an_answer_and_a_stream_tell_it_apart(server: Serving) -> None:
    message = message_of(server, tools=[TOOL])
    assert message["reasoning_content"] == f"köln, {CALL}?" and message["content"] == "let me see."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["f"]
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model="tiny", messages=[USER], stream=True, n=2)  # type: ignore[call-overload]
        deltas = [choice for chunk in stream for choice in chunk.choices]
    whole = message_of(server)
    for index in range(2):
        mine = [choice.delta for choice in deltas if choice.index == index]
        thought = [getattr(delta, "reasoning_content", None) or "" for delta in mine]
        assert "".join(thought) == whole["reasoning_content"] and any(thought)
        assert "".join(delta.content or "" for delta in mine) == whole["content"]
    scored = message_of(server, logprobs=True, include_reasoning=False)
    assert "reasoning_content" not in scored and scored["content"] == whole["content"]
    cut = message_of(server, max_tokens=9)
    assert cut["content"] is None and cut["reasoning_content"].startswith("k")


def test_the_template_may_begin_it_or_end_it(folder: Path, server: Serving) -> None:
    """A prompt that ends inside the reasoning, or behind it."""
    assert message_of(server, chat_template_kwargs={"enable_thinking": False}) == {
        "role": "assistant",
        "content": SAID,
    }
    with speaking(folder, "well\n</think>yes") as running:
        assert message_of(running, reasoning_effort="high") == {
            "role": "assistant",
            "content": "yes",
            "reasoning_content": "well",
        }
        assert message_of(running)["content"] == "well\n</think>yes"
        begun = {"role": "assistant", "content": "<think>very "}
        go_on = {"continue_final_message": True, "add_generation_prompt": False}
        assert message_of(running, messages=[USER, begun], **go_on)["reasoning_content"] == "well"
        echoed = message_of(running, messages=[USER, begun], echo=True, **go_on)
        assert echoed["reasoning_content"] == "very well" and echoed["content"] == "yes"


def test_the_switch(folder: Path, tmp_path: Path) -> None:
    plain = make_folder(tmp_path)
    with speaking(folder, SAID, reasoning_parser="none") as running:
        assert message_of(running)["content"] == SAID
    with speaking(plain, SAID) as running:  # the template knows of no reasoning
        assert message_of(running)["content"] == SAID
        with running.client() as client:
            answer = client.post(CHAT, json={"messages": [USER], "reasoning_effort": "high"})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "reasoning_effort")
    with speaking(plain, SAID, reasoning_parser="qwen3") as running:
        assert message_of(running)["reasoning_content"].startswith("köln")
    with speaking(plain, "well </think> yes", reasoning_parser="deepseek_r1") as running:
        assert message_of(running)["reasoning_content"] == "well"


def test_reasoning_comes_back_in_the_next_turn(server: Serving) -> None:
    """Under either name, and without a content where the answer was cut off."""
    shown = []
    for said in (
        {"reasoning_content": "so", "content": "yes"},
        {"reasoning": "so", "content": "yes"},
        {"reasoning_content": "so", "content": None},
    ):
        body = {"messages": [USER, {"role": "assistant", **said}, USER]}
        with server.client() as client:
            tokens = client.post("/tokenize", json=body).json()["tokens"]
            bad = {"messages": [{**USER, **said, "content": "x"}]}
            assert client.post("/tokenize", json=bad).json()["error"]["param"] == "messages"
        shown.append(make_tokenizer().decode(tokens))
    assert "<think>so</think>yes" in shown[0] and shown[0] == shown[1]
    assert shown[2] == shown[0].replace("yes", "")


def test_a_format_leaves_room_for_thought(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grammar that comes to the engine has the tags in it, unless the template ended the reasoning."""
    grammars: list[str] = []
    opening = LiveFake.open

    def noting(fake: LiveFake, slot: int, tokens: Sequence[int], sampling: Sampling) -> None:
        grammars.append("" if sampling.constraint is None else sampling.constraint.grammar)
        opening(fake, slot, tokens, sampling)

    monkeypatch.setattr(LiveFake, "open", noting)
    schema = {"name": "a", "schema": {"type": "object", "not": {}}}
    with speaking(folder, SAID) as running:
        asked = {"response_format": {"type": "json_object"}, "max_tokens": 40}
        message_of(running, **asked)
        message_of(running, **asked, chat_template_kwargs={"enable_thinking": False})
        message_of(running, tools=[TOOL], tool_choice="required")
        message_of(running)
        body = {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": schema}}
        with running.client() as client:
            answer = client.post(CHAT, json=body)
    assert ["think>" in grammar for grammar in grammars] == [True, False, True, False]
    assert grammars[1] and not grammars[3]
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "response_format"
    assert answer.json()["error"]["message"].startswith("response_format: this schema")
