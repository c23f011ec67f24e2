"""Engines under everything at once: tiny pools, few slots, clients that leave, workers that die twice under
one step, constraints that leave no token, every policy and admission rule. Each history follows from its
number."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest

from semipd.core.admission import Aggressive, Conservative, PastFuture
from semipd.core.batching import decode_slices, prefill_slices
from semipd.core.live import Live
from semipd.core.ports import KVManager
from semipd.core.types import (
    Constraint,
    Finished,
    FinishReason,
    Lane,
    Plan,
    Preempted,
    Request,
    Split,
    Stage,
)
from tests.core.harness import POLICIES, Bench, expected, make_request

HISTORIES = 200
NOBODY = 60_000  # a token that the fake never says


class Misfortune:
    """One history. gone: requests that were aborted; struck: those under whose step two workers died."""

    def __init__(self, number: int) -> None:
        self.chance = random.Random(number)
        choose = self.chance.choice
        self.bench = Bench(
            choose(POLICIES),
            blocks=choose((8, 10, 12, 16, 20, 30, 64)),
            depth=choose((1, 2, 3)),
            max_sequences=choose((1, 2, 3, 8)),
            admission=choose((None, Aggressive(), Conservative(), PastFuture())),
        )
        self.bench.executor.forgiving = True
        self.shared = [self.chance.randrange(1000) for _ in range(40)]
        self.requests = [self.request(place) for place in range(choose((3, 8, 15, 25)))]
        self.gone: set[str] = set()
        self.struck: set[str] = set()

    def request(self, place: int) -> Request:
        chance, capacity = self.chance, 4 * self.bench.blocks
        output = chance.choice((1, 2, chance.randrange(1, 12), chance.randrange(1, min(40, capacity))))
        room = capacity - output
        length = min(room, chance.choice((1, 4, 5, chance.randrange(1, 30), room)))
        own = [chance.randrange(1000) for _ in range(length)]
        known = chance.randrange(length + 1) if chance.random() < 0.6 else 0
        prompt = (self.shared[:known] + own)[:length]
        seed, least = chance.choice((0, place)), chance.choice((0, chance.randrange(output + 1)))
        request = make_request(f"r{place:02}", prompt, output, seed=seed, min_tokens=least)
        said = expected(request)
        if chance.random() < 0.3:
            request.stop_tokens = frozenset([chance.choice(said)])
        match chance.randrange(8):
            case 0:
                rule = Constraint(bad_words=((1,),))
            case 1:
                rule = Constraint(allowed=(*said[: chance.randrange(len(said) + 1)], NOBODY))
            case 2:
                request.salt, request.block_keys = None, []
                return request
            case _:
                return request
        request.sampling = replace(request.sampling, constraint=rule)
        return request

    def strike(self) -> None:
        """A worker dies, maybe for the second time under its step."""
        running = self.bench.executor._running
        if not running:
            return
        lane = self.chance.choice(list(running))
        if running[lane].attempts > 2:
            return
        if running[lane].attempts == 2:
            slots = self.bench.engine.live.by_slot
            self.struck |= {slots[piece.slot].id for piece in running[lane].batch.slices}
        self.bench.executor.kill(lane)

    def play(self) -> None:
        bench, chance, pending = self.bench, self.chance, list(self.requests)
        leaving, dying = chance.choice((0.0, 0.03, 0.1)), chance.choice((0.0, 0.05, 0.2))
        for _ in range(chance.choice((50, 200))):
            moment = chance.random()
            if pending and moment < 0.2:
                self.add(pending.pop(0))
            elif moment > 1.0 - leaving:
                request = chance.choice(self.requests)
                self.gone.add(request.id)
                bench.engine.abort(request.id)
            elif moment > 1.0 - leaving - dying:
                self.strike()
            else:
                bench.engine.step(bench.executor.clock.now() + chance.choice((0.0005, 0.01, 1.0)))
                bench.check()
                self.check_queues()
        for request in pending:
            self.add(request)
        bench.run()

    def add(self, request: Request) -> None:
        request.arrival = self.bench.executor.clock.now()
        self.bench.engine.add(request)

    def check_queues(self) -> None:
        live = self.bench.engine.live
        everybody = [*live.waiting, *live.holders()]
        assert len({request.id for request in everybody}) == len(everybody)
        assert not live.by_slot.keys() & set(live._free_slots)
        assert len(live.by_slot) + len(live._free_slots) == live.max_sequences
        for request in live.waiting:
            assert request.stage is Stage.WAITING and request.slot < 0 and not request.blocks

    def check_end(self) -> None:
        ended = [event.request for event in self.bench.events if isinstance(event, Finished)]
        assert sorted(request.id for request in ended) == [request.id for request in self.requests]
        told = self.bench.outputs()
        for request in self.requests:
            wanted, reason = outcome(request)
            got = told.get(request.id, [])
            assert got == request.output
            cut = request.finish_reason is FinishReason.ABORT and request.id in self.gone
            if cut or (request.finish_reason is FinishReason.ERROR and request.id in self.struck):
                assert got == wanted[: len(got)]
            else:
                assert (got, request.finish_reason) == (wanted, reason)


def outcome(request: Request) -> tuple[list[int], FinishReason]:
    """What becomes of a request that nothing disturbs."""
    said, rule = expected(request), request.sampling.constraint
    if rule is not None and rule.allowed:
        for place, token in enumerate(said):
            if token not in rule.allowed:
                return said[:place], FinishReason.ERROR
    stopped = said[-1] in request.stop_tokens and len(said) > request.min_tokens
    return said, FinishReason.STOP if stopped else FinishReason.LENGTH


def test_each_ends_once_with_its_own_tokens_and_all_comes_back() -> None:
    for number in range(HISTORIES):
        replay(number)


@pytest.mark.slow
def test_the_same_for_longer() -> None:
    for number in range(HISTORIES, 40 * HISTORIES):
        replay(number)


def replay(number: int) -> None:
    history = Misfortune(number)
    try:
        history.play()
        history.check_end()
    except BaseException as error:
        error.add_note(f"history {number}, policy {history.bench.policy}")
        raise


class DecodeAlone:
    """Begins prompts, and runs none while anybody decodes."""

    def plan(self, idle: frozenset[Lane], live: Live, kv: Mapping[Lane, KVManager], now: float) -> Plan:
        split, pool = Split.lone(Lane.DECODE, 2), kv[Lane.DECODE]
        if Lane.DECODE not in idle:
            return Plan(split, {})
        begin = live.waiting or not live.decoding
        prompts = prefill_slices(live, pool, Lane.DECODE, 8, Aggressive()) if begin else []
        return Plan(split, {Lane.DECODE: prompts or decode_slices(live, pool, 8)})


def test_a_plan_in_which_the_last_to_decode_gives_way_is_not_the_end() -> None:
    """It launched nothing and nothing ran, which ended the engine; `auto` came there now and then."""
    bench = Bench(blocks=12, depth=1)
    bench.engine._policy = DecodeAlone()
    young = make_request("young", [1, 2, 3], 20, arrival=1.0)
    old = make_request("old", list(range(40)), 2, arrival=0.0)
    bench.engine.add(young)
    bench.engine.step(bench.executor.clock.now() + 1.0)
    bench.engine.add(old)
    bench.run()
    assert bench.outputs() == {request.id: expected(request) for request in (young, old)}
    assert [event.request for event in bench.events if isinstance(event, Preempted)] == [young]
