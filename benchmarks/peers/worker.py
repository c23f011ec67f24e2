"""The benchmark's side of a driver: a process of its own, a line in, a line out, a time limit on each."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from semipd.lifetime import die_with_parent

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
_END_SECONDS = 10.0


class PeerFailed(Exception):
    """An engine that could not start, answer or answer in time; says why."""


@dataclass(frozen=True)
class Launch:
    """How to start an engine: arguments and what to add to the environment (None: take it away)."""

    command: Sequence[str]
    environment: Mapping[str, str | None] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """The same for a report, without this machine's folders."""
        command = [_plain(part) for part in self.command]
        return {
            "command": command,
            "environment": {k: _plain(v or "") for k, v in self.environment.items()},
        }

    def start(self, log: Path, cores: Sequence[int], **pipes: Any) -> subprocess.Popen[bytes]:
        """Start it in a session of its own, on these cores; its complaints go to `log`."""
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        for name, value in self.environment.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        parent = os.getpid()
        with log.open("ab") as errors:
            return subprocess.Popen(
                list(self.command),
                env=environment,
                cwd=ROOT,
                stderr=errors,
                start_new_session=True,
                preexec_fn=lambda: _prepare(parent, cores),
                **pipes,
            )


def _prepare(parent: int, cores: Sequence[int]) -> None:
    """In the new process: it ends with the benchmark, however that ends."""
    die_with_parent(parent)
    os.sched_setaffinity(0, cores)


def _plain(text: str) -> str:
    """Of every path in it the last part only."""
    return re.sub(r"/[^\s\",:]*/", "", text)


@dataclass
class Worker:
    """A running driver. Every method raises PeerFailed when the engine does not do its part in time."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    rest: bytes = b""
    facts: dict[str, Any] = field(default_factory=dict)
    ready_seconds: float = 0.0

    @staticmethod
    def start(name: str, launch: Launch, log: Path, cores: Sequence[int], seconds: float) -> Worker:
        begin = time.perf_counter()
        try:
            process = launch.start(log, cores, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise PeerFailed(f"cannot start: {error}") from None
        worker = Worker(name, process, log)
        try:
            worker.facts = worker.receive(seconds)["ready"]
        except BaseException:
            worker.end()
            raise
        worker.ready_seconds = time.perf_counter() - begin
        return worker

    def ask(
        self, prompts: Sequence[Sequence[int]], new: Sequence[int], seconds: float
    ) -> list[tuple[float, int]]:
        """Generate new[i] tokens after prompts[i]; (seconds since the request, tokens) of each step."""
        line = json.dumps({"prompts": prompts, "new": new}) + "\n"
        stdin = self.process.stdin
        assert stdin is not None
        try:
            stdin.write(line.encode())
            stdin.flush()
        except OSError:
            raise PeerFailed(self._why()) from None
        reply = self.receive(seconds)
        if "error" in reply:
            raise PeerFailed(reply["error"])
        steps = [(float(moment), int(count)) for moment, count in reply["steps"]]
        if sum(count for _, count in steps) != sum(new):
            raise PeerFailed(f"{sum(count for _, count in steps)} tokens came, not {sum(new)}")
        return steps

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next line."""
        stdout: IO[bytes] | None = self.process.stdout
        assert stdout is not None
        until = time.monotonic() + seconds
        while b"\n" not in self.rest:
            left = until - time.monotonic()
            if left <= 0 or not select.select([stdout], [], [], left)[0]:
                raise PeerFailed(f"no answer within {seconds:.0f} s")
            piece = os.read(stdout.fileno(), 1 << 16)
            if not piece:
                raise PeerFailed(self._why())
            self.rest += piece
        line, _, self.rest = self.rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        end(self.process)

    def _why(self) -> str:
        return f"it ended: {last_line(self.log)}"


def end_in_order() -> None:
    """Let SIGTERM end this process as an exception does, so that it ends its engines."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def last_line(log: Path) -> str:
    """The last thing that a process complained of."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:300] if lines else "without a word"


def memory(process: subprocess.Popen[bytes]) -> float:
    """Proportional set size of a process and of all below it, in bytes; 0 when it is gone."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for one in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += one.memory_full_info().pss
    return total


def busy_seconds(process: subprocess.Popen[bytes]) -> float:
    """Processor time that it and all below it have used."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for one in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                total += times.user + times.system
    return total


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that `Launch.start` started, and its session: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
