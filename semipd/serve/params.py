"""What a user may ask of one generation, with a bound on everything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from semipd.core.errors import Refused

MAX_CHOICES = 64
MAX_STOPS = 16
MAX_STOP_BYTES = 4096
MAX_STOP_TOKENS = 64
MAX_TOKEN_ID = 2**31 - 1
MAX_LOGPROBS = 20
MAX_BIASES = 300
MAX_BIAS = 100.0
MAX_ALLOWED = 4096
MAX_BAD_WORDS = 64
MAX_BAD_WORD = 256


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. None means the model's own default (generation_config.json).

    temperature: 0 is greedy. top_k: 0 (or -1) is no limit. seed: any int64; without one, requests differ.
    stop: strings that end the text and are left out of it. stop_token_ids: token ids that do the same.
    include_stop_str_in_output: leave them in. skip_special_tokens: False gives special tokens a text, too.
    ignore_eos: go on after end-of-sequence. min_tokens: none of these may end it earlier.
    max_tokens: None is as many as fit. n: continuations per prompt.
    presence_penalty, frequency_penalty: taken off the logits of tokens that were produced, once, and for
    each time. repetition_penalty: divides the positive logits of tokens of the prompt and the output, and
    multiplies the others; 1 changes nothing.
    logit_bias: added to the logits of these token ids, at most 300.
    logprobs: tell the log probability of each produced token and so many of the likeliest (0 to 20), by the
    model's logits as they are before penalties, biases, temperature and filters. prompt_logprobs: the same
    of the prompt's tokens but the first; such a prompt is computed whole, whatever the prefix cache has.
    response_format: {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"name", "schema"}}
    as in OpenAI's API: the text is such a value, and ends with it unless max_tokens cut it.
    allowed_token_ids: nothing else is produced, not even end-of-sequence. bad_words: texts that are not.
    service_tier: name of a service class of the engine; "auto" and "default" say nothing.
    priority: that of a service class, instead of its name; 0 says nothing where no class has it.
    Raises Refused, naming the field, when a value is out of bounds.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    response_format: Mapping[str, Any] | None = None
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    bad_words: tuple[str, ...] | list[str] = ()
    service_tier: str | None = None
    priority: int | None = None

    def __post_init__(self) -> None:
        _real("temperature", self.temperature, 0.0, 2.0)
        _real("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise Refused("top_p must be above 0", "top_p")
        _whole("top_k", self.top_k, -1, MAX_TOKEN_ID)
        _real("min_p", self.min_p, 0.0, 1.0)
        _whole("seed", self.seed, -(2**63), 2**63 - 1)
        _whole("max_tokens", self.max_tokens, 1, MAX_TOKEN_ID)
        _whole("min_tokens", _given("min_tokens", self.min_tokens), 0, MAX_TOKEN_ID)
        _whole("n", _given("n", self.n), 1, MAX_CHOICES)
        _real("presence_penalty", _given("presence_penalty", self.presence_penalty), -2.0, 2.0)
        _real("frequency_penalty", _given("frequency_penalty", self.frequency_penalty), -2.0, 2.0)
        _real("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _whole("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _whole("priority", self.priority, -(2**31), 2**31 - 1)
        if self.service_tier is not None and not isinstance(self.service_tier, str):
            raise Refused("service_tier must be a string", "service_tier")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise Refused(f"{name} must be true or false", name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise Refused(
                f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens})", "min_tokens"
            )
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "stop_token_ids", _stop_tokens(self.stop_token_ids))
        if self.response_format is not None and not isinstance(self.response_format, Mapping):
            raise Refused("response_format must be an object with a type", "response_format")
        object.__setattr__(self, "allowed_token_ids", _allowed(self.allowed_token_ids))
        object.__setattr__(self, "bad_words", _bad_words(self.bad_words))

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, always as a tuple."""
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """The logit biases, always as pairs of a token id and what is added."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias


@dataclass(frozen=True)
class Defaults:
    """A model's own sampling rule, for the fields that a user leaves out."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def fill(self, params: SamplingParams) -> SamplingParams:
        """`params` with every field of the rule set."""
        missing = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if getattr(params, entry.name) is None
        }
        return dataclasses.replace(params, **missing) if missing else params


