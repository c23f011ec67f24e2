"""The driver calls through NVIDIA's own Python bindings, into a library built from NVIDIA's own header.

`test_cuda_partition.FakeDriver` says what we believe of the bindings; this says whether it is so. It runs
where cuda-bindings, the header and a C compiler are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STUB = Path(__file__).with_name("driver_stub.c")
SCRIPT = """
import ctypes, json
from semipd.execute.cuda_driver import GreenContexts, partition_pairs
contexts = GreenContexts(0)
pairs = partition_pairs(contexts)
stub = ctypes.CDLL("libcuda.so.1")
stub.stub_sms.argtypes = [ctypes.c_void_p]
sizes = contexts.granularity()
found = {
    "granularity": [sizes.smallest, sizes.step, sizes.total],
    "granted": [[decode.units, prefill.units] for decode, prefill in pairs],
    "streams": [[stub.stub_sms(side.stream) for side in pair] for pair in pairs],
    "alive": [stub.stub_contexts()],
}
contexts.close()
found["alive"].append(stub.stub_contexts())
print(json.dumps(found))
"""
OLD = """
from semipd.execute.cuda_driver import CannotPartition, GreenContexts
try:
    GreenContexts(0).pair(8)
except CannotPartition as error:
    print(error)
"""


@pytest.fixture(scope="module")
def header() -> Path:
    """The folder of `cuda.h`: the toolkit's, else the one that Triton's wheel brings."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        places.append(Path(triton.origin).parent / "backends/nvidia/include")
    found = next((place for place in places if (place / "cuda.h").exists()), None)
    if found is None:
        pytest.skip("there is no cuda.h here")
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        pytest.skip("cuda-bindings is not installed")
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler here")
    return found


def run(folder: Path, header: Path, script: str, *flags: str) -> str:
    library = folder / "libcuda.so.1"
    command = ["cc", "-Wall", "-Werror", "-shared", "-fPIC", *flags, f"-I{header}"]
    subprocess.run([*command, "-o", str(library), str(STUB), "-ldl"], check=True, timeout=120)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_partitions_through_the_real_bindings(tmp_path: Path, header: Path) -> None:
    """Every argument, structure and number of a call as the header has them; all is given back."""
    found = json.loads(run(tmp_path, header, SCRIPT))
    expected = [[units, 132 - units] for units in range(8, 121, 8)]
    assert found["granularity"] == [8, 8, 132]
    assert found["granted"] == found["streams"] == expected
    assert found["alive"] == [2 * len(expected), 0]


def test_a_driver_without_green_contexts_is_named(tmp_path: Path, header: Path) -> None:
    """The bindings raise an error of their own for a function that an old driver does not have."""
    said = run(tmp_path, header, OLD, "-DOLD_DRIVER")
    assert "cuGreenCtxCreate" in said
