"""What a prompt costs the streams that run, and what they cost it: every engine's whole curve, over HTTP.

    python -m benchmarks.frontier --peer vllm=PYTHON --peer llama=PYTHON [--only semipd "vllm 256" ...]
        [--prompts 3] [--out benchmarks/results/frontier.json]

For each setting of each engine's knob a server is started; 8 streams decode from a prompt of 128 on, and
once they run a prompt of 1,024 arrives every 6 s, one token to be generated. A point is the median over
prompts of (its TTFT, the worst gap in any stream while it was in flight). Below and to the left is better.
How peers' environments are made: see cpu_peers.py. The picture goes beside the JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

from benchmarks.cpu_peers import peer, say
from benchmarks.machine import deliver, describe
from benchmarks.peers.engines import Engines
from benchmarks.peers.servers import Remote, free_port, running, server
from benchmarks.peers.tasks import random_prompts, worst_gap
from benchmarks.peers.worker import PeerFailed, end_in_order
from benchmarks.shapes import SHAPES
from semipd.bench.measure import Record

LENGTH = 4096


@dataclass(frozen=True)
class Setting:
    """An engine under one setting of its knob. curve: the points that a line joins."""

    name: str
    engine: str
    curve: str
    knobs: tuple[str, ...]


def settings(cores: int) -> dict[str, Setting]:
    """Every setting by name."""
    found = []

    def add(name: str, engine: str, curve: str, *knobs: object) -> None:
        found.append(Setting(name, engine, curve, tuple(map(str, knobs))))

    for prefill in range(1, cores):
        split = f"{prefill},{cores - prefill}"
        add(f"semipd split {split}", "semipd", "semipd", "--split", f"static:{split}")
    for tokens in (16, 32, 48, 64, 96, 128, 256, 512, 1024):
        knobs = ("--policy", "chunked", "--chunk-tokens", tokens)
        add(f"semipd chunk {tokens}", "semipd", "semipd", *knobs)
    for ttft, tpot in (("10s", "60ms"), ("4s", "100ms"), ("2s", "200ms"), ("1s", "1s")):
        targets = ("--split", "auto", "--ttft-slo", ttft, "--tpot-slo", tpot)
        add(f"semipd auto {ttft} {tpot}", "semipd", "semipd auto", *targets)
    for engine in ("vllm", "vllm-eager"):
        for tokens in (32, 64, 128, 256, 512, 1024, 2048):
            add(f"{engine} {tokens}", engine, engine, "--max-num-batched-tokens", tokens)
    for engine in ("llama-bf16", "llama-q8_0"):
        for tokens in (32, 64, 128, 256, 512, 2048):
            add(f"{engine} {tokens}", engine, engine, "--batch", tokens)
    return {setting.name: setting for setting in found}


DEFAULT = (
    *("semipd split 1,1", "semipd chunk 32", "semipd chunk 64", "semipd chunk 256", "semipd chunk 1024"),
    *("semipd auto 4s 100ms", "semipd auto 2s 200ms"),
    *("vllm 32", "vllm 64", "vllm 128", "vllm 256", "vllm 2048"),
    *("llama-bf16 64", "llama-bf16 256", "llama-bf16 2048"),
)


def length_of(shape: str) -> int:
    return min(LENGTH, int(SHAPES[shape]["max_position_embeddings"]))


async def measure(remote: Remote, options: argparse.Namespace) -> dict[str, Any]:
    """Streams, then prompts among them. Raises PeerFailed."""
    vocabulary = remote.vocabulary
    warm = random_prompts([128] * options.streams + [options.prompt], vocabulary, "warm")
    await asyncio.gather(*(remote.complete(prompt, 8) for prompt in warm))
    tokens = length_of(options.shape) - options.context
    prompts = random_prompts([options.context] * options.streams, vocabulary, "streams")
    records = [Record(time.perf_counter(), len(prompt), tokens) for prompt in prompts]
    async with asyncio.TaskGroup() as group:
        streams = [
            group.create_task(remote.complete(prompt, tokens, record))
            for prompt, record in zip(prompts, records, strict=True)
        ]
        try:
            return await _among(remote, records, options)
        finally:
            for stream in streams:
                stream.cancel()


async def _among(remote: Remote, records: list[Record], options: argparse.Namespace) -> dict[str, Any]:
    moments = [record.chunks for record in records]
    while not all(len(times) >= 8 for times in moments):
        await asyncio.sleep(0.05)
    begin = time.perf_counter()
    await asyncio.sleep(options.quiet)
    quiet = [b - a for times in moments for a, b in pairwise(times) if a >= begin]
    points = []
    begin = time.perf_counter()
    produced = sum(map(len, moments))
    for number in range(options.prompts):
        await asyncio.sleep(max(begin + number * options.every - time.perf_counter(), 0.0))
        prompt = random_prompts([options.prompt], remote.vocabulary, f"prompt {number}")[0]
        done = await remote.complete(prompt, 1)
        first = done.chunks[0]
        await asyncio.sleep(0.5)  # the gap that the prompt ended in must end too
        points.append((first - done.sent, worst_gap(moments, done.sent, first)))
    await asyncio.sleep(max(begin + options.prompts * options.every - time.perf_counter(), 0.0))
    rate = (sum(map(len, moments)) - produced) / (time.perf_counter() - begin)
    return {
        "ttft_s": statistics.median(ttft for ttft, _ in points),
        "worst_gap_ms": 1e3 * statistics.median(gap for _, gap in points),
        "quiet_itl_ms": 1e3 * statistics.median(quiet),
        "output_tokens_per_s": rate,
        "points": points,
    }


async def run_setting(
    setting: Setting, engines: Engines, options: argparse.Namespace, logs: Path
) -> dict[str, Any]:
    """Start the server, measure, end it. Raises PeerFailed."""
    port = free_port()
    shape = options.shape
    launch = server(engines, setting.engine, shape, port, setting.knobs, length_of(shape))
    log = logs / f"{setting.name.replace(' ', '-')}.log"
    cores, vocabulary = engines.cores_of(setting.engine), SHAPES[shape]["vocab_size"]
    try:
        async with (
            asyncio.timeout(options.seconds),
            running(launch, port, log, cores, options.seconds, vocabulary) as remote,
        ):
            found = await measure(remote, options)
    except TimeoutError:
        raise PeerFailed(f"not done within {options.seconds:.0f} s") from None
    except ExceptionGroup as group:
        raise PeerFailed(str(group.exceptions[0])) from None
    return {"setting": setting.name, "curve": setting.curve, "server": launch.facts(), **found}


def show(rows: list[dict[str, Any]], left_out: dict[str, str]) -> None:
    table = Table(title="a prompt of 1,024 every 6 s among 8 streams, medians")
    for heading in ("setting", "TTFT, s", "worst gap, ms", "ITL without prompts, ms", "output tok/s"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in rows:
        cells = (f"{row['ttft_s']:.2f}", f"{row['worst_gap_ms']:.0f}", f"{row['quiet_itl_ms']:.1f}")
        table.add_row(row["setting"], *cells, f"{row['output_tokens_per_s']:.0f}")
    console = Console(width=110)
    console.print(table)
    for name, why in left_out.items():
        console.print(f"left out: {name}, {why}", markup=False)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Worst gap against TTFT; a line joins the settings of one knob."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for curve in dict.fromkeys(row["curve"] for row in rows):
        own = sorted((row["ttft_s"], row["worst_gap_ms"]) for row in rows if row["curve"] == curve)
        axes.plot(*zip(*own, strict=True), "*" if "auto" in curve else "o-", label=curve)
    for row in rows:
        label = row["setting"].removeprefix(row["curve"]).removeprefix("semipd").strip()
        place = (row["ttft_s"], row["worst_gap_ms"])
        axes.annotate(label, place, textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.set(xlabel="TTFT of the prompt, s", ylabel="worst gap in a stream, ms", xscale="log", yscale="log")
    axes.set_title("A prompt of 1,024 among 8 streams")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse(known: dict[str, Setting]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--peer", type=peer, action="append", default=[], metavar="NAME=PYTHON")
    add("--shape", choices=("0.5b", "12m"), default="0.5b")
    add("--only", nargs="*", default=list(DEFAULT), metavar="SETTING", help="a setting, or an engine's all")
    add("--prompts", type=int, default=3, help="prompts of a setting")
    add("--every", type=float, default=6.0, help="seconds between them")
    add("--prompt", type=int, default=1024)
    add("--streams", type=int, default=8)
    add("--context", type=int, default=128)
    add("--quiet", type=float, default=2.0, help="seconds without prompts, before them")
    add("--seconds", type=float, default=240.0, help="most that one setting may take")
    add("--minutes", type=float, default=15.0, help="after these no setting is begun")
    add("--folder", type=Path, help="where checkpoints are kept (default: a temporary one)")
    add("--out", type=Path)
    options = parser.parse_args()
    options.peer = dict(options.peer)
    options.chosen = [s for s in known.values() if {s.name, s.engine} & set(options.only)]
    if unknown := set(options.only) - {name for s in known.values() for name in (s.name, s.engine)}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return options


def main() -> int:
    cores = sorted(os.sched_getaffinity(0))
    options = parse(settings(len(cores)))
    end_in_order()
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    until = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "models"
        folder.mkdir(parents=True, exist_ok=True)
        engines = Engines(options.peer, folder, cores)
        for setting in options.chosen:
            try:
                if time.monotonic() > until:
                    raise PeerFailed("no time was left")
                rows.append(asyncio.run(run_setting(setting, engines, options, Path(temporary))))
                say(f"{setting.name}: {rows[-1]['ttft_s']:.2f} s, {rows[-1]['worst_gap_ms']:.0f} ms")
            except PeerFailed as error:
                left_out[setting.name] = str(error)
                say(f"{setting.name} is left out: {error}")
    show(rows, left_out)
    found = {"benchmark": "frontier", "machine": describe(), "rows": rows, "left_out": left_out}
    if options.out and rows:
        plot(rows, options.out.with_suffix(".png"))
    deliver(found, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
