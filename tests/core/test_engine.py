"""The planner on the fake executor: a wrong block, a lost step or a wrong order gives wrong tokens."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semipd.core.admission import Aggressive, Conservative, PastFuture
from semipd.core.errors import Refused
from semipd.core.ports import ExecutorLost
from semipd.core.types import (
    Constraint,
    Event,
    Finished,
    FinishReason,
    Lane,
    Launched,
    Preempted,
    Request,
    Stepped,
    StepResult,
)
from tests.core.harness import POLICIES, Bench, expected, make_request


def some_requests(count: int, seed: int = 0, longest: int = 40) -> list[Request]:
    """Random prompts, some sharing a prefix, arriving at once."""
    rng = random.Random(seed)
    shared = [rng.randrange(1000) for _ in range(18)]
    requests = []
    for index in range(count):
        own = [rng.randrange(1000) for _ in range(rng.randrange(1, longest))]
        prompt = shared[: rng.randrange(19)] + own if index % 2 else own
        requests.append(make_request(f"r{index:02}", prompt, rng.randrange(1, 12), seed=index))
    return requests


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("depth", [1, 2])
def test_tokens_are_those_of_a_lone_request(policy: str, depth: int) -> None:
    bench = Bench(policy, depth=depth)
    requests = some_requests(13)
    for request in requests:
        bench.engine.add(request)
    bench.run()
    assert bench.outputs() == {request.id: expected(request) for request in requests}
    assert all(r.finish_reason is FinishReason.LENGTH for r in bench.finished().values())


@pytest.mark.parametrize("policy", POLICIES)
def test_preemption_changes_no_token(policy: str) -> None:
    """Sixteen blocks for eight growing sequences: the youngest must give way and be recomputed."""
    bench = Bench(policy, blocks=16)
    rng = random.Random(1)
    requests = [
        make_request(f"r{i}", [rng.randrange(1000) for _ in range(6)], 20, arrival=float(i))
        for i in range(8)
    ]
    for request in requests:
        bench.engine.add(request)
    bench.run()
    assert bench.outputs() == {request.id: expected(request) for request in requests}
    assert any(isinstance(event, Preempted) for event in bench.events)
    assert requests[0].preemptions == 0, "the oldest is never the one to give way"


@pytest.mark.parametrize("policy", ["static", "chunked-3", "auto"])
def test_no_step_is_planned_ahead_of_a_token_that_decides_what_may_come(policy: str) -> None:
    """A constrained request's step waits for the one before; those of others go two deep again."""
    bench = Bench(policy)
    ruled = make_request("ruled", [1, 2, 3, 4, 5], 9, constraint=Constraint(bad_words=((1,),)))
    others = [make_request(f"r{index}", [7 + index] * 6, 40) for index in range(3)]
    for request in [ruled, *others]:
        bench.engine.add(request)
    bench.run()
    depth, deepest = 0, [0, 0]  # of the decode lane, while it is live and afterwards
    over = False
    for event in bench.events:
        if isinstance(event, Launched) and event.lane is Lane.DECODE:
            depth += 1
            deepest[over] = max(deepest[over], depth)
        depth -= isinstance(event, Stepped) and event.result.lane is Lane.DECODE
        over = over or (isinstance(event, Finished) and event.request is ruled)
    assert deepest == [1, 2]
    assert bench.outputs() == {request.id: expected(request) for request in [ruled, *others]}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_that_has_no_token_left_ends_alone(policy: str) -> None:
    bench = Bench(policy)
    free = [make_request(f"r{index}", [7 + index] * 6, 12) for index in range(3)]
    third = expected(make_request("ruled", [1, 2, 3, 4, 5], 9))[:3]
    ruled = make_request("ruled", [1, 2, 3, 4, 5], 9, constraint=Constraint(allowed=tuple(third)))
    for request in [*free, ruled]:
        bench.engine.add(request)
    bench.run()
    assert bench.outputs() == {**{request.id: expected(request) for request in free}, "ruled": third}
    assert ruled.finish_reason is FinishReason.ERROR and "no token can follow" in (ruled.error or "")


@pytest.mark.parametrize("admission", [Aggressive, Conservative, PastFuture])
def test_every_admission_rule_serves_everything(admission: type) -> None:
    bench = Bench("static", blocks=20, admission=admission())
    requests = some_requests(20, seed=3, longest=20)
    for request in requests:
        bench.engine.add(request)
    bench.run()
    assert bench.outputs() == {request.id: expected(request) for request in requests}
    if admission is Conservative:
        assert not any(isinstance(event, Preempted) for event in bench.events)


