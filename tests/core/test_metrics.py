"""Metrics out of events: exact counts, quantiles within 1%, and what the planner's events mean."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semipd.core.engine import Engine
from semipd.core.histogram import PER_OCTAVE, LogHistogram
from semipd.core.kv import BlockPool
from semipd.core.metrics import Metrics
from semipd.core.partition import Static, Targets
from semipd.core.policies import Limits, SemiPD
from semipd.core.types import Finished, FinishReason, Lane, Request
from tests.execute.fake import FakeExecutor


@settings(deadline=None)
@given(
    st.lists(st.floats(1e-6, 1e5), min_size=1, max_size=200),
    st.floats(0.0, 1.0),
)
def test_quantiles_are_within_one_percent(values: list[float], q: float) -> None:
    histogram = LogHistogram()
    for value in values:
        histogram.add(value)
    exact = sorted(values)[max(1, math.ceil(q * len(values))) - 1]
    assert histogram.quantile(q) == pytest.approx(exact, rel=0.01)
    assert histogram.count == len(values)
    assert histogram.mean == pytest.approx(sum(values) / len(values))


def test_a_histogram_takes_anything_but_nan_and_stays_small() -> None:
    histogram = LogHistogram()
    for value in (0.0, -1.0, 1e-300, 1e300, 5e-324):
        histogram.add(value)
    assert histogram.count == 5 and len(histogram._buckets) < 2000
    assert (histogram.least, histogram.greatest) == (-1.0, 1e300)
    assert histogram.quantile(1.0) == 1e300
    with pytest.raises(ValueError):
        histogram.add(float("nan"))
    assert LogHistogram().quantile(0.5) == LogHistogram().mean == 0.0


def test_powers_of_two_are_exact_ends_of_buckets() -> None:
    """Prometheus' buckets are cut there: a value equal to a limit must count as within it."""
    histogram = LogHistogram(1.0)
    for octave in range(20):
        histogram.add(2**octave)
    data = histogram.data()
    for octave in range(20):
        assert data.below(octave * PER_OCTAVE) == octave + 1
        assert data.below(octave * PER_OCTAVE - 1) == octave


def test_merged_histograms_are_one() -> None:
    generator = random.Random(0)
    parts, whole = [LogHistogram(), LogHistogram()], LogHistogram()
    for _ in range(1000):
        value = generator.lognormvariate(-4, 2)
        generator.choice(parts).add(value)
        whole.add(value)
    parts[0].merge(parts[1])
    assert parts[0].data().buckets == whole.data().buckets
    assert parts[0].quantile(0.9) == whole.quantile(0.9)
    with pytest.raises(ValueError, match="add up"):
        whole.merge(LogHistogram(1.0))


def run(*requests: Request, blocks: int = 64) -> Metrics:
    """All requests through the planner on the fake executor."""
    metrics = Metrics()
    executor = FakeExecutor(blocks)
    pool = BlockPool(blocks, 4)
    policy = SemiPD(Limits(2), Static(1, 1, 2))
    engine = Engine(
        executor,
        policy,
        {Lane.PREFILL: pool, Lane.DECODE: pool},
        executor.clock,
        max_sequences=8,
        max_length=blocks * 4,
        observers=(metrics,),
    )
    for request in requests:
        engine.add(request)
    while not engine.idle:
        engine.step()
    return metrics


def test_counts_are_exact_even_with_preemption() -> None:
    requests = [Request(str(i), range(5 + i), 30 + i) for i in range(8)]
    metrics = run(*requests, blocks=30)
    tokens = [len(request.output) for request in requests]
    assert metrics.preemptions > 0, "the pool was meant to be too small"
    assert metrics.ttft.count == metrics.e2e.count == metrics.tpot.count == 8
    assert metrics.itl.count == sum(tokens) - 8
    assert metrics.generation_tokens == sum(tokens)
    assert metrics.prompt_tokens == sum(len(request.prompt) for request in requests)
    assert metrics.output_lengths.total == sum(tokens)
    assert metrics.finished[FinishReason.LENGTH] == 8
    assert not metrics._last, "an ended request was remembered"


