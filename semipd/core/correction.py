"""How far a cost model is off on this machine, lane by lane, learned from every step."""

from __future__ import annotations

import math

from semipd.core.ports import CostModel
from semipd.core.types import Event, Lane, Launched, Stepped, Work

LEARNING = 0.05  # weight of the newest step
_MOST = 1.5  # of |log(observed / predicted)| that one step may say


class Correction:
    """An observer. slowness: observed over predicted seconds of each lane's steps, smoothed. level: that of
    prefill and decode in steps of a sixth of a natural logarithm, for the keys of caches."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._log = dict.fromkeys(Lane, 0.0)
        self.slowness = dict.fromkeys(Lane, 1.0)
        self.level = (0, 0)
        self._running: dict[Lane, tuple[Work, float, float]] = {}  # work, launched at, predicted seconds
        self._predicted: dict[int, float] = {}  # by step

    def __call__(self, event: Event) -> None:
        if isinstance(event, Launched):
            lane, units = event.lane, event.split.units
            beside = next((run[0] for other, run in self._running.items() if other is not lane), None)
            mine = max(units.get(lane, 0), 1)
            seconds = self._cost.seconds(event.work, mine, beside, max(sum(units.values()) - mine, 0))
            self._predicted[event.batch.step] = seconds
            self._running[lane] = (event.work, event.now, seconds)
        elif isinstance(event, Stepped):
            result = event.result
            self._running.pop(result.lane, None)
            seconds = self._predicted.pop(result.step, 0.0)
            observed = result.finished - result.started
            if result.error is None and result.attempts == 1 and min(seconds, observed) > 0.0:
                self._learn(result.lane, math.log(observed / seconds))

    def step_left(self, lane: Lane, now: float) -> float:
        """Share that is left of the lane's step in flight, as predicted; never quite nothing. 1 without."""
        run = self._running.get(lane)
        done = (now - run[1]) / max(run[2] * self.slowness[lane], 1e-9) if run else 0.0
        return max(1.0 - done, 0.05)

    def _learn(self, lane: Lane, news: float) -> None:
        logs = self._log
        logs[lane] += LEARNING * (max(-_MOST, min(news, _MOST)) - logs[lane])
        self.slowness[lane] = math.exp(logs[lane])
        self.level = (round(6 * logs[Lane.PREFILL]), round(6 * logs[Lane.DECODE]))
