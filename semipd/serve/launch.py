"""The engine's process as the server sees it. Imports little, so that it can be started at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

ENGINE_MODULE = "semipd.start"


class EngineProcess:
    """A fresh interpreter that imports what an engine needs, and then waits for its settings at `socket`
    (`serve/messages.py`). It ends with the thread that made this object, and is deaf to the terminal's
    Ctrl-C: whoever holds it tells it when to end. To be killed, or used in a `with` block.
    """

    def __init__(self, device: str = "cpu", module: str = ENGINE_MODULE) -> None:
        """device: "auto", "cpu" or "cuda", as the settings to come say it."""
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid()), device],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End the process without a word. Idempotent."""
        self.process.kill()  # does nothing to one that has ended
        self.process.wait()
        self.socket.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
