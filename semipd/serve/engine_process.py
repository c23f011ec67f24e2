"""The engine's process: the planner on its main thread, a thread that reads, a thread that writes.

Started by `launch` as a fresh interpreter, through `semipd.start`. No torch in it.
"""

from __future__ import annotations

import contextlib
import gc
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import setproctitle

from semipd.build import build_engine, targets_of
from semipd.config import Config, from_mapping
from semipd.core.engine import Engine
from semipd.core.ports import Observer
from semipd.lifetime import die_with_parent
from semipd.logs import start_logging
from semipd.serve.messages import (
    Abort,
    Ask,
    Down,
    Start,
    Submit,
    Unframer,
    Up,
    decode_down,
    frame,
)
from semipd.serve.planner import Planner
from semipd.serve.record import TraceRecorder

_RECEIVE_BYTES = 1 << 18


def main(
    arguments: Sequence[str],
    build: Callable[[Config, Sequence[Observer]], Engine] = build_engine,
) -> None:
    """arguments: the number of the socket's descriptor, open in this process; the starter's process id."""
    descriptor, parent = map(int, arguments[:2])
    try:
        die_with_parent(parent)
    except EOFError:
        return
    for ending in (signal.SIGINT, signal.SIGTERM):  # of terminals and systemd: the server decides
        signal.signal(ending, signal.SIG_IGN)
    setproctitle.setproctitle("semipd-engine")
    with socket.socket(fileno=descriptor) as connection:
        serve(connection, build)


def serve(
    connection: socket.socket, build: Callable[[Config, Sequence[Observer]], Engine] = build_engine
) -> None:
    """Run an engine for whoever is at the other end, until they close or are gone."""
    incoming = _messages(connection)
    start = next(incoming, None)
    if not isinstance(start, Start):
        return
    config = from_mapping({name: value for part in start.settings.values() for name, value in part.items()})
    start_logging(config.server.log_level.upper(), "%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    planner = Planner(lambda observers: _build(build, config, observers), targets_of(config.policy))
    outgoing: queue.SimpleQueue[Up | None] = queue.SimpleQueue()
    planner.listen(lambda message: outgoing.put(message))
    threading.Thread(target=_read, args=(incoming, planner), name="reader", daemon=True).start()
    writer = threading.Thread(target=_write, args=(connection, outgoing), name="writer", daemon=True)
    writer.start()
    planner.run()
    outgoing.put(None)
    writer.join()


def _build(
    build: Callable[[Config, Sequence[Observer]], Engine], config: Config, observers: Sequence[Observer]
) -> Engine:
    engine = build(config, (*observers, *_recorders(config)))
    gc.freeze()  # a collection that walks all modules would hold up the planner for 15 ms
    return engine


def _recorders(config: Config) -> list[Observer]:
    """Raises ConfigError when the trace cannot be written."""
    path = config.server.record_trace
    return [TraceRecorder(path, config.cache.block_size)] if path is not None else []


def _messages(connection: socket.socket) -> Iterator[Down]:
    unframer = Unframer()
    with contextlib.suppress(OSError):
        while data := connection.recv(_RECEIVE_BYTES):
            for body in unframer.feed(data):
                yield decode_down(body)


def _read(incoming: Iterator[Down], planner: Planner) -> None:
    try:
        for message in incoming:
            if isinstance(message, Submit):
                planner.submit(message)
            elif isinstance(message, Abort):
                planner.abort(message)
            elif isinstance(message, Ask):
                planner.ask()
            else:
                break
    finally:
        planner.close()


def _write(connection: socket.socket, outgoing: queue.SimpleQueue[Up | None]) -> None:
    with contextlib.suppress(OSError):
        while (message := outgoing.get()) is not None:
            connection.sendall(frame(message))
