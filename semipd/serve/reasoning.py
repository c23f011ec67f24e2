"""What a model thinks before it answers: told from the answer, as the text comes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from semipd.serve.call_grammar import answer_grammar, behind_reasoning
from semipd.serve.call_parts import partial
from semipd.serve.chat import ChatTemplate
from semipd.serve.constraint import Lark
from semipd.serve.tokenizer import Tokenizer
from semipd.serve.tool_use import Tools

OPEN, CLOSE = "<think>", "</think>"
MARKS = (OPEN, CLOSE)
_TAIL = 16  # tokens of a prompt that are looked at: more than a tag and the blanks behind it have


class _Place(Enum):
    """Where in an answer a text has come to."""

    BEFORE = "nothing but blanks"
    INSIDE = "in the reasoning"
    BEHIND = "nothing but blanks since"
    OVER = "in the answer"


@dataclass(frozen=True)
class ReasoningRule:
    """begun: the text begins with reasoning; else only if it begins with the tag."""

    begun: bool

    def finder(self) -> ReasoningFinder:
        return ReasoningFinder(self.begun)


class ReasoningFinder:
    """Takes one answer's text apart. What it finds, joined, does not depend on how the text was cut into
    pieces. Blanks at both ends of the reasoning, and between it and the answer, belong to neither."""

    def __init__(self, begun: bool) -> None:
        self._begun = begun
        self._place = _Place.BEFORE
        self._buffer = ""  # not yet understood
        self._blank = ""  # at the end of the reasoning, if that ends here
        self._fresh = True  # none of it was told

    def feed(self, text: str, last: bool = False) -> tuple[str, str]:
        """What is certain to be reasoning, and what is certain to be the answer."""
        if self._place is _Place.OVER:
            return "", text
        self._buffer += text
        thought = ""
        if self._place is _Place.BEFORE and not self._enter(last):
            return "", ""
        if self._place is _Place.INSIDE:
            thought = self._think(last)
        if self._place is _Place.BEHIND:
            self._buffer = self._buffer.lstrip()
            if self._buffer:
                self._place = _Place.OVER
        if self._place is not _Place.OVER:
            return thought, ""
        answer, self._buffer = self._buffer, ""
        return thought, answer

    def _enter(self, last: bool) -> bool:
        """Whether it is certain what the text begins with."""
        bare = self._buffer.lstrip()
        if bare.startswith(OPEN):
            self._buffer, self._place = bare[len(OPEN) :], _Place.INSIDE
        elif OPEN.startswith(bare) and not last:
            return False
        else:
            self._place = _Place.INSIDE if self._begun else _Place.OVER
        return True

    def _think(self, last: bool) -> str:
        end = self._buffer.find(CLOSE)
        if end >= 0:
            self._place = _Place.BEHIND
            text, self._buffer = self._buffer[:end], self._buffer[end + len(CLOSE) :]
        else:
            held = None if last else partial(self._buffer, CLOSE)
            held = len(self._buffer) if held is None else held
            text, self._buffer = self._buffer[:held], self._buffer[held:]
        return self._bare(text)

    def _bare(self, text: str) -> str:
        """Without the blanks at both ends of all reasoning."""
        bare = text.rstrip()
        if not bare:
            self._blank += text
            return ""
        bare = self._blank + bare
        self._blank = text[len(text.rstrip()) :]
        if self._fresh:
            self._fresh, bare = False, bare.lstrip()
        return bare


def thought_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    """How many tokens of an answer that begins with reasoning are that, the tags included."""
    parts = [tokenizer.token_bytes(token) for token in tokens]
    end = b"".join(parts).find(CLOSE.encode())
    if end < 0:
        return len(parts)
    ends = itertools.accumulate(map(len, parts))
    return next(count for count, at in enumerate(ends, start=1) if at >= end + len(CLOSE))


class Reasoning:
    """By one model's chat template. parser: "auto" for what the template shows, "qwen3" for reasoning that
    begins with its tag, "deepseek_r1" for reasoning that every answer begins with, "none"."""

    def __init__(self, chat: ChatTemplate | None, tokenizer: Tokenizer, parser: str = "auto") -> None:
        self._tokenizer = tokenizer
        self._marks = {text: tokenizer.tags[text] for text in MARKS if text in tokenizer.tags}
        self._always = parser == "deepseek_r1"
        self._wanted = parser in ("qwen3", "deepseek_r1") or (
            parser == "auto" and chat is not None and chat.mentions(CLOSE)
        )

    def of(
        self, prompt: Sequence[int], begun: str | None = None, echo: bool = False
    ) -> ReasoningRule | None:
        """The rule of what comes behind a prompt; None: no reasoning. begun: what there is of the last
        message, which goes on. echo: and is repeated."""
        if not self._wanted:
            return None
        if begun is not None:
            if echo or not begun.strip():
                return ReasoningRule(begun=False)
            return ReasoningRule(begun=True) if begun.rfind(OPEN) > begun.rfind(CLOSE) else None
        end = (
            b"".join(map(self._tokenizer.token_bytes, prompt[-_TAIL:])).decode("utf-8", "replace").rstrip()
        )
        if end.endswith(CLOSE):  # the template thinks for the model: nothing
            return None
        return ReasoningRule(begun=self._always or end.endswith(OPEN))

    def before(self, rule: ReasoningRule, tools: Tools, schema: str | None) -> Lark | None:
        """The grammar of an answer to which a model comes by thinking. schema: of a response format, where
        the tools have no grammar."""
        grammar = tools.grammar
        if tools.free:
            return grammar
        if grammar is None and schema is not None:
            grammar = Lark(answer_grammar(schema), answer_grammar(schema), "response_format")
        if grammar is None:
            return None
        text = behind_reasoning(grammar.text, rule.begun, MARKS, self._marks)
        return Lark(text, behind_reasoning(grammar.spelled, rule.begun, MARKS, {}), grammar.param)
