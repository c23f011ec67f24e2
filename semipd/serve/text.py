"""The text of one sequence as its tokens come: detokenised, cut at stop strings, ended truthfully."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from semipd.core.types import FinishReason, Score
from semipd.serve.alignment import Alignment, Told
from semipd.serve.call_parts import CallPart
from semipd.serve.calls import CallFinder
from semipd.serve.session import Piece
from semipd.serve.stops import StopFinder
from semipd.serve.tokenizer import Tokenizer


@dataclass(slots=True)
class Delta:
    """What a sequence gained. finish: "stop", "length" or "abort" with its last delta, else None.

    text may be empty (half a character, or the start of a stop string) although tokens are not.
    cached_tokens: prompt tokens found in the prefix cache, where the engine told.
    scores: of `tokens`; prompt_scores: of the prompt's tokens but the first, all with the first delta;
    told: the tokens whose text is now certain, with theirs. All empty unless asked for.
    calls, reasoning: what came of calls of tools, and of what the model thinks; it is not in the text."""

    index: int
    text: str
    tokens: list[int]
    finish: str | None
    cached_tokens: int | None = None
    scores: list[Score] = field(default_factory=list)
    prompt_scores: list[Score] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    calls: list[CallPart] = field(default_factory=list)
    reasoning: str = ""


@dataclass(frozen=True)
class Echo:
    """A prompt to be repeated before the text. alone: and nothing else."""

    text: str
    tokens: Sequence[int]
    alone: bool = False


class TextStream:
    """Turns one sequence's pieces into deltas. Their joined text does not depend on the grouping.

    tokenizer: None where there is none; then texts are empty. A stop string counts only in text
    after the first `min_tokens` tokens. The stop string or stop token itself is part of the text only with
    `include_stops`. alignment: where the tokens of the text are to be told. shown: special tokens that are
    part of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stops: Sequence[str],
        min_tokens: int,
        echo: Echo | None = None,
        alignment: Alignment | None = None,
        prompt_length: int = 0,
        include_stops: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(shown) if tokenizer is not None else None
        self._stops = StopFinder(stops, include_stops)
        self._include_stops = include_stops
        self._min_tokens = min_tokens
        self._echo = echo
        self._alignment = alignment
        self._prompt_length = prompt_length
        self.produced = 0

    def feed(self, piece: Piece) -> Delta:
        """After a delta with a finish, feed no more."""
        if not piece.scores and self._echo is None and self._alignment is None:
            return self._plain(piece)
        echo, self._echo = self._echo, None
        first = sum(score.position < self._prompt_length for score in piece.scores)
        prompt_scores, scores = piece.scores[:first], piece.scores[first:]
        told = self._begin(echo, prompt_scores)
        if echo is not None and echo.alone:
            delta = Delta(piece.index, "", [], "length", piece.cached_tokens)
        else:
            if self._alignment is not None:
                self._alignment.scores += scores
            delta = self._plain(piece)
        if self._alignment is not None:
            told += self._alignment.certain(finished=delta.finish is not None)
        delta.text = echo.text + delta.text if echo is not None else delta.text
        delta.scores, delta.prompt_scores = scores[: len(delta.tokens)], prompt_scores
        delta.told = told
        return delta

    def _begin(self, echo: Echo | None, scores: Sequence[Score]) -> list[Told]:
        """The tokens of a prompt that is repeated."""
        if echo is None or self._alignment is None or self._tokenizer is None:
            return []
        return self._alignment.prompt(echo.text, echo.tokens, scores, self._tokenizer.detokenizer())

    def _plain(self, piece: Piece) -> Delta:
        """The delta without scores."""
        finish = piece.finish.value if piece.finish else None
        if self._detokenizer is None:
            self.produced += len(piece.tokens)
            return Delta(piece.index, "", piece.tokens, finish, piece.cached_tokens)
        texts: list[str] = []
        cut = piece.finish is FinishReason.STOP and not self._include_stops
        last = len(piece.tokens) - 1 if cut else -1
        for place, token in enumerate(piece.tokens):
            self.produced += 1
            if place != last:
                texts.append(self._certain(self._detokenizer.feed(token), token))
            if self._stops.found:
                return Delta(piece.index, "".join(texts), piece.tokens[: place + 1], "stop")
        if finish is not None:
            texts.append(self._certain(self._detokenizer.flush()))
            if self._stops.found:
                finish = "stop"
            texts.append(self._sent(self._stops.flush()))
        return Delta(piece.index, "".join(texts), piece.tokens, finish, piece.cached_tokens)

    def _certain(self, text: str, token: int | None = None) -> str:
        if self._alignment is not None and token is not None:
            self._alignment.feed(token, len(text))
        return self._sent(self._stops.feed(text) if self.produced > self._min_tokens else text)

    def _sent(self, text: str) -> str:
        if self._alignment is not None:
            self._alignment.sent += len(text)
        return text


def find_calls(finder: CallFinder, delta: Delta) -> None:
    """Take the calls out of a delta's text. Where they are the end of it, that is why it ended."""
    delta.text, delta.calls = finder.feed(delta.text, last=delta.finish is not None)
    if finder.done or (finder.count and delta.finish == "stop"):
        delta.finish = "tool_calls"
