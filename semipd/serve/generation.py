"""From a prompt and parameters to requests, and from their tokens to text: what server and `LLM` share."""

from __future__ import annotations

import itertools
import time
from array import array
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

import msgspec

from semipd.core import keys
from semipd.core.errors import Refused
from semipd.core.types import Constraint, Sampling
from semipd.serve.alignment import Alignment
from semipd.serve.calls import CallRule
from semipd.serve.constraint import ConstraintMaker, Lark
from semipd.serve.messages import EngineInfo, Submit
from semipd.serve.model_folder import ModelFolder
from semipd.serve.params import SamplingParams
from semipd.serve.reasoning import MARKS, ReasoningRule
from semipd.serve.session import Session
from semipd.serve.text import Delta, Echo, TextStream, find_calls
from semipd.serve.tokenizer import Tokenizer
from semipd.setting import NEUTRAL_CLASSES, ServiceClass

_WORD = 2**64


@dataclass(frozen=True)
class Plan:
    """Requests ready to be submitted. Prompt p's choice c is request p * params.n + c.

    echoes: of each request, where prompts are to be repeated. told: whether the tokens of the texts are.
    calls, reasoning: how those of tools, and what the model thinks, are found in a text, where they are."""

    submits: list[Submit]
    params: list[SamplingParams]  # of each request, complete
    prompt_tokens: int  # of all prompts, each counted once
    echoes: Sequence[Echo] = ()
    told: bool = False
    calls: CallRule | None = None
    reasoning: ReasoningRule | None = None


