"""The planner that subsumes the fixed ways: before each launch it scores, and then does what one of them
would do. Targets in, shares out.

A way is a split of the device, a mixed batch with a chunk of prompt tokens, or one phase alone. The cost
model gives two figures of each: the rate at which prompts are worked off (1: as fast as with the whole
device) and the seconds of a decode step. From these follow everybody's first and last token, if the way
were kept whenever there are prompts, these and later ones. The way with the least

    sum of the times to the last token + price * expected number of missed targets

is taken: decode gets the least that meets its target with margin when prompts press, a predicted TTFT miss
(of prompts yet to come, too) is bought off with decode's slack, and when both fail, the fewest miss. The
price of a miss follows how many there are (`core.price`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from semipd.core.backlog import LASTING, Backlog, Queue
from semipd.core.batching import decode_slices, next_prefill, prefill_slices
from semipd.core.correction import Correction
from semipd.core.live import Live
from semipd.core.order import Order, PromptWork
from semipd.core.partition import Targets
from semipd.core.policies import Limits
from semipd.core.ports import CostModel, KVManager
from semipd.core.price import KEPT, Price
from semipd.core.types import Device, Event, Finished, Lane, Launched, Plan, Slice, Split, Stepped, Work
from semipd.core.urgency import MARGIN, Streams, Urgency, late, miss

OVERLOAD = 2.0  # power of load over rate by which a busy period grows when there is no end to it
STICK = 0.02  # a way must be this much better, in parts, than the present one
APART = 1.25  # units of decode in a split, at least, over those in the one before it
DECODES, CONTEXT, PROMPTS = 4.0, 2.0, 2.0  # levels to an octave: of sequences, their context, prefill steps

Levels = tuple[int, int]
Key = tuple[Levels, Levels, Levels]  # of the decode batch, of the prefill step, of the correction


class Way(NamedTuple):
    """Units of each phase; chunk > 0: a mixed batch. step is infinite when decode is held."""

    prefill: int
    decode: int
    chunk: int
    rate: float
    step: float


class Auto:
    """A policy and an observer. targets: by service class, one of them "default". chunks: of mixed batches.
    cost: corrected online by what steps really take. work: what prompts take by the same model, shared with
    the order in `limits`, so that the order is corrected too. kept: share of targets that should be."""

    def __init__(
        self,
        limits: Limits,
        device: Device,
        cost: CostModel,
        targets: Mapping[str, Targets],
        work: PromptWork | None = None,
        chunks: Sequence[int] = (64, 128, 256, 512, 1024, 2048),
        kept: float = KEPT,
    ) -> None:
        self.limits, self._device, self._cost = limits, device, cost
        self._chunks = tuple(chunks)
        self._work = work or PromptWork(cost, device.units)
        self._correction = Correction(cost)
        self._ways_of: dict[Key, list[Way]] = {}
        self._tables: dict[tuple[Key, bool, bool], list[Way]] = {}
        self._splits = (*_thinned(device.legal_splits), (device.units, device.units))
        self._backlog = Backlog(targets, self._work, limits.prefill_tokens)
        self._urgency = Urgency(targets)
        self._tpot = targets["default"].tpot
        self._price = Price(targets, kept)
        self._tokens_alone = Way(0, device.units, 0, 0.0, 0.0)
        self._prompts_alone = Way(device.units, device.units, 0, 1.0, 0.0)
        self._way, self._settled = self._tokens_alone, False  # the way chosen last
        self._arrived = self._ended = 0  # requests: until then, and until now
        self._held = (0, 0)  # units of the last plan
        self._ways((9, 9), (4, 4))  # the cost model tabulates each number of units at its first use

    def __call__(self, event: Event) -> None:
        """Observe: correct the cost model by every step, learn how long outputs are."""
        if isinstance(event, (Launched, Stepped)):
            self._correction(event)
            if isinstance(event, Launched) and event.lane is Lane.PREFILL:
                self._work.launched(event.work, event.batch.slices)
            elif isinstance(event, Stepped) and event.result.lane is Lane.PREFILL:
                self._settled = False
            self._work.slowness = self._correction.slowness[Lane.PREFILL]
        else:
            self._ended += isinstance(event, Finished)
            self._urgency(event)
            self._price(event)

    def plan(self, idle: frozenset[Lane], live: Live, kv: Mapping[Lane, KVManager], now: float) -> Plan:
        prefilling, order = live.busy(Lane.PREFILL), None
        if not live.waiting and not live.prefilling and not prefilling:
            way = self._tokens_alone
        elif prefilling and live.decoding and self._is_settled(live):
            way = self._way  # and no prompt can start
        else:
            self._work.step_left = self._correction.step_left(Lane.PREFILL, now) if prefilling else 0.0
            order = self.limits.order_at(live, now)
            if live.decoding:
                queue = self._backlog.queue(live, order, now)
                way = self._choose(live, queue, self._urgency.streams(live, now))
                self._arrived, self._settled = len(live) + self._ended, True
            else:
                way = self._prompts_alone
        return self._launch(way, idle, live, kv, order)

    def _is_settled(self, live: Live) -> bool:
        """Whether nothing happened since the last choice that could change it: the same prefill step runs
        and nobody came."""
        came = len(live) + self._ended > self._arrived
        holds = self._way.decode == 0 and live.busy(Lane.DECODE)
        return self._settled and not came and not holds and not self._way.chunk

    def _launch(
        self, way: Way, idle: frozenset[Lane], live: Live, kv: Mapping[Lane, KVManager], order: Order | None
    ) -> Plan:
        """Do what the fixed way would do, on the lanes that have room."""
        limits, units = self.limits, self._device.units
        slices: dict[Lane, Sequence[Slice]] = {}
        if way.decode and Lane.DECODE in idle:
            slices[Lane.DECODE] = decodes = decode_slices(live, kv[Lane.DECODE], limits.batch)
            if way.chunk:
                decodes += prefill_slices(
                    live, kv[Lane.DECODE], Lane.DECODE, way.chunk, limits.admission, order=order
                )
        if way.prefill and Lane.PREFILL in idle and not live.busy(Lane.PREFILL):
            prompts = prefill_slices(
                live, kv[Lane.PREFILL], Lane.PREFILL, limits.prefill_tokens, limits.admission, order=order
            )
            slices[Lane.PREFILL] = self._backlog.first_part(prompts, live, way.rate)
        if not any(slices.values()) and live.decoding and not live.in_flight:
            # Decode was to be held for prompts that cannot enter yet.
            slices[Lane.DECODE] = decode_slices(live, kv[Lane.DECODE], limits.batch)
        prefill = bool(slices.get(Lane.PREFILL)) or live.busy(Lane.PREFILL)
        if prefill and (slices.get(Lane.DECODE) or live.busy(Lane.DECODE)):
            split = Split.pair(way.prefill or units, way.decode or units, units)
        else:
            split = Split.lone(Lane.PREFILL if prefill else Lane.DECODE, units)
        self._held = (split.of(Lane.PREFILL), split.of(Lane.DECODE))
        return Plan(split, slices)

    def _choose(self, live: Live, queue: Queue, streams: Streams) -> Way:
        table = self._table(live)
        present, (before, beside) = self._way[:3], self._held
        switch = self._device.switch_seconds * len(live)
        best, least = table[0], math.inf
        for way, score in zip(table, self._scores(table, queue, streams), strict=True):
            prefill, decode, chunk, _, _ = way
            score += switch * ((prefill != before or decode != beside) + (prefill > 0))  # now, and back
            if (prefill, decode, chunk) == present:
                score -= STICK * abs(score)
            if score < least:
                best, least = way, score
        self._way = best
        return best

    def _scores(self, table: list[Way], queue: Queue, streams: Streams) -> list[float]:
        """Of every way. Prompts that arrive before the present ones are done wait as well, may be late, and
        lengthen the busy period as in an M/G/1 queue: work / (rate - load). Later ones come too, so that
        decode goes on at a mean pace: prompts are there for load / rate of the time. Those who come will
        have their tokens at that pace, too. Runs at every plan: `min` and `max` of two numbers would take
        as long as the rest."""
        prompts, work, backlog, bearable, arrivals, load, kinds, ahead = queue
        groups, size, tokens, shortest, longest, pace = streams
        alone = table[-1].step  # a decode step without prompts
        top = max([way.rate for way in table if way.step < math.inf])  # the best that does not hold decode
        scores, due, price = [], self._backlog.soon, self._price.value
        slow = (1.0 - MARGIN) * self._tpot
        for _, _, _, rate, step in table:
            misses = wait = 0.0
            if not rate:
                wait = step * longest  # until the streams have ended
                rate = top
            slowness, kept = 1.0 / rate, (rate if rate < top else top)
            if wait or slowness > bearable:
                for first, left, soon in prompts:
                    if (first := wait + first * slowness) > soon:
                        misses += miss(first, left)
            spare, share = kept - load, load / kept
            if share > 0.95:  # the more comes than is worked off, the longer it lasts
                spare, share = 0.05 * kept * (0.95 / share) ** OVERLOAD, 0.95
            busy = min(wait + backlog / spare, LASTING)
            found = arrivals * busy  # arrive meanwhile
            total = len(prompts) * wait + work * slowness + found * (0.5 * wait + ahead * slowness)
            for part, before, scale, delay, own in kinds:
                chance = late((due - wait - delay * slowness) * kept / scale, load * before / kept)
                misses += found * part * min(chance / own, 1.0)
            rest = 1.0 / (share / step + (1.0 - share) / alone)
            if rest > slow:
                misses += found * miss(rest, self._tpot)
            done = busy / step  # 0 while decode is held: then `step` is infinite
            if step > pace or shortest < done < longest:
                for count, remaining, allowance, soon in groups:
                    last = remaining * step
                    if last > busy:
                        last = busy + (remaining - done) * rest
                    total += count * last
                    if last > soon:
                        misses += count * miss(last, allowance)
            elif done <= shortest:  # none is late, so that all groups are as one: all end after it
                total += size * busy + (tokens - size * done) * rest
            else:  # or before
                total += tokens * step
            scores.append(total + price * misses)
        return scores

    def _table(self, live: Live) -> list[Way]:
        """Ways that can be taken now and that no other one beats in both rate and step. Kept by rounded
        features, so that the cost model is asked only when the work has changed."""
        prefilling, decoding = live.busy(Lane.PREFILL), live.busy(Lane.DECODE)
        context = sum([request.planned for request in live.decoding])
        start, tokens = next_prefill(live, self.limits.prefill_tokens)
        key = (
            (_level(len(live.decoding), DECODES), _level(context, CONTEXT)),
            (_level(start, PROMPTS), _level(tokens, PROMPTS)),
            self._correction.level,
        )
        table = self._tables.get((key, prefilling, decoding))
        if table is None:
            if len(self._tables) >= 2048:
                self._tables, self._ways_of = {}, {}
            ways = self._ways_of.get(key)
            if ways is None:
                ways = self._ways_of[key] = self._ways(*key[:2])
            table = self._tables[key, prefilling, decoding] = []
            for way in ways:
                # A lane with a step in flight must not be left without units.
                possible = (way.prefill or not prefilling) and (way.decode or not decoding)
                if possible and (not table or way.step < table[-1].step):
                    table.append(way)
        return table

    def _ways(self, decodes: Levels, prompts: Levels) -> list[Way]:
        """Every candidate for decode batches of such levels (sequences, context) beside prefill steps of
        such ones (start, tokens), the quickest for prompts first."""
        units, seconds = self._device.units, self._cost.seconds
        slowness = self._correction.slowness
        slow_first, slow_next = slowness[Lane.PREFILL], slowness[Lane.DECODE]
        start, tokens = _amount(prompts[0], PROMPTS), max(_amount(prompts[1], PROMPTS), 16)
        decode = Work.decode(max(_amount(decodes[0], DECODES), 1), _amount(decodes[1], CONTEXT))
        prompt = Work.of((Slice(0, start, tokens),))
        whole = seconds(prompt, units) * slow_first
        alone = Way(0, units, 0, 0.0, seconds(decode, units) * slow_next)
        ways = [Way(units, 0, 0, 1.0, math.inf), alone]
        for first, second in self._splits:
            rate = whole / (seconds(prompt, first, decode, second) * slow_first)
            ways.append(Way(first, second, 0, rate, seconds(decode, second, prompt, first) * slow_next))
        for chunk in self._chunks:
            size = min(chunk - decode.sequences, tokens)
            if size > 0:
                step = seconds(decode + Work.of((Slice(0, start, size),)), units) * slow_next
                ways.append(Way(0, units, chunk, size / step * whole / tokens, step))
            if size == tokens:
                break  # longer ones are the same
        return sorted(ways, key=lambda way: (-way.rate, way.step))


def _level(amount: int, fineness: float) -> int:
    """Equal for amounts within an octave / fineness of each other, but for the smallest."""
    return round(fineness * math.log2(amount + 4.0))


def _amount(level: int, fineness: float) -> int:
    """In the middle of the level."""
    return round(math.exp2(level / fineness)) - 4


def _thinned(splits: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Enough of them to choose from, the least for decode first: its steps go by the ratio of units."""
    found: list[tuple[int, int]] = []
    for prefill, decode in sorted(splits, key=lambda split: split[1]):
        if not found or decode >= APART * found[-1][1]:
            found.append((prefill, decode))
    return found
