"""What is expected of the prompts that come."""

from __future__ import annotations

from random import Random

import pytest

from semipd.core.arrivals import Arrivals


def seen(gaps: list[float], tokens: list[int]) -> Arrivals:
    arrivals, now = Arrivals(), 1000.0
    for gap, length in zip(gaps, tokens, strict=True):
        now += gap
        arrivals.meet(now, length, length / 1000)
    return arrivals


def test_how_even_what_comes_is() -> None:
    """Kingman's 2 / (Ca^2 + Cs^2), with what both were drawn from."""
    rng = Random(5)
    steady = [rng.expovariate(100.0) for _ in range(4000)]
    bursts = [rng.gammavariate(1 / 4, 4 / 100.0) for _ in range(4000)]  # Ca^2 = 4
    same, varied = [500] * 4000, [1 + int(rng.expovariate(1 / 500)) for _ in range(4000)]
    assert seen(steady, same).calm == pytest.approx(2.0, rel=0.2)
    assert seen(steady, varied).calm == pytest.approx(1.0, rel=0.2)
    assert seen(bursts, varied).calm == pytest.approx(2 / 5, rel=0.3)


def test_prompts_that_come_at_once_or_out_of_order_are_no_trouble() -> None:
    arrivals = seen([0.0] * 50, [100] * 50)
    assert arrivals.rate == pytest.approx(25, rel=0.15)  # at least two seconds are looked at
    assert arrivals.load == pytest.approx(0.1 * arrivals.rate)
    assert 0.2 <= arrivals.calm <= 2.0
    arrivals.meet(990.0, 100, 0.1)
    assert arrivals.rate == pytest.approx(25, rel=0.15)


def test_long_prompts_are_told_from_short_ones() -> None:
    arrivals = seen([0.01] * 2000, [8000 if index % 20 == 0 else 200 for index in range(2000)])
    assert arrivals.long_part == pytest.approx(0.05, rel=0.1)
    assert arrivals.long_load == pytest.approx(400 / 590, rel=0.1)
