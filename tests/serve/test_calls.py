"""Calls of tools in a model's text: found in whatever pieces the text comes, and no text is lost."""

from __future__ import annotations

import itertools
import json
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from semipd.serve.calls import FORMATS, Call, CallFinder, format_of

KNOWN = frozenset(("f", "get_weather"))
Found = tuple[str, list[tuple[str, str]]]


def find(form: str, pieces: list[str], single: bool = False) -> Found:
    """The text that is no call, and the calls."""
    finder = CallFinder(FORMATS[form], KNOWN, single)
    texts, calls = [], list[Call]()
    for place, piece in enumerate(pieces):
        text, more = finder.feed(piece, last=place == len(pieces) - 1)
        texts.append(text)
        calls += more
        if finder.done:
            break
    assert [call.index for call in calls] == list(range(finder.count))
    assert len({call.id for call in calls}) == len(calls)
    return "".join(texts), [(call.name, call.arguments) for call in calls]


F, G = ("f", "{}"), ("get_weather", '{"city": "Köln"}')
JSON_F, JSON_G = (
    '{"name": "f", "arguments": {}}',
    '{"name":"get_weather","arguments":{"city":"K\\u00f6ln"}}',
)


@pytest.mark.parametrize(
    ("form", "text", "said", "calls"),
    [
        ("hermes", f"<tool_call>\n{JSON_F}\n</tool_call>", "", [F]),
        ("hermes", f"Let me see.\n\n<tool_call>{JSON_F}</tool_call>\n", "Let me see.", [F]),
        ("hermes", f"<tool_call>\n{JSON_F}\n</tool_call>\n<tool_call>\n{JSON_G}\n</tool_call>", "", [F, G]),
        ("hermes", f"<tool_call>{JSON_F}<tool_call>{JSON_G}", "", [F, G]),  # not closed
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [F]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "", [F]),  # encoded twice
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": "\\"</tool_call>\n<tool_call>"}}</tool_call>.',
            ".",
            [("f", '{"a": "\\"</tool_call>\\n<tool_call>"}')],
        ),
        ("hermes", "1 < 2 <tool> <tool_call", "1 < 2 <tool> <tool_call", []),
        ("hermes", "<tool_call>f()</tool_call> ok ", "<tool_call>f()</tool_call> ok ", []),
        ("hermes", '<tool_call>{"name": "f"</tool_call>', '<tool_call>{"name": "f"</tool_call>', []),
        ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ("hermes", '<tool_call>{"name": "f\n ', '<tool_call>{"name": "f\n ', []),
        (
            "hermes",
            f"<tool_call>x</tool_call>\n<tool_call>{JSON_F}</tool_call>",
            "<tool_call>x</tool_call>",
            [F],
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}', None, []),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}', None, []),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}', None, []),
        ("hermes", '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 9999, None, []),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": 1' + "0" * 9999 + "}}</tool_call>",
            None,
            [],
        ),
        ("llama3", '{"name": "f", "parameters": {}}', "", [F]),
        ("llama3", '\n {"name": "f", "parameters": {}}\n', "", [F]),
        ("llama3", f'{{"name": "f", "parameters": {{}}}}; {JSON_G}', "", [F, G]),
        ("llama3", '{"type": "function", "name": "f", "parameters": {}} done', "done", [F]),
        ("llama3", '{"name": "f", "parameters": {}}; {"a": 1} {"b": 2}', '; {"a": 1} {"b": 2}', [F]),
        ("llama3", '{"name": "Ada", "parameters": {}}', None, []),  # an answer in JSON
        ("llama3", '{"name": "f"}', None, []),
        ("llama3", 'I would call {"name": "f", "parameters": {}}', None, []),
        ("llama3", '{"name": "f", "parameters": {', None, []),
        ("mistral", f"[TOOL_CALLS][{JSON_F}, {JSON_G}]", "", [F, G]),
        ("mistral", f"Ah! [TOOL_CALLS] [{JSON_F}]", "Ah!", [F]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]get_weather{"city": "Köln"}', "", [F, G]),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{} and", "and", [F]),
        ("mistral", f"[TOOL_CALLS][{JSON_F}, 5] then", None, []),
        ("mistral", "[TOOL_CALLS][]", None, []),
        ("mistral", "[TOOL_CALL] [TOOL_CALLS] ", None, []),
    ],
)
def test_what_is_a_call(form: str, text: str, said: str | None, calls: list[tuple[str, str]]) -> None:
    """None: the text as it is."""
    expected = (text if said is None else said, calls)
    assert find(form, [text]) == expected
    assert find(form, [*text[:2000], text[2000:]]) == expected


def test_one_call_may_be_the_last() -> None:
    both = f"See: <tool_call>{JSON_F}</tool_call><tool_call>{JSON_G}</tool_call> more"
    assert find("hermes", [both], single=True) == find("hermes", list(both), single=True) == ("See:", [F])
    assert find("mistral", [f"[TOOL_CALLS][{JSON_F}, {JSON_G}]"], single=True) == ("", [F])


SCRAPS = [
    *("<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[TOOL", "f[ARGS]", "[", "]", "{", "}"),
    *(
        JSON_F,
        JSON_G,
        '{"name": "f", "parameters": {"a": "}\\""}}',
        '"',
        "\\",
        ";",
        ",",
        " ",
        "\n",
        "x",
        "é",
    ),
]
scraps = st.lists(st.sampled_from(SCRAPS), max_size=12).map("".join)


@given(st.sampled_from(sorted(FORMATS)), scraps, st.lists(st.integers(0, 200), max_size=12), st.booleans())
@example("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": "\\"]"}}]', [42, 43, 44], False)
@example("llama3", '{"name": "f", "parameters": {}};{"', [30, 32, 33], False)
def test_pieces_do_not_matter_and_nothing_is_lost(
    form: str, text: str, cuts: list[int], single: bool
) -> None:
    places = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)] or [""]
    said, calls = find(form, [text], single)
    assert find(form, pieces, single) == (said, calls)
    if not calls:
        assert said == text
    elif not single:
        bare = re.sub(r"\s", "", said)
        rest = iter(re.sub(r"\s", "", text))
        assert all(letter in rest for letter in bare), "text in its order"
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "scrap", [*SCRAPS[:2], '<tool_call>"', '"</tool_call>', *SCRAPS[3:10], "\n;", "\\"]
)
def test_no_text_takes_long(form: str, scrap: str) -> None:
    """What a client can have a model repeat is read in a time that grows with its length."""
    text = (FORMATS[form].opening or "{") + scrap * (100_000 // len(scrap))
    pieces = [text[at : at + 1000] for at in range(0, len(text), 1000)]
    began = time.process_time()
    said, calls = find(form, pieces)
    assert (said, calls) == (text, [])
    assert time.process_time() - began < 5.0


def test_the_format_is_the_templates() -> None:
    hermes = "{% if tools %}<tool_call>{% endif %}"
    llama = """{{ 'Environment: ipython' }}{% if tools %}{"name": n, "parameters": p}{% endif %}"""
    for template, name in ((hermes, "hermes"), (llama, "llama3"), ("{{ tools }}[TOOL_CALLS]", "mistral")):
        assert format_of("auto", template) is FORMATS[name]
    xml = hermes + "<function=f>"
    assert format_of("auto", xml) is format_of("auto", "{{ tools }}") is format_of("auto", None) is None
    assert format_of("none", hermes) is None and format_of("llama3", hermes) is FORMATS["llama3"]
