"""Before anything imports Triton: without a GPU its kernels run in its interpreter, on the CPU."""

from __future__ import annotations

import os

from semipd.execute.choose import has_gpu

if not has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"
