"""How urgent the decoding requests are, in few groups: how far they have to go, and in what time; and the
chances to miss a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple

from semipd.core.lengths import LengthPredictor
from semipd.core.live import Live
from semipd.core.partition import Targets
from semipd.core.types import Event, Request

MARGIN = 0.15  # a prediction this far from its limit, in parts, is as good as certain
GROUPS = 4
SEEN = 32  # requests looked at, evenly among them
STALE = 6  # times that the groups may be asked for and stay as they are
PRIOR = (256,) * 16  # lengths of outputs to begin with


def miss(seconds: float, limit: float) -> float:
    """Chance that what is predicted to take `seconds` misses `limit`: a ramp; 0 when it is lost already."""
    return min(max((seconds / limit - 1.0) / (2.0 * MARGIN) + 0.5, 0.0), 1.0) if limit > 0.0 else 0.0


def late(left: float, load: float) -> float:
    """Chance not to be done within `left`, in mean times of service, in an M/M/1 queue of this load that
    gives up what would not be: the work that a finite dam loses. Under too much load it is what there is
    too much of, (load - 1) / load. In a queue that gives up nothing all would be late then, whatever was
    chosen."""
    if left <= 0.0:
        return 1.0
    free = 1.0 - load
    if -1e-3 < free < 1e-3:
        return 1.0 / (1.0 + left)
    later = math.exp(min(-free * left, 50.0))
    return free * later / (1.0 - load * later)


class Group(NamedTuple):
    """Decoding requests of similar urgency: how many, tokens still to come, seconds allowed for them (soon:
    they may be late)."""

    size: float
    remaining: float
    allowance: float
    soon: float


class Streams(NamedTuple):
    """groups: the most urgent first. size, tokens: requests, and tokens still to come, in all of them.
    shortest, longest: of what is still to come, the least and the most of a group. pace: seconds a token
    at which none may be late."""

    groups: list[Group]
    size: int
    tokens: float
    shortest: float
    longest: float
    pace: float


class Urgency:
    """An observer. targets: by service class."""

    def __init__(self, targets: Mapping[str, Targets]) -> None:
        self._targets = targets
        self._lengths = LengthPredictor(prior=PRIOR)
        self._streams: Streams | None = None
        self._count, self._age = -1, 0

    def __call__(self, event: Event) -> None:
        self._lengths(event)

    def streams(self, live: Live, now: float) -> Streams:
        """Those of `live.decoding`, which must not be empty. The same as last time when hardly any came or
        went."""
        count = len(live.decoding)
        if self._streams and abs(self._count - count) <= count // 16 and self._age < STALE:
            self._age += 1
            return self._streams
        seen = islice(live.decoding, 0, None, -(-count // SEEN))
        rows = sorted([self._row(request, now) for request in seen])
        size, weight = -(-len(rows) // GROUPS), count / len(rows)
        groups = [_group(rows[begin : begin + size], weight) for begin in range(0, len(rows), size)]
        remaining = [group.remaining for group in groups]
        self._streams = Streams(
            groups,
            count,
            sum([group.size * group.remaining for group in groups]),
            min(remaining),
            max(remaining),
            min([group.soon / group.remaining for group in groups]),
        )
        self._count, self._age = count, 0
        return self._streams

    def _row(self, request: Request, now: float) -> tuple[float, float, int]:
        """What orders it; seconds allowed for what is to come; tokens to come."""
        remaining = self._lengths.remaining(request) or 1
        target = self._targets.get(request.service_class) or self._targets["default"]
        allowed = target.tpot * (len(request.output) + remaining - 1) - (now - request.first_token_at)
        return allowed / remaining, allowed, remaining


def _group(rows: list[tuple[float, float, int]], weight: float) -> Group:
    """weight: requests that a row stands for."""
    count = len(rows)
    allowance = sum([allowed for _, allowed, _ in rows]) / count
    mean = sum([remaining for _, _, remaining in rows]) / count
    return Group(count * weight, mean, allowance, allowance * (1.0 - MARGIN))
