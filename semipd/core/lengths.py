"""How long outputs will be, judged by those that ended lately."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

from semipd.core.types import Event, Finished, FinishReason, Request


class LengthPredictor:
    """An observer. Expects of a request the mean of the recent lengths beyond what it has produced.

    prior: lengths that it begins with, as the first outputs to end are the short ones."""

    def __init__(self, remember: int = 512, prior: Sequence[int] = ()) -> None:
        self._recent = deque(prior)
        self._remember = remember
        self._sorted = sorted(prior)
        self._sums = [0, *accumulate(reversed(self._sorted))]  # _sums[i]: total of the i longest lengths

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Finished):
            return
        if event.request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            length = len(event.request.output)
            self._recent.append(length)
            insort(self._sorted, length)
            if len(self._recent) > self._remember:
                del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
            self._sums = [0, *accumulate(reversed(self._sorted))]

    def remaining(self, request: Request) -> int:
        """Tokens still to come, 0 to what `max_tokens` leaves. All of that when nothing is known."""
        produced = len(request.output)
        longer = len(self._sorted) - bisect_right(self._sorted, produced)
        if longer:
            expected = self._sums[longer] // longer
        elif self._sorted:  # longer than all that was seen: as much again
            expected = 2 * produced + 1
        else:
            expected = request.max_tokens
        return max(min(expected, request.max_tokens) - produced, 0)
