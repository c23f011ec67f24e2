"""Texts that follow a grammar, token by token, by llguidance. `grammar_text` has the grammars themselves.

The library is imported with the first grammar: most processes never see one. No torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semipd.model.grammar_text import GrammarError, gist, parser_limits

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

WORD = 32  # tokens per word of a mask


class GrammarTokenizer:
    """The bytes of every token of one model, arranged for masks: 3 ms for 300 tokens, 0.6 s for 150,000.

    ends: ids that end a sequence."""

    def __init__(self, file: Path, vocabulary: int, ends: tuple[int, ...]) -> None:
        """file: a tokenizer.json. vocabulary: entries of a row of logits. Raises GrammarError."""
        from llguidance import LLTokenizer

        try:
            text, eos = file.read_text("utf-8"), list(ends)
            try:
                self.raw: LLTokenizer = LLTokenizer(text, n_vocab=vocabulary, eos_token=eos)
            except ValueError:  # it has tokens that the model has not
                self.raw = LLTokenizer(text, eos_token=eos)
        except (OSError, ValueError) as error:
            raise GrammarError(f"the model's tokenizer cannot follow a grammar: {gist(error)}") from None
        self.vocabulary = vocabulary
        self.ends = ends

    def letters(self) -> list[int]:
        """Tokens of single bytes."""
        found = (self.raw.tokenize_bytes(bytes((byte,))) for byte in range(128))
        return [ids[0] for ids in found if len(ids) == 1]


class Follower:
    """One text on its way through a grammar. A new one costs about a millisecond, a `copy` much less."""

    def __init__(self, tokenizer: GrammarTokenizer, grammar: str) -> None:
        from llguidance import LLMatcher

        self._tokenizer = tokenizer
        self._start: LLMatcher = LLMatcher(tokenizer.raw, grammar, log_level=0, limits=parser_limits())
        self._raw = self._start.deep_copy()
        self._followed = 0

    def copy(self) -> Follower:
        """Another text of the same grammar, at its beginning."""
        twin = object.__new__(Follower)
        twin._tokenizer, twin._start, twin._followed = self._tokenizer, self._start, 0
        twin._raw = self._start.deep_copy()
        return twin

    def mask(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens that may come after these, all of the text so far: bits of uint32 [vocabulary / 32]
        (rounded up), token 0 the lowest of the first. None may where the text does not follow the grammar,
        or the grammar became too complex. Fast when `tokens` goes on from the last call's."""
        raw, size = self._raw, -(-self._tokenizer.vocabulary // WORD)
        words = np.zeros(-(-self._tokenizer.raw.vocab_size // WORD), np.uint32)
        if len(tokens) < self._followed:
            self._raw = raw = self._start.deep_copy()  # `reset` does not lead out of an error
            self._followed = 0
        if len(tokens) > self._followed:
            raw.consume_tokens(tokens[self._followed :].tolist())
            self._followed = len(tokens)
        if raw.is_error():
            return words[:size]
        raw.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if raw.is_error():
            return np.zeros_like(words[:size])
        self._spell(words)
        complete = raw.is_accepting()
        for token in self._tokenizer.ends:  # exactly then, also where an end is spelled like a text
            bit = np.uint32(1 << token % WORD)
            words[token // WORD] = words[token // WORD] | bit if complete else words[token // WORD] & ~bit
        return words[:size]

    @property
    def lost(self) -> bool:
        """Whether this text is not followed any more."""
        return self._raw.is_error()

    def spoiled(self) -> bool:
        """Whether no copy can be followed any more: what they learn of the grammar they share, and that has
        a bound. A new follower of the same grammar starts over."""
        raw = self._start.deep_copy()
        if not raw.is_error():
            raw.compute_bitmask()
        return raw.is_error()

    def _spell(self, words: np.ndarray) -> None:
        """Where only one text can follow and it spells a tag, llguidance lets only the tag's own token
        through, which it then does not take for that text: the tag is spelled instead."""
        (some,) = np.nonzero(words)
        if len(some) != 1 or (word := int(words[some[0]])) & (word - 1):
            return
        token = int(some[0]) * WORD + word.bit_length() - 1
        known = token in self._tokenizer.ends or not self._tokenizer.raw.is_special_token(token)
        if known or self._raw.validate_tokens([token]):
            return
        words[:] = 0
        for spelled in self._tokenizer.letters():
            if self._raw.validate_tokens([spelled]):
                words[spelled // WORD] |= np.uint32(1 << spelled % WORD)
