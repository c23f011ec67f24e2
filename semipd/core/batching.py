"""The steps that every policy is made of: which decodes go on, which prompts come next, who gives way."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

from semipd.core.admission import Admission
from semipd.core.live import Live
from semipd.core.order import Order
from semipd.core.ports import KVManager
from semipd.core.types import Lane, Request, Slice, Stage

_new = tuple.__new__  # does what `Slice(...)` does in a third of its time, once for every produced token


def decode_slices(live: Live, kv: KVManager, limit: int) -> list[Slice]:
    """One position of every decoding request, oldest first, at most `limit`; blocks reserved.

    When the pool is short, first the lane drains (an empty list is returned while a step is in flight),
    so that nobody is pinned by a step planned ahead; then the youngest holders are preempted.
    """
    rows: list[tuple[int, int, int, bool]] = []
    block_size = kv.block_size
    for request in list(live.decoding):
        position = request.planned
        if position >= request.end or request.slot < 0:
            continue  # its last step is in flight, or it was preempted for an older one just now
        if position >= len(request.blocks) * block_size and not kv.reserve(request, position + 1):
            if live.busy(Lane.DECODE):
                return []
            if not _make_room(live, kv, request, position + 1):
                continue
        rows.append((request.slot, position, 1, True))
        if len(rows) == limit:
            break
    if live.preempted:
        rows = [row for row in rows if row[0] in live.by_slot]
    return list(map(_new, itertools.repeat(Slice), rows))


def next_prefill(live: Live, most: int) -> tuple[int, int]:
    """(start, tokens <= most) of the prefill step that runs, or about what the next one will be."""
    if flights := live.flights[Lane.PREFILL]:
        pieces = flights[0].batch.slices
        return pieces[0].start, sum(piece.count for piece in pieces)
    started = [request for request in live.prefilling if request.planned < request.known]
    start = started[0].planned if started else 0
    queue = itertools.chain(started, itertools.islice(live.waiting, 8))
    return start, min(sum(request.known - request.planned for request in queue), most)


def prefill_slices(
    live: Live,
    kv: KVManager,
    lane: Lane,
    tokens: int,
    admission: Admission,
    *,
    longest: int = 0,
    order: Order | None = None,
) -> list[Slice]:
    """Prompt positions worth at most `tokens`.

    Without an order, started prompts go first, then waiting ones as they came; with one, the least key.
    A prompt is admitted only with blocks for all of it, so a started prompt can always go on.
    longest: at most this many tokens of one prompt (0: no limit).
    """
    slices: list[Slice] = []
    piece = longest or tokens
    blocked = False
    for request in _queue(live, order):
        if tokens <= 0:
            break
        if request.stage is Stage.WAITING:
            # When one cannot enter, none behind it may, or the large ones would starve.
            blocked = blocked or not _enter(live, kv, request, admission)
            if blocked:
                continue
        elif request.in_flight and request.lane is not lane:
            if order is None:
                break  # as they come: none passes the one whose piece runs on the other lane
            continue
        tokens -= _add_prefill(slices, request, min(tokens, piece))
    return slices


def transfer_slices(live: Live, target: KVManager) -> list[Slice]:
    """The next request whose blocks move to the decode pool; its target blocks reserved. The prefix that
    the decode pool already knows is not copied."""
    for request in live.transferring:
        if request.in_flight == 0:
            twin = copy.copy(request)
            twin.blocks, twin.published, twin.pool = [], 0, None
            if not target.reserve(twin, request.computed):
                return []
            request.incoming = twin
            return [Slice(request.slot, twin.computed, request.computed - twin.computed, False)]
    return []


def first_waiting(live: Live, order: Order | None) -> Request:
    """The waiting prompt that would enter next. There must be one."""
    return min(live.waiting, key=order) if order is not None else live.waiting[0]


def _queue(live: Live, order: Order | None) -> Iterator[Request]:
    """Prompts in the order in which they should run. Admitting the yielded one is allowed."""
    if order is not None:
        yield from sorted([*live.prefilling, *live.waiting], key=order)
        return
    yield from list(live.prefilling)
    while live.waiting:
        head = live.waiting[0]
        yield head
        if live.waiting and live.waiting[0] is head:
            return


def _enter(live: Live, kv: KVManager, request: Request, admission: Admission) -> bool:
    if not live.has_free_slot or not admission.may_enter(request, live, kv):
        return False
    if not kv.reserve(request, request.known):
        return False
    live.admit(request)
    return True


def _add_prefill(slices: list[Slice], request: Request, tokens: int) -> int:
    remaining = request.known - request.planned
    count = min(remaining, tokens)
    if count > 0:
        slices.append(Slice(request.slot, request.planned, count, count == remaining))
    return count


def _make_room(live: Live, kv: KVManager, request: Request, upto: int) -> bool:
    """Preempt the youngest holders that nothing pins until `request` fits; False if it must wait, either
    because only pinned requests are left or because it was itself the youngest."""
    while not kv.reserve(request, upto):
        victims = [holder for holder in live.holders() if not holder.in_flight and holder.pool is kv]
        victim = max(victims, key=_age_order)
        if victim is request and live.in_flight:
            return False  # others run and will give blocks back; recomputing this one would only cost
        if live.holding == 1:
            raise AssertionError(f"request {request.id} does not fit the pool alone")
        live.preempt(victim)
        if victim is request:
            return False
    return True


def _age_order(request: Request) -> tuple[float, str]:
    return (request.arrival, request.id)
