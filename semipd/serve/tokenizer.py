"""Text to token ids and back, with `tokenizers` alone. By the bytes of tokens: no character is split."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from semipd.core.errors import ConfigError, Refused
from semipd.serve.model_folder import read_json

HEAD_CHARACTERS = 16  # per token: more than any text but blanks has on average
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """One model's tokenizer.json and tokenizer_config.json. Safe to use from several threads.

    special: the tokens that steer a model (end of sequence, start of a turn), by text. User text that
    spells one is encoded as the characters that it is made of. tags: these, and other tokens that grammars
    (`model.grammar`) know by their ids alone, not as text: those that were added and look like a tag.
    """

    def __init__(self, folder: Path) -> None:
        self.config = read_json(folder / "tokenizer_config.json") or {}
        self._parsing = _load(folder / "tokenizer.json")  # turns the text of special tokens into their ids
        self._literal = _twin(self._parsing, folder / "tokenizer.json")  # does not
        self._literal.encode_special_tokens = True
        self.special = {
            token.content: index
            for index, token in self._parsing.get_added_tokens_decoder().items()
            if token.special
        }
        self.tags = self.special | {
            token.content: index
            for index, token in self._parsing.get_added_tokens_decoder().items()
            if token.content.startswith("<") and token.content.endswith(">")
        }
        self._special_ids = frozenset(self.special.values())
        self._bos = self._explicit_bos()
        self._bytes = _TokenBytes(self._parsing, self._special_ids)
        self.size = self._parsing.get_vocab_size()
        self._longest = max((len(token) for token in self._parsing.get_vocab()), default=1)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Ids of user text, which is never parsed for special tokens. `add_special`: with the tokens that
        the model's tokenizer puts around a text, such as begin-of-sequence."""
        ids = _encode(self._literal, text, add_special)
        if not self._special_ids.isdisjoint(ids):
            self._check_injection(text, ids)
        return self._with_bos(ids) if add_special else ids

    def encode_trusted(self, text: str) -> list[int]:
        """Ids of text in which special tokens are meant; nothing is added around it."""
        return _encode(self._parsing, text, False)

    def check_size(self, text: str, limit: int, param: str) -> None:
        """Refuse a text that cannot fit `limit` tokens, without the work of encoding all of it."""
        if len(text) > limit * self._longest or self._is_far_beyond(text, limit):
            raise Refused(f"a text of {len(text)} characters exceeds the limit of {limit} tokens", param)

    def _is_far_beyond(self, text: str, limit: int) -> bool:
        """Whether a long text's beginning alone is twice too long. The longest tokens are mostly runs of
        spaces, so a bound by characters alone lets through far more than any text can hold."""
        head = HEAD_CHARACTERS * limit
        return len(text) > 2 * head and len(_encode(self._literal, text[:head], False)) > 2 * limit

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens have none."""
        return b"".join(map(self._bytes.of, ids)).decode("utf-8", "replace")

    def shown(self, texts: Iterable[str]) -> frozenset[int]:
        """Ids of those special tokens that these texts name."""
        return frozenset(self.special[text] for text in texts if text in self.special)

    def detokenizer(self, shown: frozenset[int] = frozenset()) -> Detokenizer:
        """shown: special tokens that have a text after all."""
        return Detokenizer(self._bytes.of, self.token_bytes, shown)

    def token_string(self, index: int) -> str | None:
        """The vocabulary's own spelling of an id; None for an id that it does not have."""
        return self._parsing.id_to_token(index)

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one token; of a special token, those of its name."""
        if index in self._special_ids:
            return (self.token_string(index) or "").encode()
        return self._bytes.of(index)

    def named_special(self, name: str) -> str | None:
        """The text of a token that tokenizer_config.json names, such as "bos_token"."""
        value = self.config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def _explicit_bos(self) -> tuple[bool, int] | None:
        """(wanted, id) where tokenizer_config.json says whether texts begin with begin-of-sequence."""
        wanted = self.config.get("add_bos_token")
        text = self.named_special("bos_token")
        index = self._parsing.token_to_id(text) if text is not None else None
        return (wanted, index) if isinstance(wanted, bool) and index is not None else None

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self._bos is None:
            return ids
        wanted, bos = self._bos
        if wanted and ids[:1] != [bos]:
            return [bos, *ids]
        return ids[1:] if not wanted and ids[:1] == [bos] else ids

    def _check_injection(self, text: str, ids: list[int]) -> None:
        """A vocabulary that spells a special token among its ordinary pieces could still produce it."""
        added = self._special_ids.intersection(_encode(self._literal, "", True))
        for index in self._special_ids.intersection(ids) - added:
            token = self._parsing.id_to_token(index)
            if token is not None and token in text:
                raise Refused(f"the text contains the special token {token!r}", "prompt")


class Detokenizer:
    """Text of a growing list of ids. What it returns, joined, is what `Tokenizer.decode` gives."""

    def __init__(
        self, of: Callable[[int], bytes], named: Callable[[int], bytes], shown: frozenset[int]
    ) -> None:
        """of: a token's bytes. named: the same of those that are shown."""
        self._of = (lambda index: named(index) if index in shown else of(index)) if shown else of
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, index: int) -> str:
        """The text that this id completes: whole characters only, maybe none."""
        return self._decode(self._of(index))

    def flush(self) -> str:
        """A replacement character if the last one stayed incomplete, else nothing."""
        return self._decode(b"", True)


