"""How the planner sees prompts. A prompt of n tokens takes 1 + n / 10 ms on the whole device."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd.core.backlog import NOTHING, Backlog
from semipd.core.live import Live
from semipd.core.order import PromptWork
from semipd.core.partition import Targets
from semipd.core.types import Lane, Request, Sampling, Slice, Work
from semipd.execute.sim import FixedCost

UNITS = 16
MODEL = FixedCost(UNITS, 1e-3, 1e-4, 0.0)


def seen(lengths: list[int], arrivals: list[float] | None = None, now: float = 0.0):  # type: ignore[no-untyped-def]
    """The queue of waiting prompts of these lengths, the shortest first; a target of a second."""
    live, work = Live(64, frozenset(Lane)), PromptWork(MODEL, UNITS)
    backlog = Backlog({"default": Targets(1.0, 1.0)}, work, 2048)
    for index, (tokens, arrival) in enumerate(zip(lengths, arrivals or [0.0] * len(lengths), strict=True)):
        live.waiting.append(Request(str(index), range(tokens), 2, Sampling(), arrival=arrival))
    return backlog.queue(live, work.shortest([], now), now)


def test_nothing_presses_where_nothing_is() -> None:
    assert seen([]) == NOTHING


def test_prompts_that_fit_one_step_share_it() -> None:
    queue = seen([800, 480, 640, 1600])
    assert [prompt.work for prompt in queue.prompts] == pytest.approx([0.049, 0.113, 0.193, 0.354])
    assert queue.backlog == pytest.approx(0.354) and queue.work == pytest.approx(0.709)
    assert queue.bearable == pytest.approx(0.85 / 0.354)


def test_what_cannot_be_met_any_more_presses_no_more() -> None:
    queue = seen([4000, 160], arrivals=[-0.7, -0.7])
    assert [prompt.left for prompt in queue.prompts] == pytest.approx([0.3, float("inf")])


def test_many_more_than_are_looked_at_count_as_so_much_work() -> None:
    queue = seen([2000] * 96)
    assert len(queue.prompts) == 25 and queue.backlog == pytest.approx(96 * 0.201)


def test_a_short_prompt_to_come_does_not_stand_behind_long_ones() -> None:
    """Ten long ones wait, of 0.3 s each; of those to come a seventh is long."""
    live, work = Live(64, frozenset(Lane)), PromptWork(MODEL, UNITS)
    backlog = Backlog({"default": Targets(1.0, 1.0)}, work, 2048)
    for index in range(200):
        tokens = 3000 if index % 10 == 0 else 160
        work.seconds(Request(str(index), range(tokens), 2, Sampling(), arrival=index / 40))
    for index in range(10):
        live.waiting.append(Request(f"w{index}", range(3000), 2, Sampling(), arrival=5.0))
    by_length, as_they_come = (
        backlog.queue(live, order, 5.0).ahead for order in (work.shortest([], 5.0), None)
    )
    assert as_they_come == pytest.approx(0.5 * 3.0, rel=0.1)
    assert by_length == pytest.approx(0.5 * (3.0 / 7 + 0.3 * 6 / 7), rel=0.1)


def test_long_prompts_to_come_wait_for_all_and_short_ones_for_short_ones() -> None:
    work = PromptWork(MODEL, UNITS)
    backlog = Backlog({"default": Targets(1.0, 1.0)}, work, 2048)
    assert backlog._kinds(0.0, 0.0, by_length=True) == []
    for index in range(2000):
        tokens = 4000 if index % 20 == 0 else 160
        work.seconds(Request(str(index), range(tokens), 2, Sampling(), arrival=index / 40))
    long, short = backlog._kinds(0.1, 3.0, by_length=True)
    seconds = {tokens: MODEL.seconds(Work.of((Slice(0, 0, tokens),)), UNITS) for tokens in (160, 4000)}
    assert (short.part, long.part) == pytest.approx((0.95, 0.05), rel=0.1)
    assert short.load == pytest.approx(
        0.95 * seconds[160] / (0.95 * seconds[160] + 0.05 * seconds[4000]), rel=0.1
    )
    assert (short.scale * work.arrivals.calm, long.load) == (pytest.approx(seconds[160], rel=0.01), 1.0)
    assert short.delay == pytest.approx(0.1) and long.delay == 1.5
    (everyone,) = backlog._kinds(0.1, 3.0, by_length=False)
    assert everyone.part == everyone.load == 1.0 and everyone.scale == pytest.approx(long.scale)


def first_part(lengths: list[int], behind: int = 0, partial: bool = False) -> int:
    """How many of the prompts of these lengths go first, on the whole device, while `behind` more of one
    token wait and nobody comes. partial: the last one does not end within the step."""
    live, work = Live(1000, frozenset(Lane)), PromptWork(MODEL, UNITS)
    backlog = Backlog({"default": Targets(1.0, 1.0)}, work, 2048)
    for index, tokens in enumerate([*lengths, *[1] * behind]):
        live.waiting.append(Request(str(index), range(tokens), 2, Sampling(), arrival=0.0))
    last = len(lengths) - 1
    slices = [Slice(n, 0, tokens, n < last or not partial) for n, tokens in enumerate(lengths)]
    found = backlog.first_part(slices, live, 1.0)
    assert found == slices[: len(found)]
    return len(found)


def test_a_short_prompt_does_not_wait_for_the_long_one_that_could_share_its_step() -> None:
    """Apart, the short one ends 100 ms sooner, and the long one and all behind it 1 ms later."""
    assert first_part([96, 1008]) == 1
    assert first_part([96, 1008], behind=98) == 1
    assert first_part([96, 1008], behind=101) == 2


def test_those_who_come_meanwhile_count_too() -> None:
    """Twenty a second come; the device is busy for half a second with what is here."""
    live, work = Live(64, frozenset(Lane)), PromptWork(MODEL, UNITS)
    backlog = Backlog({"default": Targets(1.0, 1.0)}, work, 2048)
    work.arrivals.rate, work.arrivals.load = 20.0, 0.8
    pieces = [Slice(0, 0, 20, True), Slice(1, 0, 980, True)]
    for index, piece in enumerate(pieces):
        live.waiting.append(Request(str(index), range(piece.count), 2, Sampling(), arrival=0.0))
    apart, together = (backlog.first_part(pieces, live, rate) for rate in (1.0, 0.8))
    assert (len(apart), len(together)) == (1, 2)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(0, 300), st.booleans())
def test_the_step_is_cut_where_least_is_waited(lengths: list[int], behind: int, partial: bool) -> None:
    def seconds(tokens: int) -> float:
        return 1e-3 + 1e-4 * (tokens + -tokens % 16) if tokens else 0.0

    def waited(cut: int) -> float:
        first, second = seconds(sum(lengths[:cut])), seconds(sum(lengths[cut:]))
        ended = cut - (partial and cut == len(lengths))
        others = len(lengths) + behind - ended
        return ended * first + others * (first + second)

    cut = first_part(lengths, behind, partial)
    assert 1 <= cut <= len(lengths)
    assert waited(cut) <= min(map(waited, range(1, len(lengths) + 1))) + 1e-9
