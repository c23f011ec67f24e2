"""The settings of `semipd bench serve`: names, defaults, bounds and help, as in `semipd.config`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from semipd.bench import lengths, traces, workload
from semipd.bench.payload import CHAT, COMPLETIONS
from semipd.bench.workload import Lengths, Times
from semipd.core.errors import ConfigError
from semipd.flags import check_fields, setting
from semipd.trace import Arrival

DEFAULT_REQUESTS = 100
DEFAULT_CONCURRENCY = 8


@dataclass(frozen=True)
class Options:
    """Benchmark of a server"""

    url: str = setting(
        "http://127.0.0.1:8000", "the server; any that speaks OpenAI's HTTP API", group="Server"
    )
    model: str | None = setting(None, "model to ask for (default: the first of /v1/models)", group="Server")
    endpoint: str = setting(
        COMPLETIONS, "which API to measure", "choice", choices=(COMPLETIONS, CHAT), group="Server"
    )
    api_key: str | None = setting(None, "sent as a bearer token", group="Server")
    timeout: float = setting(
        600.0, "most time for one request", "seconds", low=0.01, high=1e6, group="Server"
    )
    requests: int | None = setting(
        None, f"how many to send (default: {DEFAULT_REQUESTS})", "size", low=1, high=10**9, group="Load"
    )
    duration: float | None = setting(
        None,
        "stop sending after this time, instead of --requests",
        "seconds",
        low=0.1,
        high=1e6,
        group="Load",
    )
    rate: float | None = setting(
        None,
        "arrivals per second on a schedule that does not wait for answers; inf: all at once",
        "number",
        low=1e-6,
        high=math.inf,
        group="Load",
    )
    arrivals: str = setting(
        "poisson", "with --rate: poisson, gamma:CV or onoff:ON,OFF (two times)", group="Load"
    )
    concurrency: int | None = setting(
        None,
        "without --rate: streams kept busy (default: "
        f"{DEFAULT_CONCURRENCY}); with it: most requests at a time",
        "integer",
        low=1,
        high=10000,
        group="Load",
    )
    warmup: int = setting(
        0, "requests sent before, one by one, not counted", "integer", low=0, high=10**6, group="Load"
    )
    seed: int = setting(0, "of times, lengths and prompts", "integer", low=0, high=2**63 - 1, group="Load")
    input_length: str = setting(
        "256", "prompt tokens: 1024, 4K, or 128:1024 for uniform", group="Lengths and prompts"
    )
    output_length: str = setting("64", "output tokens, likewise", group="Lengths and prompts")
    workload: str | None = setting(
        None,
        f"lengths like a data set's, instead of the two above: {', '.join(lengths.NAMED)}",
        group="Lengths and prompts",
    )
    length_scale: float = setting(
        1.0,
        "multiplies the lengths of --workload, for small models",
        "number",
        low=1e-4,
        high=1e3,
        group="Lengths and prompts",
    )
    prompt_kind: str = setting(
        "auto",
        "random prompts as token ids or as text (auto: ids for completions, text for chat)",
        "choice",
        choices=("auto", "ids", "text"),
        group="Lengths and prompts",
    )
    vocab_size: int | None = setting(
        None,
        "ids are drawn below this (default: 1000)",
        "size",
        low=2,
        high=2**24,
        group="Lengths and prompts",
    )
    ignore_eos: bool = setting(
        True, "ask for exactly the output length", "flag", group="Lengths and prompts"
    )
    trace: str | None = setting(None, "replay the arrivals and lengths of this file", group="Trace")
    trace_format: str = setting(
        "semipd", "format of --trace", "choice", choices=tuple(traces.READERS), group="Trace"
    )
    trace_speed: float = setting(
        1.0, "replay this many times as fast as recorded", "number", low=1e-6, high=1e6, group="Trace"
    )
    ttft_slo: float | None = setting(
        None, "count requests that meet this TTFT (goodput)", "seconds", low=1e-6, high=1e6, group="Result"
    )
    tpot_slo: float | None = setting(
        None, "count requests that meet this TPOT (goodput)", "seconds", low=1e-6, high=1e6, group="Result"
    )
    json: bool = setting(False, "print the JSON line only", "flag", group="Result")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.endpoint == CHAT and self.prompt_kind == "ids":
            raise ConfigError("--prompt-kind ids: a chat takes text only")
        if self.arrivals != "poisson" and self.rate is None:
            raise ConfigError("--arrivals needs --rate")
        if self.trace and (self.rate or self.workload):
            raise ConfigError("--trace brings its own times and lengths; drop --rate and --workload")
        if self.rate == math.inf and self.limit is None:
            raise ConfigError("--rate inf needs --requests")
        self.times, self.lengths  # refuse what does not parse  # noqa: B018

    @property
    def as_text(self) -> bool:
        return self.prompt_kind == "text" or (self.prompt_kind == "auto" and self.endpoint == CHAT)

    @property
    def scheduled(self) -> bool:
        """Whether requests have arrival times of their own (an open loop)."""
        return self.rate is not None or self.trace is not None

    @property
    def streams(self) -> int | None:
        """Most requests at a time; None: no limit."""
        return self.concurrency or (None if self.scheduled else DEFAULT_CONCURRENCY)

    @property
    def limit(self) -> int | None:
        """Number of requests; None: until the duration or the trace ends."""
        if self.requests is None and self.duration is None and self.trace is None:
            return DEFAULT_REQUESTS
        return self.requests

    @property
    def times(self) -> Times:
        """The arrival process. Without a rate, times are not looked at."""
        return workload.parse_times(self.arrivals, self.rate or math.inf)

    @property
    def lengths(self) -> Lengths:
        if self.workload is None:
            return lengths.Pair(
                lengths.parse_side(self.input_length), lengths.parse_side(self.output_length)
            )
        return lengths.Scaled(lengths.named(self.workload), self.length_scale)

    def plan(self) -> Iterator[Arrival]:
        """The arrivals to send, lazily. Raises ConfigError on a bad row of a trace."""
        if self.trace is None:
            duration = self.duration if self.scheduled else None
            return workload.generate(self.times, self.lengths, self.seed, self.limit, duration)
        rows = traces.read(self.trace, self.trace_format, self.seed, self.trace_speed)
        return self._cut(islice(rows, self.requests))

    def _cut(self, rows: Iterator[Arrival]) -> Iterator[Arrival]:
        for row in rows:
            if self.duration is not None and row.time > self.duration:
                return
            yield row
