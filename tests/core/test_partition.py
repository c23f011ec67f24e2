"""Controllers are pure functions of a window: legal shares, no oscillation, the published algorithm."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd.core.partition import (
    Observation,
    Paper,
    Shared,
    Static,
    Targets,
    Window,
    WindowCollector,
)
from semipd.core.types import (
    Finished,
    FinishReason,
    Lane,
    Request,
    Split,
    Stepped,
    StepResult,
    Tokens,
    Work,
)

TARGETS = Targets(ttft=0.3, tpot=0.04)


def seen(prefill: int, decode: int, ttft: float, tpot: float, load: float = 0.3) -> Observation:
    return Observation(prefill, decode, ttft, tpot, load)


def step(paper: Paper, history: list[Observation]) -> tuple[int, int]:
    last = history[-1]
    split = paper.split(Window(tuple(history)), Split.pair(last.prefill_units, last.decode_units, 100))
    return split.of(Lane.PREFILL), split.of(Lane.DECODE)


def test_fixed_ways_are_fixed() -> None:
    window = Window((seen(50, 50, 9.0, 9.0),))
    assert str(Static(30, 70, 100).split(window, Split.pair(1, 1, 100))) == "30:70/100"
    assert str(Shared(100).split(window, Split.pair(1, 1, 100))) == "100:100/100"


def test_the_paper_starts_with_everything_for_both() -> None:
    assert str(Paper(100, TARGETS).split(Window(), Split.lone(Lane.DECODE, 100))) == "100:100/100"


@pytest.mark.parametrize(("ttft", "tpot"), [(0.1, 0.01), (1.0, 0.1)])
def test_both_met_or_both_failed_changes_nothing(ttft: float, tpot: float) -> None:
    assert step(Paper(100, TARGETS, 5), [seen(60, 70, ttft, tpot)]) == (60, 70)


def test_a_failing_phase_gains_until_the_model_meets_its_target() -> None:
    prefill, decode = step(Paper(100, TARGETS, 5), [seen(50, 50, 0.35, 0.01)])
    assert prefill > 50 and decode == 50
    prefill, decode = step(Paper(100, TARGETS, 5), [seen(50, 50, 0.1, 0.045)])
    assert prefill == 50 and decode > 50


def test_what_passes_everything_is_taken_from_the_other() -> None:
    prefill, decode = step(Paper(100, TARGETS, 10), [seen(100, 100, 3.0, 0.01)])
    assert prefill == 100 and decode < 100


def test_the_fit_recovers_the_law_that_made_the_data() -> None:
    """Windows from TTFT = 6 / (x - 30) + 0.1: the step stops at the first share that meets the target."""
    law = [seen(x, 100 - x, 6.0 / (x - 30.0) + 0.1, 0.01) for x in (40, 45, 50)]
    prefill, _ = step(Paper(100, TARGETS, 1, max_steps=50), law)
    assert 6.0 / (100.0 * prefill / max(prefill + 50, 100) - 30.0) + 0.1 <= 0.3
    assert 6.0 / (100.0 * (prefill - 1) / max(prefill + 49, 100) - 30.0) + 0.1 > 0.29


@given(
    st.lists(
        st.tuples(
            st.integers(1, 100),
            st.integers(1, 100),
            st.floats(1e-3, 10) | st.just(math.nan),
            st.floats(1e-4, 1) | st.just(math.nan),
            st.floats(0, 2),
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 20),
)
def test_shares_are_always_legal_and_a_pure_function(
    rows: list[tuple[int, int, float, float, float]], size: int
) -> None:
    history = [seen(*row) for row in rows]
    first = step(Paper(100, TARGETS, size), history)
    assert all(1 <= share <= 100 for share in first)
    assert step(Paper(100, TARGETS, size), history) == first


def test_a_constant_load_does_not_oscillate() -> None:
    """The device answers with the published laws; once both targets hold, nothing moves any more."""
    paper, history, prefill, decode = Paper(100, TARGETS, 5), [], 100, 100
    for _ in range(60):
        x = 100.0 * prefill / max(prefill + decode, 100)
        y = 100.0 * decode / max(prefill + decode, 100)
        history.append(seen(prefill, decode, 4.0 / max(x - 30.0, 0.1) + 0.02, 1.2 / y + 0.01))
        prefill, decode = step(paper, history)
    tail = {(o.prefill_units, o.decode_units) for o in history[-20:]}
    assert len(tail) == 1
    assert history[-1].ttft <= TARGETS.ttft and history[-1].tpot <= TARGETS.tpot


def test_windows_hold_quantiles_of_what_happened() -> None:
    collector = WindowCollector(size=10, quantile=0.9)
    split = Split.pair(50, 50, 100)
    for index in range(10):
        request = Request(str(index), [1], 8, arrival=float(index))
        request.first_token_at, request.output = index + 0.1 * (index + 1), [5]
        collector.add(Tokens(request.first_token_at, (request,), (5,)))
        request.output, request.last_token_at = [5] * 5, request.first_token_at + 0.4
        request.finish_reason = FinishReason.LENGTH
        collector.add(Finished(request.last_token_at, request))
        assert collector.close(split, index + 0.5) is None
        collector.add(Stepped(StepResult(Lane.PREFILL, index, (5,), index, index + 0.2), Work(), split))
    window = collector.close(split, 10.0)
    assert window is not None
    (news,) = window.history
    assert (news.ttft, news.tpot) == (pytest.approx(1.0), pytest.approx(0.1))
    assert news.load == pytest.approx(0.1)  # ten steps of 0.2 s on half the device in 10 s
    assert collector.close(split, 11.0) is None, "a new window begins"