def test_both_lanes_run_at_once_and_decode_goes_on_during_a_long_prefill() -> None:
    bench = Bench("static", blocks=400)
    bench.engine.add(make_request("stream", [1, 2, 3], 60))
    for _ in range(6):
        bench.engine.step()
    bench.engine.add(make_request("long", list(range(300)), 2))
    bench.run()
    steps = [event.result for event in bench.events if isinstance(event, Stepped)]
    prefills = [r for r in steps if r.lane is Lane.PREFILL]
    decodes = [r for r in steps if r.lane is Lane.DECODE]
    during = [d for d in decodes for p in prefills if p.started < d.finished and d.started < p.finished]
    assert len(during) >= 5


def test_a_lone_phase_has_the_whole_device() -> None:
    bench = Bench("static")
    bench.engine.add(make_request("one", [1, 2, 3], 10))
    bench.run()
    for event in bench.events:
        if isinstance(event, Launched):
            assert event.split.of(event.lane) == 2, "a phase that runs alone is not capped"


def test_prefill_first_never_overlaps() -> None:
    bench = Bench("prefill-first")
    for request in some_requests(10):
        bench.engine.add(request)
    bench.run()
    steps = sorted((e.result.started, e.result.finished) for e in bench.events if isinstance(e, Stepped))
    assert all(one[1] <= two[0] + 1e-12 for one, two in itertools.pairwise(steps))


def test_a_shared_prefix_is_computed_once() -> None:
    bench = Bench("static")
    prompt = list(range(40))
    bench.engine.add(make_request("first", prompt, 2))
    bench.run()
    bench.engine.add(make_request("second", [*prompt, 7, 8], 2))
    bench.run()
    assert bench.finished()["first"].cached_tokens == 0
    assert bench.finished()["second"].cached_tokens == 40
    assert bench.outputs()["second"] == expected(make_request("x", [*prompt, 7, 8], 2))


def test_a_full_hit_still_computes_the_last_token() -> None:
    """A shared block is never rewritten: the block of the last token is not matched."""
    bench = Bench("static")
    for name in ("first", "second"):
        bench.engine.add(make_request(name, list(range(40)), 3))
        bench.run()
    assert bench.finished()["second"].cached_tokens == 36
    assert bench.outputs()["second"] == bench.outputs()["first"]


def test_produced_tokens_are_reused_by_the_next_turn() -> None:
    bench = Bench("static")
    first = make_request("turn1", list(range(10)), 12)
    bench.engine.add(first)
    bench.run()
    bench.engine.add(make_request("turn2", [*first.prompt, *first.output, 5], 2))
    bench.run()
    assert bench.finished()["turn2"].cached_tokens == 20


def test_stop_tokens_end_a_request_and_min_tokens_holds_them_off() -> None:
    bench = Bench("static")
    plain = expected(make_request("x", [1, 2, 3], 8))
    bench.engine.add(make_request("stopped", [1, 2, 3], 8, stop=(plain[2],)))
    bench.engine.add(make_request("held", [1, 2, 3], 8, stop=(plain[2],), min_tokens=3))
    bench.run()
    assert bench.outputs() == {"stopped": plain[:3], "held": plain}
    assert bench.finished()["stopped"].finish_reason is FinishReason.STOP


def test_disaggregated_copies_what_the_decode_pool_lacks() -> None:
    bench = Bench("disaggregated")
    for name in ("first", "second"):
        bench.engine.add(make_request(name, list(range(40)), 3))
        bench.run()
    transfers = [e.batch for e in bench.events if isinstance(e, Launched) and e.lane is Lane.TRANSFER]
    assert [len(batch.copies) for batch in transfers] == [10, 0]


@pytest.mark.parametrize("after", range(12))
def test_an_abort_frees_everything_at_any_moment(after: int) -> None:
    bench = Bench("static")
    bench.engine.add(make_request("gone", list(range(30)), 10))
    bench.engine.add(make_request("stays", [4, 5, 6], 10))
    for _ in range(after):
        bench.engine.step(bench.executor.clock.now() + 1.0)
    bench.engine.abort("gone")
    bench.engine.abort("never existed")
    bench.run()
    assert bench.outputs()["stays"] == expected(make_request("x", [4, 5, 6], 10))
    gone = bench.finished()["gone"]
    assert gone.finish_reason in (FinishReason.ABORT, FinishReason.LENGTH)


def test_a_failed_step_ends_exactly_its_requests() -> None:
    bench = Bench("static")
    good, bad = make_request("good", [1, 2, 3], 20), make_request("bad", [9, 9, 9], 20)
    bench.engine.add(good)
    for _ in range(4):
        bench.engine.step()
    bench.engine.add(bad)
    bench.executor.poison = 9
    bench.run()
    assert bad.finish_reason is FinishReason.ERROR and bad.error == "made to fail"
    assert bench.outputs() == {"good": expected(good)}


