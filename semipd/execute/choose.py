"""Whether to run on a GPU: a cheap question, asked in a process that has not imported torch."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

GPU_FILE = Path("/dev/nvidia0")


def has_gpu(device_file: Path = GPU_FILE) -> bool:
    """Whether the system shows an NVIDIA GPU and the installed torch was built for one."""
    if not device_file.exists():
        return False
    try:
        return "+cpu" not in metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False
