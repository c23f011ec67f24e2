"""In which order prompts run: as they come, or the shortest first.

As they come, a prompt that has started goes on before others start (`batching` does so without being told).
Shortest first goes by the seconds of work that are left of a prompt, less a part of the time that it has
waited, so that short ones do not stand behind long ones and none starves.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from semipd.core.ports import CostModel
from semipd.core.types import Request, Slice, Work

Order = Callable[[Request], float]  # the least goes first
PromptOrder = Callable[[float], Order]  # the order at a time in seconds

AGEING = 0.1  # seconds of prefill that one second of waiting makes up for
MEMORY = 10.0  # seconds over which the arriving prompts are averaged
_REMEMBERED = 4096
_ALIKE = 16  # tokens; that many more or less make no difference to a prompt's time


class PromptWork:
    """How long prompts take on the whole device, alone; and how many seconds of that arrive per second.

    slowness: observed over predicted seconds, for whoever observes them. step_left: share of the prefill
    step in flight that is still to be done. arrivals, load: prompts, and seconds of prefill, per second.
    """

    def __init__(self, cost: CostModel, units: int) -> None:
        self._cost, self._units = cost, units
        self._whole: dict[Request, float] = {}
        self._by_length: dict[int, float] = {}
        self._counted_at, self._since = 0.0, math.inf
        self._arrived = self._came = 0.0  # prompts, and seconds of prefill, fading
        self.slowness = self.step_left = 1.0
        self.arrivals = self.load = 0.0

    def seconds(self, request: Request) -> float:
        """Prefill seconds that the request still needs on the whole device."""
        known, whole = request.known, self._whole.get(request)
        if whole is None:
            whole = self._meet(request, known)
        in_flight = (request.planned - request.computed) * self.step_left  # still to be done of it
        left = known - request.planned
        return whole * ((left if left > 0 else 0) + in_flight) / known * self.slowness

    def shortest(self, now: float) -> Order:
        """A `PromptOrder`: shortest remaining prompt first, with ageing."""
        return lambda request: self.seconds(request) - AGEING * (now - request.arrival)

    def _of_length(self, tokens: int) -> float:
        """Seconds for a whole prompt, its length rounded up to a multiple of _ALIKE tokens."""
        tokens += -tokens % _ALIKE
        seconds = self._by_length.get(tokens)
        if seconds is None:
            if len(self._by_length) >= _REMEMBERED:
                self._by_length = {}
            seconds = self._cost.seconds(Work.of((Slice(0, 0, tokens),)), self._units)
            self._by_length[tokens] = seconds
        return seconds

    def _meet(self, request: Request, known: int) -> float:
        if len(self._whole) >= _REMEMBERED:
            self._whole = {}
        whole = self._whole[request] = self._of_length(known)
        if self._since == math.inf:
            self._since = self._counted_at = request.arrival
        decay = math.exp(-max(request.arrival - self._counted_at, 0.0) / MEMORY)
        self._arrived = self._arrived * decay + 1.0
        self._came = self._came * decay + whole
        self._counted_at = max(request.arrival, self._counted_at)
        seen = MEMORY * (1.0 - math.exp(-max(self._counted_at - self._since, 1.0) / MEMORY))
        self.arrivals, self.load = self._arrived / seen, self._came / seen
        return whole
