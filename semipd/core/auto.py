"""The planner that subsumes the fixed ways: before each launch it scores, and then does what one of them
would do. Targets in, shares out.

A way is a split p:d of the device, a mixed batch with a chunk of c prompt tokens, or one phase alone. For
the present work the cost model gives two figures of each: the rate at which prompts are worked off (1: as
fast as with the whole device) and the seconds of a decode step. From these follow, for every request that
is here now, the time of its first token and of its last one, if the way were kept until the prompts are
done. The way with the least

    sum of the times to the last token + MISS * expected number of missed targets

is taken. So decode gets the least that meets its target with margin when prompts press, everything when
they do not; a predicted TTFT miss is bought off with decode's slack; and when both fail, the fewest miss.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from semipd.core.batching import decode_slices, prefill_slices
from semipd.core.lengths import LengthPredictor
from semipd.core.live import Live
from semipd.core.partition import Targets
from semipd.core.policies import Limits
from semipd.core.ports import CostModel, KVManager
from semipd.core.types import Device, Event, Lane, Launched, Plan, Request, Slice, Split, Stepped, Work

MISS = 2.0  # seconds of latency that one missed target is worth
MARGIN = 0.15  # a prediction this far from its limit, in parts, is as good as certain
AGEING = 0.1  # seconds of prefill that one second of waiting makes up for
FORESEEN = 24  # prompts looked at one by one
STREAM_GROUPS = 6  # decoding requests are scored in this many groups
MEMORY = 10.0  # seconds over which the arriving load is averaged
STALE = 6  # plans for which the groups may stay as they are
LEARNING = 0.05  # weight of the newest step in the correction of the cost model
STICK = 0.02  # a way must be this much better, in parts, than the present one


class Way(NamedTuple):
    """One candidate. chunk > 0: a mixed batch. rate: prompt work per second, 1 for the whole device.
    step: seconds of a decode step, infinite when decode is held."""

    prefill: int
    decode: int
    chunk: int
    rate: float
    step: float

    @property
    def name(self) -> tuple[int, int, int]:
        return (self.prefill, self.decode, self.chunk)


class Group(NamedTuple):
    """Decoding requests of about the same urgency: how many, tokens still to come, and the seconds that
    they may take for them."""

    size: int
    remaining: float
    allowance: float


@dataclass
class _Correction:
    """Observed over predicted seconds of one kind of step, smoothed in logarithms."""

    log_ratio: float = 0.0

    def learn(self, predicted: float, observed: float) -> None:
        if predicted > 0.0 and observed > 0.0:
            news = max(-1.5, min(math.log(observed / predicted), 1.5))
            self.log_ratio += LEARNING * (news - self.log_ratio)

    @property
    def factor(self) -> float:
        return math.exp(self.log_ratio)


@dataclass
class _Arriving:
    """Prompts per second and their whole-device seconds of prefill per second, averaged over MEMORY."""

    rate: float = 0.0
    load: float = 0.0
    at: float = 0.0

    def add(self, now: float, seconds: float) -> None:
        decay = math.exp(-max(now - self.at, 0.0) / MEMORY)
        self.rate = self.rate * decay + 1.0 / MEMORY
        self.load = self.load * decay + seconds / MEMORY
        self.at = max(now, self.at)


class Auto:
    """A policy and an observer. targets: by service class; "default" must be there.

    chunks: sizes of mixed batches to consider. cost: corrected online by what steps really take."""

    def __init__(
        self,
        limits: Limits,
        device: Device,
        cost: CostModel,
        targets: Mapping[str, Targets],
        chunks: Sequence[int] = (64, 128, 256, 512, 1024, 2048),
    ) -> None:
        self._limits, self._device, self._cost = limits, device, cost
        self._targets, self._chunks = targets, tuple(chunks)
        self._lengths = LengthPredictor()
        self._corrections = {lane: _Correction() for lane in Lane}
        self._predicted: dict[int, float] = {}
        self._running: dict[Lane, tuple[Work, Split, float, float]] = {}
        self._step_left = 1.0
        self._tables: dict[tuple[int, ...], list[Way]] = {}
        self._prompt_seconds: dict[Request, float] = {}
        self._groups: list[Group] = []
        self._groups_age = (-1, 0)
        self._present: tuple[int, int, int] | None = None
        self._whole_prompt = 1.0
        self._arriving = _Arriving()

    # -- observing ---------------------------------------------------------------------------------

    def __call__(self, event: Event) -> None:
        if isinstance(event, Launched):
            beside = next((v for k, v in self._running.items() if k is not event.lane), None)
            other = beside[0] if beside else None
            units = sum(event.split.units.values()) - event.split.of(event.lane) if beside else 0
            seconds = self._cost.seconds(event.work, max(event.split.of(event.lane), 1), other, units)
            self._predicted[event.batch.step] = seconds
            self._running[event.lane] = (event.work, event.split, event.now, seconds)
        elif isinstance(event, Stepped):
            result = event.result
            self._running.pop(result.lane, None)
            predicted = self._predicted.pop(result.step, 0.0)
            if result.error is None and result.attempts == 1:
                self._corrections[result.lane].learn(predicted, result.finished - result.started)
        else:
            self._lengths(event)

    # -- planning ----------------------------------------------------------------------------------

    def plan(self, idle: frozenset[Lane], live: Live, kv: Mapping[Lane, KVManager], now: float) -> Plan:
        self._step_left = self._prefill_left(now)
        prompts = self._prompts(live, now)
        pressing = bool(prompts) or live.busy(Lane.PREFILL)
        if not pressing or not live.decoding:
            way = Way(0, self._device.units, 0, 0.0, 0.0) if not pressing else self._lone_prefill()
        else:
            way = self._choose(live, prompts, now)
        return self._launch(way, idle, live, kv, now)

    def _launch(
        self, way: Way, idle: frozenset[Lane], live: Live, kv: Mapping[Lane, KVManager], now: float
    ) -> Plan:
        """Do what the fixed way would do, on the lanes that have room."""
        limits, units = self._limits, self._device.units
        slices: dict[Lane, Sequence[Slice]] = {}
        order = self._order(now)
        if way.decode and Lane.DECODE in idle and (live.decoding or way.chunk):
            decodes = decode_slices(live, kv[Lane.DECODE], limits.batch)
            if way.chunk:
                decodes += prefill_slices(
                    live, kv[Lane.DECODE], Lane.DECODE, way.chunk, limits.admission, order=order
                )
            slices[Lane.DECODE] = decodes
        if way.prefill and Lane.PREFILL in idle and not live.busy(Lane.PREFILL):
            slices[Lane.PREFILL] = prefill_slices(
                live, kv[Lane.PREFILL], Lane.PREFILL, limits.prefill_tokens, limits.admission, order=order
            )
        if live.decoding and Lane.DECODE in idle and not live.in_flight and not any(slices.values()):
            # Decode was to be held for prompts that cannot enter yet.
            slices[Lane.DECODE] = decode_slices(live, kv[Lane.DECODE], limits.batch)
        prefill = bool(slices.get(Lane.PREFILL)) or live.busy(Lane.PREFILL)
        decode = bool(slices.get(Lane.DECODE)) or live.busy(Lane.DECODE)
        if prefill and decode:
            # A phase that is being drained keeps the least share until it is done.
            least = self._device.legal_splits[0][0] if self._device.legal_splits else units
            shares = (way.prefill or least, way.decode or least)
            if sum(shares) > units and not (way.prefill == way.decode == units):
                shares = (units - least, least) if way.prefill else (least, units - least)
            return Plan(Split.pair(*shares, units), slices)
        held = live.decoding and not decode and prefill
        until = now + self._whole_prompt if held else None
        return Plan(Split.lone(Lane.PREFILL if prefill else Lane.DECODE, units), slices, until)

    def _choose(self, live: Live, prompts: list[tuple[float, float]], now: float) -> Way:
        """The way with the least score."""
        table = self._table(live)
        groups = self._streams(live, now)
        alone = table[-1].step
        best, least = table[0], math.inf
        for way in table:
            score = self._score(way, prompts, groups, alone, self._arriving)
            if way.name == self._present:
                score -= STICK * abs(score)
            elif self._device.switch_seconds:
                score += self._device.switch_seconds * len(live)
            if score < least:
                best, least = way, score
        self._present = best.name
        return best

    @staticmethod
    def _score(
        way: Way,
        prompts: list[tuple[float, float]],
        groups: list[Group],
        alone: float,
        arriving: _Arriving,
    ) -> float:
        """Seconds until everybody's last token, and MISS for every expected miss.

        prompts: (seconds of prefill on the whole device until its first token, seconds left for it).
        The prompts that will arrive before the present ones are done wait as well, and lengthen the busy
        period as in an M/G/1 queue: work / (rate - load)."""
        total = misses = 0.0
        if way.rate > 0.0:
            slowness, wait = 1.0 / way.rate, 0.0
        else:  # prompts wait until the streams have ended
            slowness, wait = 1.0, way.step * max((group.remaining for group in groups), default=0.0)
        for work, left in prompts:
            first = wait + work * slowness
            total += first
            misses += _miss(first, left)
        backlog = prompts[-1][0] if prompts else 0.0
        busy = wait + backlog / max((way.rate or 1.0) - arriving.load, 0.05)
        total += arriving.rate * busy * 0.5 * (wait + backlog * slowness)
        for size, remaining, allowance in groups:
            last = remaining * way.step
            if last > busy:  # the rest goes on without prompts
                done = busy / way.step if way.step < math.inf else 0.0
                last = busy + (remaining - done) * alone
            total += size * last
            misses += size * _miss(last, allowance)
        return total + MISS * misses

    # -- what the score looks at -------------------------------------------------------------------

    def _prompts(self, live: Live, now: float) -> list[tuple[float, float]]:
        """(seconds of whole-device prefill up to and including it, seconds left to its target), in the
        order in which prompts run."""
        queue = [*live.prefilling, *live.waiting]
        if not queue:
            return []
        key = self._order(now)
        found, total = [], 0.0
        for request in heapq.nsmallest(FORESEEN, queue, key=key):
            own = self._seconds_of(request)
            total += own
            left = request.arrival + self._targets_of(request).ttft - now
            # A target that is lost already can be neither met nor missed any more.
            found.append((total, left if request.first_token_at < 0 and left > own else math.inf))
        if len(queue) > FORESEEN:
            total += (len(queue) - FORESEEN) * total / FORESEEN
            found.append((total, math.inf))
        self._whole_prompt = max(0.25 * total / len(found), 1e-3)
        return found

    def _prefill_left(self, now: float) -> float:
        """Share of the running prefill step that is still to do, as predicted; never quite nothing."""
        running = self._running.get(Lane.PREFILL)
        if running is None:
            return 1.0
        _, _, launched, seconds = running
        seconds *= self._corrections[Lane.PREFILL].factor
        return max(1.0 - (now - launched) / seconds, 0.05) if seconds > 0.0 else 0.05

    def _order(self, now: float) -> _Order:
        return _Order(self, now)

    def _streams(self, live: Live, now: float) -> list[Group]:
        """The decoding requests in groups of similar urgency."""
        count, age = self._groups_age
        if count == len(live.decoding) and age < STALE:
            self._groups_age = (count, age + 1)
            return self._groups
        rows = []
        for request in live.decoding:
            produced = len(request.output)
            remaining = max(self._lengths.remaining(request), 1)
            target = self._targets_of(request).tpot
            elapsed = now - request.first_token_at
            rows.append((target * (produced + remaining - 1) - elapsed, remaining))
        rows.sort(key=lambda row: row[0] / row[1])
        size = -(-len(rows) // STREAM_GROUPS)
        self._groups = []
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            allowance = sum(row[0] for row in part) / len(part)
            self._groups.append(Group(len(part), sum(row[1] for row in part) / len(part), allowance))
        self._groups_age = (len(live.decoding), 0)
        return self._groups

    def _targets_of(self, request: Request) -> Targets:
        return self._targets.get(request.service_class) or self._targets["default"]

    def _seconds_of(self, request: Request) -> float:
        """Prefill seconds that the request still needs on the whole device."""
        known = request.known
        whole = self._prompt_seconds.get(request)
        if whole is None:
            if len(self._prompt_seconds) > 4096:
                self._prompt_seconds.clear()
            work = Work.of((Slice(0, 0, known),))
            whole = self._cost.seconds(work, self._device.units)
            self._prompt_seconds[request] = whole
            self._arriving.add(request.arrival, whole)
        # Of what is in flight, the part counts that its step has still before it.
        in_flight = (request.planned - request.computed) * self._step_left
        left = (max(known - request.planned, 0) + in_flight) / known
        return whole * left * self._corrections[Lane.PREFILL].factor

    # -- the table of ways -------------------------------------------------------------------------

    def _table(self, live: Live) -> list[Way]:
        """Ways that can be taken now and that no other one beats in both rate and step.

        Kept by rounded features, so that the cost model is asked only when the work has changed."""
        context = sum(request.planned for request in live.decoding)
        prefilling, decoding = live.busy(Lane.PREFILL), live.busy(Lane.DECODE)
        start, tokens = self._next_prompt(live)
        corrections = [round(8 * self._corrections[lane].log_ratio) for lane in (Lane.PREFILL, Lane.DECODE)]
        features = (_round(len(live.decoding)), _round(context), _round(tokens), _round(start))
        key = (*features, prefilling, decoding, *corrections)
        table = self._tables.get(key)
        if table is None:
            if len(self._tables) > 2048:
                self._tables.clear()
            decode = Work.decode(len(live.decoding), context)
            ways = self._ways(decode, start, max(tokens, 16))
            # A lane with a step in flight must not be left without units.
            ways = [way for way in ways if way.prefill >= prefilling and way.decode >= decoding]
            table = self._tables[key] = _frontier(ways)
        return table

    def _next_prompt(self, live: Live) -> tuple[int, int]:
        """(start, tokens) of the prefill step that runs or would come next."""
        most = self._limits.prefill_tokens
        if flights := live.flights[Lane.PREFILL]:
            _, start, count, _ = flights[0].batch.slices[0]
            return start, count
        for request in live.prefilling:
            if request.planned < request.known:
                return request.planned, min(request.known - request.planned, most)
        return 0, min(sum(request.known for request in itertools.islice(live.waiting, 4)), most)

    def _ways(self, decode: Work, start: int, tokens: int) -> list[Way]:
        units = self._device.units
        prompt = Work.of((Slice(0, start, tokens),))
        slow_first, slow_next = (self._corrections[lane].factor for lane in (Lane.PREFILL, Lane.DECODE))
        whole = self._cost.seconds(prompt, units) * slow_first
        ways = [Way(units, 0, 0, 1.0, math.inf)]
        ways.append(Way(0, units, 0, 0.0, self._cost.seconds(decode, units) * slow_next))
        for first, second in [*self._device.legal_splits, (units, units)]:
            rate = whole / (self._cost.seconds(prompt, first, decode, second) * slow_first)
            step = self._cost.seconds(decode, second, prompt, first) * slow_next
            ways.append(Way(first, second, 0, rate, step))
        for chunk in self._chunks:
            size = max(chunk - decode.sequences, 0)
            if size > 0:
                mixed = decode + Work.of((Slice(0, start, min(size, tokens)),))
                step = self._cost.seconds(mixed, units) * slow_next
                ways.append(Way(0, units, chunk, min(size, tokens) / step * whole / tokens, step))
        return ways

    def _lone_prefill(self) -> Way:
        return Way(self._device.units, self._device.units, 0, 1.0, 0.0)


class _Order:
    """Shortest remaining prompt first; waiting makes up for length."""

    __slots__ = ("_auto", "_now")

    def __init__(self, auto: Auto, now: float) -> None:
        self._auto, self._now = auto, now

    def __call__(self, request: Request) -> float:
        return self._auto._seconds_of(request) - AGEING * (self._now - request.arrival)


def _frontier(ways: list[Way]) -> list[Way]:
    kept: list[Way] = []
    for way in sorted(ways, key=lambda way: (-way.rate, way.step)):
        if not kept or way.step < kept[-1].step:
            kept.append(way)
    return kept


def _miss(seconds: float, limit: float) -> float:
    """Chance that something predicted to take `seconds` misses `limit`: a ramp around it."""
    if limit == math.inf:
        return 0.0
    if limit <= 0.0:
        return 0.0  # lost already
    return min(max((seconds / limit - 1.0) / (2.0 * MARGIN) + 0.5, 0.0), 1.0)


def _round(value: float) -> int:
    """Equal for values within about 6%."""
    return round(12.0 * math.log2(value + 8.0))
