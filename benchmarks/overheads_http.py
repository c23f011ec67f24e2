"""What HTTP adds to the first token of a lone request: the same prompt shapes through `semipd serve` and
through the library, one after the other, in one run.

Both engines are up all the time and one of them is idle; who goes first alternates. The client is a plain
socket kept open (an HTTP library's own milliseconds are not the server's), and each request's first event
is one line of its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from semipd import LLM, SamplingParams
from tests.checkpoints import write_tokenizer

INPUT, OUTPUT = 128, 4
WARM_UP = 5
LIMIT_MS = 10.0


class Server:
    """A `semipd serve` of its own. url: where. pid: its first process."""

    def __init__(self, folder: Path, *flags: str) -> None:
        write_tokenizer(folder)
        command = [sys.executable, "-m", "semipd.cli", "serve", str(folder), "--load-format", "dummy"]
        command += ["--port", "0", "--log-level", "error", *flags]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        words = (word for line in self._process.stdout for word in line.split())
        url = next((word for word in words if word.startswith("http://")), None)
        if url is None:
            raise SystemExit("the server did not start")
        self.url, self.pid = url, self._process.pid

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.communicate(timeout=20)
        finally:
            self._process.kill()

    def first_tokens_seconds(self) -> tuple[float, int]:
        """Sum and count of the engine's own times to first token, from /metrics."""
        page = httpx.get(f"{self.url}/metrics", trust_env=False).text
        found = {"sum": 0.0, "count": 0.0}
        for line in page.splitlines():
            for part in found:
                if line.startswith(f"semipd:time_to_first_token_seconds_{part}"):
                    found[part] = float(line.rpartition(" ")[2])
        return found["sum"], int(found["count"])

    def family(self) -> dict[str, psutil.Process]:
        """Its processes by name."""
        first = psutil.Process(self.pid)
        return {process.cmdline()[0]: process for process in [first, *first.children(recursive=True)]}


def some_prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(8000) for _ in range(INPUT)]


def compare(folder: Path, pairs: int, flags: dict[str, Any]) -> dict[str, float]:
    """Milliseconds to the first token by both ways: medians, and the median of the pairs' differences."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    over_http, inside = list[float](), list[float]()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(folder, *words))
        llm = stack.enter_context(LLM(str(folder), load_format="dummy", **flags))
        ways = [
            (over_http, stack.enter_context(_http_way(server.url))),
            (inside, stack.enter_context(_library_way(llm))),
        ]
        for number in range(WARM_UP + pairs):
            if number == WARM_UP:
                before = server.first_tokens_seconds()
            for kept, way in ways if number % 2 else reversed(ways):
                seconds = way(some_prompt(number))
                if number >= WARM_UP:
                    kept.append(seconds)
        after = server.first_tokens_seconds()
    differences = [theirs - mine for theirs, mine in zip(over_http, inside, strict=True)]
    engine = (after[0] - before[0]) / max(after[1] - before[1], 1)
    return {
        "http_ms": 1e3 * statistics.median(over_http),
        "http_engine_mean_ms": 1e3 * engine,
        "http_mean_ms": 1e3 * statistics.fmean(over_http),
        "library_ms": 1e3 * statistics.median(inside),
        "library_mean_ms": 1e3 * statistics.fmean(inside),
        "added_ms": 1e3 * statistics.median(differences),
        "pairs": pairs,
    }


@contextlib.contextmanager
def _http_way(url: str) -> Iterator[Callable[[list[int]], float]]:
    """Seconds from sending a request to its first event, on one connection kept open."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60.0)

    def run(prompt: list[int]) -> float:
        settings = {"max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True, "stream": True}
        body = json.dumps({"prompt": prompt, **settings}).encode()
        begin = time.perf_counter()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        line = answer.readline()
        seconds = time.perf_counter() - begin
        if answer.status != 200 or not line.startswith(b"data: {"):
            raise SystemExit(f"the server answered {answer.status}: {line!r}")
        answer.read()
        return seconds

    connection.connect()
    try:
        yield run
    finally:
        connection.close()


@contextlib.contextmanager
def _library_way(llm: LLM) -> Iterator[Callable[[list[int]], float]]:
    """Seconds from `LLM.stream` to its first tokens, on one event loop kept open."""
    params = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)

    async def first(prompt: list[int]) -> float:
        begin = time.perf_counter()
        stream = llm.stream(prompt, params)
        await anext(stream)
        seconds = time.perf_counter() - begin
        async for _ in stream:
            pass
        return seconds

    with asyncio.Runner() as runner:
        yield lambda prompt: runner.run(first(prompt))
