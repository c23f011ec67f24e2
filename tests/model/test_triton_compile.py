"""The interpreter runs what a compiler would refuse. So the kernels are compiled for Hopper, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from semipd.execute.choose import has_gpu

SHARED_MEMORY = 227 * 1024  # of one program on Hopper


@pytest.mark.skipif(has_gpu(), reason="the GPU tests launch them")
def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.model.compile_kernels"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 9 and all(row["shared"] <= SHARED_MEMORY for row in rows)
    for row in rows:
        if row["kernel"] in ("prefill_kernel", "decode_kernel"):
            assert row["tensor_cores"] and row["asynchronous"], row
        if row["kernel"] == "prefill_kernel":
            assert row["wgmma"], "Hopper's own matrix instructions"
