"""Grammars as the server sees them: tried out in a process of their own before anybody follows them, and
remembered. Imports nothing of what compiles them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from semipd.core.errors import Overloaded
from semipd.model.grammar_text import GrammarError
from semipd.serve.grammar_process import Bounds

REMEMBERED = 256  # grammars, and what was wrong with others
REMEMBERED_BYTES = 2**24
AT_ONCE = 2  # that are tried out
MAX_WAITING = 128  # requests of one server that wait for it
Result = TypeVar("Result")
_GRACE = 5.0  # seconds in which the process does what it does by itself
_TRIES = 2
# The parent's import path, so that both find the same code; -P keeps a file in the working directory from
# hiding a module.
_PROGRAM = """
import sys
sys.path[:] = sys.argv[5:]
from semipd.serve.grammar_process import Bounds, main
main(int(sys.argv[1]), Bounds(float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
"""


class Verdict(NamedTuple):
    """error: why there is no grammar."""

    grammar: str = ""
    error: str = ""


class Unchecked(Exception):
    """A grammar that is to be tried out first, which takes its time."""


class GrammarCheck:
    """Tries out grammars. Safe to use from several threads. The process is started with the first grammar,
    again when it has died, and ends with this one."""

    def __init__(self, bounds: Bounds = Bounds()) -> None:
        self._bounds = bounds
        self._lock = threading.Lock()
        self._places = threading.Semaphore(AT_ONCE)
        self._helper: _Helper | None = None
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()
        self._bytes = 0

    def of(self, order: Mapping[str, str], wait: bool = True) -> str:
        """The grammar of an order (`grammar_process.answer`). wait: try it out if need be.

        Raises GrammarError, Overloaded where nothing can be tried out, and Unchecked."""
        name = _name(order)
        known = self._recall(name)
        if known is None and not wait:
            raise Unchecked
        if known is None:
            with self._places:
                known = self._recall(name) or self._try_out(name, json.dumps(order).encode())
        if known.error:
            raise GrammarError(known.error)
        return known.grammar

    def close(self) -> None:
        """End the process. Idempotent; the next grammar starts another."""
        with self._lock:
            helper, self._helper = self._helper, None
        if helper is not None:
            helper.close()

    def _recall(self, name: bytes) -> Verdict | None:
        with self._lock:
            known = self._known.get(name)
            if known is not None:
                self._known.move_to_end(name)
            return known

    def _try_out(self, name: bytes, order: bytes) -> Verdict:
        for _ in range(_TRIES):
            try:
                helper = self._running()
            except OSError:  # processes or memory are scarce
                break
            lines = helper.ask(order)
            end = json.loads(lines[-1]) if lines else {}
            if "code" not in end or end["code"] == -signal.SIGKILL:
                self._forget(helper)
                continue
            verdict = self._verdict(lines[:-1], end["code"])
            if end["code"] != -signal.SIGALRM:  # which says more of the machine than of the grammar
                self._keep(name, verdict)
            return verdict
        raise Overloaded("no grammar can be tried out at the moment")

    def _verdict(self, lines: list[bytes], code: int) -> Verdict:
        """code: of the child's end."""
        if code or not lines:
            return Verdict(error=self._bounds.why(code))
        return Verdict(**json.loads(lines[0]))

    def _keep(self, name: bytes, verdict: Verdict) -> None:
        with self._lock:
            if name in self._known:
                return
            self._known[name] = verdict
            self._bytes += len(verdict.grammar)
            while len(self._known) > REMEMBERED or self._bytes > REMEMBERED_BYTES:
                _, old = self._known.popitem(last=False)
                self._bytes -= len(old.grammar)

    def _running(self) -> _Helper:
        with self._lock:
            if self._helper is None:
                self._helper = _Helper(self._bounds)
            return self._helper

    def _forget(self, helper: _Helper) -> None:
        """One that did not answer."""
        with self._lock:
            if self._helper is helper:
                self._helper = None
        helper.close()


def _name(order: Mapping[str, str]) -> bytes:
    """The same for equal orders alone."""
    digest = hashlib.blake2b(digest_size=16)
    for key, text in order.items():
        data = text.encode("utf-8", "surrogatepass")
        digest.update(f"{key} {len(data)} ".encode())
        digest.update(data)
    return digest.digest()


class WaitingRoom:
    """Threads on which requests wait for new grammars, so that no other request waits behind these. Used on
    the event loop."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="grammar")
        self._inside = 0

    async def run(self, work: Callable[[], Result]) -> Result:
        """What work returns, and raises; Overloaded where too many wait."""
        if self._inside >= MAX_WAITING:
            raise Overloaded(f"{self._inside} requests wait already for new grammars to be tried out")
        self._inside += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._inside -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Helper:
    """The process as whoever asks it sees it."""

    def __init__(self, bounds: Bounds) -> None:
        numbers = [str(value) for value in (bounds.cpu_seconds, bounds.seconds, bounds.memory)]
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(ours.close)
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno()), *numbers, *sys.path],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    process_group=0,
                )
            undo.pop_all()
        ours.settimeout(_GRACE)
        self._orders = ours
        self._patience = bounds.seconds + _GRACE
        self._end = weakref.finalize(self, _end, process, ours)

    def ask(self, order: bytes) -> list[bytes]:
        """The lines of its answer; none if it is gone."""
        ours, theirs = socket.socketpair()
        with ours, contextlib.suppress(OSError):
            ours.settimeout(self._patience)
            with theirs:
                socket.send_fds(self._orders, [b"."], [theirs.fileno()])
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                ours.sendall(order)
                ours.shutdown(socket.SHUT_WR)
            with ours.makefile("rb") as stream:
                return [line for line in stream.read().split(b"\n") if line]
        return []

    def close(self) -> None:
        self._end()


def _end(process: subprocess.Popen[bytes], orders: socket.socket) -> None:
    orders.close()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
