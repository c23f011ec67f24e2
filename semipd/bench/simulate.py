"""Drive the engine through a workload in virtual time, and say what its requests experienced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from semipd.bench.workload import prefix_keys
from semipd.core.engine import Engine
from semipd.core.errors import Refused
from semipd.core.histogram import LogHistogram
from semipd.core.partition import Targets
from semipd.core.types import Event, Finished, FinishReason, Request, Sampling, Stepped, Switched, Tokens
from semipd.execute.sim import ENDS, VirtualClock
from semipd.trace import Arrival

QUANTILES = (0.5, 0.9, 0.99)


@dataclass
class Summary:
    """An observer: latencies in log buckets, so memory is flat in the number of requests.

    Only requests whose arrival lies in `window` (seconds) count, so that warm-up and drain can be cut.
    targets: by service class; "default" must be there. `met` counts requests that met both.
    """

    targets: Mapping[str, Targets]
    window: tuple[float, float] = (0.0, float("inf"))
    ttft: LogHistogram = field(default_factory=LogHistogram)
    tpot: LogHistogram = field(default_factory=LogHistogram)
    itl: LogHistogram = field(default_factory=LogHistogram)
    e2e: LogHistogram = field(default_factory=LogHistogram)
    counted: int = 0
    met: int = 0
    requests: int = 0
    refused: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    switches: int = -1  # the first split is no switch
    steps: int = 0
    kv_peak: float = 0.0
    first_arrival: float = float("inf")
    last_token: float = 0.0

    def __post_init__(self) -> None:
        self._last: dict[Request, float] = {}

    def __call__(self, event: Event) -> None:
        kind = type(event)
        if kind is Tokens:
            self._tokens(event)  # type: ignore[arg-type]
        elif kind is Stepped:
            self.steps += 1
        elif isinstance(event, Finished):
            self._finish(event.request)
        elif isinstance(event, Switched):
            self.switches += 1

    @property
    def attainment(self) -> float:
        """Share of the counted requests that met both targets; a refused request met none."""
        return self.met / self.counted if self.counted else 0.0

    def data(self) -> dict[str, Any]:
        """The result as plain numbers, in seconds and per second."""
        seconds = max(self.last_token - self.first_arrival, 1e-9) if self.requests else 1.0
        return {
            **{f"{name}_s": _figures(getattr(self, name)) for name in ("ttft", "tpot", "itl", "e2e")},
            "attainment": self.attainment,
            "requests": self.requests,
            "counted": self.counted,
            "refused": self.refused,
            "request_throughput": self.requests / seconds,
            "output_throughput": self.output_tokens / seconds,
            "kv_peak": self.kv_peak,
            "split_switches": max(self.switches, 0),
            "preemptions": self.preemptions,
            "steps": self.steps,
            "simulated_s": seconds,
        }

    def refuse(self, arrival: float) -> None:
        self.refused += 1
        self.counted += self._counts(arrival)

    def _counts(self, arrival: float) -> bool:
        return self.window[0] <= arrival <= self.window[1]

    def _tokens(self, event: Tokens) -> None:
        """Equal gaps, as sequences of one batch mostly have them, are counted at once."""
        now, last = event.now, self._last
        before, run = -1.0, 0
        for request in event.requests:
            previous = last.get(request)
            last[request] = now
            if previous == before:
                run += 1
            elif previous is not None:
                if run:
                    self.itl.add(now - before, run)
                before, run = previous, 1
        if run:
            self.itl.add(now - before, run)

    def _finish(self, request: Request) -> None:
        self._last.pop(request, None)
        self.requests += 1
        self.preemptions += request.preemptions
        self.output_tokens += len(request.output)
        self.first_arrival = min(self.first_arrival, request.arrival)
        self.last_token = max(self.last_token, request.last_token_at)
        if not self._counts(request.arrival):
            return
        self.counted += 1
        if request.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        ttft = request.first_token_at - request.arrival
        gaps = len(request.output) - 1
        tpot = (request.last_token_at - request.first_token_at) / gaps if gaps else 0.0
        self.ttft.add(ttft)
        self.e2e.add(request.last_token_at - request.arrival)
        if gaps:
            self.tpot.add(tpot)
        targets = self.targets.get(request.service_class) or self.targets["default"]
        self.met += ttft <= targets.ttft and tpot <= targets.tpot


def run(
    engine: Engine, clock: VirtualClock, arrivals: Iterable[Arrival], summary: Summary, declared: int = 4096
) -> None:
    """Feed the arrivals to the engine at their times and run until everything is done.

    declared: the `max_tokens` of every request, as a client would give it that does not know the length;
    the true length hides in `min_tokens`, where no policy looks (see `SimExecutor`).
    """
    pending = iter(arrivals)
    number = 0
    upcoming = next(pending, None)
    pools = set(engine.kv.values())
    while upcoming is not None or not engine.idle:
        now = clock.now()
        while upcoming is not None and upcoming.time <= now:
            try:
                engine.add(_request(number, upcoming, engine, declared))
            except Refused:
                summary.refuse(upcoming.time)
            number += 1
            upcoming = next(pending, None)
        if engine.idle:
            if upcoming is None:
                break
            clock.time = max(clock.time, upcoming.time)
            continue
        engine.step(upcoming.time if upcoming is not None else None)
        for pool in pools:
            summary.kv_peak = max(summary.kv_peak, 1.0 - pool.available / pool.total)


def _request(number: int, arrival: Arrival, engine: Engine, declared: int) -> Request:
    prompt, output = arrival.prompt_tokens, arrival.output_tokens
    room = engine.max_length - prompt
    capacity = min(pool.total * pool.block_size for pool in engine.kv.values()) - prompt
    return Request(
        str(number),
        range(prompt),
        max(min(declared, room, capacity), output),
        Sampling(ban_until=prompt + output - 1),
        frozenset((ENDS,)),
        output - 1,
        arrival.time,
        prefix_keys(arrival, engine.block_size) if arrival.keys else [],
        service_class=arrival.service_class,
    )


def _figures(histogram: LogHistogram) -> dict[str, float]:
    named = {f"p{round(100 * q)}": histogram.quantile(q) for q in QUANTILES}
    return {"mean": histogram.mean, **named}
