"""TTFT, ITL, TPOT and the rest, counted out of the engine's events. An observer; it never asks the engine.

Counts are exact: one TTFT per request that got a token, one ITL per further token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from semipd.core.histogram import HistogramData, LogHistogram
from semipd.core.partition import Targets
from semipd.core.types import (
    Event,
    Finished,
    FinishReason,
    Lane,
    Launched,
    Preempted,
    Request,
    Split,
    Stepped,
    Switched,
    Tokens,
)

SECONDS, TOKENS = 1e-3, 1.0  # units of the histograms


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """All metrics at one moment, as plain data. Lanes appear by their value ("prefill", "decode")."""

    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    switches: int
    finished: dict[str, int]  # by finish reason
    busy_seconds: dict[str, float]  # by lane
    units: dict[str, int]  # by lane, under the present split
    split: str
    histograms: dict[str, HistogramData]
    step_seconds: dict[str, HistogramData]  # by lane
    # By service class with a target: requests that met both targets, and all that ended.
    attained: dict[str, tuple[int, int]] = field(default_factory=dict)


class Metrics:
    """Hears every event on the planner thread; about 1 us a token.

    Attributes are histograms that may be read at any time on that thread; `snapshot` is for others.
    targets: by service class, "default" for the rest. A class without any target is not counted.
    """

    def __init__(self, targets: Mapping[str, Targets] | None = None) -> None:
        self._targets = {name: target for name, target in (targets or {}).items() if target != Targets()}
        self._classes = frozenset(targets or ())
        self._attained = {name: [0, 0] for name in self._targets}
        self.ttft = LogHistogram(SECONDS)
        self.itl = LogHistogram(SECONDS)
        self.tpot = LogHistogram(SECONDS)
        self.e2e = LogHistogram(SECONDS)
        self.queue_time = LogHistogram(SECONDS)
        self.prefill_time = LogHistogram(SECONDS)
        self.decode_time = LogHistogram(SECONDS)
        self.prompt_lengths = LogHistogram(TOKENS)
        self.output_lengths = LogHistogram(TOKENS)
        self.step_tokens = LogHistogram(TOKENS)
        self.step_seconds: dict[Lane, LogHistogram] = {}
        self.busy_seconds: dict[Lane, float] = {}
        self.finished = dict.fromkeys(FinishReason, 0)
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.preemptions = 0
        self.switches = 0
        self.split: Split | None = None
        self._last: dict[Request, float] = {}  # time of the latest token of every unfinished request
        self._unfinished: set[str] = set()  # their ids
        self._stopped: set[str] = set()

    def __call__(self, event: Event) -> None:
        kind = type(event)
        if kind is Tokens:
            self._tokens(event)  # type: ignore[arg-type]
        elif kind is Stepped:
            self._stepped(event)  # type: ignore[arg-type]
        elif isinstance(event, Finished):
            self._finish(event.request)
        elif isinstance(event, Switched):
            self.switches += self.split is not None
            self.split = event.split
        elif isinstance(event, Preempted):
            self.preemptions += 1
        elif isinstance(event, Launched):
            self.split = event.split

    def count_as_stop(self, request_id: str) -> None:
        """Whoever reads the text has found a stop string and aborts the request: count that as the
        success that it is. On the planner thread, before the abort. Ignored, as the abort is, when the
        request has ended by itself meanwhile."""
        if request_id in self._unfinished:
            self._stopped.add(request_id)

    def snapshot(self) -> MetricsSnapshot:
        """A copy of everything, as plain data. On the planner thread."""
        split = self.split
        return MetricsSnapshot(
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            preemptions=self.preemptions,
            switches=self.switches,
            finished={reason.value: count for reason, count in self.finished.items()},
            busy_seconds={lane.value: seconds for lane, seconds in self.busy_seconds.items()},
            units={lane.value: count for lane, count in split.units.items()} if split else {},
            split=str(split) if split else "-",
            histograms={name: histogram.data() for name, histogram in self._named()},
            step_seconds={lane.value: histogram.data() for lane, histogram in self.step_seconds.items()},
            attained={name: (met, ended) for name, (met, ended) in self._attained.items()},
        )

    def _named(self) -> tuple[tuple[str, LogHistogram], ...]:
        """Histograms by their Prometheus names."""
        return (
            ("time_to_first_token_seconds", self.ttft),
            ("inter_token_latency_seconds", self.itl),
            ("time_per_output_token_seconds", self.tpot),
            ("e2e_request_latency_seconds", self.e2e),
            ("request_queue_time_seconds", self.queue_time),
            ("request_prefill_time_seconds", self.prefill_time),
            ("request_decode_time_seconds", self.decode_time),
            ("request_prompt_tokens", self.prompt_lengths),
            ("request_generation_tokens", self.output_lengths),
            ("iteration_tokens_total", self.step_tokens),
        )

    def _tokens(self, event: Tokens) -> None:
        now, last = event.now, self._last
        self.generation_tokens += len(event.tokens)
        # Sequences of one batch mostly had their last token at the same moment: count equal gaps at once.
        before, run = -1.0, 0
        for request in event.requests:
            previous = last.get(request)
            last[request] = now
            if previous == before:
                run += 1
            elif previous is None:
                self._first(request, now)
            else:
                if run:
                    self.itl.add(now - before, run)
                before, run = previous, 1
        if run:
            self.itl.add(now - before, run)

    def _first(self, request: Request, now: float) -> None:
        self._unfinished.add(request.id)
        self.ttft.add(now - request.arrival)
        self.queue_time.add(request.started_at - request.arrival)
        self.prefill_time.add(now - request.started_at)
        self.prompt_tokens += len(request.prompt)

    def _stepped(self, event: Stepped) -> None:
        result = event.result
        lane, seconds = result.lane, result.finished - result.started
        if lane not in self.step_seconds:
            self.step_seconds[lane] = LogHistogram(SECONDS)
            self.busy_seconds[lane] = 0.0
        self.step_seconds[lane].add(seconds)
        self.busy_seconds[lane] += seconds
        self.step_tokens.add(event.work.tokens)

    def _finish(self, request: Request) -> None:
        last = self._last.pop(request, None)
        self._unfinished.discard(request.id)
        reason = request.finish_reason or FinishReason.ERROR
        if request.id in self._stopped:
            self._stopped.discard(request.id)
            reason = FinishReason.STOP if reason is FinishReason.ABORT else reason
        self.finished[reason] += 1
        if reason is not FinishReason.ABORT:  # a client that left has no opinion
            self._count_attained(request, reason is not FinishReason.ERROR)
        if last is None or reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        tokens = len(request.output)
        self.e2e.add(last - request.arrival)
        self.decode_time.add(last - request.first_token_at)
        self.prompt_lengths.add(len(request.prompt))
        self.output_lengths.add(tokens)
        if tokens > 1:
            self.tpot.add((last - request.first_token_at) / (tokens - 1))

    def _count_attained(self, request: Request, success: bool) -> None:
        name = request.service_class if request.service_class in self._classes else "default"
        targets = self._targets.get(name)
        if targets is None:
            return
        counts = self._attained[name]
        gaps = max(len(request.output) - 1, 1)
        ttft = request.first_token_at - request.arrival
        tpot = (request.last_token_at - request.first_token_at) / gaps
        counts[0] += success and ttft <= targets.ttft and tpot <= targets.tpot
        counts[1] += 1