class RequestMaker:
    """Checks prompts against a model and an engine, and makes requests of them."""

    def __init__(
        self,
        model: ModelFolder,
        seed: int = 0,
        prefix_cache: bool = True,
        classes: Sequence[ServiceClass] = (),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """classes: what requests may name as their service class. tokenizer: the model's, if it has one."""
        self._model = model
        self._constraints = ConstraintMaker(model, tokenizer)
        self._classes = {entry.name for entry in classes}
        self._by_priority = {entry.priority: entry.name for entry in classes if entry.priority is not None}
        self._prefix_cache = prefix_cache
        self._seed = seed
        self._seeded = itertools.count(1)  # its next() is atomic: plans are made on several threads

    def close(self) -> None:
        """End what it started. Idempotent; it may go on."""
        self._constraints.close()

    def plan(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        engine: EngineInfo,
        cache_salt: str | None = None,
        arrived: float | None = None,
        calls: Lark | None = None,
        wait: bool = True,
    ) -> Plan:
        """One request per prompt and choice. arrived: time.monotonic() at its arrival (default: now).
        calls: a grammar that the texts have to follow. wait: for a new grammar to be tried out.

        Raises Refused, naming the field, for what can never be served; Overloaded, and Unchecked, as
        `ConstraintMaker.of`."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        age = time.monotonic() - arrived if arrived is not None else 0.0
        submits: list[Submit] = []
        complete: list[SamplingParams] = []
        for ids, asked in zip(prompts, each, strict=True):
            whole = self._model.defaults.fill(asked)
            submits += self._choices(ids, whole, engine, cache_salt, age, calls, wait)
            complete += [whole] * whole.n
        return Plan(submits, complete, sum(map(len, prompts)))

    def check(self, params: SamplingParams, calls: Lark, wait: bool) -> None:
        """Refuse a grammar that cannot be followed, before it becomes a part of another. wait: as above."""
        self._constraints.of(params, calls, wait)

    def _choices(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        engine: EngineInfo,
        salt: str | None,
        age: float,
        calls: Lark | None,
        wait: bool,
    ) -> list[Submit]:
        most = self._max_tokens(ids, params, engine.limit)
        constraint = self._constraints.of(params, calls, wait)
        stop_tokens = self._stop_tokens(params, constraint)
        service_class = self._service_class(params.service_tier, params.priority)
        sampling = Sampling(
            temperature=float(params.temperature or 0.0),
            top_p=float(1.0 if params.top_p is None else params.top_p),
            top_k=max(params.top_k or 0, 0),
            min_p=float(params.min_p or 0.0),
            ban_until=len(ids) + min(params.min_tokens, most) if params.min_tokens else 0,
            ban_tokens=stop_tokens if params.min_tokens else (),
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            repetition_penalty=float(params.repetition_penalty or 1.0),
            logit_bias=self._biases(params),
            prompt_length=len(ids),
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            constraint=constraint,
        )
        # To score a prompt takes the logits of all its positions, so it has no keys to match.
        cached = self._prefix_cache and params.prompt_logprobs is None
        root = keys.root(salt) if cached else None
        chain = keys.block_keys(ids, engine.block_size, root) if root is not None else []
        first = Submit(
            id="",
            prompt=array("i", ids).tobytes(),
            max_tokens=most,
            sampling=sampling,
            stop_tokens=stop_tokens,
            min_tokens=params.min_tokens,
            keys=b"".join(chain),
            salt=root,
            age=age,
            service_class=service_class,
        )
        seed = mix(self._seed, next(self._seeded)) if params.seed is None else params.seed
        return [_with_seed(first, mix(seed, choice) if choice else seed) for choice in range(params.n)]

    def _max_tokens(self, ids: Sequence[int], params: SamplingParams, limit: int) -> int:
        if not len(ids):
            raise Refused("the prompt is empty", "prompt")
        if min(ids) < 0 or max(ids) >= self._model.vocabulary:
            raise Refused(
                f"the prompt has token ids outside 0 to {self._model.vocabulary - 1}, the vocabulary",
                "prompt",
            )
        room = limit - len(ids)
        if room < 1:
            raise Refused(
                f"the prompt has {len(ids)} tokens; with one token of output the limit is {limit}", "prompt"
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise Refused(
                f"max_tokens is {params.max_tokens}, but after a prompt of {len(ids)} tokens the limit of "
                f"{limit} leaves {room}",
                "max_tokens",
            )
        return room if params.max_tokens is None else params.max_tokens

    def _service_class(self, tier: str | None, priority: int | None) -> str:
        named = None if tier in NEUTRAL_CLASSES else tier
        if named is not None and named not in self._classes:
            known = ", ".join(sorted(self._classes)) or "none"
            raise Refused(
                f"service_tier {named[:64]!r} is no class of this server ({known})", "service_tier"
            )
        by_priority = None if priority is None else self._by_priority.get(priority)
        if priority and by_priority is None:
            known = ", ".join(map(str, sorted(self._by_priority))) or "none"
            raise Refused(
                f"no service class of this server has the priority {priority} ({known})", "priority"
            )
        if named is not None and by_priority not in (None, named):
            raise Refused(f"the priority {priority} is that of {by_priority}, not of {named}", "priority")
        return named or by_priority or "default"

    def _biases(self, params: SamplingParams) -> tuple[tuple[int, float], ...]:
        for token, _ in params.biases:
            if token >= self._model.vocabulary:
                raise Refused(f"logit_bias names token {token}, not in the vocabulary", "logit_bias")
        return params.biases

    def _stop_tokens(self, params: SamplingParams, constraint: Constraint | None) -> tuple[int, ...]:
        for token in params.stop_token_ids:
            if token >= self._model.vocabulary:
                raise Refused(f"stop token {token} is not in the vocabulary", "stop_token_ids")
        eos = () if params.ignore_eos else self._model.eos
        ends = constraint.ends if constraint is not None and constraint.grammar else ()
        return tuple(dict.fromkeys([*params.stop_token_ids, *eos, *ends]))


async def generate(
    session: Session, plan: Plan, tokenizer: Tokenizer | None
) -> AsyncGenerator[list[Delta], None]:
    """Run a plan's requests; yields the deltas that came together. Close it (`contextlib.aclosing`) to
    abort what still runs. Raises EngineDead, Refused or RequestFailed."""
    texts = [
        TextStream(
            tokenizer,
            params.stops,
            params.min_tokens,
            plan.echoes[index] if plan.echoes else None,
            Alignment() if plan.told and params.logprobs is not None else None,
            submit.prompt_tokens,
            params.include_stop_str_in_output,
            _shown(tokenizer, params, plan),
        )
        for index, (params, submit) in enumerate(zip(plan.params, plan.submits, strict=True))
    ]
    finders = [plan.calls.finder() for _ in plan.submits] if plan.calls is not None else []
    thoughts = [plan.reasoning.finder() for _ in plan.submits] if plan.reasoning is not None else []
    with session.submit(plan.submits) as stream:
        async for pieces in stream:
            deltas = [texts[piece.index].feed(piece) for piece in pieces]
            for delta in deltas:
                if thoughts:
                    finder = thoughts[delta.index]
                    delta.reasoning, delta.text = finder.feed(delta.text, last=delta.finish is not None)
                if finders:
                    find_calls(finders[delta.index], delta)
                if delta.finish is not None:
                    stream.stop(delta.index)
            yield deltas


def _shown(tokenizer: Tokenizer | None, params: SamplingParams, plan: Plan) -> frozenset[int]:
    """Special tokens that have a text: all, or those that calls and reasoning are made of."""
    if tokenizer is None:
        return frozenset()
    if not params.skip_special_tokens:
        return frozenset(tokenizer.special.values())
    marks = plan.calls.form.marks if plan.calls is not None else ()
    return tokenizer.shown((*marks, *MARKS) if plan.reasoning is not None else marks)


def mix(seed: int, number: int) -> int:
    """An int64 that depends on every bit of both: one splitmix64 step."""
    value = (seed + number * 0x9E3779B97F4A7C15) % _WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB % _WORD
    value ^= value >> 31
    return value - _WORD if value >= _WORD // 2 else value


def _with_seed(submit: Submit, seed: int) -> Submit:
    return msgspec.structs.replace(submit, sampling=replace(submit.sampling, seed=seed))