def test_a_lost_executor_answers_everybody() -> None:
    bench = Bench("static")
    for request in some_requests(12):
        bench.engine.add(request)
    for _ in range(5):
        bench.engine.step()
    done = set(bench.finished())

    def lost(until: float | None) -> list[StepResult]:
        raise ExecutorLost("the device fell off")

    bench.executor.wait = lost  # type: ignore[method-assign]
    bench.engine.step()
    late = make_request("late", [1], 1)
    bench.engine.add(late)
    bench.engine.step()
    for name, request in bench.finished().items():
        if name not in done:
            assert (request.finish_reason, request.error) == (FinishReason.ERROR, "the device fell off")
    assert len(bench.finished()) == 13
    bench.engine.check_idle()


@pytest.mark.parametrize(
    ("prompt", "output", "param"),
    [([], 1, "prompt"), ([1], 0, "max_tokens"), ([1] * 1000, 1, "prompt"), ([1] * 10, 1000, "max_tokens")],
)
def test_what_can_never_be_served_is_refused(prompt: list[int], output: int, param: str) -> None:
    bench = Bench("static")
    with pytest.raises(Refused) as refusal:
        bench.engine.add(make_request("no", prompt, output))
    assert refusal.value.param == param


def test_a_request_larger_than_the_pool_is_refused_rather_than_stuck() -> None:
    with pytest.raises(Refused, match="KV pool"):
        Bench("static", blocks=8).engine.add(make_request("no", [1] * 30, 5))


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(POLICIES),
    blocks=st.integers(14, 40),
    depth=st.integers(1, 2),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_whatever_happens_tokens_are_right_and_nothing_leaks(
    policy: str, blocks: int, depth: int, seed: int, data: st.DataObject
) -> None:
    """Arrivals, aborts and worker deaths at random moments, in a pool too small for all."""
    bench = Bench(policy, blocks=blocks, depth=depth)
    requests = some_requests(10, seed, longest=24)
    rng = random.Random(seed)
    pending = list(requests)
    aborted: set[str] = set()
    for _ in range(200):
        action = data.draw(st.sampled_from(("step", "step", "add", "abort", "kill")))
        if action == "add" and pending:
            bench.engine.add(pending.pop(0))
        elif action == "abort" and rng.random() < 0.3:
            name = rng.choice(requests).id
            aborted.add(name)
            bench.engine.abort(name)
        elif action == "kill" and bench.executor._running:
            lane = next(iter(bench.executor._running))
            if bench.executor._running[lane].attempts == 1:
                bench.executor.kill(lane)
        else:
            bench.engine.step(bench.executor.clock.now() + 0.01)
            bench.check()
    for request in pending:
        bench.engine.add(request)
    bench.run()
    told = bench.outputs()
    for request in requests:
        want = expected(request)
        got = told.get(request.id, [])
        if request.finish_reason is FinishReason.ABORT:
            assert request.id in aborted and got == want[: len(got)]
        else:
            assert got == want


def test_events_tell_each_request_once() -> None:
    bench = Bench("chunked-16")
    for request in some_requests(9):
        bench.engine.add(request)
    bench.run()
    ends = [event.request.id for event in bench.events if isinstance(event, Finished)]
    assert sorted(ends) == [f"r{i:02}" for i in range(9)]
    launched = [e.batch.step for e in bench.events if isinstance(e, Launched)]
    stepped = [e.result.step for e in bench.events if isinstance(e, Stepped)]
    assert sorted(launched) == sorted(stepped) == list(range(1, len(launched) + 1))
    assert isinstance(bench.events[0], Event)


@pytest.mark.parametrize("long", [False, True])
def test_a_step_is_planned_ahead_of_short_ones_only_while_prompts_are_on_their_way(
    long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever ends a prompt during a long step joins the next one."""
    monkeypatch.setattr("semipd.core.live.LONG_STEP", 0.0 if long else 1e9)
    bench, most = Bench("static"), 0
    bench.engine.add(make_request("a", [1] * 8, 40))
    for turn in range(60):
        bench.engine.step(bench.executor.clock.now() + 1.0)
        if turn == 4:
            bench.engine.add(make_request("b", [2] * 200, 2))
        if turn > 6 and bench.engine.live.prefilling:  # what was in flight when it came has landed
            most = max(most, len(bench.engine.live.flights[Lane.DECODE]))
    bench.run()
    assert most == (1 if long else 2)
