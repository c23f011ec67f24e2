"""The resident: a small single-threaded process that loads and packs the weights, maps the KV pool, and
then only forks, waits and forks again. Its workers share every page of both without a copy.

It must have no second thread when it forks: a fork copies only the thread that forks, so a pool's locks and
queues would reach the workers broken. Those that pack weights have ended by then. It never runs the model.

While nothing happens, it prepares what only some requests need, the tokenizer for grammars, and its workers
give way to new ones that have it.

It ends when told to, when its socket closes, or when its parent dies. While it imports torch and loads, and
cannot listen, the kernel watches the parent for it (PR_SET_PDEATHSIG, see launch.py); later the socket and
a pidfd do, because that signal also comes when only the *thread* that started the resident ends.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import math
import mmap
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import setproctitle
import torch

from semipd.core.errors import ConfigError
from semipd.execute.cgroup import available_memory
from semipd.execute.linux import give_freed_memory_back, thread_ids
from semipd.execute.shared import LANES, SharedMemory
from semipd.execute.wire import Channel, Close, Failed, Fork, Forked, Job, Order, Ready, Start
from semipd.execute.worker import Storage, work
from semipd.lifetime import die_with_parent, outlive_parent
from semipd.logs import start_logging
from semipd.model.dense import load_model
from semipd.model.grammar import GrammarTokenizer
from semipd.model.grammar_text import GrammarError

log = logging.getLogger(__name__)

QUIET = 1.0  # seconds in which no step began
LARGE_TOKENIZER = 2**20  # bytes; what a worker makes of a smaller one when it needs it takes milliseconds
PATIENCE = 5.0  # seconds for threads that have done their work to end, and for a fork to succeed


def main(descriptor: int) -> None:
    """Serve the parent over the socket with this descriptor until it closes."""
    if sys.stderr is not None:
        faulthandler.enable()
    # The parent decides: systemd sends SIGTERM to every process of a service, while its requests finish.
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # what a parent ignores, its children inherit
    setproctitle.setproctitle("semipd-resident")
    channel: Channel[Order] = Channel(socket.socket(fileno=descriptor), Order)
    try:
        start, (memory,) = channel.receive_with_descriptors()
        assert isinstance(start, Start)
        start_logging(start.log_level, "%(levelname)s %(name)s: %(message)s")
        storage = _load(start, memory, channel)
        if storage is not None:
            outlive_parent()
            channel.send(Ready())
            Resident(channel, storage, start.parent).serve()
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone: nobody to tell
    finally:
        channel.close()


def _load(start: Start, memory: int, channel: Channel[Order]) -> Storage | None:
    """Everything that workers share, or None after telling the parent why not."""
    torch.set_num_threads(1)
    try:
        model = load_model(
            start.model,
            dtype=start.dtype,
            load_format=start.load_format,
            seed=start.seed,
            quantization=start.quantization,
            quantize_head=start.quantize_head,
        )
        shared = SharedMemory(memory, start.slots, start.max_length, start.block_size)
        pool = kv_pool(model.kv_shape(start.blocks, start.block_size), model.dtype)
    except ConfigError as error:
        channel.send(Failed(str(error), config=True))
        return None
    except Exception as error:
        log.exception("loading %s failed", start.model)
        channel.send(Failed(f"loading {start.model} failed: {type(error).__name__}: {error}"))
        return None
    if not _alone():
        channel.send(Failed("loading the model started a thread in the resident; workers cannot be forked"))
        return None
    gc.collect()
    gc.freeze()  # later collections, in any worker, do not write to these pages
    renewal = os.eventfd(0) if _has_large_tokenizer(start.model) else -1
    return Storage(start.model, model, shared, pool, start.cores, renewal=renewal)


def _has_large_tokenizer(folder: str) -> bool:
    try:
        return os.path.getsize(os.path.join(folder, "tokenizer.json")) >= LARGE_TOKENIZER
    except OSError:
        return False


def _alone() -> bool:
    """Whether this is the only thread. One that was joined leaves the system's list a little later."""
    until = time.monotonic() + PATIENCE
    while len(thread_ids()) > 1:
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True


