"""How tokens are chosen, and what can be told of how likely they were: part of `core.types`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

NO_TOKEN = -1  # instead of a token: a slot's `Constraint` leaves none that may come


@dataclass(frozen=True, slots=True)
class Constraint:
    """Which tokens may come: a pure function of this and of the tokens produced so far.

    grammar: what the text must be, in llguidance's form; "": anything. ends: end-of-sequence tokens; under
    a grammar they may come once its text is complete, and never before. allowed: no other tokens, where it
    names any. bad_words: sequences of tokens, none empty, whose last may not come after the others.
    """

    grammar: str = ""
    ends: tuple[int, ...] = ()
    allowed: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one slot are chosen on the device: a pure function of this, the position, the
    tokens below it and the logits.

    temperature: 0 means greedy. top_k: 0 means no limit. seed: any int64; always concrete here.
    Tokens in `ban_tokens` cannot be produced at positions below `ban_until` (this is how min_tokens
    keeps a sequence alive without asking the host).

    Before temperature and filters: logits of tokens that occur below the position are divided by
    `repetition_penalty` where positive and multiplied where not; those of tokens that were produced, at
    positions from `prompt_length` on, lose `frequency_penalty` for every time and `presence_penalty` once;
    `logit_bias` (distinct ids, each with what is added to its logit) comes last. Tokens that `constraint`
    rules out cannot be produced.
    logprobs: also tell of every produced token its `Score` with so many of the best; prompt_logprobs: of
    every prompt token but the first. None: do not.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    ban_until: int = 0
    ban_tokens: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    prompt_length: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None

    @property
    def penalises(self) -> bool:
        """Whether any penalty can change a logit."""
        return (
            self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0
        )


class Score(NamedTuple):
    """How likely the model held a token, by its logits as they were before any rule of `Sampling`.

    row: of the slice in its batch. position: of the token in its sequence. logprob: the token's natural log
    probability, float32. ids, logprobs: the best tokens at this position, best first, as many as asked for.
    """

    row: int
    position: int
    logprob: float
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
