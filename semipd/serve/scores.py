"""Log probabilities in the forms of the API: tokens by their text, and lists side by side or one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from semipd.core.types import Score
from semipd.serve.alignment import Told
from semipd.serve.tokenizer import Tokenizer


class ScoreForms:
    """How one answer tells of tokens. best: alternatives per token, at most."""

    def __init__(self, tokenizer: Tokenizer, best: int) -> None:
        self._tokenizer = tokenizer
        self._best = best

    def completion(self, told: Sequence[Told]) -> dict[str, Any]:
        """Of /v1/completions: four lists with an entry per token. The token itself is always among the
        best. Where two of them have one text, the larger number counts."""
        return {
            "tokens": [self._text(token) for token, _, _ in told],
            "token_logprobs": [None if score is None else score.logprob for _, _, score in told],
            "top_logprobs": [self._named(token, score) for token, _, score in told],
            "text_offset": [offset for _, offset, _ in told],
        }

    def chat(self, told: Iterable[Told]) -> dict[str, Any]:
        """Of /v1/chat/completions: an entry per token."""
        content = [
            {
                **self._entry(token, score.logprob),
                "top_logprobs": [self._entry(*pair) for pair in _pairs(score, self._best)],
            }
            for token, _, score in told
            if score is not None
        ]
        return {"content": content, "refusal": None}

    def prompt(self, tokens: Sequence[int], scores: Sequence[Score]) -> list[Any]:
        """`prompt_logprobs`: null, then for every further token of the prompt an object by token id."""
        entries: list[Any] = [None]
        for token, score in zip(tokens[1:], scores, strict=False):
            pairs = {token: score.logprob, **dict(_pairs(score, self._best))}
            entries.append(
                {str(t): {"logprob": p, "decoded_token": self._text(t)} for t, p in pairs.items()}
            )
        return entries

    def _named(self, token: int, score: Score | None) -> dict[str, float] | None:
        if score is None:
            return None
        named: dict[str, float] = {}
        for other, logprob in (*_pairs(score, self._best), (token, score.logprob)):
            named.setdefault(self._text(other), logprob)
        return named

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._text(token),
            "logprob": logprob,
            "bytes": list(self._tokenizer.token_bytes(token)),
        }

    def _text(self, token: int) -> str:
        """The token's text; where its bytes are no text on their own, those, in the API's notation."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _pairs(score: Score, count: int) -> list[tuple[int, float]]:
    return list(zip(score.ids[:count], score.logprobs, strict=False))
