"""Reading weights from disk while the process that wants them is still importing torch."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

STRETCH = 1 << 20  # bytes per request: of more, systems read a part only


def start_reading(folder: str) -> threading.Thread:
    """Have the system read a checkpoint's weights into its cache; milliseconds where it holds them."""
    thread = threading.Thread(target=_read, args=(Path(folder),), name="read-ahead", daemon=True)
    thread.start()
    return thread


def _read(folder: Path) -> None:
    with contextlib.suppress(OSError):  # whoever loads the files reports what is wrong with them
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                for begin in range(0, os.fstat(file.fileno()).st_size, STRETCH):
                    os.posix_fadvise(file.fileno(), begin, STRETCH, os.POSIX_FADV_WILLNEED)
