"""Texts that must call tools: what follows the grammar is found to be calls; no other text follows it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llguidance
import pytest
from tokenizers import AddedToken

from semipd.core.errors import Refused
from semipd.serve.call_grammar import CallGrammar, answer_grammar, behind_reasoning, schemas_of
from semipd.serve.call_parts import joined
from semipd.serve.call_xml import types_of
from semipd.serve.calls import FORMATS, CallFinder
from semipd.serve.tokenizer import Tokenizer
from tests.serve.fakes import make_folder, make_tokenizer

LOOK: dict[str, Any] = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/place"}, "n": {"type": "integer", "minimum": 0, "maximum": 20}},
    "required": ["at", "n"],
    "additionalProperties": False,
    "$defs": {"place": {"enum": ["x", "</tool_call>", 'a "b" [TOOL_CALLS]', "é"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": LOOK}},
    {"type": "function", "function": {"name": 'g"é'}},
]
NAMES = frozenset(("look", 'g"é'))
ALL, STRICT = schemas_of(TOOLS, NAMES), schemas_of(TOOLS, {"look"})
MARKS = {"<tool_call>": 3, "</tool_call>": 4, "[TOOL_CALLS]": 3, "[ARGS]": 4, "[CALL_ID]": 2}
WAYS = [("hermes", False), ("llama3", False), ("mistral", False), ("mistral", True), ("qwen3_coder", False)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = make_folder(tmp_path_factory.mktemp("model"))
    return llguidance.LLTokenizer((folder / "tokenizer.json").read_text(), eos_token=[0])


class Walk:
    """One text that follows a grammar."""

    def __init__(self, tokenizer: Any, lark: str, marks: dict[str, int]) -> None:
        grammar = llguidance.LLMatcher.grammar_from_lark(lark)
        assert not (error := llguidance.LLMatcher.validate_grammar(grammar, tokenizer)), error
        self._matcher = llguidance.LLMatcher(tokenizer, grammar)
        self._named = {index: text for text, index in marks.items()}
        self._raw = make_tokenizer()

    def follows(self, *parts: str | int) -> bool:
        """Whether a text may be this, of characters and special tokens, and end there."""
        ids = [
            i for part in parts for i in ([part] if isinstance(part, int) else self._raw.encode(part).ids)
        ]
        self._matcher.reset()
        whole = self._matcher.validate_tokens(ids) == len(ids)
        return whole and bool(self._matcher.consume_tokens(ids)) and bool(self._matcher.is_accepting())

    def special_after(self, text: str) -> set[int]:
        """Special tokens that may come next."""
        self._matcher.reset()
        self._matcher.consume_tokens(self._raw.encode(text).ids)
        mask = self._matcher.compute_bitmask()
        return {index for index in range(5) if mask[0] >> index & 1}

    def random(self, dice: random.Random) -> list[str]:
        """A text by chance, token by token."""
        self._matcher.reset()
        pieces = []
        for _ in range(2000):
            mask = self._matcher.compute_bitmask()
            choice = dice.choice([i for i in range(len(mask) * 8) if mask[i // 8] >> i % 8 & 1])
            if choice == 0:
                break
            self._matcher.consume_token(choice)
            name = self._named.get(choice)
            pieces.append(name or self._raw.decode([choice]))
        return pieces


def schema_in(name: str) -> dict[str, Any]:
    return LOOK if name == "look" else {}


def calls_in(form: str, pieces: Sequence[str]) -> tuple[str, list[tuple[str, Any]]]:
    finder = CallFinder(FORMATS[form], {name: schema_in(name) for name in NAMES})
    text, calls = finder.feed("".join(pieces), last=True)
    return text, [(call.name, json.loads(call.arguments)) for call in joined(calls)]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("form", "by_name"), WAYS)
def test_what_follows_is_a_call(tokenizer: Any, form: str, by_name: bool, special: bool) -> None:
    marks = {text: MARKS[text] for text in FORMATS[form].marks} if special else {}
    dice = random.Random(1)
    seen: set[int] = set()
    for single in (False, True):
        walk = Walk(tokenizer, CallGrammar(FORMATS[form], marks, by_name).required(ALL, single), marks)
        for _ in range(6):
            pieces = walk.random(dice)
            text, calls = calls_in(form, pieces)
            assert text == "" and calls, pieces
            assert len(calls) == 1 or not single
            seen.add(len(calls))
            for name, arguments in calls:
                assert name in NAMES
                assert arguments == {} if name != "look" else set(arguments) == {"at", "n"}
        assert not walk.follows("hello") and not walk.follows("")
    assert seen > {1} or form == "llama3"


@pytest.mark.parametrize(("form", "by_name"), WAYS)
def test_calls_or_an_answer_in_json(tokenizer: Any, form: str, by_name: bool) -> None:
    schema = json.dumps(
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": ["object", "array"], "required": ["b"]}}}
    )
    marks = {text: MARKS[text] for text in FORMATS[form].marks} if by_name else {}
    grammar = CallGrammar(FORMATS[form], marks, by_name)
    assert grammar.takes_answers == (form in ("hermes", "qwen3_coder") or by_name)
    if grammar.takes_answers:
        walk = Walk(tokenizer, grammar.required(ALL, False, schema), marks)
        assert walk.follows('{"b": 1}') and walk.follows("[1]")
        assert not walk.follows("{}") and not walk.follows("hello")
        dice = random.Random(2)
        assert any(calls_in(form, walk.random(dice))[1] for _ in range(20))


LOOKS, EMPTY = '{"at": "é", "n": 7}', "{}"
BAD = '{"at": "é", "n": "many"}'


def hermes(arguments: str, name: str = "look") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_free_text_with_strict_calls(tokenizer: Any) -> None:
    walk = Walk(tokenizer, CallGrammar(FORMATS["hermes"], {}).allowed(STRICT), {})
    for text in ("", "hi", "a <tool> <tool_cal", "</tool_call>", f"hi {hermes(LOOKS)}\n{hermes(LOOKS)} so"):
        assert walk.follows(text), text
    assert walk.follows(hermes('{"what": [1]}', 'g\\"é')), "not strict"
    assert not walk.follows(hermes(BAD)) and not walk.follows(hermes(EMPTY, "other"))
    assert not walk.follows("<tool_call> is a tag")
    assert walk.special_after("hi") == walk.special_after("") == {0}, "besides the end"


TEXTS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "code": {"type": "string", "pattern": "^[a-z]+/(?:x|y)$", "maxLength": 5},
        "has": {"type": "string", "pattern": "ab|c"},
        "maybe": {"anyOf": [{"enum": ["one", "two"]}, {"type": "null"}]},
        "place": {"$ref": "#/$defs/place"},
        "list": {"type": "array", "items": {"$ref": "#/$defs/place"}},
    },
    "required": ["text"],
    "$defs": {"place": {"type": "string", "minLength": 2}},
}


def tags(**arguments: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function=look>\n{inner}</function>\n</tool_call>"


def test_arguments_in_tags_follow_their_schemas(tokenizer: Any) -> None:
    form = FORMATS["qwen3_coder"]
    walk = Walk(tokenizer, CallGrammar(form, {}).required({"look": TEXTS}, True), {})
    for good in (
        {"text": ""},
        {"text": '\n "é" <tag>\n\n</param\n'},
        {"text": "5", "code": "ab/x"},
        {"text": "5", "has": "xxc\n", "maybe": "two"},
        {"text": "5", "maybe": "null", "place": "aé", "list": '["aé", "bbb"]'},
    ):
        assert walk.follows(tags(**good)), good
        (call,) = joined(CallFinder(form, {"look": TEXTS}).feed(tags(**good), last=True)[1])
        assert json.loads(call.arguments).keys() == good.keys()
        assert json.loads(call.arguments)["text"] == good["text"]
    for bad in (
        {},
        {"text": "x</parameter>"},
        {"text": "x", "code": "ab/z"},
        {"text": "x", "code": "abcd/x"},
        {"text": "x", "has": "xx"},
        {"text": "x", "maybe": "three"},
        {"text": "x", "place": "a"},
        {"text": "x", "list": '["a"]'},
        {"text": "x", "other": "y"},
        {"code": "ab/x", "text": "x"},
    ):
        assert not walk.follows(tags(**bad)), bad
    free = Walk(tokenizer, CallGrammar(form, {}).allowed(schemas_of(TOOLS, ())), {})
    assert free.follows("So: " + tags(what="is", that="?")) and not free.follows("<tool_call>{}")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "string", "format": "date"},
        {"type": "string", "pattern": "^a|b$"},
        {"enum": ["</parameter>"]},
        {"type": "string", "maxLength": -1},
    ],
)
def test_what_tags_cannot_follow_is_refused(part: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        CallGrammar(FORMATS["qwen3_coder"], {}).required({"f": {"properties": {"a": part}}}, True)
    for schema in ({"anyOf": [{}]}, {"properties": {"a>": {}}}):
        with pytest.raises(Refused):
            CallGrammar(FORMATS["qwen3_coder"], {}).required({"f": schema}, True)


def test_choices_that_refer_to_each_other_end() -> None:
    """There are 40 to the 16 ways from one to the next: whoever walks them all does so for ever."""
    defined = {
        f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{(i + k) % 40}"} for k in range(40)]} for i in range(40)
    }
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/d0"}},
        "$defs": defined,
    }
    assert types_of(schema["properties"]["x"], schema) == {"string"}
    defined["d39"] = {"type": "boolean"}
    assert types_of(schema["properties"]["x"], schema) == {"boolean"}
    with pytest.raises(Refused, match="too deep"):
        CallGrammar(FORMATS["qwen3_coder"], {}).required({"f": schema}, True)
    for i in range(5):
        defined[f"d{i}"] = {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 40}
    defined["d5"] = {"type": "boolean"}
    with pytest.raises(Refused, match="65536 bytes"):
        CallGrammar(FORMATS["qwen3_coder"], {}).required({"f": schema}, True)


def test_free_text_with_strict_calls_in_other_forms(tokenizer: Any) -> None:
    walk = Walk(tokenizer, CallGrammar(FORMATS["llama3"], {}).allowed(STRICT), {})
    for text in ("", "hi {", f'{{"name": "look", "parameters": {LOOKS}}}'):
        assert walk.follows(text), text
    assert not walk.follows(f'{{"name": "look", "parameters": {BAD}}}') and not walk.follows("{}")

    marks = {"[TOOL_CALLS]": 3, "[ARGS]": 4}
    walk = Walk(tokenizer, CallGrammar(FORMATS["mistral"], marks).allowed(STRICT), marks)
    assert walk.follows("hi") and walk.follows("hi", 3, f' [{{"name": "look", "arguments": {LOOKS}}}]')
    assert not walk.follows(3, f'[{{"name": "look", "arguments": {BAD}}}]') and not walk.follows(3, "hi")
    walk = Walk(tokenizer, CallGrammar(FORMATS["mistral"], marks, True).allowed(STRICT), marks)
    assert walk.follows("hi") and walk.follows("hi", 3, "look", 4, LOOKS, 3, "look", 4, LOOKS)
    assert walk.special_after("hi") == {0, 3}
    assert not walk.follows(3, "look", 4, BAD) and not walk.follows(3, "other", 4, EMPTY)


def test_an_answer_that_follows_a_grammar_may_be_thought_about(tokenizer: Any) -> None:
    tags = ("<think>", "</think>")
    answer = answer_grammar('{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}')
    walk = Walk(tokenizer, behind_reasoning(answer, False, tags, {}), {})
    thought = "so {} <think> it\nis</"
    for good in ('{"a": 1}', f'<think>{thought}</think>\n\n{{"a": 1}}', '<think></think>{"a": 1}'):
        assert walk.follows(good), good
    for bad in (
        thought,
        "{}",
        f"<think>{thought}</think>",
        "<think></think>{}",
        f'{thought}</think>{{"a": 1}}',
    ):
        assert not walk.follows(bad), bad
    walk = Walk(tokenizer, behind_reasoning(answer, True, tags, {}), {})
    assert walk.follows(f'{thought}</think>\n{{"a": 1}}') and not walk.follows('{"a": 1}')

    calls = CallGrammar(FORMATS["hermes"], {}).required(STRICT, False)
    walk = Walk(tokenizer, behind_reasoning(calls, False, tags, {}), {})
    assert walk.follows(hermes(LOOKS)) and walk.follows(f"<think>{hermes(BAD)}</think>\n{hermes(LOOKS)}")
    assert not walk.follows(f"<think>{hermes(LOOKS)}</think>")

    marks = {"<think>": 2, "</think>": 3}
    walk = Walk(tokenizer, behind_reasoning(answer, False, tags, marks), marks)
    assert walk.follows('{"a": 1}') and walk.follows(2, "</think> so", 3, '\n{"a": 1}')
    assert not walk.follows('<think>so</think>{"a": 1}') and not walk.follows(2, "so", 3)


def test_marks_that_are_added_and_not_special(tmp_path: Path) -> None:
    """As in tokenizers of Qwen: a grammar knows such a token by its id, and as text it fits nowhere."""
    raw = make_tokenizer()
    names = ("<tool_call>", "</tool_call>", "<think>", "[X]", "<y", "word")
    raw.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    folder = make_folder(tmp_path)
    raw.save(str(folder / "tokenizer.json"))
    ours = Tokenizer(folder)
    theirs = llguidance.LLTokenizer((folder / "tokenizer.json").read_text(), eos_token=[0])
    added = {token.content: index for index, token in raw.get_added_tokens_decoder().items()}
    assert ours.tags == {text: i for text, i in added.items() if theirs.is_special_token(i)}

    form = FORMATS["hermes"]
    marks = {text: ours.tags[text] for text in form.marks}
    lark = behind_reasoning(
        CallGrammar(form, marks).required(ALL, True), False, ("<think>", "</think>"), {}
    )
    matcher = llguidance.LLMatcher(theirs, llguidance.LLMatcher.grammar_from_lark(lark))
    text = hermes('{"at": "x", "n": 7}')
    ids = ours.encode(text, False)
    assert ids[0] == ours.tags["<tool_call>"] and ids[-1] == ours.tags["</tool_call>"]
    for index in ids:
        mask = matcher.compute_bitmask()
        assert mask[index // 8] >> index % 8 & 1 and matcher.consume_token(index), ours.token_string(index)
    assert matcher.is_accepting()
