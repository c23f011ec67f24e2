"""How much may enter: whether the request at the head of the queue is admitted now.

All three rules admit a request into an empty engine, so nothing that fits the pool alone waits forever.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from itertools import accumulate
from typing import Protocol

from semipd.core.live import Live
from semipd.core.ports import KVManager
from semipd.core.types import Finished, FinishReason, Request


class Admission(Protocol):
    def may_enter(self, request: Request, live: Live, kv: KVManager) -> bool: ...


class Aggressive:
    """Admit when the prompt fits and every decoding request could still take one more block."""

    def may_enter(self, request: Request, live: Live, kv: KVManager) -> bool:
        holders = live.holding
        return not holders or kv.available >= _blocks(request.known, kv) + holders


class Conservative:
    """Admit when everybody could run to `max_tokens`: no preemption, ever, and an emptier pool."""

    def may_enter(self, request: Request, live: Live, kv: KVManager) -> bool:
        needed = _blocks(len(request.prompt) + request.max_tokens, kv)
        growth = sum(
            _blocks(len(holder.prompt) + holder.max_tokens, kv) - len(holder.blocks)
            for holder in live.holders()
        )
        return kv.available >= needed + growth


class PastFuture:
    """Admit when the predicted peak of the pool's future use fits (LightLLM's past-future scheduler).

    Output lengths are predicted from the recent past: the mean of the finished lengths that exceed what
    a request has already produced, capped by its `max_tokens`. Requests end in order of their predicted
    remaining length, so the peak is the largest use over those moments.
    """

    def __init__(self, remember: int = 512) -> None:
        self._recent: deque[int] = deque()
        self._remember = remember
        self._sorted: list[int] = []
        self._sums: list[int] = [0]  # _sums[i]: total of the i longest lengths

    def __call__(self, event: object) -> None:
        """Observe finished requests."""
        if not isinstance(event, Finished):
            return
        if event.request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            length = len(event.request.output)
            self._recent.append(length)
            insort(self._sorted, length)
            if len(self._recent) > self._remember:
                del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
            self._sums = [0, *accumulate(reversed(self._sorted))]

    def may_enter(self, request: Request, live: Live, kv: KVManager) -> bool:
        entries = [(self._remaining(holder), holder.known) for holder in live.holders()]
        if not entries:
            return True
        entries.append((self._remaining(request), request.known))
        entries.sort(reverse=True)
        peak = held = 0
        for count, (remaining, known) in enumerate(entries, start=1):
            # When this one ends, the `count` longest ones are still here, each grown by `remaining`.
            held += known
            peak = max(peak, held + count * remaining)
        return _blocks(peak, kv) + len(entries) <= kv.total

    def _remaining(self, request: Request) -> int:
        produced = len(request.output)
        longer = len(self._sorted) - bisect_right(self._sorted, produced)
        expected = self._sums[longer] // longer if longer else request.max_tokens
        return max(min(expected, request.max_tokens) - produced, 0)


def _blocks(tokens: int, kv: KVManager) -> int:
    return -(-tokens // kv.block_size)
