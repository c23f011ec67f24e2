"""Text to ids and back: characters stay whole, and user text cannot spell a special token."""

from __future__ import annotations

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from semipd.core.errors import ConfigError, Refused
from semipd.serve.tokenizer import Tokenizer
from tests.serve.fakes import SPECIAL, TEXTS, make_folder, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_folder(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """In the manner of Llama 2 and Mistral: spaces as U+2581, unknown characters as bytes."""
    folder = tmp_path_factory.mktemp("pieces")
    words = ["▁", "▁hello", "▁world", "he", "llo", "wor", "ld", "h", "e", "l", "o", "w", "r", "d", "é"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    raw = RawTokenizer(
        models.Unigram(
            [(name, -float(place)) for place, name in enumerate(names)], unk_id=0, byte_fallback=True
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    raw.save(str(folder / "tokenizer.json"))
    settings = {"add_bos_token": True, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(folder)


def joined(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = tokenizer.detokenizer()
    return "".join(map(detokenizer.feed, ids)) + detokenizer.flush()


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 420), max_size=40))
def test_pieces_join_to_what_the_library_decodes(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Any ids, so mostly broken UTF-8; ids beyond the vocabulary have no text."""
    known = [index for index in ids if tokenizer.token_string(index) is not None]
    assert joined(tokenizer, ids) == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == make_tokenizer_once().decode(known, skip_special_tokens=True)


@settings(deadline=None)
@given(text=st.text("ab <|end>é日🦊👩\u200d\ufffd\x00\n", max_size=40))
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert joined(tokenizer, ids) == text
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.feed(index) for index in ids]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_a_character_appears_when_its_last_byte_does(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("𓀀")
    assert len(ids) == 4, "the test wants a character of four tokens"
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.feed(index) for index in ids] == ["", "", "", "𓀀"]
    half = tokenizer.detokenizer()
    assert [half.feed(index) for index in ids[:2]] == ["", ""]
    assert half.flush() == "\ufffd"


def test_sentencepiece_spaces_and_bytes(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("hello world 🦊é")
    assert ids[0] == 1, "tokenizer_config.json asks for begin-of-sequence"
    # A continuation keeps its leading space: "The" + " world", not "Theworld".
    assert joined(sentencepiece, ids) == " hello world 🦊é"
    assert sentencepiece.encode("hello", add_special=False)[0] != 1


@pytest.mark.parametrize("special", SPECIAL)
def test_user_text_is_never_parsed_for_special_tokens(tokenizer: Tokenizer, special: str) -> None:
    ids = tokenizer.encode(f"a{special}b {special}")
    assert not set(ids) & set(range(len(SPECIAL)))
    assert tokenizer.decode(ids) == f"a{special}b {special}"
    assert tokenizer.special[special] in tokenizer.encode_trusted(f"a{special}b")


def test_a_vocabulary_that_spells_a_special_token_is_no_way_in(sentencepiece: Tokenizer) -> None:
    """Unigram finds "</s>" among its pieces even where special tokens are not parsed."""
    with pytest.raises(Refused, match="special token"):
        sentencepiece.encode("hello</s>")


def test_begin_of_sequence_is_added_as_the_folder_says(tmp_path: Path) -> None:
    with_bos = make_folder(tmp_path / "with", bos=True)
    assert Tokenizer(with_bos).encode("hello")[0] == 1
    settings = json.loads((with_bos / "tokenizer_config.json").read_text())
    (with_bos / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
    assert Tokenizer(with_bos).encode("hello")[0] != 1
    without = make_folder(tmp_path / "without")
    assert Tokenizer(without).encode("hello")[0] != 1
    (without / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    assert Tokenizer(without).encode("hello")[0] == 1


def test_padding_and_truncation_of_the_file_are_ignored(tmp_path: Path) -> None:
    raw = make_tokenizer()
    raw.enable_truncation(2)
    raw.enable_padding(length=50)
    raw.save(str(tmp_path / "tokenizer.json"))
    text = "hello world, how are you today? xyzzy"
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_broken_text_and_files_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="Unicode"):
        tokenizer.encode("a\ud800")
    with pytest.raises(Refused) as caught:
        tokenizer.check_size("x" * 10_000, 10, "messages")
    assert caught.value.param == "messages"
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_other_decoders_are_looked_up(tmp_path: Path) -> None:
    raw = RawTokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "well": 3}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece(cleanup=False)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert joined(tokenizer, tokenizer.encode("playing well")) == " playing well"


_RAW: list[RawTokenizer] = []


def make_tokenizer_once() -> RawTokenizer:
    if not _RAW:
        _RAW.append(make_tokenizer())
    return _RAW[0]


def test_encoding_leaves_the_interpreter_to_others(tokenizer: Tokenizer) -> None:
    """`encode` of the library keeps its lock: a long prompt stopped every stream while it was tokenised."""
    text = TEXTS[0] * 20_000
    moments = [time.perf_counter()]
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(tokenizer.encode, text)
        while not done.done():
            time.sleep(0.001)
            moments.append(time.perf_counter())
    longest = max(after - before for before, after in itertools.pairwise(moments))
    assert longest < 0.8 * (moments[-1] - moments[0]), "nothing else ran meanwhile"


def test_a_text_far_beyond_the_limit_is_not_encoded_whole(tmp_path: Path) -> None:
    """One token of many blanks made the bound by characters let everything through."""
    raw = make_tokenizer()
    raw.add_tokens([" " * 200])
    folder = make_folder(tmp_path)
    raw.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder)
    with pytest.raises(Refused, match="exceeds"):
        tokenizer.check_size("hello world, " * 1000, 100, "prompt")
    tokenizer.check_size(" " * 200 * 90, 100, "prompt")
    assert len(tokenizer.encode(" " * 200 * 90)) == 90
