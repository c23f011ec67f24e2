"""The log line of a server under traffic."""

from __future__ import annotations

import asyncio
import logging
import time

from semipd.core.errors import EngineDead
from semipd.serve.messages import Stats
from semipd.serve.service import Service

EVERY_SECONDS = 5.0

log = logging.getLogger("semipd")


async def log_traffic(service: Service, every: float = EVERY_SECONDS) -> None:
    """Log one line per `every` seconds in which anything happened, until cancelled."""
    before, last = time.monotonic(), None
    while True:
        await asyncio.sleep(every)
        if not service.session.ready:
            continue
        try:
            stats = await service.session.stats()
        except (TimeoutError, EngineDead):
            continue
        now = time.monotonic()
        if (last is None or _produced(stats) != _produced(last) or stats.running) and any(_produced(stats)):
            log.info("%s", line(stats, last, now - before))
        before, last = now, stats


def line(stats: Stats, last: Stats | None, seconds: float) -> str:
    """What happened since `last`, `seconds` ago."""
    prompt, generated, queried, hit = (
        count - before
        for count, before in zip(_produced(stats), _produced(last) if last else (0,) * 4, strict=True)
    )
    share = f"{100 * hit / queried:.0f}%" if queried else "-"
    return (
        f"prompt {prompt / seconds:.0f} tok/s, generation {generated / seconds:.0f} tok/s, "
        f"running {stats.running}, waiting {stats.waiting}, KV {100 * stats.kv_usage:.0f}%, "
        f"prefix hits {share}, split prefill:decode {stats.metrics.split}{_attained(stats, last)}"
    )


def _attained(stats: Stats, last: Stats | None) -> str:
    """Share of the requests that ended in between which met their targets."""
    met, ended = (
        sum(counts[place] for counts in stats.metrics.attained.values())
        - (sum(counts[place] for counts in last.metrics.attained.values()) if last else 0)
        for place in (0, 1)
    )
    return f", SLO {100 * met / ended:.0f}%" if ended else ""


def _produced(stats: Stats) -> tuple[int, int, int, int]:
    metrics = stats.metrics
    return metrics.prompt_tokens, metrics.generation_tokens, stats.prefix_queries, stats.prefix_hits
