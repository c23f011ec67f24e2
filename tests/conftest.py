"""Before anything imports torch or Triton. One thread for the tests' own arithmetic: its tensors are tiny,
and on a busy machine a pool waits for the scheduler at every operation (engines size theirs themselves).
Without a GPU Triton's kernels run in its interpreter, on the CPU."""

from __future__ import annotations

import os

from semipd.execute.choose import has_gpu

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # "0" from whoever has found a GPU in another way