def kv_pool(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in anonymous shared memory, which forked processes share for writing. Takes memory when
    touched, not when made. Raises ConfigError when it could never fit."""
    count = math.prod(shape)
    nbytes = count * dtype.itemsize
    if nbytes > (free := available_memory()):
        raise ConfigError(
            f"the KV pool takes {nbytes / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB of memory are free: "
            "lower --kv-memory or --kv-blocks"
        )
    descriptor = os.memfd_create("semipd-kv")
    try:
        os.ftruncate(descriptor, nbytes)
        buffer = mmap.mmap(descriptor, nbytes)
    except OSError as error:  # a limit of this process
        raise ConfigError(
            f"the KV pool of {nbytes / 2**30:.2f} GiB cannot be had ({error.strerror}): "
            "lower --kv-memory or --kv-blocks"
        ) from None
    finally:
        os.close(descriptor)
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)


def _patient_fork() -> int:
    """As `os.fork`, which may fail for a moment where processes or memory are scarce."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return os.fork()
        except OSError:
            if time.monotonic() > until:
                raise
        time.sleep(0.05)


@dataclass
class Resident:
    """Forks a worker per lane, as often as asked to."""

    channel: Channel[Order]
    storage: Storage
    parent: int

    def __post_init__(self) -> None:
        self._workers: dict[int, int] = {}  # process id by lane
        self._unprepared = self.storage.renewal >= 0

    def serve(self) -> None:
        """Until told to end, or the parent is gone."""
        events = select.poll()
        events.register(self.channel.fileno(), select.POLLIN)
        try:
            watch = os.pidfd_open(self.parent)
        except OSError:  # an old kernel, or a sandbox: the socket's end must do
            watch = -1
        else:
            events.register(watch, select.POLLIN)
        try:
            while all(descriptor != watch for descriptor, _ in self._wait(events)):
                order, descriptors = self.channel.receive_with_descriptors()
                if isinstance(order, Close):
                    return
                assert isinstance(order, Fork)
                self._fork(order.lane, descriptors[0])
        finally:
            for lane in list(self._workers):
                self._end(lane)

    def _wait(self, events: select.poll) -> list[tuple[int, int]]:
        """For the next event; after a quiet time, prepare first."""
        words = self.storage.shared.words
        while self._unprepared and len(self._workers) == len(LANES):
            steps = [words.running(lane) for lane in self._workers]
            if found := events.poll(1000 * QUIET):
                return found
            if steps == [words.running(lane) for lane in self._workers]:
                self._prepare()
        return events.poll()

    def _prepare(self) -> None:
        """Make the tokenizer for grammars, in memory that later workers share, and let them take over."""
        self._unprepared = False
        spec, file = self.storage.model.spec, Path(self.storage.folder) / "tokenizer.json"
        try:
            ends = tuple(token for token in spec.eos_token_ids if 0 <= token < spec.vocabulary)
            grammar = GrammarTokenizer(file, spec.vocabulary, ends or (spec.vocabulary - 1,))
        except (GrammarError, ImportError) as error:
            log.info("%s", error)  # whoever asks for a grammar is told
            return
        gc.collect()
        gc.freeze()
        give_freed_memory_back()
        self.storage = replace(self.storage, grammar=grammar)
        os.eventfd_write(self.storage.renewal, 1)

    def _fork(self, lane: int, descriptor: int) -> None:
        self._end(lane)
        self.storage.shared.words.forget(lane)
        resident = os.getpid()
        try:
            pid = _patient_fork()
        except OSError as error:
            self.channel.send(Failed(f"the resident could not fork a worker: {error.strerror}"))
            raise EOFError("cannot fork") from error
        if pid == 0:
            self._be_worker(lane, descriptor, resident)
        os.close(descriptor)
        self._workers[lane] = pid
        self.channel.send(Forked(lane, pid))

    def _end(self, lane: int) -> None:
        """Make sure that the lane's worker is dead, and reap it."""
        pid = self._workers.pop(lane, None)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _be_worker(self, lane: int, descriptor: int, resident: int) -> None:
        """In the fork. Does not return."""
        code = 1
        try:
            self.channel.close()
            setproctitle.setproctitle(f"semipd-{LANES[lane].value}")
            die_with_parent(resident)
            jobs: Channel[Job] = Channel(socket.socket(fileno=descriptor), Job)
            work(lane, jobs, self.storage)
            code = 0
        except (EOFError, BrokenPipeError, ConnectionResetError):
            code = 0  # the planner or the resident is gone
        except BaseException:
            log.exception("the %s worker ends", LANES[lane].value)
        finally:
            os._exit(code)
