"""`semipd bench serve`: load on an OpenAI-compatible server, and what its users would have seen.

With a rate or a trace, requests start on schedule whether or not earlier ones were answered, and latencies
count from the schedule. With a concurrency alone, a stream starts its next request when the last one ended,
and latencies count from that moment.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import msgspec

from semipd.bench import payload
from semipd.bench.http import Client, Endpoint, HttpError
from semipd.bench.measure import Measurements, Record, Targets
from semipd.bench.options import Options
from semipd.bench.progress import Progress
from semipd.bench.report import json_line, latency_table
from semipd.core.errors import ConfigError
from semipd.flags import add_flags, from_flags
from semipd.trace import Arrival

PREPARED = 512  # requests made before the clock starts
PROBE_SECONDS = 10.0
DEFAULT_VOCABULARY = 1000
LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "E2E"}


@dataclass(frozen=True, slots=True)
class Server:
    """What /v1/models told."""

    model: str
    vocabulary: int


async def probe(client: Client, options: Options) -> Server:
    """Ask for the models. Raises ConfigError when there is no server, or none of use."""
    where = client.endpoint
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            answer = await client.get("/v1/models")
    except TimeoutError:
        raise ConfigError(f"no answer from {where} within {PROBE_SECONDS:g} s") from None
    except HttpError as error:
        raise ConfigError(f"no server at {where}: {error}") from None
    if answer.status in (401, 403):
        raise ConfigError(f"{where} refuses the API key (HTTP {answer.status}); see --api-key")
    entry: dict[str, Any] = {}
    if answer.status == 200:
        entry = _model_entry(answer.body, options.model)
    model = options.model or entry.get("id")
    if not isinstance(model, str):
        raise ConfigError(f"{where}/v1/models names no model (HTTP {answer.status}); give --model")
    stated = entry.get("vocab_size")
    vocabulary = stated if isinstance(stated, int) and stated > 1 else DEFAULT_VOCABULARY
    return Server(model, options.vocab_size or vocabulary)


def _model_entry(body: bytes, model: str | None) -> dict[str, Any]:
    """The entry of `model`, or the first one; empty when the answer is not a list of models."""
    try:
        data = msgspec.json.decode(body)["data"]
        entries = [entry for entry in data if isinstance(entry, dict)]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return {}
    if model is not None:
        entries = [entry for entry in entries if entry.get("id") == model]
    return entries[0] if entries else {}


class Load:
    """One run: sends the plan's requests and collects what comes back."""

    def __init__(self, options: Options, client: Client, server: Server) -> None:
        self.measurements = Measurements(
            Targets(options.ttft_slo, options.tpot_slo), exact_prompts=not options.as_text
        )
        self.running = 0
        self.stopped = False
        self._options = options
        self._client = client
        self._server = server
        kind = "text" if options.as_text else "ids"
        self._prompts = payload.Prompts(kind, server.vocabulary, options.seed)
        self._room = asyncio.Semaphore(options.streams) if options.streams else None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._started = self._ended = 0.0

    async def run(self) -> None:
        """Warm up, send everything, wait for the answers. After `stop`, returns at once."""
        for arrival, request in islice(self._requests(first=2**32), self._options.warmup):
            await self._guarded(self._exchange(self._record(arrival, time.perf_counter()), request))
            if self.stopped:
                return
        requests = self._requests()
        requests = chain(list(islice(requests, PREPARED)), requests)
        self._started = self._ended = time.perf_counter()
        if self._options.scheduled:
            await self._guarded(self._on_schedule(requests))
        else:
            loops = [self._one_after_another(requests) for _ in range(self._options.streams or 1)]
            await asyncio.gather(*(self._guarded(loop) for loop in loops))
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Give up what is under way. It is not counted, neither as done nor as failed."""
        self.stopped = True
        self.cancel()

    def cancel(self) -> None:
        """End every task of this run."""
        for task in tuple(self._tasks):
            task.cancel()

    @property
    def seconds(self) -> float:
        """From the start of the schedule to the last answer."""
        return self._ended - self._started

    def _requests(self, first: int = 0) -> Iterator[tuple[Arrival, bytes]]:
        options = self._options
        path = payload.PATHS[options.endpoint]
        for number, arrival in zip(count(first), options.plan(), strict=False):
            body = payload.body(
                options.endpoint,
                self._server.model,
                self._prompts.make(number, arrival),
                arrival.output_tokens,
                options.ignore_eos,
            )
            yield arrival, self._client.encode("POST", path, body)

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """Run as a task that `stop` cancels."""
        task = self._spawn(work)
        try:
            await task
        except asyncio.CancelledError:
            if not self.stopped:
                raise

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and self._failure is None:
            self._failure = task.exception()

    async def _on_schedule(self, requests: Iterator[tuple[Arrival, bytes]]) -> None:
        for arrival, request in requests:
            due = self._started + arrival.time
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            self._spawn(self._when_there_is_room(self._record(arrival, due), request))

    async def _when_there_is_room(self, record: Record, request: bytes) -> None:
        async with self._room or contextlib.nullcontext():
            await self._counted(record, request)

    async def _one_after_another(self, requests: Iterator[tuple[Arrival, bytes]]) -> None:
        limit = self._options.duration
        for arrival, request in requests:
            now = time.perf_counter()
            if limit is not None and now - self._started > limit:
                return
            await self._counted(self._record(arrival, now), request)

    @staticmethod
    def _record(arrival: Arrival, scheduled: float) -> Record:
        return Record(scheduled, arrival.prompt_tokens, arrival.output_tokens)

    async def _counted(self, record: Record, request: bytes) -> None:
        self.running += 1
        try:
            await self._exchange(record, request)
            self._ended = time.perf_counter()
            self.measurements.add(record)
        finally:
            self.running -= 1

    async def _exchange(self, record: Record, request: bytes) -> None:
        """Send one request and fill in its record."""
        stream = payload.Stream(record)
        record.sent = time.perf_counter()
        try:
            async with asyncio.timeout(self._options.timeout):
                answer = await self._client.send(request, stream.feed)
        except TimeoutError:
            record.error = "timeout"
        except HttpError as error:
            record.error, record.detail = error.kind, str(error)
        else:
            if answer.status == 200:
                stream.finish()
            else:
                kind, record.detail = payload.error_of(answer.body)
                record.error = f"HTTP {answer.status} {kind}".strip()


async def measure(options: Options, show: bool = False) -> dict[str, Any]:
    """Run the benchmark; returns plain JSON data (see `Measurements.summary`). show: a progress bar.

    Ctrl-C ends it early, with what there is. Raises ConfigError."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    client = Client(Endpoint.parse(options.url), headers)
    try:
        server = await probe(client, options)
        load = Load(options, client, server)
        spent = time.process_time()
        with _interruptible(load.stop), Progress(load, options, show) as progress:
            watcher = asyncio.create_task(progress.watch())
            try:
                await load.run()
            finally:
                watcher.cancel()
                load.cancel()
        spent = time.process_time() - spent
    finally:
        client.close()
    result = load.measurements.summary(load.seconds)
    return {
        "benchmark": "serve",
        "url": str(client.endpoint),
        "model": server.model,
        "endpoint": options.endpoint,
        "load": _describe(options),
        "rate": options.rate,
        "concurrency": options.streams,
        "seed": options.seed,
        "interrupted": load.stopped,
        **result,
        "client_cpu_us_per_chunk": 1e6 * spent / max(result["chunks"], 1),
        "client_cpu_share": spent / max(load.seconds, 1e-9),
    }


