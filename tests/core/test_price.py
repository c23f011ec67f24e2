"""What a missed target is worth: it follows the share of requests that keep theirs."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from semipd.core.partition import Targets
from semipd.core.price import KEPT, LEAST, MOST, Price
from semipd.core.types import Finished, FinishReason, Request, Sampling

TARGETS = {"default": Targets(1.0, 0.1), "patient": Targets(100.0, 10.0)}


def finished(
    ttft: float, tpot: float, reason: FinishReason = FinishReason.STOP, service_class: str = "default"
) -> Finished:
    """A request of eleven tokens that had these latencies."""
    request = Request("r", [1], 16, Sampling(), arrival=5.0, service_class=service_class)
    request.output.extend(range(11))
    request.first_token_at = 5.0 + ttft
    request.last_token_at = request.first_token_at + 10 * tpot
    request.finish_reason = reason
    return Finished(request.last_token_at, request)


def after(events: Iterable[Finished]) -> Price:
    price = Price(TARGETS)
    for event in events:
        price(event)
    return price


def test_it_falls_while_all_targets_are_kept_and_rises_with_either_miss() -> None:
    price = after([finished(0.9, 0.09)] * 2000)
    assert price.value == LEAST
    for late in (finished(1.1, 0.01), finished(0.1, 0.11)):
        before = price.value
        price(late)
        assert before < price.value <= MOST
    assert after([finished(2.0, 1.0)] * 100).value == MOST


@pytest.mark.parametrize(
    ("kept", "low", "high"), [(1.0 - 3 * (1.0 - KEPT), 0.8 * MOST, MOST), (1.0, LEAST, LEAST)]
)
def test_it_is_high_where_too_many_are_missed(kept: float, low: float, high: float) -> None:
    generator, price, values = random.Random(0), Price(TARGETS), []
    for _ in range(20_000):
        price(finished(0.5 if generator.random() < kept else 1.5, 0.05))
        values.append(price.value)
    late = sorted(values[5000:])
    assert low <= late[len(late) // 2] <= high


def test_at_the_share_that_should_be_kept_it_stays_where_it_is() -> None:
    """The steps up and down cancel out."""
    price, group = Price(TARGETS, 0.95), [finished(1.5, 0.05)] + [finished(0.5, 0.05)] * 19
    for _ in range(40):
        price(finished(0.5, 0.05))
    before = price.value
    for event in group:
        price(event)
    assert LEAST < before < MOST and price.value == pytest.approx(before)


def test_the_share_that_should_be_kept_can_be_said() -> None:
    """One in eleven is late: too many for 95%, few enough for 90%."""
    events = ([finished(1.5, 0.05)] + [finished(0.5, 0.05)] * 10) * 100
    for kept, value in ((0.95, MOST), (0.9, LEAST)):
        price = Price(TARGETS, kept)
        for event in events:
            price(event)
        assert value / 3 < price.value < value * 3


def test_every_class_has_its_own_targets_and_who_left_has_no_say() -> None:
    low = after([finished(0.5, 0.05)] * 2000).value
    for event in (
        finished(5.0, 1.0, service_class="patient"),
        finished(5.0, 1.0, FinishReason.ABORT),
        finished(5.0, 1.0, FinishReason.ERROR),
    ):
        assert after([finished(0.5, 0.05)] * 2000 + [event]).value == low
    assert (
        after([finished(0.5, 0.05)] * 2000 + [finished(5.0, 0.01, service_class="unheard of")]).value > low
    )
