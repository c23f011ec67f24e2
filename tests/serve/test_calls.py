"""Calls of tools in a model's text: found in whatever pieces the text comes, and no text is lost."""

from __future__ import annotations

import itertools
import json
import re
import time

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from semipd.serve.call_parts import CallPart, joined
from semipd.serve.calls import FORMATS, CallFinder, format_of

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string"},
        "n": {"type": "integer"},
        "x": {"type": ["number", "null"]},
        "yes": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "list": {"$ref": "#/$defs/list"},
        "any": {},
        "either": {"type": ["string", "integer"]},
    },
    "$defs": {"list": {"type": "array"}},
}
KNOWN = {"f": SCHEMA, "get_weather": {}}
Found = tuple[str, list[tuple[str, str]]]


def find(form: str, pieces: list[str], single: bool = False) -> Found:
    """The text that is no call, and the calls."""
    finder = CallFinder(FORMATS[form], KNOWN, single)
    texts, parts = [], list[CallPart]()
    for place, piece in enumerate(pieces):
        text, more = finder.feed(piece, last=place == len(pieces) - 1)
        texts.append(text)
        parts += more
        if finder.done:
            break
    calls = joined(parts)
    assert [call.index for call in calls] == list(range(finder.count))
    assert all(part.arguments != "" or part.id for part in parts)
    assert len({call.id for call in calls}) == len(calls)
    return "".join(texts), [(call.name, call.arguments) for call in calls]


