"""Which tokens a text that was let out is made of, and where in it each of them begins."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from semipd.core.types import Score
from semipd.serve.tokenizer import Detokenizer


class Told(NamedTuple):
    """A token of a text. offset: characters of the text before its own. score: None for the first token of
    a prompt, and where the engine gave none."""

    token: int
    offset: int
    score: Score | None


class Alignment:
    """Holds tokens back until their text is out. What it gives, joined, does not depend on the grouping.

    scores: of tokens to come, in order. sent: characters that are out."""

    def __init__(self) -> None:
        self.scores: deque[Score] = deque()
        self.sent = 0
        self._fed = 0
        self._held: deque[tuple[int, Told]] = deque()

    def prompt(
        self, text: str, tokens: Sequence[int], scores: Sequence[Score], detokenizer: Detokenizer
    ) -> list[Told]:
        """The tokens of a prompt that is let out first. scores: of all of them but the first."""
        told, at, given = [], 0, [None, *scores]
        for place, token in enumerate(tokens):
            score = given[place] if place < len(given) else None
            told.append(Told(token, min(at, len(text)), score))
            at += len(detokenizer.feed(token))
        self.sent = self._fed = len(text)
        return told

    def feed(self, token: int, length: int) -> None:
        """A token that completes so many characters."""
        score = self.scores.popleft() if self.scores else None
        told = Told(token, self._fed, score)
        self._fed += length
        self._held.append((self._fed, told))

    def certain(self, finished: bool) -> list[Told]:
        """Tokens whose text is out: all of it, or, once the text is finished, some of it."""
        told = []
        while self._held:
            end, token = self._held[0]
            if end > self.sent and not (finished and token.offset < self.sent):
                break
            told.append(token)
            self._held.popleft()
        return told
