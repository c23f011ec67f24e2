"""Grammars as text: made of what a request asks for, and tried out, over bytes instead of a model's tokens.
With `model/grammar.py`, which follows them, all that knows llguidance. No numpy, no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLParserLimits

# Between two tokens of JSON: nothing, a blank, or a new line with its indentation. Without an end to it, a
# model that is not sure of itself writes blanks for ever.
_WHITESPACE = r"( |\n[ \t]{0,40})?"
_LOOKS = 4  # places of a grammar to look at in advance, where only one text leads from one to the next
_LEXER_STATES = (
    50_000  # 1 to 2 kB each; a long text with a hard pattern can need more, and starts over then
)


class GrammarError(ValueError):
    """A grammar that cannot be followed; says why, in one line."""


def grammar_of_schema(schema: str) -> str:
    """The grammar of the JSON values that a JSON schema (as text) describes. Does not check it."""
    from llguidance import LLMatcher

    options: Any = {
        "whitespace_pattern": _WHITESPACE,
        "whitespace_flexible": True,
        "coerce_one_of": True,
        "lenient": False,
    }
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=options)
    except ValueError as error:
        raise GrammarError(gist(error)) from None


def grammar_of_lark(text: str) -> str:
    """The grammar that llguidance's dialect of Lark describes. Does not check it."""
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_lark(text)
    except ValueError as error:
        raise GrammarError(gist(error)) from None


class Probe:
    """Compiles grammars. To compile takes the same work whatever the tokens (`parser_limits`)."""

    def __init__(self) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self._tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()))

    def check(self, grammar: str) -> None:
        """Compile a grammar and look at its beginning. Raises GrammarError. May take any time and memory:
        the library's limits do not cover all of its work."""
        from llguidance import LLMatcher

        raw = LLMatcher(self._tokenizer, grammar, log_level=0, limits=parser_limits())
        for _ in range(_LOOKS):
            if not raw.is_error():
                raw.compute_bitmask()
            if raw.is_error():
                raise GrammarError(gist(raw.get_error()))
            forced = raw.compute_ff_tokens()
            if not forced:
                return
            raw.consume_tokens(forced)


class _Bytes:
    """A tokenizer of bytes, in the form that llguidance takes."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)

    def __init__(self) -> None:
        self.tokens = [*(bytes((byte,)) for byte in range(256)), b"<end>"]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def parser_limits() -> LLParserLimits:
    """llguidance's own, which keep most masks below 20 ms, but for these: less memory; no work ahead on all
    tokens of a vocabulary, so that what compiles over bytes compiles over tokens; and an error's text holds
    neither the grammar nor the text so far."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_lexer_states=_LEXER_STATES, precompute_large_lexemes=False, verbose_errors=False
    )


def gist(error: object) -> str:
    """The gist of the library's message."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = "; ".join(line for line in lines if line and line != "<non-verbose/>")[:300]
    return "no text that ends satisfies it" if text.startswith("NoExtension") else text or "unknown error"
