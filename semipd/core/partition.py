"""Targets, and fixed ways to share the device between the two phases, and the paper's. Each way is a pure
function of a window of observations; `core.policies.SemiPD` collects the windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from semipd.core.types import Event, Finished, FinishReason, Lane, Split, Stepped, Tokens


@dataclass(frozen=True, slots=True)
class Targets:
    """Latency targets in seconds: arrival to first token, and mean time per output token after it."""

    ttft: float = math.inf
    tpot: float = math.inf


@dataclass(frozen=True, slots=True)
class Observation:
    """One closed window: the units that each phase had and the latencies that it gave (NaN: no sample)."""

    prefill_units: int
    decode_units: int
    ttft: float
    tpot: float
    load: float  # share of its time that the whole device would need for the prompts: r * l_100


@dataclass(frozen=True, slots=True)
class Window:
    """What a controller may look at. history: closed windows, oldest first; the last one is the news."""

    history: tuple[Observation, ...] = ()


class Static:
    """A fixed pair of shares while both phases have work."""

    def __init__(self, prefill: int, decode: int, total: int) -> None:
        self._split = Split.pair(prefill, decode, total)

    def split(self, window: Window, current: Split) -> Split:
        return self._split


class Shared(Static):
    """Both phases on everything, competing: what (100, 100) means in the semi-PD paper."""

    def __init__(self, total: int) -> None:
        super().__init__(total, total, total)


class Paper:
    """Algorithm 1 of semi-PD (arXiv 2504.19867, section 4.3) as published.

    With x and y the shares in percent and load = r * l_100 (arrival rate times prefill time on the whole
    device), TTFT(x) = a1 / (x - 100 load) + b1 (an M/M/1 queue) and TPOT(y) = a2 / y + b2, both refitted
    from the history at every window. If only one target fails, its share rises in steps until the model,
    at the share that remains after competition x / (x + y), meets the target; what passes 100 is taken from
    the other. If both or neither fail, nothing changes.
    """

    # Shape of the published fits (Llama3-8B, ShareGPT), used until two different shares were observed.
    TTFT_SHAPE = (0.6809, 0.022)
    TPOT_SHAPE = (0.6284, 0.3818)

    def __init__(self, total: int, targets: Targets, step: int = 1, max_steps: int = 5) -> None:
        """step: units that a share changes by at a time. The start is everything for both."""
        self._total, self._targets, self._step, self._max_steps = total, targets, step, max_steps

    def split(self, window: Window, current: Split) -> Split:
        total = self._total
        if not window.history:
            return Split.pair(total, total, total)
        prefill, decode = current.of(Lane.PREFILL) or total, current.of(Lane.DECODE) or total
        news, targets = window.history[-1], self._targets
        slow_first, slow_next = news.ttft > targets.ttft, news.tpot > targets.tpot
        if slow_first == slow_next:  # the text's rule: both met, or both failed, leave as it is
            return Split.pair(prefill, decode, total)
        if slow_first:
            prefill, decode = self._raise(prefill, decode, self._first_token(window), targets.ttft)
        else:
            decode, prefill = self._raise(decode, prefill, self._next_token(window), targets.tpot)
        return Split.pair(prefill, decode, total)

    def _raise(self, mine: int, other: int, model: _Curve, target: float) -> tuple[int, int]:
        for _ in range(self._max_steps):
            if mine < self._total:
                mine = min(mine + self._step, self._total)
            else:
                other = max(other - self._step, self._step)
            if model.at(self._effective(mine, other)) <= target:
                break
        return mine, other

    def _effective(self, mine: int, other: int) -> float:
        """The share in percent that a phase keeps when both compete for more than there is."""
        return 100.0 * mine / max(mine + other, self._total)

    def _first_token(self, window: Window) -> _Curve:
        load = 100.0 * window.history[-1].load
        points = [
            (self._effective(o.prefill_units, o.decode_units), 100.0 * o.load, o.ttft)
            for o in window.history
        ]
        return _fit(points, load, self.TTFT_SHAPE)

    def _next_token(self, window: Window) -> _Curve:
        points = [(self._effective(o.decode_units, o.prefill_units), 0.0, o.tpot) for o in window.history]
        return _fit(points, 0.0, self.TPOT_SHAPE)


@dataclass(frozen=True, slots=True)
class _Curve:
    """latency(share) = a / (share - load) + b; infinite at or below the load."""

    a: float
    b: float
    load: float

    def at(self, share: float) -> float:
        return self.a / (share - self.load) + self.b if share > self.load else math.inf


def _fit(points: Sequence[tuple[float, float, float]], load: float, shape: tuple[float, float]) -> _Curve:
    """Least squares of latency over 1 / (share - load); with one share seen, the published shape scaled
    through the last point. points: (share, load then, latency)."""
    pairs = [(1.0 / (x - then), t) for x, then, t in points if x > then and not math.isnan(t)]
    if not pairs:
        return _Curve(0.0, math.inf, load)
    count = len(pairs)
    mean_u, mean_t = sum(u for u, _ in pairs) / count, sum(t for _, t in pairs) / count
    spread = sum((u - mean_u) ** 2 for u, _ in pairs)
    if spread > 1e-12 * mean_u**2:
        a = sum((u - mean_u) * (t - mean_t) for u, t in pairs) / spread
        if a > 0.0:
            return _Curve(a, max(mean_t - a * mean_u, 0.0), load)
    u, t = pairs[-1]
    scale = t / (100.0 * shape[0] * u + shape[1])
    return _Curve(100.0 * shape[0] * scale, shape[1] * scale, load)


@dataclass
class WindowCollector:
    """Turns events into windows of `size` steps with the `quantile` of TTFT and TPOT in each."""

    size: int = 200
    quantile: float = 0.9
    keep: int = 50
    _steps: int = 0
    _opened: float = math.nan
    _prefill_seconds: float = 0.0  # scaled to the whole device
    _ttft: list[float] = field(default_factory=list)
    _tpot: list[float] = field(default_factory=list)
    _history: list[Observation] = field(default_factory=list)

    def add(self, event: Event) -> None:
        match event:
            case Tokens():
                self._ttft += [
                    request.first_token_at - request.arrival
                    for request in event.requests
                    if len(request.output) == 1
                ]
            case Finished(request=request):
                if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                    gaps = max(len(request.output) - 1, 1)
                    self._tpot.append((request.last_token_at - request.first_token_at) / gaps)
            case Stepped(result=result, split=split):
                self._steps += 1
                if math.isnan(self._opened):
                    self._opened = result.started
                if result.lane is Lane.PREFILL:
                    share = split.of(Lane.PREFILL) / max(sum(split.units.values()), split.total)
                    self._prefill_seconds += (result.finished - result.started) * share

    def close(self, split: Split, now: float) -> Window | None:
        """The window ending now, once it is full; then a new one begins."""
        if self._steps < self.size:
            return None
        seconds = max(now - self._opened, 1e-9)
        news = Observation(
            split.of(Lane.PREFILL),
            split.of(Lane.DECODE),
            _quantile(self._ttft, self.quantile),
            _quantile(self._tpot, self.quantile),
            self._prefill_seconds / seconds,
        )
        self._history = [*self._history[-self.keep + 1 :], news]
        self._steps, self._opened, self._prefill_seconds = 0, now, 0.0
        self._ttft, self._tpot = [], []
        return Window(tuple(self._history))


def _quantile(values: list[float], share: float) -> float:
    if not values:
        return math.nan
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]