def _describe(options: Options) -> str:
    """The load in a few words."""
    if options.trace is not None:
        text = f"trace {options.trace_format} at {options.trace_speed:g} times its speed"
    elif options.rate is not None:
        text = f"{options.arrivals} at {options.rate:g}/s"
    else:
        text = f"{options.streams} streams"
    if options.trace is None:
        lengths = f"{options.input_length} in, {options.output_length} out"
        scale = "" if options.length_scale == 1 else f" times {options.length_scale:g}"
        text += f", {options.workload + scale if options.workload else lengths}"
    return text


@contextlib.contextmanager
def _interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls `stop`, the next one raises KeyboardInterrupt as usual."""
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop()

    try:
        loop.add_signal_handler(signal.SIGINT, interrupted)
    except (NotImplementedError, RuntimeError, ValueError):  # not the main thread, or no such signals
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def print_result(result: dict[str, Any]) -> None:
    """The table for people."""
    facts = [
        ("server", f"{result['url']}, {result['model']} ({result['endpoint']})"),
        ("load", result["load"] + (", interrupted" if result["interrupted"] else "")),
        ("requests", f"{result['completed']} completed, {result['failed']} failed"),
        ("duration", f"{result['duration_s']:.2f} s"),
        ("request throughput", f"{result['request_throughput']:.3f} /s"),
        (
            "token throughput",
            f"{result['output_throughput']:.1f} output/s, {result['prompt_throughput']:.1f} prompt/s",
        ),
    ]
    if "goodput" in result and result["attainment"] is not None:
        facts.append(
            ("goodput", f"{result['goodput']:.3f} /s ({result['attainment']:.1%} met the targets)")
        )
    for kind, number in result["errors"].items():
        detail = result["error_examples"].get(kind)
        facts.append(("error", f"{number} x {kind}" + (f": {detail}" if detail else "")))
    for name, meaning in _REMARKS.items():
        if result[name]:
            facts.append(("note", f"{result[name]} answers {meaning}"))
    cost = (
        f"{result['client_cpu_share']:.1%} of a core, {result['client_cpu_us_per_chunk']:.0f} us per chunk"
    )
    late = result["send_delay_s"]["p99"]
    if late is not None:
        cost += f", requests sent {late * 1000:.1f} ms late (P99)"
    facts.append(("this client", cost))
    rows = {label: result[name] for name, label in LATENCIES.items()}
    latency_table("Serving Benchmark Result", rows, facts)


_REMARKS = {
    "without_usage": "had no usage: their chunks were counted as tokens",
    "chunks_unlike_usage": "had another number of chunks than of tokens; a chunk is one ITL gap",
    "short_outputs": "were shorter than asked for",
    "prompt_length_mismatch": "state another prompt length than was sent",
}


def run(options: Options) -> dict[str, Any]:
    """`measure` in an event loop of its own, with a progress bar when stderr is a terminal."""
    _allow_many_connections()
    return asyncio.run(measure(options, show=sys.stderr.isatty()))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `semipd bench serve`."""
    add_flags(parser, Options)


def run_command(namespace: argparse.Namespace) -> int:
    """Run, print the table and, as the last line, the JSON object. Returns the exit code: 0; 1 when no
    request succeeded; 130 when interrupted. Raises ConfigError (one line, exit code 2)."""
    options = from_flags(Options, namespace)
    result = run(options)
    if not options.json:
        print_result(result)
    print(json_line(result), flush=True)
    if result["interrupted"]:
        return 130
    return 0 if result["completed"] else 1


def _allow_many_connections() -> None:
    """Raise the soft limit of open files to the hard one: every stream is a socket."""
    try:
        import resource
    except ImportError:  # not on this platform, and neither is the limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
