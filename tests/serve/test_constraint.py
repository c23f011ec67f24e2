"""Response formats, allowed tokens and bad words: what is taken, what is refused and how quickly."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semipd.core.errors import Refused
from semipd.serve.constraint import MAX_SCHEMA_BYTES, ConstraintMaker, Lark
from semipd.serve.model_folder import ModelFolder, read_model_folder
from semipd.serve.params import SamplingParams
from semipd.serve.tokenizer import Tokenizer
from tests.serve.fakes import make_folder

OBJECT = {"type": "json_object"}


def form(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return read_model_folder(make_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def maker(model: ModelFolder) -> Iterator[ConstraintMaker]:
    maker = ConstraintMaker(model, Tokenizer(model.path))
    yield maker
    maker.close()


def refusal(maker: ConstraintMaker, **fields: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        maker.of(SamplingParams(**fields))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return caught.value


def test_nothing_is_asked_for_by_default(maker: ConstraintMaker) -> None:
    assert maker.of(SamplingParams()) is None
    assert maker.of(SamplingParams(response_format={"type": "text"}, bad_words=[])) is None


@pytest.mark.parametrize(
    "response_format",
    [
        {},
        {"type": "yaml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": []}},
        {"type": "json_object", "json_schema": {"name": "x", "schema": {}}},
        {"type": "json_object", "whitespace": 3},
        form({"type": "strng"}),
        form({"not": {"type": "string"}}),
        form({"type": "string", "format": "no such format"}),
        form({"type": "string", "pattern": "(("}),
        form({"type": "string", "pattern": "(?=a)b"}),
        form({"type": "integer", "minimum": 5, "maximum": 3}),
        form({"$ref": "#"}),
        form({"$ref": "http://example.invalid/schema.json"}),
        form({}, size=3),
        form({"default": object()}),
    ],
    ids=lambda value: json.dumps(value, default=str)[:60],
)
def test_a_format_that_cannot_be_followed_is_refused(
    maker: ConstraintMaker, response_format: dict[str, Any]
) -> None:
    assert refusal(maker, response_format=response_format).param == "response_format"


@pytest.mark.parametrize(
    "schema",
    [
        nested(70),
        nested(900),
        {"enum": ["x" * MAX_SCHEMA_BYTES]},
        {
            "type": "integer",
            "multipleOf": 62_615_533,
        },  # an automaton of as many states, whatever the limits
        {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (991, 997)]},
        {"items": [{"properties": {"a": {"type": "number", "multipleOf": 1234.567}}}]},
        {"type": "integer", "multipleOf": 1e300},
        {"allOf": [{"type": "string", "pattern": f"^(a{{{prime}}})+b$"} for prime in (79, 83, 89, 97)]},
        {"type": "string", "allOf": [{"pattern": "a*" + count * "b"} for count in range(30)]},
        {
            "type": "object",
            "properties": {f"property {index}": {"type": "string"} for index in range(1500)},
        },
        {"type": "string", "pattern": "a?" * 2049},
        {"type": "object", "patternProperties": {"a?" * 2049: {}}},
        {"type": "string", "minLength": 1000, "pattern": "^[a-z]{1,200}([0-9]{1,200}[a-z]{1,200}){1,200}$"},
    ],
)
def test_what_would_take_for_ever_is_refused_at_once(maker: ConstraintMaker, schema: Any) -> None:
    """Without a bound, ours or the library's, these take minutes, gigabytes or the stack."""
    before = time.thread_time()
    assert refusal(maker, response_format=form(schema)).param == "response_format"
    assert time.thread_time() - before < 5.0


def test_a_grammar_that_no_slot_has_room_for_is_refused(maker: ConstraintMaker) -> None:
    """Its characters are within the limit, its bytes are not; the planner had no words for it."""
    text = f'start: "{chr(0x65E5) * 50_000}"'
    assert len(text) < MAX_SCHEMA_BYTES
    with pytest.raises(Refused, match="bytes; at most 131072"):
        maker.of(SamplingParams(), Lark(text, text, "tools"))


def test_a_schema_does_not_change_how_it_is_read(maker: ConstraintMaker) -> None:
    """llguidance takes options from the schema itself: such as to overlook what it does not know."""
    options = {"lenient": True, "whitespace_pattern": "[ab]*"}
    assert refusal(maker, response_format=form({"not": {}, "x-guidance": options}))
    constraint = maker.of(SamplingParams(response_format=form({"type": "integer", "x-guidance": options})))
    assert constraint is not None and "[ab]*" not in constraint.grammar


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"ignore_eos": True}, "ignore_eos"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
    ],
)
def test_contradictions_are_told(maker: ConstraintMaker, more: dict[str, Any], param: str) -> None:
    assert refusal(maker, response_format=OBJECT, **more).param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": []},
        {"allowed_token_ids": [400]},
        {"allowed_token_ids": [-1]},
        {"allowed_token_ids": [True]},
        {"allowed_token_ids": list(range(5000))},
        {"bad_words": "fox"},
        {"bad_words": [""]},
        {"bad_words": [3]},
        {"bad_words": ["x"] * 65},
        {"bad_words": ["x" * 257]},
        {"bad_words": ["日" * 200]},
        {"response_format": "json_object"},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_fields_out_of_bounds_are_refused(maker: ConstraintMaker, fields: dict[str, Any]) -> None:
    assert refusal(maker, **fields).param == next(iter(fields))


def test_bad_words_are_spelled_as_vllm_spells_them(maker: ConstraintMaker, model: ModelFolder) -> None:
    """At the beginning and behind a blank, where that is another token and not one more."""
    tokenizer = Tokenizer(model.path)
    constraint = maker.of(SamplingParams(bad_words=["hello", "Q", "quick brown"]))
    assert constraint is not None and constraint.grammar == ""
    texts = [tokenizer.decode(ids) for ids in constraint.bad_words]
    assert (
        texts[0] == "hello" and "Q" in texts and " Q" not in texts
    )  # " Q" is two tokens, so its last is "Q"
    for text, ids in zip(texts, constraint.bad_words, strict=True):
        assert tuple(tokenizer.encode(text, False)) == ids
    assert len({len(ids) for ids in constraint.bad_words if "hello" in tokenizer.decode(ids)}) == 1


def test_a_model_without_an_end_says_its_last_token(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if path.is_file():
            settings = json.loads(path.read_text())
            path.write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token_id"}))
    model = read_model_folder(folder)
    assert model.eos == ()
    constraint = ConstraintMaker(model, Tokenizer(folder)).of(SamplingParams(response_format=OBJECT))
    assert constraint is not None and constraint.ends == (model.vocabulary - 1,)


def test_without_a_tokenizer_only_ids_can_be_named(model: ModelFolder) -> None:
    maker = ConstraintMaker(model, None)
    constraint = maker.of(SamplingParams(allowed_token_ids=(7, 5, 7)))
    assert constraint is not None and constraint.allowed == (7, 5)
    assert refusal(maker, response_format=OBJECT).param == "response_format"
    assert refusal(maker, bad_words=["fox"]).param == "bad_words"
