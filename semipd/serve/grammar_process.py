"""The process that tries out grammars: nobody else compiles one that was not seen to compile here.

How long a grammar takes to compile, and how much memory, no rule foresees. So a child is forked for each,
with a bound on both, and is killed beyond. The process itself only forks and waits, and imports little.

    server ── an order: a socket ──> this process ── fork ──> child ── its verdict ──> that socket
                                     when the child has ended ── how it ended ──> that socket, closed then
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

import setproctitle

from semipd.lifetime import die_with_parent
from semipd.model.grammar_text import GrammarError, Probe, grammar_of_lark, grammar_of_schema

_BRISK_SECONDS = 0.05  # who takes longer gives way to everybody else
_NICE = 10
_NO_MEMORY = 3  # exit code


@dataclass(frozen=True)
class Bounds:
    """Of one grammar. cpu_seconds: the largest ordinary ones, of 64 KiB, take less than 0.1. seconds: on a
    machine that has no processor time for it. memory: bytes; ordinary ones take less than 20 MiB."""

    cpu_seconds: float = 0.5
    seconds: float = 10.0
    memory: int = 256 * 2**20

    def why(self, code: int) -> str:
        """What is wrong with a grammar, by the exit code of the child that tried it out."""
        memory = f"it takes more than {self.memory // 2**20} MiB of memory to compile"
        known = {
            -signal.SIGPROF: f"it takes more than {self.cpu_seconds:g} s of processor time to compile",
            -signal.SIGALRM: f"it did not compile within {self.seconds:g} s, on a machine that is busy",
            -signal.SIGABRT: memory,
            _NO_MEMORY: memory,
            -signal.SIGSEGV: "it is nested too deeply to compile",
        }
        return known.get(code, f"its compilation ended with code {code}")

    def set(self) -> None:
        """Let the kernel end this process beyond them."""
        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + self.memory, size + self.memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.setitimer(signal.ITIMER_PROF, self.cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)


def answer(order: Mapping[str, str], probe: Probe) -> dict[str, str]:
    """The grammar of an order, or what is wrong with it. An order has a JSON `schema`, or grammars in Lark:
    `spelled`, by which the other, `lark`, is tried out."""
    try:
        if "schema" in order:
            grammar = grammar_of_schema(order["schema"])
            probe.check(grammar)
        else:
            probe.check(grammar_of_lark(order["spelled"]))
            grammar = grammar_of_lark(order["lark"])
    except GrammarError as error:
        return {"error": str(error)}
    return {"grammar": grammar}


@dataclass
class _Child:
    """descriptor: of the socket that its answer goes to. started: time.monotonic()."""

    descriptor: int
    started: float
    brisk: bool = True


class Helper:
    """orders: where every message is a descriptor; its end is this process's."""

    def __init__(self, orders: socket.socket, bounds: Bounds) -> None:
        self._orders = orders
        self._bounds = bounds
        self._probe = Probe()
        self._children: dict[int, _Child] = {}

    def serve(self) -> None:
        """Until the other end closes."""
        ended, bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
        events = select.poll()
        for descriptor in (self._orders.fileno(), ended):
            events.register(descriptor, select.POLLIN)
        try:
            while True:
                some = [descriptor for descriptor, _ in events.poll(self._patience())]
                if ended in some:
                    os.read(ended, 4096)
                self._slow_down()
                self._reap()
                if self._orders.fileno() in some:
                    _, descriptors, _, _ = socket.recv_fds(self._orders, 1, 1)
                    if not descriptors:
                        return
                    self._start(descriptors[0])
        finally:
            for pid in self._children:
                os.kill(pid, signal.SIGKILL)

    def _start(self, descriptor: int) -> None:
        helper = os.getpid()
        try:
            pid = os.fork()
        except OSError:  # whoever asked finds the socket closed
            os.close(descriptor)
            return
        if pid == 0:
            self._be_child(descriptor, helper)
        self._children[pid] = _Child(descriptor, time.monotonic())

    def _be_child(self, descriptor: int, helper: int) -> None:
        """In the fork. Does not return."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            die_with_parent(helper)
            for other in self._children.values():  # whoever waits at one of these waits for its end
                os.close(other.descriptor)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the library's last words
            with socket.socket(fileno=descriptor) as asker, asker.makefile("rwb") as stream:
                order = json.loads(stream.read())
                self._bounds.set()
                stream.write(json.dumps(answer(order, self._probe)).encode() + b"\n")
            code = 0
        except MemoryError:
            code = _NO_MEMORY
        finally:
            os._exit(code)

    def _reap(self) -> None:
        """Say of each child that has ended how it ended."""
        while self._children:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if not pid:
                return
            child = self._children.pop(pid)
            seconds = usage.ru_utime + usage.ru_stime
            end = {"code": os.waitstatus_to_exitcode(status), "seconds": seconds, "kib": usage.ru_maxrss}
            with socket.socket(fileno=child.descriptor) as asker, contextlib.suppress(OSError):
                asker.sendall(b"\n" + json.dumps(end).encode() + b"\n")

    def _patience(self) -> float | None:
        """Milliseconds until a child is to be slowed down."""
        times = [child.started for child in self._children.values() if child.brisk]
        return max(min(times) + _BRISK_SECONDS - time.monotonic(), 0.0) * 1000 + 1 if times else None

    def _slow_down(self) -> None:
        now = time.monotonic()
        for pid, child in self._children.items():
            if child.brisk and now > child.started + _BRISK_SECONDS:
                child.brisk = False
                os.setpriority(os.PRIO_PROCESS, pid, _NICE)


def main(descriptor: int, bounds: Bounds) -> None:
    """Try out what is asked for at the socket with this descriptor until it closes."""
    for ending in (signal.SIGINT, signal.SIGTERM):  # the server decides
        signal.signal(ending, signal.SIG_IGN)
    setproctitle.setproctitle("semipd-grammar")
    with socket.socket(fileno=descriptor) as orders:
        Helper(orders, bounds).serve()
