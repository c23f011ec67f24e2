"""What a benchmark ran on, what the host of that machine took from it, and its last JSON line."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

TRIES, QUIET = 4, 0.01  # of what is measured, while the host takes more of a core than that

Result = TypeVar("Result")


def describe() -> dict[str, Any]:
    """CPU, cores, versions and the date. No host name."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu(),
        "amx": "amx_bf16" in _cpuinfo(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "semipd": _version("semipd"),
    }


class Stolen:
    """What the host of a virtual machine takes from this one, from now on."""

    def __init__(self) -> None:
        self._begin, self._taken = time.monotonic(), _stolen_seconds()

    @property
    def cores(self) -> float:
        """Cores in the mean since then. Above a few hundredths, a figure taken meanwhile is the host's."""
        share = (_stolen_seconds() - self._taken) / max(time.monotonic() - self._begin, 1e-9)
        return round(share, 3)


def undisturbed(measure: Callable[[], Result]) -> tuple[Result, float]:
    """What it returns, and the cores that the host took meanwhile: of the last of `TRIES`, if it took too
    much every time."""
    for _ in range(TRIES):
        stolen = Stolen()
        result = measure()
        if (cores := stolen.cores) <= QUIET:
            break
    return result, cores


def deliver(result: dict[str, Any], out: Path | None) -> None:
    """Print the last line, and write the same to a file if one is named."""
    if out:
        write_json(out, result)
    print(json.dumps(result))


def write_json(path: Path, value: Any) -> None:
    """Write all of it or nothing, so that whoever is ended meanwhile leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def _stolen_seconds() -> float:
    """CPU time, of all cores since the start, that the host gave to others while this machine had work. 0
    where the system does not tell."""
    path = Path("/proc/stat")
    words = path.read_text().partition("\n")[0].split() if path.exists() else []
    return int(words[8]) / os.sysconf("SC_CLK_TCK") if len(words) > 8 else 0.0


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _cpu() -> str:
    for line in _cpuinfo().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
