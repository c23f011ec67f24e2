"""In which order prompts run: as they come, or the shortest first (by deadline: `core.deadline`).

As they come, a prompt that has started goes on before others start (`batching` does so without being told).
Shortest first goes by the seconds of work that are left of a prompt, less a part of the time that it has
waited, so that short ones do not stand behind long ones and none starves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from semipd.core.arrivals import Arrivals
from semipd.core.ports import CostModel
from semipd.core.types import Request, Slice, Work

Order = Callable[[Request], float]  # the least goes first
PromptOrder = Callable[[Sequence[Request], float], Order]  # of these prompts, at a time in seconds

AGEING = 0.1  # seconds of prefill that one second of waiting makes up for
FADING = 0.05  # weight of the newest step in what sharing one gains
_REMEMBERED = 4096
_ALIKE = 16  # tokens; that many more or less make no difference to a prompt's time


class PromptWork:
    """How long prompts take on the whole device, one by one and together.

    slowness: observed over predicted seconds, for whoever observes them. step_left: share of the prefill
    step in flight that is still to be done.
    """

    def __init__(self, cost: CostModel, units: int) -> None:
        self._cost, self._units = cost, units
        self._whole: dict[Request, float] = {}
        self._by_length: dict[int, float] = {}
        self._running = 0.0  # seconds of the step launched last
        self._alone = self._shared = 0.0  # of steps lately: their prompts one by one, and as they were
        self.arrivals = Arrivals()
        self.slowness = self.step_left = 1.0

    def seconds(self, request: Request) -> float:
        """Prefill seconds that the request still needs, alone."""
        left = request.known - request.planned
        in_flight = (request.planned - request.computed) * self.step_left  # still to be done of it
        return self.alone(request, (left if left > 0 else 0) + in_flight)

    def alone(self, request: Request, tokens: float) -> float:
        """Seconds of so many of its tokens when no other prompt is in the step."""
        known, whole = request.known, self._whole.get(request)
        if whole is None:
            whole = self._meet(request, known)
        return whole * tokens / known * self.slowness

    def missing(self, request: Request) -> float:
        """Seconds of those of its tokens that no step has yet, when no other prompt is in theirs."""
        left = request.known - request.planned
        return self.alone(request, left) if left > 0 else 0.0

    def gain(self, tokens: int, alone: float, most: int) -> float:
        """What part of `alone`, the seconds of so many tokens of prompts one by one, they take when they
        share steps of at most `most` tokens."""
        if not alone:
            return 1.0
        step = min(tokens, most)
        return min(self.together(step) * tokens / (step * alone), 1.0)

    def together(self, tokens: int) -> float:
        """Seconds of a step with so many tokens of several prompts."""
        return self._of_length(tokens) * self.slowness

    @property
    def running(self) -> float:
        """Seconds that are left of the step in flight, if there is one."""
        return self._running * self.step_left * self.slowness

    @property
    def load(self) -> float:
        """Seconds of prefill that arrive per second, as prompts have shared steps lately."""
        gain = self._shared / self._alone if self._alone else 1.0
        return self.arrivals.load * gain * self.slowness

    @property
    def step(self) -> float:
        """Seconds of a prefill step of late."""
        return self._shared * self.slowness

    def launched(self, work: Work, slices: Sequence[Slice]) -> None:
        """Learn from a prefill step how much prompts gain by sharing one."""
        self._running = self._cost.seconds(work, self._units)
        alone = sum([self._of_length(piece.count) for piece in slices])
        self._alone += FADING * (alone - self._alone)
        self._shared += FADING * (self._of_length(work.tokens) - self._shared)

    def shortest(self, _requests: Sequence[Request], now: float) -> Order:
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
        self.arrivals.meet(request.arrival, known, whole)
        return whole
