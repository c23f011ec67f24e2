"""Before anything imports Triton: without a GPU its kernels run in its interpreter, on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"
