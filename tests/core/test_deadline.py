"""The order `deadline`: the most prompts in time, in the quickest order to do it, against all orders."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from semipd.build import make_policy
from semipd.config import PolicyConfig
from semipd.core.deadline import PACE, PATIENCE, ByDeadline, Job, arrange, in_time
from semipd.core.errors import ConfigError
from semipd.core.order import PromptWork
from semipd.core.partition import Targets
from semipd.core.types import Device, Request, Sampling
from semipd.execute.sim import FixedCost

UNITS = 16
DEVICE = Device("d", UNITS, "SM", tuple((p, UNITS - p) for p in range(2, UNITS, 2)), 2)
MODEL = FixedCost(UNITS, 1e-3, 1e-4, 0.0)  # a prompt of 1,000 tokens takes 0.101 s
TARGETS = {"default": Targets(1.0, 0.1)}


def random_jobs(rng: random.Random) -> list[Job]:
    found = []
    for _ in range(rng.randint(1, 6)):
        work = rng.uniform(0.1, 2.0)
        left = math.inf if rng.random() < 0.2 else rng.uniform(0.1, 6.0)
        found.append(Job(work, left, work))
    return found


def ends(jobs: list[Job], order: tuple[int, ...] | list[int], begin: float) -> dict[int, float]:
    times = itertools.accumulate([jobs[index].work for index in order], initial=begin)
    return dict(zip(order, itertools.islice(times, 1, None), strict=True))


def met(jobs: list[Job], end: dict[int, float]) -> int:
    return sum(jobs[index].left < math.inf and time <= jobs[index].left for index, time in end.items())


@pytest.mark.parametrize("seed", range(60))
def test_as_many_are_in_time_as_in_the_best_of_all_orders(seed: int) -> None:
    rng = random.Random(seed)
    jobs, begin = random_jobs(rng), rng.uniform(0.0, 1.0)
    orders = [ends(jobs, order, begin) for order in itertools.permutations(range(len(jobs)))]
    most = max(met(jobs, end) for end in orders)
    assert len(in_time(jobs, begin)) == most
    order = arrange(jobs, begin)
    assert sorted(order) == list(range(len(jobs)))
    assert met(jobs, ends(jobs, order, begin)) >= most


@pytest.mark.parametrize("seed", range(60))
def test_of_the_orders_with_the_same_in_time_it_is_the_quickest(seed: int) -> None:
    rng = random.Random(1000 + seed)
    jobs, begin = random_jobs(rng), rng.uniform(0.0, 1.0)
    kept = in_time(jobs, begin)
    sums = []
    for order in itertools.permutations(range(len(jobs))):
        end = ends(jobs, order, begin)
        if all(end[index] <= jobs[index].left for index in kept):
            sums.append(sum(end.values()))
    assert sum(ends(jobs, arrange(jobs, begin), begin).values()) == pytest.approx(min(sums))


def request(name: str, tokens: int, arrival: float = 0.0, service_class: str = "") -> Request:
    return Request(name, range(tokens), 2, Sampling(), arrival=arrival, service_class=service_class)


def names(requests: list[Request], now: float, targets: dict[str, Targets] | None = None) -> list[str]:
    order = ByDeadline(PromptWork(MODEL, UNITS), targets or TARGETS, 2048)(requests, now)
    return [found.id for found in sorted(requests, key=order)]


def test_the_shortest_goes_first_while_nobody_would_be_late() -> None:
    requests = [request("long", 3000), request("short", 500), request("middle", 1000)]
    assert names(requests, 0.0) == ["short", "middle", "long"]


def test_a_long_prompt_goes_first_when_it_would_be_late_and_the_short_one_can_wait() -> None:
    """At 0.4 s the long one, of 0.3 s, has 0.6 s left: with the short one, of 0.2 s, before it, at the pace
    that is reckoned with, it would be late."""
    requests = [request("long", 3000), request("short", 2000, arrival=0.39)]
    assert PACE * 0.3 < 0.6 < PACE * 0.5 < 1.0
    assert names(requests, 0.39) == ["long", "short"]


def test_who_cannot_be_in_time_any_more_makes_nobody_late() -> None:
    """Both long ones are as old; one of them is lost already, and stands behind all that can be in time."""
    lost = request("lost", 9500)  # 0.95 s, and 0.5 s left
    requests = [lost, request("long", 2000, arrival=0.2), request("short", 500, arrival=0.45)]
    assert names(requests, 0.5)[-1] == "lost"


def test_the_longest_is_given_up_when_not_all_can_be_in_time() -> None:
    requests = [request("longest", 4000)] + [request(str(index), 2000, arrival=0.01) for index in range(3)]
    assert names(requests, 0.02)[-1] == "longest"


def test_a_class_with_less_time_goes_first() -> None:
    """The shorter one has to wait, but not when the other one could never be in time."""
    requests = [request("other", 1500), request("hurried", 2000, service_class="hurried")]
    for ttft, first in ((1.0, "other"), (0.5, "hurried"), (0.15, "other")):
        assert names(requests, 0.0, TARGETS | {"hurried": Targets(ttft, 0.1)})[0] == first


def test_none_waits_for_good() -> None:
    """Short prompts that would all be in time, and one that has waited for longer than anybody should."""
    requests = [request(str(index), 2000, arrival=99.9) for index in range(2)]
    assert names([*requests, request("old", 9000, arrival=100.0 - PATIENCE)], 100.0)[-1] == "old"
    assert names([*requests, request("old", 9000, arrival=99.9 - PATIENCE)], 100.0)[0] == "old"


def test_who_came_after_the_order_was_made_goes_last() -> None:
    requests = [request("one", 9000), request("two", 500)]
    order = ByDeadline(PromptWork(MODEL, UNITS), TARGETS, 2048)(requests, 0.0)
    late = request("preempted meanwhile", 100)
    assert sorted([late, *requests], key=order)[-1] is late


def test_without_targets_it_is_the_shortest_first() -> None:
    requests = [request("long", 9500), request("short", 9000, arrival=0.3)]
    assert names(requests, 0.4, {"default": Targets()}) == ["short", "long"]


def test_it_needs_a_model_and_a_target() -> None:
    settings = PolicyConfig(policy="chunked", prompt_order="deadline", ttft_slo=1.0)
    assert make_policy(settings, DEVICE, MODEL)
    with pytest.raises(ConfigError, match="--prompt-order deadline needs a cost model of d"):
        make_policy(settings, DEVICE)
    with pytest.raises(ConfigError, match="--prompt-order deadline needs --ttft-slo"):
        make_policy(PolicyConfig(policy="chunked", prompt_order="deadline"), DEVICE, MODEL)
