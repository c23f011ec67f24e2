"""Run on a machine where this package and some of what it needs are not installed."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import zipfile
from pathlib import Path


def prepare() -> str | None:
    """Unpack the wheels in the folder that WHEELS names and put them on the import path. Returns why
    nothing can run on a GPU here, or None."""
    if folder := os.environ.get("WHEELS"):
        unpacked = tempfile.mkdtemp(prefix="wheels-")
        for wheel in sorted(Path(folder).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
        sys.path.insert(0, unpacked)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (unpacked, os.environ.get("PYTHONPATH"))))
        importlib.invalidate_caches()
    # Read when the driver starts, which the question below may do; `CudaBackend` would set it too late.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None
