"""What takes longest to start is started first: torch's import, in the resident. Whoever starts it imports
what it needs itself meanwhile, which is why imports of ours stand inside of functions here.

`python -m semipd.start DESCRIPTOR PARENT DEVICE` is the engine's process (`serve/launch.py` starts it).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from semipd.execute.choose import has_gpu
from semipd.execute.launch import ResidentProcess
from semipd.lifetime import die_with_parent

if TYPE_CHECKING:
    from semipd.build import Resolved
    from semipd.config import Config
    from semipd.core.engine import Engine
    from semipd.core.ports import Observer


def early_resident(device: str) -> ResidentProcess | None:
    """For the engine that is to come on this device ("auto", "cpu" or "cuda"); None on a GPU.

    To be closed where no engine comes of it. Call on a thread that outlives the loading."""
    on_gpu = device == "cuda" or (device == "auto" and has_gpu())
    return None if on_gpu else ResidentProcess()


def build_on(
    resident: ResidentProcess | None,
) -> Callable[[Config | Resolved, Sequence[Observer]], Engine]:
    """`build.build_engine`, with that resident."""
    from semipd.build import build_engine

    return lambda config, observers: build_engine(config, observers, resident)


def main(arguments: Sequence[str]) -> None:
    """arguments: as above; the socket's descriptor is open in this process, PARENT is who started it."""
    *connection, device = arguments
    try:
        die_with_parent(int(connection[1]))
    except EOFError:
        return
    resident = early_resident(device)
    from semipd.serve import engine_process

    engine_process.main(connection, build_on(resident))


if __name__ == "__main__":
    main(sys.argv[1:])
