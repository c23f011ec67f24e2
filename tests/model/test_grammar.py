"""Masks of a grammar on the tests' tokenizer: where a text may go on, end, and start over."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from semipd.model.grammar import Follower, GrammarTokenizer
from semipd.model.grammar_text import GrammarError, grammar_of_schema
from tests.checkpoints import VOCABULARY, write_tokenizer

END, BEGIN = 0, 1


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def raw(file: Path) -> Tokenizer:
    return Tokenizer.from_file(str(file))


def follower(
    file: Path, schema: Any, vocabulary: int = VOCABULARY, ends: tuple[int, ...] = (END,)
) -> Follower:
    return Follower(GrammarTokenizer(file, vocabulary, ends), grammar_of_schema(json.dumps(schema)))


def allowed(text: Follower, tokens: Sequence[int]) -> set[int]:
    bits = np.unpackbits(text.mask(np.array(tokens, np.int32)).view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def test_a_text_ends_where_it_is_complete_and_nowhere_else(file: Path, raw: Tokenizer) -> None:
    text = follower(file, {"type": "integer", "minimum": 0, "maximum": 99})
    digits = {raw.token_to_id(digit) for digit in "0123456789"}
    assert allowed(text, []) == digits
    four = raw.token_to_id("4")
    assert allowed(text, [four]) == digits | {END}
    assert allowed(text, [four, four]) == {END}
    assert allowed(text, [four, four, END]) == allowed(text, [four, four, four]) == set()


def test_a_text_may_be_followed_from_any_earlier_place(file: Path, raw: Tokenizer) -> None:
    """Also after it went astray, and its copies know nothing of it."""
    text = follower(file, {"enum": ["dog", "dig"]})
    whole = raw.encode('"dog"').ids
    masks = [allowed(text, whole[:length]) for length in range(len(whole) + 1)]
    assert all(token in mask for token, mask in zip(whole, masks, strict=False)) and masks[-1] == {END}
    assert allowed(text, [*whole, *whole]) == set()
    for length in (2, 0, len(whole), 1):
        assert allowed(text, whole[:length]) == masks[length] == allowed(text.copy(), whole[:length])


def test_special_tokens_are_no_text_and_an_end_is_no_character(file: Path, raw: Tokenizer) -> None:
    """Inside a string nearly everything may come, but what steers the model; where a letter is said to be
    the end, it is no letter any more."""
    letter = raw.token_to_id("q")
    inside = allowed(follower(file, {"type": "string"}), raw.encode('"').ids)
    assert letter in inside and len(inside) > 150 and not inside & {END, BEGIN, 2, 3, 4}
    text = follower(file, {"type": "string"}, ends=(letter,))
    assert allowed(text, raw.encode('"').ids) == inside - {letter}
    assert allowed(text, raw.encode('"a"').ids) == {letter}


def test_a_text_that_looks_like_a_tag_is_spelled(file: Path, tmp_path: Path) -> None:
    """Where the vocabulary has a token for the tag, special or only added, as Qwen's for <tool_call>: that
    token alone was let through, and with it the text was lost."""
    raw = Tokenizer.from_file(str(file))
    raw.add_tokens([AddedToken("<tag>", special=False, normalized=False)])
    raw.add_special_tokens([AddedToken("<|tag|>", normalized=False)])
    raw.save(str(tmp_path / "tokenizer.json"))
    vocabulary = raw.get_vocab_size()
    for value in ("a <tag> b", "<|tag|>"):
        text = follower(tmp_path / "tokenizer.json", {"const": value}, vocabulary)
        tokens: list[int] = []
        while (choices := allowed(text, tokens)) != {END}:
            assert choices and len(tokens) < 40 and vocabulary - 1 not in choices
            tokens.append(min(choices))
        assert json.loads(raw.decode(tokens, skip_special_tokens=False)) == value


@pytest.mark.parametrize("vocabulary", [VOCABULARY + 77, VOCABULARY, 300])
def test_logits_and_tokenizer_may_differ_in_size(file: Path, raw: Tokenizer, vocabulary: int) -> None:
    """Entries that the tokenizer lacks are never allowed; those that the model lacks are left out."""
    text = follower(file, {"type": "string"}, vocabulary)
    words = text.mask(np.array(raw.encode('"').ids, np.int32))
    assert words.dtype == np.uint32 and words.size == -(-vocabulary // 32)
    assert max(allowed(text, raw.encode('"').ids)) < -(-min(vocabulary, VOCABULARY) // 32) * 32


def test_a_file_that_is_no_tokenizer_is_told(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(GrammarError, match="cannot follow"):
        GrammarTokenizer(path, 10, (0,))
    path.write_text("{}")
    with pytest.raises(GrammarError, match="cannot follow"):
        GrammarTokenizer(path, 10, (0,))
