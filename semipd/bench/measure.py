"""What a client saw, request by request, and the numbers that follow from it.

TTFT, E2E: from the *scheduled* arrival to the first and to the last token, so time that a request spends
waiting to be sent counts (no coordinated omission). TPOT: (last - first token) / (tokens - 1). ITL: the gap
between two successive chunks of one stream; a chunk that carries several tokens is one gap. Tokens are
those that the server's usage states, or, without usage, the chunks.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from semipd.bench.report import quantiles


@dataclass(slots=True)
class Record:
    """One request as the client saw it; times in seconds of time.perf_counter.

    chunks: the moment of each chunk that carried output. stated_*: from the usage, -1 without one.
    """

    scheduled: float
    prompt_tokens: int
    output_tokens: int
    sent: float = 0.0
    chunks: array[float] = field(default_factory=lambda: array("d"))
    stated_prompt: int = -1
    stated_output: int = -1
    error: str | None = None  # its kind; like errors are counted together
    detail: str = ""

    @property
    def produced(self) -> int:
        return self.stated_output if self.stated_output >= 0 else len(self.chunks)


@dataclass(slots=True)
class Targets:
    """Latency targets in seconds; None: no target."""

    ttft: float | None = None
    tpot: float | None = None

    def __bool__(self) -> bool:
        return self.ttft is not None or self.tpot is not None


@dataclass(slots=True)
class Measurements:
    """Sums up records as they finish: 8 bytes per token and latency are kept, no record is."""

    targets: Targets = field(default_factory=Targets)
    exact_prompts: bool = True  # the prompt's length in tokens is known before it is sent
    ttft: array[float] = field(default_factory=lambda: array("d"))
    tpot: array[float] = field(default_factory=lambda: array("d"))
    itl: array[float] = field(default_factory=lambda: array("d"))
    e2e: array[float] = field(default_factory=lambda: array("d"))
    send_delay: array[float] = field(default_factory=lambda: array("d"))
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # of each kind of error, the first message
    completed: int = 0
    attained: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    chunks: int = 0
    without_usage: int = 0  # no usage in the stream
    unlike_usage: int = 0  # usage states another number of tokens than there were chunks
    short: int = 0  # fewer tokens than were asked for
    prompt_mismatch: int = 0  # usage states another prompt length than was sent

    @property
    def failed(self) -> int:
        return self.errors.total()

    def add(self, record: Record) -> None:
        """Take in a finished request."""
        self.chunks += len(record.chunks)
        if record.sent:
            self.send_delay.append(record.sent - record.scheduled)
        if record.error is not None:
            self.errors[record.error] += 1
            self.examples.setdefault(record.error, record.detail)
            return
        self.completed += 1
        self._check_usage(record)
        times = record.chunks
        first, last, produced = times[0], times[-1], record.produced
        ttft = first - record.scheduled
        self.ttft.append(ttft)
        self.e2e.append(last - record.scheduled)
        self.itl.extend(later - earlier for earlier, later in pairwise(times))
        tpot = (last - first) / (produced - 1) if produced > 1 else None
        if tpot is not None:
            self.tpot.append(tpot)
        self.attained += self._meets(ttft, tpot)

    def _meets(self, ttft: float, tpot: float | None) -> bool:
        return (self.targets.ttft is None or ttft <= self.targets.ttft) and (
            self.targets.tpot is None or tpot is None or tpot <= self.targets.tpot
        )

    def _check_usage(self, record: Record) -> None:
        stated = record.stated_prompt
        self.prompt_tokens += stated if stated >= 0 else record.prompt_tokens
        self.output_tokens += record.produced
        self.without_usage += record.stated_output < 0
        self.unlike_usage += record.produced != len(record.chunks)
        self.short += record.produced < record.output_tokens
        self.prompt_mismatch += self.exact_prompts and 0 <= stated != record.prompt_tokens

    def summary(self, seconds: float) -> dict[str, Any]:
        """Everything as plain JSON data. seconds: from the first scheduled arrival to the last answer.

        Quantiles of nothing are null. `goodput` is requests per second that met all targets; failed
        requests met none."""
        seconds = max(seconds, 1e-9)
        ended = self.completed + self.failed
        result: dict[str, Any] = {
            "completed": self.completed,
            "failed": self.failed,
            "errors": dict(self.errors.most_common()),
            "error_examples": {kind: text for kind, text in self.examples.items() if text},
            "duration_s": seconds,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "request_throughput": self.completed / seconds,
            "prompt_throughput": self.prompt_tokens / seconds,
            "output_throughput": self.output_tokens / seconds,
            "ttft_s": quantiles(self.ttft),
            "tpot_s": quantiles(self.tpot),
            "itl_s": quantiles(self.itl),
            "e2e_s": quantiles(self.e2e),
            "send_delay_s": quantiles(self.send_delay),
            "chunks": self.chunks,
            "without_usage": self.without_usage,
            "chunks_unlike_usage": self.unlike_usage,
            "short_outputs": self.short,
            "prompt_length_mismatch": self.prompt_mismatch,
        }
        if self.targets:
            result["ttft_slo_s"], result["tpot_slo_s"] = self.targets.ttft, self.targets.tpot
            result["attainment"] = self.attained / ended if ended else None
            result["goodput"] = self.attained / seconds
        return result
