"""What runs on a lent card for minutes has run here before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from semipd.execute.choose import has_gpu


@pytest.mark.slow
@pytest.mark.skipif(has_gpu(), reason="the GPU tests themselves run here")
def test_the_gpu_tests_pass_on_the_fake_device() -> None:
    """Parity with transformers, conformance, switches, every policy."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.dry_run"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-3000:]
