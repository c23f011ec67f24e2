"""Messages on standard error that hold up nobody.

Who reads them may have stopped: behind a pipe that is full, a plain write would wait for ever, and with it
the event loop and every stream. What finds no room is dropped. There is no thread, since the resident must
have none when it forks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select

STANDARD_ERROR = 2
_PIECE = 4096  # bytes that a pipe or socket which says that it has room always takes


class StandardError(logging.Handler):
    """Writes to the descriptor, not to `sys.stderr`: nothing is buffered."""

    def __init__(self, descriptor: int = STANDARD_ERROR) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._room = select.poll()
        self._room.register(descriptor, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        data = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
        with contextlib.suppress(OSError):  # nobody reads any more
            while data and self._room.poll(0):
                data = data[os.write(self._descriptor, data[:_PIECE]) :]


def start_logging(level: int | str, format: str, datefmt: str | None = None) -> None:
    """For a process of ours; does nothing where logging was set up before."""
    logging.basicConfig(level=level, format=format, datefmt=datefmt, handlers=[StandardError()])


def fill_standard_streams() -> None:
    """Open /dev/null for a standard stream that the starter closed. Otherwise whatever is opened next gets
    its number, and messages go there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