F, G = ("f", "{}"), ("get_weather", '{"city":"K\\u00f6ln"}')  # arguments as they were written
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
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": nul', "", [("f", '{"a": nul')]),  # cut off
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>.', ".", [("f", '{"a": 1')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": {}}} so', "so", [("f", '{"a": {}}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}, "id": {"b": "}"}}</tool_call> so', "so", [F]),
        ("hermes", '<tool_call>{"arguments": {"a": "ö"}, "name": "f"}', "", [("f", '{"a": "ö"}')]),
        ("hermes", '<tool_call>{"arguments": {"a": NaN}, "name": "f"}', None, []),
        ("hermes", '<tool_call>{"arguments": {"a": "\\ud800"}, "name": "f"}', None, []),
        ("hermes", "<tool_call>{" + " " * 2000 + JSON_F[1:] + "</tool_call>", "", [F]),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}', None, []),
        ("hermes", '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 9999, "", [("f", '{"a":' * 9999)]),
        ("hermes", '<tool_call>{"arguments": {"a": 1' + "0" * 9999 + '}, "name": "f"}', None, []),
        (
            "hermes",
            '<tool_call>{"type": "function", "id": "1", "name": "f", "arguments": {"a": "\n\\\n\t"}}',
            "",
            [("f", '{"a": "\\n\\n\\t"}')],
        ),
        ("llama3", '{"name": "f", "parameters": {}}', "", [F]),
        ("llama3", '\n {"name": "f", "parameters": {}}\n', "", [F]),
        ("llama3", f'{{"name": "f", "parameters": {{}}}}; {JSON_G}', "", [F, G]),
        ("llama3", '{"type": "function", "name": "f", "parameters": {}} done', "done", [F]),
        ("llama3", '{"name": "f", "parameters": {}}; {"a": 1} {"b": 2}', '; {"a": 1} {"b": 2}', [F]),
        ("llama3", '{"name": "Ada", "parameters": {}}', None, []),  # an answer in JSON
        ("llama3", '{"name": "f"}', None, []),
        ("llama3", 'I would call {"name": "f", "parameters": {}}', None, []),
        ("llama3", '{"name": "f", "parameters": {', "", [("f", "{")]),
        ("llama3", '{"name": "f", "parameters": 5}', None, []),
        ("mistral", f"[TOOL_CALLS][{JSON_F}, {JSON_G}]", "", [F, G]),
        ("mistral", f"Ah! [TOOL_CALLS] [{JSON_F}]", "Ah!", [F]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]get_weather{"city":"K\\u00f6ln"}', "", [F, G]),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{} and", "and", [F]),
        ("mistral", f"[TOOL_CALLS][{JSON_F}, 5] then", ", 5] then", [F]),
        (
            "mistral",
            f'[TOOL_CALLS] [{JSON_F} , {{"arguments": {{}}, "name": "f"}},{JSON_F}].',
            ".",
            [F] * 3,
        ),
        ("mistral", f"[TOOL_CALLS]{JSON_F}, {JSON_F}", f", {JSON_F}", [F]),
        ("mistral", "[TOOL_CALLS][]", None, []),
        ("mistral", "[TOOL_CALL] [TOOL_CALLS] ", None, []),
    ],
)
def test_what_is_a_call(form: str, text: str, said: str | None, calls: list[tuple[str, str]]) -> None:
    """None: the text as it is."""
    expected = (text if said is None else said, calls)
    assert find(form, [text]) == expected
    assert find(form, [*text[:2000], text[2000:]]) == expected


X = "<function=f>\n%s</function>\n"
P = "<parameter=%s>\n%s\n</parameter>\n"


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (f"<tool_call>\n{X % ''}</tool_call>", "", ["{}"]),
        (f"So:\n<tool_call>{X % ''}</tool_call>\n<tool_call>{X % ''}</tool_call>\n", "So:", ["{}", "{}"]),
        (f"<tool_call>{X % ''}{X % ''}</tool_call> so", "so", ["{}", "{}"]),
        (f"<tool_call>{X % (P % ('a', 'x'))}</tool_call>", "", ['{"a": "x"}']),
        (f"<tool_call>{X % (P % ('a', '5'))} so", "so", ['{"a": "5"}']),
        (f"<tool_call>{X % (P % ('n', ' 5') + P % ('x', '1.5'))}", "", ['{"n": 5, "x": 1.5}']),
        (f"<tool_call>{X % (P % ('yes', 'True') + P % ('x', 'None'))}", "", ['{"yes": true, "x": null}']),
        (f"<tool_call>{X % (P % ('n', 'many'))}", "", ['{"n": "many"}']),
        (f"<tool_call>{X % (P % ('either', '5') + P % ('any', '5'))}", "", ['{"either": 5, "any": "5"}']),
        (
            f"<tool_call>{X % (P % ('either', 'five') + P % ('b', '5'))}",
            "",
            ['{"either": "five", "b": "5"}'],
        ),
        (f"<tool_call>{X % (P % ('list', '[1,[2]]'))}", "", ['{"list": [1, [2]]}']),
        (
            "<tool_call>" + X % (P % ("a", ' \n</tool_call>é"</param\n')),
            "",
            ['{"a": " \\n</tool_call>é\\"</param\\n"}'],
        ),
        (f"<tool_call>{X % (P % ('a', chr(10)))}", "", ['{"a": "\\n"}']),
        (f"<tool_call>{X % '<parameter=a></parameter>'}", "", ['{"a": ""}']),
        ("<tool_call><function=f><parameter=a>\nso fa", "", ['{"a": "so fa']),  # cut off
        ("<tool_call><function=f><parameter=n>\n5", "", ['{"n": ']),
        ("<tool_call><function=f>", "", [""]),
        ("<tool_call><function=f> and so on", "and so on", ["{}"]),
        (f"<tool_call>{JSON_F}</tool_call>", "", ["{}"]),
        ("<tool_call><function f></tool_call> <func", None, []),
    ],
)
def test_calls_in_tags(text: str, said: str | None, calls: list[str]) -> None:
    expected = (text if said is None else said, [("f", arguments) for arguments in calls])
    assert find("qwen3_coder", [text]) == find("qwen3_coder", list(text)) == expected


def in_tags(arguments: dict[str, object]) -> str:
    """As the template of Qwen3-Coder writes a call."""
    values = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()
    }
    return f"<tool_call>\n{X % ''.join(P % pair for pair in values.items())}</tool_call>"


in_schema = st.fixed_dictionaries(
    {},
    optional={
        "a": st.text(max_size=30),
        "n": st.integers(),
        "x": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "yes": st.none() | st.booleans(),
        "list": st.lists(st.text(max_size=9) | st.integers() | st.just({"a": [None]}), max_size=3),
    },
)


