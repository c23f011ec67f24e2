"""How urgent the decoding requests are, in few groups: how far they have to go, and in what time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from semipd.core.lengths import LengthPredictor
from semipd.core.live import Live
from semipd.core.partition import Targets
from semipd.core.types import Event

GROUPS = 4
STALE = 6  # times that the groups may be asked for and stay as they are
PRIOR = (256,) * 16  # lengths of outputs to begin with


class Group(NamedTuple):
    """Decoding requests of similar urgency: how many, tokens still to come, seconds allowed for them (soon:
    they may be late)."""

    size: int
    remaining: float
    allowance: float
    soon: float


class Urgency:
    """An observer. targets: by service class. margin: a prediction this far from its limit, in parts, is as
    good as certain."""

    def __init__(self, targets: Mapping[str, Targets], margin: float) -> None:
        self._targets, self._part = targets, 1.0 - margin
        self._lengths = LengthPredictor(prior=PRIOR)
        self._groups: list[Group] = []
        self._count, self._age = -1, 0

    def __call__(self, event: Event) -> None:
        self._lengths(event)

    def groups(self, live: Live, now: float) -> list[Group]:
        """Those of `live.decoding`, which must not be empty, the most urgent first. The same as last time
        when hardly any came or went."""
        count = len(live.decoding)
        if abs(self._count - count) <= count // 16 and self._age < STALE:
            self._age += 1
            return self._groups
        rows, default = [], self._targets["default"]
        for request in live.decoding:
            remaining = self._lengths.remaining(request) or 1
            target = self._targets.get(request.service_class, default)
            allowed = target.tpot * (len(request.output) + remaining - 1)
            rows.append((allowed - (now - request.first_token_at), remaining))
        rows.sort(key=lambda row: row[0] / row[1])
        size = -(-len(rows) // GROUPS)
        self._groups = []
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            allowance = sum(allowed for allowed, _ in part) / len(part)
            mean = sum(remaining for _, remaining in part) / len(part)
            self._groups.append(Group(len(part), mean, allowance, allowance * self._part))
        self._count, self._age = count, 0
        return self._groups
