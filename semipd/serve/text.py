"""The text of one sequence as its tokens come: detokenised, cut at stop strings, ended truthfully."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from semipd.core.types import FinishReason
from semipd.serve.session import Piece
from semipd.serve.stops import StopFinder
from semipd.serve.tokenizer import Detokenizer


@dataclass(slots=True)
class Delta:
    """What a sequence gained. finish: "stop", "length" or "abort" with its last delta, else None.

    text may be empty (half a character, or the start of a stop string) although tokens are not.
    cached_tokens: prompt tokens found in the prefix cache, where the engine told."""

    index: int
    text: str
    tokens: list[int]
    finish: str | None
    cached_tokens: int | None = None


class TextStream:
    """Turns one sequence's pieces into deltas. Their joined text does not depend on the grouping.

    detokenizer: None where there is no tokenizer; then texts are empty. A stop string counts only in text
    after the first `min_tokens` tokens. The stop string or stop token itself is not part of the text.
    """

    def __init__(self, detokenizer: Detokenizer | None, stops: Sequence[str], min_tokens: int) -> None:
        self._detokenizer = detokenizer
        self._stops = StopFinder(stops)
        self._min_tokens = min_tokens
        self.produced = 0

    def feed(self, piece: Piece) -> Delta:
        """After a delta with a finish, feed no more."""
        finish = piece.finish.value if piece.finish else None
        if self._detokenizer is None:
            self.produced += len(piece.tokens)
            return Delta(piece.index, "", piece.tokens, finish, piece.cached_tokens)
        texts: list[str] = []
        last = len(piece.tokens) - 1 if piece.finish is FinishReason.STOP else -1
        for place, token in enumerate(piece.tokens):
            self.produced += 1
            if place != last:
                texts.append(self._certain(self._detokenizer.feed(token)))
            if self._stops.found:
                return Delta(piece.index, "".join(texts), piece.tokens[: place + 1], "stop")
        if finish is not None:
            texts.append(self._certain(self._detokenizer.flush()))
            if self._stops.found:
                finish = "stop"
            texts.append(self._stops.flush())
        return Delta(piece.index, "".join(texts), piece.tokens, finish, piece.cached_tokens)

    def _certain(self, text: str) -> str:
        return self._stops.feed(text) if self.produced > self._min_tokens else text