@given(in_schema, st.integers(1, 40), st.sampled_from(["hermes", "llama3", "mistral", "qwen3_coder"]))
def test_arguments_come_as_they_are(arguments: dict[str, object], step: int, form: str) -> None:
    """What a template makes of a call is found to be that call, in whatever pieces it comes."""
    body = json.dumps(arguments, ensure_ascii=step % 2 == 0)
    text = {
        "hermes": f'<tool_call>\n{{"name": "f", "arguments": {body}}}\n</tool_call>',
        "llama3": f'{{"name": "f", "parameters": {body}}}',
        "mistral": f'[TOOL_CALLS] [{{"name": "f", "arguments": {body}}}]',
        "qwen3_coder": in_tags(arguments),
    }[form]
    assume(form != "qwen3_coder" or text.count("</parameter>") == len(arguments))
    said, calls = find(form, [text[at : at + step] for at in range(0, len(text), step)])
    assert said == "" and [name for name, _ in calls] == ["f"]
    assert json.loads(calls[0][1]) == arguments


@pytest.mark.parametrize("form", ["hermes", "qwen3_coder"])
def test_a_call_that_was_cut_off_is_not_done(form: str) -> None:
    """Or its answer would not say that it was cut off."""
    text = {"hermes": f"<tool_call>{JSON_F}", "qwen3_coder": in_tags({"n": 5, "a": "x"})}[form]
    for length in range(len(text)):
        finder = CallFinder(FORMATS[form], KNOWN, single=True)
        finder.feed(text[:length], last=True)
        assert not finder.done or "\n</tool_call>".endswith(text[length:])


def test_arguments_are_told_as_they_come() -> None:
    """OpenAI's shape: the name first, without arguments, and then these, in pieces."""
    value = "a long text " * 10
    for form, text in (
        ("hermes", '<tool_call>{"name": "f", "arguments": ' + json.dumps({"a": value})),
        ("qwen3_coder", in_tags({"a": value})),
    ):
        finder = CallFinder(FORMATS[form], KNOWN)
        told = [part for at in range(0, len(text), 5) for part in finder.feed(text[at : at + 5])[1]]
        assert (told[0].name, told[0].arguments, told[0].index) == ("f", "", 0) and told[0].id
        assert all(part.id is part.name is None and part.index == 0 for part in told[1:])
        assert len(told) > 20 and max(len(part.arguments) for part in told) < 20


def test_one_call_may_be_the_last() -> None:
    both = f"See: <tool_call>{JSON_F}</tool_call><tool_call>{JSON_G}</tool_call> more"
    assert find("hermes", [both], single=True) == find("hermes", list(both), single=True) == ("See:", [F])
    assert find("mistral", [f"[TOOL_CALLS][{JSON_F}, {JSON_G}]"], single=True) == ("", [F])


SCRAPS = [
    *("<function=f>", "</function>", "<parameter=a>", "<parameter=n>", "</parameter>", "</par"),
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
        assert all(arguments[:1] in ("", "{") for _, arguments in calls)


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
    assert (said, calls) == (text, []) or (form, scrap) == ("qwen3_coder", "<function=f>")
    assert time.process_time() - began < 5.0


def test_the_format_is_the_templates() -> None:
    hermes = "{% if tools %}<tool_call>{% endif %}"
    llama = """{{ 'Environment: ipython' }}{% if tools %}{"name": n, "parameters": p}{% endif %}"""
    for template, name in ((hermes, "hermes"), (llama, "llama3"), ("{{ tools }}[TOOL_CALLS]", "mistral")):
        assert format_of("auto", template) is FORMATS[name]
    assert format_of("auto", hermes + "<function=f>") is FORMATS["qwen3_coder"]
    for template in (hermes + "<arg_key>", "{{ tools }}", None):
        assert format_of("auto", template) is None
    assert format_of("none", hermes) is None and format_of("llama3", hermes) is FORMATS["llama3"]
