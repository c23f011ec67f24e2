"""Every engine as an HTTP server with streaming completions: how it is started, and one client of it.

What is asked: POST /v1/completions with token ids, greedy, to the full length, as a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.engines import LENGTH, Engines
from benchmarks.peers.tasks import random_prompts
from benchmarks.peers.worker import HERE, Launch, PeerFailed, end, last_line, memory
from benchmarks.shapes import SHAPES
from semipd.bench.http import Client, Endpoint, HttpError
from semipd.bench.measure import Record
from semipd.bench.payload import Stream, body

MODEL = "model"  # its name in every server
_POLL_SECONDS = 0.02
STREAMS, CONTEXT = 8, 512  # whose memory is told


def server(
    engines: Engines, name: str, shape: str, port: int, knobs: Sequence[str] = (), length: int = LENGTH
) -> Launch:
    """The engine's own server, with flags of its own added. Raises PeerFailed."""
    folder, family = str(engines.checkpoint(shape)), engines.family(name)
    environment = dict(engines.environment(name))
    if family == "semipd":
        command = [engines.python(name), "-m", "semipd.cli", "serve", folder, "--log-level", "error"]
        for setting, value in engines.own(name.partition("@")[0]).items():
            flag = f"--{setting.replace('_', '-')}"
            command += [flag] if value is True else [flag, str(value)]
        command += ["--max-model-len", str(length), "--served-model-name", MODEL]
    elif family == "vllm":
        del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
        command = [engines.python(name), "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        command += ["--served-model-name", MODEL, "--dtype", "bfloat16", "--max-model-len", str(length)]
        command += ["--max-num-seqs", "64" if not knobs else "16"]
        command += ["--enforce-eager"] if name.startswith("vllm-eager") else []
    elif family == "llama":
        settings = json.dumps(engines.llama(name, shape, 2048, unified=True) | {"length": length})
        command = [engines.python(name), str(HERE / "serve_llama.py"), settings]
    else:
        raise PeerFailed(f"{name} is not run as a server here")
    return Launch([*command, "--port", str(port), *knobs], environment)


@dataclass
class Remote:
    """A server that runs, as its one client sees it. url has no path; vocabulary: of its tokens."""

    process: subprocess.Popen[bytes]
    client: Client
    vocabulary: int

    async def complete(self, prompt: Sequence[int], tokens: int, record: Record | None = None) -> Record:
        """One request to its end. `record.chunks` grows while it streams. Raises PeerFailed."""
        record = record or Record(time.perf_counter(), len(prompt), tokens)
        stream = Stream(record)
        request = self.client.encode(
            "POST", "/v1/completions", body("completions", MODEL, list(prompt), tokens, True)
        )
        record.sent = time.perf_counter()
        try:
            answer = await self.client.send(request, stream.feed)
        except HttpError as error:
            raise PeerFailed(str(error)) from None
        if answer.status != 200:
            raise PeerFailed(f"HTTP {answer.status}: {answer.body[:200].decode(errors='replace')}")
        stream.finish()
        if record.error:
            raise PeerFailed(f"{record.error} {record.detail}")
        return record


@asynccontextmanager
async def running(
    launch: Launch, port: int, log: Path, cores: Sequence[int], seconds: float, vocabulary: int
) -> AsyncIterator[Remote]:
    """Start a server, wait until it is healthy, and end it afterwards. Raises PeerFailed."""
    process = launch.start(log, cores, stdout=subprocess.DEVNULL)
    client = Client(Endpoint.parse(f"http://127.0.0.1:{port}"))
    try:
        until = time.monotonic() + seconds
        while not await _ready(client):
            if process.poll() is not None:
                raise PeerFailed(f"the server ended: {last_line(log)}")
            if time.monotonic() > until:
                raise PeerFailed(f"the server was not ready within {seconds:.0f} s")
            await asyncio.sleep(_POLL_SECONDS)
        yield Remote(process, client, vocabulary)
    finally:
        client.close()
        await asyncio.to_thread(end, process)


async def _ready(client: Client) -> bool:
    """This engine's /health tells that it lives, /ready that it serves; the others have only /health."""
    with contextlib.suppress(HttpError):
        status = (await client.get("/ready")).status
        return status == 200 or (status == 404 and (await client.get("/health")).status == 200)
    return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def start_figures(
    engines: Engines, name: str, shape: str, logs: Path, seconds: float
) -> Mapping[str, float]:
    """Seconds from the start of the process to its first token, and megabytes (PSS) when it has served
    `STREAMS` requests at once. Raises PeerFailed."""
    return asyncio.run(_start_figures(engines, name, shape, logs, seconds))


async def _start_figures(
    engines: Engines, name: str, shape: str, logs: Path, seconds: float
) -> Mapping[str, float]:
    port = free_port()
    launch = server(engines, name, shape, port)
    vocabulary = SHAPES[shape]["vocab_size"]
    begin = time.perf_counter()
    log, cores = logs / f"{name}-server.log", engines.cores_of(name)
    async with running(launch, port, log, cores, seconds, vocabulary) as remote, asyncio.timeout(seconds):
        first = await remote.complete(random_prompts([16], vocabulary, "first")[0], 1)
        prompts = random_prompts([CONTEXT] * STREAMS, vocabulary, "memory")
        await asyncio.gather(*(remote.complete(prompt, 16) for prompt in prompts))
        return {
            "server start": first.chunks[0] - begin,
            "server memory": memory(remote.process) / 1e6,
        }
