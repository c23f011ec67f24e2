"""The prompts that are here and those to come: how much work, in what time it should be done, and which of
them share the next step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

from semipd.core.live import Live
from semipd.core.order import Order, PromptWork
from semipd.core.partition import Targets
from semipd.core.types import Lane, Slice
from semipd.core.urgency import MARGIN

FORESEEN = 24  # prompts looked at one by one
LASTING = 60.0  # seconds; no busy period is taken to be longer
SPARE = 0.02  # of the device that is left for a backlog, at least


class Prompt(NamedTuple):
    """work: seconds of prefill on the whole device until its first token. left: seconds until its target,
    infinite when that is lost already: it can be neither met nor missed any more. soon: it may be late."""

    work: float
    left: float
    soon: float


class Kind(NamedTuple):
    """Prompts to come. part: of all of them. load: part of the work to come that is theirs or before it.
    delay: seconds until all that is here and goes before them is done. scale: seconds in which the chance
    to have no first token by then falls to 1/e, without any load. own: part of the work counted in `load`
    that is theirs; of what cannot be done in time, theirs is given up. On the whole device."""

    part: float
    load: float
    scale: float
    delay: float
    own: float


class Queue(NamedTuple):
    """work: the sum of theirs; backlog: the most. bearable: how much slower than on the whole device none
    may be late. arrivals, load: prompts, and seconds of work, that come a second. ahead: of what is here,
    seconds that one of them waits for in the mean."""

    prompts: list[Prompt]
    work: float
    backlog: float
    bearable: float
    arrivals: float
    load: float
    kinds: list[Kind]
    ahead: float


NOTHING = Queue([], 0.0, 0.0, math.inf, 0.0, 0.0, [], 0.0)


class Backlog:
    """targets: by service class. work: what prompts take. limit: most prompt tokens of one step. soon: what
    prompts yet to come should not exceed, in seconds."""

    def __init__(self, targets: Mapping[str, Targets], work: PromptWork, limit: int) -> None:
        self._targets, self._work, self._limit = targets, work, limit
        self.soon = (1.0 - MARGIN) * targets["default"].ttft

    def queue(self, live: Live, order: Order | None, now: float) -> Queue:
        """Everything that presses for prefill now."""
        prompts = self._prompts(live, order, now)
        if not prompts:
            return NOTHING
        work, come = [prompt.work for prompt in prompts], self._work
        most = max(work)
        bearable = min([prompt.soon / max(prompt.work, 1e-9) for prompt in prompts])
        kinds = self._kinds(work[0], most, order is not None)
        ahead = self._ahead(work[0], most, order is not None)
        return Queue(prompts, sum(work), most, bearable, come.arrivals.rate, come.load, kinds, ahead)

    def _prompts(self, live: Live, order: Order | None, now: float) -> list[Prompt]:
        """In the order in which they run. They share steps: many in one take much less than each alone."""
        queue = [*live.prefilling, *live.waiting]
        if not queue:
            return []
        work, default = self._work, self._targets["default"]
        running = before = work.running if live.busy(Lane.PREFILL) else 0.0
        found: list[Prompt] = []
        tokens, seconds = 0, 0.0  # of the step that is being filled
        for request in (sorted(queue, key=order) if order else queue)[:FORESEEN]:
            missing, until, own = request.known - request.planned, running, 0.0
            if missing > 0:
                if tokens + missing > self._limit:
                    before, tokens = before + seconds, 0
                tokens += missing
                own = work.alone(request, missing)
                seconds = own if tokens == missing else work.together(tokens)
                until = before + seconds
            target = self._targets.get(request.service_class, default)
            left = request.arrival + target.ttft - now
            if request.first_token_at >= 0 or left <= own:
                left = math.inf
            found.append(Prompt(until, left, left * (1.0 - MARGIN)))
        if len(queue) > FORESEEN:
            found.append(Prompt((before + seconds) * len(queue) / FORESEEN, math.inf, math.inf))
        return found

    def first_part(self, slices: list[Slice], live: Live, rate: float) -> list[Slice]:
        """Of the prompts that could share the next step, those that should, when prompts are worked off at
        `rate`; the others have the one after it.

        In one step all end together, and it takes less time than two. In two the first ones end sooner, and
        the others, those behind them and those who come before all are done wait for what two take more.
        The step is cut where the sum of these times is least."""
        if len(slices) < 2:
            return slices
        work, ends = self._work, list(accumulate([piece.count for piece in slices]))
        tokens, whole = ends[-1], work.together(ends[-1])
        queue = [*live.prefilling, *live.waiting]
        left = sum([request.known - request.planned for request in queue])
        busy = whole * left / tokens / max(rate - work.load, SPARE)
        concerned = len(queue) + work.arrivals.rate * min(busy, LASTING)
        best, least, ended = len(slices), concerned * whole, 0
        for index in range(len(slices) - 1):
            ended += slices[index].sample
            first, second = work.together(ends[index]), work.together(tokens - ends[index])
            cost = concerned * first + (concerned - ended) * second
            if cost < least:
                best, least = index + 1, cost
        return slices[:best]

    def _kinds(self, first: float, most: float, by_length: bool) -> list[Kind]:
        """first, most: seconds of work until one of the prompts that are here has its first token, and
        until all have. by_length: the shortest go first, so that short ones do not wait for long ones, but
        for a step that runs."""
        come = self._work.arrivals
        if not come.rate:
            return []
        mean, part = self._work.load / come.rate, come.long_part
        everyone = Kind(1.0, 1.0, mean / come.calm, 0.5 * most, 1.0)
        if not by_length or not 0.0 < part < 1.0:
            return [everyone]
        short = mean * (1.0 - come.long_load) / (1.0 - part)
        kinds = [everyone._replace(part=part, own=come.long_load)]
        if (delay := first + self._work.step) < self.soon:  # else they are late in any case
            kinds.append(Kind(1.0 - part, 1.0 - come.long_load, short / come.calm, delay, 1.0))
        return kinds

    def _ahead(self, first: float, most: float, by_length: bool) -> float:
        """The mean of those who come: long ones find half of what is waiting now, short ones half of what
        goes before them, the first and a step."""
        part = self._work.arrivals.long_part if by_length else 1.0
        return 0.5 * (part * most + (1.0 - part) * min(first + self._work.step, most))
