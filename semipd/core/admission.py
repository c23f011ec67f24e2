"""How much may enter: whether the request at the head of the queue is admitted now.

All three rules admit a request into an empty engine, so nothing that fits the pool alone waits forever.
"""

from __future__ import annotations

from typing import Protocol

from semipd.core.lengths import LengthPredictor
from semipd.core.live import Live
from semipd.core.ports import KVManager
from semipd.core.types import Event, Request


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

    Output lengths are predicted from the recent past (`core.lengths`). Requests end in order of predicted
    remaining length, so the peak is the largest use over those moments.
    """

    def __init__(self, remember: int = 512) -> None:
        self._lengths = LengthPredictor(remember)

    def __call__(self, event: Event) -> None:
        """Observe finished requests."""
        self._lengths(event)

    def may_enter(self, request: Request, live: Live, kv: KVManager) -> bool:
        entries = [(self._lengths.remaining(holder), holder.known) for holder in live.holders()]
        if not entries:
            return True
        entries.append((self._lengths.remaining(request), request.known))
        entries.sort(reverse=True)
        peak = held = 0
        for count, (remaining, known) in enumerate(entries, start=1):
            # When this one ends, the `count` longest ones are still here, each grown by `remaining`.
            held += known
            peak = max(peak, held + count * remaining)
        return _blocks(peak, kv) + len(entries) <= kv.total


def _blocks(tokens: int, kv: KVManager) -> int:
    return -(-tokens // kv.block_size)
