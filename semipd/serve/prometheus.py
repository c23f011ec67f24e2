"""The engine's state in Prometheus' text format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from semipd.core.histogram import PER_OCTAVE, HistogramData
from semipd.core.metrics import SECONDS, MetricsSnapshot
from semipd.serve.messages import Stats

PREFIX = "semipd:"
_OWN_PREFIX = re.compile(rf"^(# (?:HELP|TYPE) |){PREFIX}", re.MULTILINE)
# Ends of buckets, in octaves above the histogram's unit: 1 ms to 18 minutes by halves, 1 to 1 Mi tokens.
_SECONDS_EDGES = [half * PER_OCTAVE // 2 for half in range(41)]
_TOKENS_EDGES = [octave * PER_OCTAVE for octave in range(21)]

Labels = Mapping[str, str]


def render(stats: Stats, model: str, alias: str | None = None) -> str:
    """The page for /metrics. Every sample carries the model's name. alias: repeat what other servers have
    as well under this prefix, for their dashboards."""
    labels = {"model_name": model}
    common = "".join(_common(stats, labels))
    again = _OWN_PREFIX.sub(rf"\1{alias}:", common) if alias else ""
    return common + "".join(_own(stats.metrics, labels)) + again


def _common(stats: Stats, model: Labels) -> Iterator[str]:
    metrics = stats.metrics
    yield from _gauge("num_requests_running", "Requests that hold KV blocks", stats.running, model)
    yield from _gauge("num_requests_waiting", "Requests that wait to enter", stats.waiting, model)
    yield from _gauge("kv_cache_usage_perc", "Share of KV blocks held, 0 to 1", stats.kv_usage, model)
    yield from _counter("prefix_cache_queries", "Tokens looked up", [({}, stats.prefix_queries)], model)
    yield from _counter("prefix_cache_hits", "Tokens found in the cache", [({}, stats.prefix_hits)], model)
    yield from _counter(
        "num_preemptions_total", "Requests sent back to the queue", [({}, metrics.preemptions)], model
    )
    yield from _counter(
        "prompt_tokens_total",
        "Prompt tokens of requests that started",
        [({}, metrics.prompt_tokens)],
        model,
    )
    yield from _counter(
        "generation_tokens_total", "Tokens produced", [({}, metrics.generation_tokens)], model
    )
    finished = [({"finished_reason": reason}, count) for reason, count in metrics.finished.items()]
    yield from _counter("request_success_total", "Requests that ended", finished, model)
    for name, data in metrics.histograms.items():
        yield from _head(name, _HELP[name], "histogram")
        yield from _histogram(name, data, model)


def _own(metrics: MetricsSnapshot, model: Labels) -> Iterator[str]:
    yield from _counter("partition_switches_total", "Changes of the split", [({}, metrics.switches)], model)
    busy = [({"phase": lane}, seconds) for lane, seconds in metrics.busy_seconds.items()]
    yield from _counter("phase_busy_seconds_total", "Time in steps", busy, model)
    yield from _head("partition_units", "Units of each phase under the present split", "gauge")
    for lane, units in metrics.units.items():
        yield _line("partition_units", {**model, "phase": lane}, units)
    yield from _attainment(metrics.attained, model)
    yield from _head("step_seconds", "Time of one step", "histogram")
    for lane, data in metrics.step_seconds.items():
        yield from _histogram("step_seconds", data, {**model, "phase": lane})


def _attainment(attained: Mapping[str, tuple[int, int]], model: Labels) -> Iterator[str]:
    """Nothing while no class has a target. The counters allow a share over any time."""
    if not attained:
        return
    yield from _head("slo_attainment", "Share of ended requests that met their targets, 0 to 1", "gauge")
    for name, (met, ended) in attained.items():
        if ended:
            yield _line("slo_attainment", {**model, "class": name}, met / ended)
    counts = [({"class": name}, met) for name, (met, _) in attained.items()]
    yield from _counter("slo_met_total", "Requests that met their targets", counts, model)
    counts = [({"class": name}, ended) for name, (_, ended) in attained.items()]
    yield from _counter("slo_requests_total", "Requests that targets apply to", counts, model)


_HELP = {
    "time_to_first_token_seconds": "Arrival to first token",
    "inter_token_latency_seconds": "Time between two tokens of a request",
    "time_per_output_token_seconds": "Mean time per token after the first, one value per request",
    "e2e_request_latency_seconds": "Arrival to last token",
    "request_queue_time_seconds": "Arrival to first launch",
    "request_prefill_time_seconds": "First launch to first token",
    "request_decode_time_seconds": "First token to last token",
    "request_prompt_tokens": "Prompt tokens of finished requests",
    "request_generation_tokens": "Tokens produced for finished requests",
    "iteration_tokens_total": "Positions computed in one step",
}


def _gauge(name: str, text: str, value: float, labels: Labels) -> Iterator[str]:
    yield from _head(name, text, "gauge")
    yield _line(name, labels, value)


def _counter(name: str, text: str, values: Iterable[tuple[Labels, float]], labels: Labels) -> Iterator[str]:
    yield from _head(name, text, "counter")
    for extra, value in values:
        yield _line(name, {**labels, **extra}, value)


def _histogram(name: str, data: HistogramData, labels: Labels) -> Iterator[str]:
    edges = _SECONDS_EDGES if data.unit == SECONDS else _TOKENS_EDGES
    occupied = sorted(data.buckets.items())
    seen = place = 0
    for edge in edges:
        while place < len(occupied) and occupied[place][0] <= edge:
            seen += occupied[place][1]
            place += 1
        limit = data.unit * 2.0 ** (edge / PER_OCTAVE)
        yield _line(f"{name}_bucket", {**labels, "le": f"{limit:.6g}"}, seen)
    yield _line(f"{name}_bucket", {**labels, "le": "+Inf"}, data.count)
    yield _line(f"{name}_sum", labels, data.total)
    yield _line(f"{name}_count", labels, data.count)


def _head(name: str, text: str, kind: str) -> Iterator[str]:
    yield f"# HELP {PREFIX}{name} {text}\n# TYPE {PREFIX}{name} {kind}\n"


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
    return f"{PREFIX}{name}{{{inside}}} {value:.12g}\n"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
