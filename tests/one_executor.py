"""Many engines, one after another, over one CPU executor: policy, split, chunk and pool differ, and the
model is loaded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from semipd.build import make_policy, predictor
from semipd.config import from_mapping
from semipd.core.engine import Engine
from semipd.core.kv import BlockPool
from semipd.core.types import Event, Lane, Preempted, Request, Score, Scored, Stepped
from semipd.execute.clock import MonotonicClock
from semipd.execute.cpu import CpuExecutor
from semipd.model.spec import load_spec
from semipd.serve.generation import RequestMaker
from semipd.serve.messages import EngineInfo
from semipd.serve.model_folder import read_model_folder
from semipd.serve.params import SamplingParams
from semipd.serve.tokenizer import Tokenizer

SLOTS, MAX_LENGTH, POOL_TOKENS = 64, 400, 8192
AT_ONCE = 7  # requests that are there at the start; each further one comes after a step
MOST_TURNS = 100_000


class OneModel:
    """Runs requests on a model folder under any settings; an executor per block size."""

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        self.folder, self.dtype = folder, dtype
        self._spec, self._model = load_spec(folder), read_model_folder(folder)
        self.tokenizer = Tokenizer(folder)
        self._executors: dict[int, CpuExecutor] = {}
        self.scores: list[list[Score]] = []  # of each prompt of the last run, by position

    def close(self) -> None:
        for executor in self._executors.values():
            executor.close()
        self._executors.clear()

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        kv_blocks: int = 0,
        **settings: Any,
    ) -> tuple[list[list[int]], int]:
        """Output tokens of every prompt, and how often any request was preempted.

        kv_blocks: of the pool; 0 means all that the executor has. settings: as those of `LLM`."""
        config = from_mapping(settings)
        size = config.cache.block_size
        executor = self._executor(size)
        limit = min(MAX_LENGTH, kv_blocks * size or POOL_TOKENS)
        known = executor.device
        seed, cached = config.model.seed, config.cache.prefix_cache
        maker = RequestMaker(self._model, seed, cached, tokenizer=self.tokenizer)
        info = EngineInfo(known.name, known.units, known.unit_kind, limit, size)
        clock = MonotonicClock()
        plan = maker.plan(prompts, params, info)
        requests = [submit.request(clock.now()) for submit in plan.submits]
        for number, request in enumerate(requests):
            request.id = str(number)
        policy = make_policy(config.policy, known, predictor(config.policy, self._spec, self.dtype, known))
        pool = BlockPool(kv_blocks or POOL_TOKENS // size, size, config.cache.prefix_cache)
        events: list[Event] = []
        engine = Engine(
            executor,
            policy,
            {Lane.PREFILL: pool, Lane.DECODE: pool},
            clock,
            max_sequences=SLOTS,
            max_length=limit,
            observers=[lambda event: events.append(event), *([policy] if callable(policy) else [])],
        )
        try:
            _drive(engine, requests, events)
        except BaseException:
            self._executors.pop(size).close()  # its steps in flight would answer the next engine
            raise
        self.scores = [[score for one, score in _scored(events) if one is request] for request in requests]
        return [request.output for request in requests], sum(isinstance(e, Preempted) for e in events)

    def _executor(self, block_size: int) -> CpuExecutor:
        if block_size not in self._executors:
            self._executors[block_size] = CpuExecutor(
                self.folder,
                dtype=self.dtype,
                slots=SLOTS,
                max_length=MAX_LENGTH,
                blocks=POOL_TOKENS // block_size,
                block_size=block_size,
            )
        return self._executors[block_size]


def _scored(events: Sequence[Event]) -> Iterator[tuple[Request, Score]]:
    for event in events:
        if isinstance(event, Scored):
            yield from zip(event.requests, event.scores, strict=True)


def _drive(engine: Engine, requests: Sequence[Request], events: list[Event]) -> None:
    """Some requests at once, then one more after each step, so that prompts arrive while others decode.
    What arrives when depends on steps alone, never on the speed of the machine."""
    waiting = list(requests)
    for _ in range(MOST_TURNS):
        steps = sum(isinstance(event, Stepped) for event in events)
        while waiting and len(requests) - len(waiting) < AT_ONCE + steps:
            engine.add(waiting.pop(0))
        if engine.idle:
            break
        engine.step(engine.clock.now() + 60.0)
        assert engine.dead is None, engine.dead
    assert not waiting and engine.idle, f"not finished after {MOST_TURNS} turns"
    engine.check_idle()
