"""Whether to run on a GPU: a cheap question, asked in a process that has not imported torch."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether the system shows an NVIDIA GPU and the installed torch was built for one."""
    if next(devices.glob("nvidia[0-9]*"), None) is None:
        return False
    try:
        return "+cpu" not in metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False
