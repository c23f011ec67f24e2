"""What auto chooses, on the fake device whose cost is a + b * tokens + c * context, shared by units."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semipd.core.admission import Aggressive
from semipd.core.auto import Auto, Way
from semipd.core.backlog import LASTING, Kind, Prompt, Queue
from semipd.core.deadline import ByDeadline
from semipd.core.engine import Engine
from semipd.core.kv import BlockPool
from semipd.core.order import PromptWork
from semipd.core.partition import Targets
from semipd.core.policies import Limits
from semipd.core.ports import CostModel
from semipd.core.price import MOST
from semipd.core.types import Device, Event, Lane, Launched, Request, Sampling, Stepped, Switched, Work
from semipd.core.urgency import Group, Streams, late, miss
from semipd.execute.sim import FixedCost, SimExecutor, VirtualClock

UNITS = 16
DEVICE = Device("d", UNITS, "SM", tuple((p, UNITS - p) for p in range(2, UNITS, 2)), 2)


class Rig:
    """An engine under auto in virtual time. A decode step of 8 takes 2.3 ms on the whole device, a prompt
    of 1,000 takes 101 ms. truth: what steps really take; the model may be wrong about it."""

    def __init__(
        self, targets: Targets, truth: float = 1.0, model: CostModel | None = None, depth: int = 2
    ) -> None:
        real = model or FixedCost(UNITS, truth * 1e-3, truth * 1e-4, truth * 1e-6)
        model = model or FixedCost(UNITS, 1e-3, 1e-4, 1e-6)
        self.clock = VirtualClock()
        self.events: list[Event] = []
        work = PromptWork(model, UNITS)
        limits = Limits(
            UNITS,
            2048,
            batch=64,
            admission=Aggressive(),
            order=ByDeadline(work, {"default": targets}, 2048),
        )
        device = dataclasses.replace(DEVICE, depth=depth)
        self.auto = Auto(limits, device, model, {"default": targets}, work)
        pool = BlockPool(4000, 16)
        self.engine = Engine(
            SimExecutor(device, real, self.clock),
            self.auto,
            {Lane.PREFILL: pool, Lane.DECODE: pool},
            self.clock,
            max_sequences=128,
            max_length=50_000,
            observers=[self.events.append, self.auto],
        )
        self.requests: list[Request] = []

    def add(self, prompt: int, output: int) -> Request:
        name = str(len(self.requests))
        request = Request(name, range(prompt), output, Sampling(ban_until=10**6), arrival=self.clock.now())
        self.requests.append(request)
        self.engine.add(request)
        return request

    def run(self, seconds: float = math.inf) -> None:
        end = self.clock.now() + seconds
        while not self.engine.idle and self.clock.now() < end:
            self.engine.step(end if end < math.inf else None)

    def streams(self, count: int = 8, output: int = 400) -> None:
        for _ in range(count):
            self.add(100, output)
        self.run(0.2)
        self.events.clear()

    def launches(self, lane: Lane) -> list[Launched]:
        return [e for e in self.events if isinstance(e, Launched) and e.lane is lane]


def test_a_lone_phase_has_everything() -> None:
    rig = Rig(Targets(0.5, 0.05))
    rig.add(3000, 30)
    rig.run()
    for event in rig.events:
        if isinstance(event, Launched):
            assert event.split.of(event.lane) == UNITS


def test_tight_tpot_keeps_streams_on_time_beside_long_prompts() -> None:
    rig = Rig(Targets(30.0, 0.006))
    rig.streams()
    for _ in range(4):
        rig.add(4000, 1)
    rig.run()
    for request in rig.requests[:8]:
        assert (request.last_token_at - request.first_token_at) / 399 <= 0.006


def test_tight_ttft_moves_decode_aside() -> None:
    """Decode has slack (it may take 50 ms a token): the prompt gets what it needs to be in time."""
    rig = Rig(Targets(0.14, 0.05))
    rig.streams()
    prompt = rig.add(1000, 1)
    rig.run()
    assert prompt.first_token_at - prompt.arrival <= 0.14
    for request in rig.requests[:8]:
        assert (request.last_token_at - request.first_token_at) / 399 <= 0.05


def test_short_prompts_do_not_wait_behind_long_ones_and_none_starves() -> None:
    rig = Rig(Targets(1.0, 0.05))
    long = [rig.add(8000, 2) for _ in range(3)]
    short = []
    for _ in range(100):
        rig.run(0.05)
        short.append(rig.add(300, 2))
    rig.run()
    waits = sorted(r.first_token_at - r.arrival for r in short)
    assert waits[50] < 0.4
    assert all(request.first_token_at < 30.0 for request in long)


@pytest.mark.parametrize("truth", [0.5, 2.0])
def test_a_wrong_cost_model_is_corrected_by_what_is_observed(truth: float) -> None:
    rig = Rig(Targets(30.0, 0.012), truth)
    rig.streams(output=300)
    for _ in range(6):
        rig.run(0.5)
        rig.add(3000, 1)
    rig.run()
    assert rig.auto._correction.slowness[Lane.DECODE] == pytest.approx(truth, rel=0.25)
    for request in rig.requests[:8]:
        assert (request.last_token_at - request.first_token_at) / 299 <= 0.012


def test_a_constant_load_settles_on_a_way() -> None:
    """Hysteresis: with eight streams and one endless queue of equal prompts, switches are rare."""
    rig = Rig(Targets(5.0, 0.01))
    rig.streams(output=2000)
    for _ in range(60):
        rig.add(1000, 1)
    rig.run(4.0)
    splits = [str(e.split) for e in rig.launches(Lane.DECODE)]
    changes = sum(one != two for one, two in itertools.pairwise(splits))
    assert changes <= len(splits) / 5


class Saturating:
    """Decode steps of 20 ms on 10 units or more; prompts of 0.1 ms a token on all of it."""

    def seconds(self, work: Work, units: int, beside: Work | None = None, beside_units: int = 0) -> float:
        units = max(round(units * UNITS / (units + beside_units)) if beside else units, 1)
        prompts = 1e-4 * (work.tokens - work.decodes) * UNITS / units
        return prompts + (0.02 * max(1.0, 10 / units) if work.decodes else 0.0)


def test_what_a_way_costs_decode_is_not_over_with_the_present_prompts() -> None:
    """Prompts keep the device busy for 0.55 of the time and nobody is ever late. With 6 of 16 units for
    decode they take 0.88 of the time and decode's mean pace is 31 ms; with 2 units, which has the present
    prompts done sooner, it is 40."""
    rig = Rig(Targets(30.0, 30.0), model=Saturating())
    rig.streams(output=5000)
    for _ in range(300):
        rig.add(825, 1)
        rig.run(0.15)
    streams = rig.requests[:8]
    tokens = sum(len(stream.output) for stream in streams) / len(streams)
    assert (rig.clock.now() - streams[0].first_token_at) / tokens < 0.031


def test_shares_are_legal_and_every_step_comes_back() -> None:
    rig = Rig(Targets(0.3, 0.01))
    for index in range(60):
        rig.add(50 + 97 * index % 1500, 5 + index)
        rig.run(0.03)
    rig.run()
    legal = {*DEVICE.legal_splits, (UNITS, UNITS), (UNITS, 0), (0, UNITS)}
    launched = [e for e in rig.events if isinstance(e, Launched)]
    assert {(e.split.of(Lane.PREFILL), e.split.of(Lane.DECODE)) for e in launched} <= legal
    assert len(launched) == sum(isinstance(e, Stepped) for e in rig.events)
    rig.engine.check_idle()


def test_nothing_but_build_knows_auto() -> None:
    """Deleting auto deletes one file."""
    package = Path(__file__).parents[2] / "semipd"
    users = [path.name for path in package.rglob("*.py") if "core.auto" in path.read_text()]
    assert users == ["build.py"]


@given(
    streams=st.integers(1, 24),
    prompts=st.lists(st.integers(200, 6000), min_size=1, max_size=6),
    ttft=st.sampled_from([0.2, 1.0, 10.0]),
    tpot=st.sampled_from([0.004, 0.01, 0.05]),
)
@settings(max_examples=25, deadline=None)
def test_a_phase_without_work_holds_nothing_that_the_other_needs(
    streams: int, prompts: list[int], ttft: float, tpot: float
) -> None:
    """Whatever the load and the targets: while a step runs, no unit is idle, and none is kept from it for a
    lane that runs nothing."""
    rig = Rig(Targets(ttft, tpot))
    for _ in range(streams):
        rig.add(50, 60)
    rig.run(0.05)
    for tokens in prompts:
        rig.add(tokens, 3)
    rig.run()
    running = dict.fromkeys((Lane.PREFILL, Lane.DECODE), 0)  # steps in flight
    split, since = None, 0.0
    for event in rig.events:
        if isinstance(event, Stepped):
            if split is not None and event.result.finished > since:
                held = sum(split.of(lane) for lane, steps in running.items() if steps)
                assert held >= UNITS, f"{split} while {running} ran"
            running[event.result.lane] -= 1
            since = event.result.finished
        elif isinstance(event, Launched | Switched):
            split, since = event.split, event.now
            if isinstance(event, Launched):
                running[event.lane] += 1
    rig.engine.check_idle()


def test_decode_takes_everything_back_when_the_prompts_are_done() -> None:
    rig = Rig(Targets(0.13, 0.05))
    rig.streams(output=600)
    prompt = rig.add(1000, 1)
    rig.run(0.6)
    assert 0.0 < prompt.first_token_at <= prompt.arrival + 0.13
    after = [e.split for e in rig.launches(Lane.DECODE) if e.now > prompt.first_token_at]
    assert len(after) > 20 and all(split.of(Lane.DECODE) == UNITS for split in after)


def test_decode_is_held_when_a_prompt_is_in_time_on_the_whole_device_alone() -> None:
    """The streams have many times the time that they need; beside them the prompt would be late."""
    alone = Rig(Targets(9.0, 0.5))
    prompt = alone.add(2000, 1)
    alone.run()
    rig = Rig(Targets(1.1 * (prompt.first_token_at - prompt.arrival), 0.5), depth=1)
    rig.streams()
    prompt = rig.add(2000, 1)
    rig.run()
    begin, end = prompt.started_at, prompt.first_token_at
    assert not [event for event in rig.launches(Lane.DECODE) if begin <= event.now < end]


def scores(*ways: Way, streams: Streams, kinds: Sequence[Kind] = (), load: float = 0.6) -> list[float]:
    """Of ways for one prompt of 0.2 s that cannot be late, while 6 prompts a second arrive."""
    prompts = [Prompt(0.2, math.inf, math.inf)]
    auto = Rig(Targets(0.5 / 0.85, 1.0)).auto
    queue = Queue(prompts, 0.2, 0.2, math.inf, 6.0, load, list(kinds), 0.1)
    return auto._scores(list(ways), queue, streams)


def lost(left: float, load: float) -> float:
    """Monte-Carlo of an M/M/1 queue, first in first out: who would not be done in time leaves then."""
    rng, waited, count = Random(7), 0.0, 100_000
    found = 0
    for _ in range(count):
        there = waited + rng.expovariate(1.0)
        found += there > left
        waited = max(min(there, left) - rng.expovariate(load), 0.0)
    return found / count


@pytest.mark.parametrize("load", [0.3, 0.8, 1.0, 1.3])
def test_the_chance_to_be_late(load: float) -> None:
    assert late(0.0, load) == late(-1.0, load) == 1.0
    assert late(5.0, load) == pytest.approx(lost(5.0, load), rel=0.1, abs=1e-3)
    assert late(2000.0, load) == pytest.approx(max(1.0 - 1.0 / load, 0.0), abs=1e-3)


@given(st.floats(1e-3, 100.0), st.floats(0.0, 3.0))
def test_more_time_and_less_load_make_nobody_later(left: float, load: float) -> None:
    chance = late(left, load)
    assert 0.0 <= chance <= 1.0 and late(1.1 * left, load) <= chance * (1 + 1e-3)
    assert late(left, load + 0.01) >= chance * (1 - 1e-3)


@pytest.mark.parametrize("own", [1.0, 0.25])
def test_later_prompts_may_be_late(own: float) -> None:
    """own: part of the work that is theirs: where less is, more of them are given up for the rest."""
    way, nobody = Way(8, 8, 0, 0.9, 0.01), Streams([], 0, 0.0, math.inf, 0.0, 1.0)
    (pressed,) = scores(way, streams=nobody, kinds=[Kind(0.5, 1.0, 0.1, 0.2, own)])
    (calm,) = scores(way, streams=nobody)
    come = 6.0 * 0.2 / (0.9 - 0.6)
    chance = late((0.5 - 0.2 / 0.9) * 0.9 / 0.1, 0.6 / 0.9)
    assert (pressed - calm) / MOST == pytest.approx(come * 0.5 * chance / own)


def test_who_comes_has_a_target_for_his_tokens_too() -> None:
    """The target is a second a token; prompts are there for two thirds of the time."""
    nobody, alone = Streams([], 0, 0.0, math.inf, 0.0, 1.0), Way(0, 16, 0, 0.0, 0.9)
    quick, slow = (scores(Way(8, 8, 0, 0.9, step), alone, streams=nobody)[0] for step in (0.9, 1.4))
    come = 6.0 * 0.2 / (0.9 - 0.6)
    pace = 1.0 / ((2 / 3) / 1.4 + (1 / 3) / 0.9)
    assert (slow - quick) / MOST == pytest.approx(come * (miss(pace, 1.0) - miss(0.9, 1.0)))
    assert miss(pace, 1.0) > miss(0.9, 1.0) > 0.0


@pytest.mark.parametrize("load", [0.6, 0.95, 9.0])
def test_no_busy_period_is_taken_to_last_for_ever(load: float) -> None:
    nobody = Streams([], 0, 0.0, math.inf, 0.0, 1.0)
    (score,) = scores(Way(8, 8, 0, 0.9, 0.01), streams=nobody, load=load)
    assert score <= 0.2 / 0.9 + 6.0 * LASTING * 0.1 / 0.9
    assert (score > 0.9 * 6.0 * LASTING * 0.1 / 0.9) == (load > 1.0)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(1, 2000)), min_size=1, max_size=4),
    st.floats(0.001, 0.5),
)
def test_groups_that_nobody_of_is_late_count_as_one(sizes: list[tuple[int, float]], step: float) -> None:
    """The short way and the long one, which targets that cannot be missed force, say the same."""
    groups = [Group(size, remaining, 1e9, 1e9) for size, remaining in sizes]
    size, tokens = sum(size for size, _ in sizes), sum(size * remaining for size, remaining in sizes)
    shortest, longest = (choose(remaining for _, remaining in sizes) for choose in (min, max))
    ways = Way(8, 8, 0, 0.9, step), Way(0, 16, 0, 0.0, 0.001)
    short, long = (
        scores(*ways, streams=Streams(groups, size, tokens, shortest, longest, pace)) for pace in (1e6, 0.0)
    )
    assert short == pytest.approx(long)
