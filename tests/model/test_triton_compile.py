"""The interpreter runs what a compiler would refuse, or make slow. So the kernels are compiled for Hopper,
too, which needs no GPU: the wheel of Triton brings the assembler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from semipd.execute.choose import has_gpu

pytestmark = pytest.mark.skipif(has_gpu(), reason="the GPU tests launch them")
MOST_STACK = 80  # bytes a thread: a value or two of a loop that cost nothing where they were measured
WIDE_STACK = 176  # for float32 with heads of 128 or more, whose operands come in parts


def compiled(folder: Path, *options: str) -> list[dict[str, Any]]:
    """What every kernel takes. Skips where Triton or its assembler is not there."""
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this Triton comes without NVIDIA's assembler (ptxas)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.model.compile_kernels", *options],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["shared"] <= row["most_shared"], row
        wide = row["dtype"] == "fp32" and row["constants"].get("DIM", 0) >= 128
        assert row["stack"] <= (WIDE_STACK if wide else MOST_STACK), ("registers do not suffice", row)
        if row["kernel"] in ("prefill_kernel", "decode_kernel"):
            assert row["wgmma"] or row["mma"], ("products by scalar instructions", row)
            assert row["asynchronous"], row
        if (
            row["kernel"] == "prefill_kernel"
            and row["target"] == "hopper"
            and row["constants"]["PARTS"] == 1
        ):
            assert row["wgmma"], ("Hopper's own matrix instructions", row)


def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    rows = compiled(tmp_path)
    assert len(rows) == 9
    check(rows)
    assert not any(row["stack"] for row in rows)


@pytest.mark.slow
def test_every_kind_of_checkpoint_compiles(tmp_path: Path) -> None:
    """Other widths, groups, dtypes, windows, pools too large for 32 bits, and an older card."""
    rows = compiled(tmp_path, "--all")
    assert {row["target"] for row in rows} == {"hopper", "ampere"} and len(rows) > 60
    check(rows)