def _given(name: str, value: object) -> object:
    if value is None:
        raise Refused(f"{name} must be a number, not null", name)
    return value


def _real(name: str, value: object, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise Refused(f"{name} must be a number, not {value!r}", name)
    if not low <= value <= high:
        raise Refused(f"{name} must be between {low:g} and {high:g}, not {value:g}", name)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(f"{name} must be a whole number, not {value!r}", name)
    if not low <= value <= high:
        shown = value if abs(value) < 10**20 else "a number of that size"
        raise Refused(f"{name} must be between {low} and {high}, not {shown}", name)


def _stops(stop: object) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, (tuple, list)) or not all(isinstance(text, str) for text in stops):
        raise Refused("stop must be a string or a list of strings", "stop")
    if len(stops) > MAX_STOPS:
        raise Refused(f"at most {MAX_STOPS} stop strings, not {len(stops)}", "stop")
    for text in stops:
        if not text:
            raise Refused("a stop string is empty", "stop")
        if len(text.encode("utf-8", "surrogatepass")) > MAX_STOP_BYTES:
            raise Refused(f"a stop string is longer than {MAX_STOP_BYTES} bytes", "stop")
    return tuple(stops)


def _stop_tokens(ids: object) -> tuple[int, ...]:
    if not isinstance(ids, (tuple, list)):
        raise Refused("stop_token_ids must be a list of token ids", "stop_token_ids")
    if len(ids) > MAX_STOP_TOKENS:
        raise Refused(f"at most {MAX_STOP_TOKENS} stop tokens, not {len(ids)}", "stop_token_ids")
    for token in ids:
        _whole("stop_token_ids", _given("stop_token_ids", token), 0, MAX_TOKEN_ID)
    return tuple(dict.fromkeys(ids))


def _allowed(ids: object) -> tuple[int, ...] | None:
    if ids is None:
        return None
    if not isinstance(ids, (tuple, list)) or not 1 <= len(ids) <= MAX_ALLOWED:
        raise Refused(
            f"allowed_token_ids must be a list of 1 to {MAX_ALLOWED} token ids", "allowed_token_ids"
        )
    for token in ids:
        _whole("allowed_token_ids", _given("allowed_token_ids", token), 0, MAX_TOKEN_ID)
    return tuple(dict.fromkeys(ids))


def _bad_words(words: object) -> tuple[str, ...]:
    if not isinstance(words, (tuple, list)) or not all(isinstance(word, str) for word in words):
        raise Refused("bad_words must be a list of strings", "bad_words")
    if len(words) > MAX_BAD_WORDS:
        raise Refused(f"at most {MAX_BAD_WORDS} bad words, not {len(words)}", "bad_words")
    for word in words:
        if not word or len(word) > MAX_BAD_WORD:
            raise Refused(f"a bad word must have 1 to {MAX_BAD_WORD} characters", "bad_words")
    return tuple(words)


def _biases(given: object) -> tuple[tuple[int, float], ...]:
    pairs = tuple(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, tuple) or not all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
        raise Refused("logit_bias must map token ids to numbers", "logit_bias")
    if len(pairs) > MAX_BIASES:
        raise Refused(f"at most {MAX_BIASES} logit biases, not {len(pairs)}", "logit_bias")
    for token, bias in pairs:
        _whole("logit_bias", _given("logit_bias", token), 0, MAX_TOKEN_ID)
        _real("logit_bias", _given("logit_bias", bias), -MAX_BIAS, MAX_BIAS)
    if len(dict(pairs)) < len(pairs):
        raise Refused("logit_bias names a token twice", "logit_bias")
    return tuple((token, float(bias)) for token, bias in pairs)