def test_times_add_up() -> None:
    requests = [Request(str(i), range(9), 12) for i in range(4)]
    metrics = run(*requests)
    first = sum(request.first_token_at - request.arrival for request in requests)
    assert metrics.ttft.total == pytest.approx(first)
    assert metrics.queue_time.total + metrics.prefill_time.total == pytest.approx(first)
    gaps = sum(request.last_token_at - request.first_token_at for request in requests)
    assert metrics.itl.total == pytest.approx(gaps)
    assert metrics.decode_time.total == pytest.approx(gaps)
    assert metrics.tpot.total == pytest.approx(gaps / 11)
    assert metrics.e2e.total == pytest.approx(first + gaps)
    assert metrics.step_tokens.total == 4 * 9 + 4 * 11


def test_an_abort_is_no_success_unless_the_text_was_complete() -> None:
    for complete, reason in ((False, FinishReason.ABORT), (True, FinishReason.STOP)):
        metrics = Metrics()
        executor = FakeExecutor()
        pool = BlockPool(64, 4)
        engine = Engine(
            executor,
            SemiPD(Limits(2), Static(1, 1, 2)),
            {Lane.PREFILL: pool, Lane.DECODE: pool},
            executor.clock,
            max_sequences=8,
            max_length=256,
            observers=(metrics,),
        )
        engine.add(Request("a", range(5), 50))
        for _ in range(6):
            engine.step()
        if complete:
            metrics.count_as_stop("a")
        engine.abort("a")
        while not engine.idle:
            engine.step()
        assert metrics.finished[reason] == 1 and sum(metrics.finished.values()) == 1
        assert metrics.e2e.count == complete
        assert not metrics._stopped


def test_a_stop_that_comes_too_late_is_forgotten() -> None:
    """The stop string may be in the last token that was allowed: the request has ended by then, and its
    name would stay in memory for as long as the server runs."""
    metrics = run(Request("a", range(9), 5))
    metrics.count_as_stop("a")
    assert not metrics._stopped and not metrics._unfinished
    assert metrics.finished[FinishReason.LENGTH] == 1


def test_a_snapshot_is_a_copy_by_lane() -> None:
    metrics = run(Request("a", range(9), 5))
    snapshot = metrics.snapshot()
    assert set(snapshot.step_seconds) == set(snapshot.busy_seconds) == {"prefill", "decode"}
    assert snapshot.histograms["inter_token_latency_seconds"].count == 4
    metrics.itl.add(1.0)
    assert snapshot.histograms["inter_token_latency_seconds"].count == 4
    assert snapshot.finished == {"stop": 0, "length": 1, "abort": 0, "error": 0}
    assert Metrics().snapshot().split == "-"


def ended(
    name: str, ttft: float, tpot: float, tokens: int = 5, reason: FinishReason = FinishReason.LENGTH
) -> Finished:
    """A request of class `name` that ended so, one second after the clock's start."""
    request = Request("r", range(9), 64, arrival=1.0, service_class=name)
    request.output = [7] * tokens
    if tokens:
        request.first_token_at = 1.0 + ttft
        request.last_token_at = 1.0 + ttft + (tokens - 1) * tpot
    request.finish_reason = reason
    return Finished(9.0, request)


def test_attainment_is_counted_for_classes_with_a_target() -> None:
    metrics = Metrics({"default": Targets(ttft=0.5), "fast": Targets(0.1, 0.01), "free": Targets()})
    for event in (
        ended("default", 0.4, 9.0),
        ended("nobody knows it", 0.6, 0.0),  # counts as default
        ended("fast", 0.09, 0.009),
        ended("fast", 0.09, 0.02),
        ended("fast", 0.2, 0.001),
        ended("fast", 0.05, 0.0, tokens=1),  # without a second token there is no TPOT to miss
        ended("fast", 0.0, 0.0, tokens=0, reason=FinishReason.ERROR),
        ended("fast", 9.0, 9.0, reason=FinishReason.ABORT),  # the client left
        ended("free", 9.0, 9.0),
    ):
        metrics(event)
    assert metrics.snapshot().attained == {"default": (1, 2), "fast": (2, 5)}
    assert run(Request("a", range(9), 5)).snapshot().attained == {}
