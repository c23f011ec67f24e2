"""The order of prompts is a setting of its own: every policy runs them as they come, or shortest first."""

from __future__ import annotations

import pytest

from semipd.build import make_policy
from semipd.config import PolicyConfig, from_mapping
from semipd.core.engine import Engine
from semipd.core.errors import ConfigError
from semipd.core.kv import BlockPool
from semipd.core.order import AGEING, PromptWork
from semipd.core.ports import CostModel
from semipd.core.types import Device, Lane, Request, Sampling, Slice, Work
from semipd.execute.sim import FixedCost, SimExecutor, VirtualClock

UNITS = 16
DEVICE = Device("d", UNITS, "SM", tuple((p, UNITS - p) for p in range(2, UNITS, 2)), 2)
WAYS = {
    "static": {"split": "static:8,8"},
    "prefill-first": {"policy": "prefill-first"},
    "chunked": {"policy": "chunked", "chunk_tokens": 512},
    "auto": {"split": "auto", "ttft_slo": 1.0},
}
MODEL = FixedCost(UNITS, 1e-3, 1e-4, 0.0)  # a prompt of 1,000 tokens takes 0.1 s


def engine_of(settings: PolicyConfig, cost: CostModel | None = MODEL) -> Engine:
    clock = VirtualClock()
    pool = BlockPool(8000, 16)
    policy = make_policy(settings, DEVICE, cost)
    return Engine(
        SimExecutor(DEVICE, MODEL, clock),
        policy,
        {Lane.PREFILL: pool, Lane.DECODE: pool},
        clock,
        max_sequences=64,
        max_length=50_000,
        observers=[policy] if callable(policy) else [],
    )


def first_tokens(engine: Engine, lengths: list[int]) -> list[float]:
    """When each of these prompts, which arrive at once and in this order, had its first token."""
    requests = [Request(str(i), range(n), 2, Sampling()) for i, n in enumerate(lengths)]
    for request in requests:
        engine.add(request)
    while not engine.idle:
        engine.step()
    engine.check_idle()
    return [request.first_token_at for request in requests]


@pytest.mark.parametrize("way", WAYS)
def test_short_prompts_pass_long_ones_only_when_told_to(way: str) -> None:
    lengths = [6000, 6000, 200]
    came = first_tokens(engine_of(PolicyConfig(**WAYS[way], prompt_order="fcfs")), lengths)
    assert came == sorted(came)
    short = first_tokens(engine_of(PolicyConfig(**WAYS[way], prompt_order="shortest")), lengths)
    assert short[2] < short[0] / 2


@pytest.mark.parametrize("way", WAYS)
def test_the_default_order_is_deadline_for_auto_and_fcfs_for_the_others(way: str) -> None:
    lengths = [6000, 6000, 200]
    default = first_tokens(engine_of(PolicyConfig(**WAYS[way])), lengths)
    order = "deadline" if way == "auto" else "fcfs"
    assert default == first_tokens(engine_of(PolicyConfig(**WAYS[way], prompt_order=order)), lengths)


def test_waiting_makes_up_for_length() -> None:
    """A long prompt goes before a short one that came so much later that the wait outweighs it."""
    work = PromptWork(MODEL, UNITS)
    long = Request("long", range(6000), 1, arrival=0.0)  # 0.6 s
    late = Request("late", range(1000), 1, arrival=6.0)  # 0.1 s, so AGEING * 6 outweighs the difference
    soon = Request("soon", range(1000), 1, arrival=4.0)
    assert AGEING * 6.0 > 0.5 > AGEING * 4.0
    order = work.shortest([], 10.0)
    assert order(soon) < order(long) < order(late)


def test_only_what_is_left_of_a_prompt_counts() -> None:
    work = PromptWork(MODEL, UNITS)
    started = Request("started", range(4000), 1, planned=3600, computed=3600)
    other = Request("other", range(1000), 1)
    assert work.shortest([], 0.0)(started) < work.shortest([], 0.0)(other)
    assert work.seconds(started) == pytest.approx(0.0401)


def test_shortest_needs_something_to_predict_with() -> None:
    with pytest.raises(ConfigError, match="--prompt-order shortest needs a cost model of d"):
        make_policy(PolicyConfig(policy="chunked", prompt_order="shortest"), DEVICE)
    assert make_policy(PolicyConfig(policy="chunked", prompt_order="fcfs"), DEVICE)
    with pytest.raises(ConfigError, match="prompt-order"):
        from_mapping({"prompt-order": "longest"})


@pytest.mark.parametrize("seconds", [2.0, 60.0])
def test_what_arrives_is_known_soon_after_the_start(seconds: float) -> None:
    """Twenty prompts a second of 101 ms on the whole device, from 1,000 s on."""
    work = PromptWork(MODEL, UNITS)
    for index in range(round(20 * seconds)):
        work.seconds(Request(str(index), range(1000), 2, Sampling(), arrival=1000.0 + index / 20))
    assert work.arrivals.rate == pytest.approx(20.0, rel=0.1)
    assert work.load == pytest.approx(20.0 * MODEL.seconds(Work.of((Slice(0, 0, 1000),)), UNITS), rel=0.1)


def test_prompts_that_share_steps_are_less_work() -> None:
    """A step of eight prompts of 100 tokens takes 81 ms on the whole device, eight of one take 11 each."""
    work = PromptWork(MODEL, UNITS)
    for index in range(200):
        work.seconds(Request(str(index), range(96), 2, Sampling(), arrival=index / 20))
    alone = MODEL.seconds(Work.of((Slice(0, 0, 96),)), UNITS)
    assert work.load == pytest.approx(20 * alone, rel=0.2)
    slices = [Slice(slot, 0, 96) for slot in range(8)]
    for _ in range(100):
        work.launched(Work.of(slices), slices)
    together = MODEL.seconds(Work.of((Slice(0, 0, 8 * 96),)), UNITS)
    assert work.load == pytest.approx(work.arrivals.load * together / (8 * alone), rel=0.01)
    work.step_left = 0.25
    assert work.running == pytest.approx(0.25 * MODEL.seconds(Work.of(slices), UNITS))
    work.slowness = 2.0
    assert work.together(768) == pytest.approx(2 * together)
