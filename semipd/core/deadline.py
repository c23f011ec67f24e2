"""Prompts by deadline: as many as can be have their first token in time, and of the orders in which these
do, the one with the least mean latency.

Which can be in time says Moore's rule (Management Science 15, 1968): by due time, and whenever one would be
late, the longest so far is given up. How they go then says Smith's (Naval Research Logistics 3, 1956): from
the back, of all that may end last, the longest does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from semipd.core.order import Order, PromptWork
from semipd.core.partition import Targets
from semipd.core.types import Request

PACE = 1.7  # seconds until a second of work is done: decode has its share, and others come meanwhile
PATIENCE = 30.0  # seconds; who has waited longer goes first, whoever else is late then


class Job(NamedTuple):
    """work: seconds. left: seconds until it is due; infinite when that is lost or it has no target. key:
    the greater, the rather it goes last."""

    work: float
    left: float
    key: float


class ByDeadline:
    """A `PromptOrder`. targets: by service class, one of them "default". tokens: most of one step."""

    def __init__(self, work: PromptWork, targets: Mapping[str, Targets], tokens: int) -> None:
        self._work, self._targets, self._tokens = work, targets, tokens
        self._targets_given = any(target.ttft < math.inf for target in targets.values())

    def __call__(self, requests: Sequence[Request], now: float) -> Order:
        """Who is not among `requests` goes last."""
        if len(requests) < 2:
            return _alike
        shortest = self._work.shortest(requests, now)
        keys = {request: shortest(request) for request in requests}
        order = sorted(requests, key=keys.__getitem__)
        if self._targets_given:
            overdue = [request for request in order if now - request.arrival > PATIENCE]
            if overdue:
                order = [request for request in order if now - request.arrival <= PATIENCE]
            jobs, begin, late = self._jobs(overdue, order, keys, now)
            if late:
                order = [order[index] for index in arrange(jobs, begin)]
            order = overdue + order
        ranks = dict(zip(order, range(len(order)), strict=True))
        return lambda request: ranks.get(request, len(ranks))

    def _jobs(
        self, first: list[Request], queue: list[Request], keys: Mapping[Request, float], now: float
    ) -> tuple[list[Job], float, bool]:
        """The queue's, the seconds until the first of them can start when `first` goes before, and whether
        any would be late as they stand."""
        work, default = self._work, self._targets["default"]
        before = [work.missing(request) for request in first]
        alone = [work.missing(request) for request in queue]
        tokens = sum([request.known - request.planned for request in first + queue])
        gain = work.gain(tokens, sum(before) + sum(alone), self._tokens)
        begin = until = work.running + PACE * gain * sum(before)
        jobs, late = [], False
        for request, seconds in zip(queue, alone, strict=True):
            target = self._targets.get(request.service_class, default)
            left = request.arrival + target.ttft - now
            until += PACE * gain * seconds
            if request.first_token_at >= 0 or left <= begin + gain * seconds:
                left = math.inf
            elif until > left:
                late = True
            jobs.append(Job(PACE * gain * seconds, left, keys[request]))
        return jobs, begin, late


def _alike(_request: Request) -> float:
    return 0.0


def arrange(jobs: Sequence[Job], begin: float) -> list[int]:
    """Their indices in the order described above, when the first of them starts in `begin` seconds."""
    kept = in_time(jobs, begin)
    due = sorted([(job.left if index in kept else math.inf, index) for index, job in enumerate(jobs)])
    until = begin + sum([job.work for job in jobs])
    order: list[int] = []
    may_be_last: list[tuple[float, int]] = []
    while len(order) < len(jobs):
        # Rounding must not leave nobody: then the one that is due last.
        while due and (due[-1][0] >= until or not may_be_last):
            _, index = due.pop()
            heappush(may_be_last, (-jobs[index].key, -index))
        index = -heappop(may_be_last)[1]
        order.append(index)
        until -= jobs[index].work
    order.reverse()
    return order


def in_time(jobs: Sequence[Job], begin: float) -> set[int]:
    """As many as can be done before they are due, when the first starts in `begin` seconds. Those without
    a due time are not counted."""
    kept: list[tuple[float, int]] = []
    until = begin
    for left, index in sorted([(job.left, index) for index, job in enumerate(jobs) if job.left < math.inf]):
        work = jobs[index].work
        heappush(kept, (-work, index))
        until += work
        if until > left:
            until += heappop(kept)[0]
    return {index for _, index in kept}