class _TokenBytes:
    """The bytes that each id adds to a text, looked up once per id."""

    def __init__(self, raw: RawTokenizer, special: frozenset[int]) -> None:
        self._raw = raw
        self._known: dict[int, bytes] = dict.fromkeys(special, b"")
        kinds = _decoder_kinds(raw)
        self._byte_level = _byte_of_character() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._added = set(raw.get_added_tokens_decoder())
        self._anchor = self._find_anchor()

    def of(self, index: int) -> bytes:
        known = self._known.get(index)
        if known is None:
            known = self._known[index] = self._look_up(index)
        return known

    def _look_up(self, index: int) -> bytes:
        token = self._raw.id_to_token(index)
        if token is None:  # padding of the embedding: the model can produce it, the vocabulary lacks it
            return b""
        if index in self._added:
            return token.encode()
        if self._byte_level is not None:
            mapped = [self._byte_level.get(character) for character in token]
            return token.encode() if None in mapped else bytes(b for b in mapped if b is not None)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        ids, text = self._anchor
        return self._raw.decode([*ids, index], skip_special_tokens=False)[len(text) :].encode()

    def _find_anchor(self) -> tuple[list[int], str]:
        """An ordinary token and its text: decoders treat a text's first token differently (they strip a
        space), so others are looked up behind this one."""
        for index in range(self._raw.get_vocab_size()):
            token = self._raw.id_to_token(index)
            if index in self._added or token is None or not token.isascii() or not token.isalpha():
                continue
            return [index], self._raw.decode([index], skip_special_tokens=False)
        return [], ""


def _load(path: Path) -> RawTokenizer:
    if not path.is_file():
        raise ConfigError(f"{path.parent}: there is no tokenizer.json")
    try:
        raw = RawTokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    raw.no_truncation()
    raw.no_padding()
    return raw


def _twin(raw: RawTokenizer, path: Path) -> RawTokenizer:
    """A second tokenizer with settings of its own, over the same vocabulary in memory if possible."""
    twin = RawTokenizer(raw.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(raw, part)) is not None:
            setattr(twin, part, value)
    added = raw.get_added_tokens_decoder()
    for index in sorted(added):
        twin.add_tokens([added[index]])
    return twin if _same(twin.get_added_tokens_decoder(), added) else _load(path)


def _same(one: dict[int, AddedToken], other: dict[int, AddedToken]) -> bool:
    return {i: repr(token) for i, token in one.items()} == {i: repr(token) for i, token in other.items()}


def _encode(raw: RawTokenizer, text: str, add_special: bool) -> list[int]:
    """A batch of one, since `raw.encode` keeps the interpreter's lock for as long as it works: whatever the
    thread, the event loop and with it every stream would stand still."""
    try:
        return raw.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
    except TypeError:
        raise Refused("the text is not valid Unicode (it holds a lone surrogate)", "prompt") from None


def _decoder_kinds(raw: RawTokenizer) -> set[str]:
    if raw.decoder is None:
        return set()
    decoder = json.loads(raw.decoder.__getstate__())  # the library shows its settings in no other way
    return {part["type"] for part in [decoder, *decoder.get("decoders", ())] if "type" in part}


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable bytes stand for themselves, the rest for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}
