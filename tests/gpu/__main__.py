"""All GPU tests, on a machine that may have nothing installed of ours:

    python3 -m tests.gpu                                    # WHEELS=folder: unpack the wheels in it first
    python3 -m tests.gpu --parts partition load --results FOLDER

Each part runs in a process of its own, since a kernel that goes astray ends everything in its process, and
ends at its limit. What came out is printed, and kept in FOLDER/gpu-tests.json as parts end. Without a GPU:
one line and exit code 0.

Parts, in this order:
  partition    which SMs each side of every split has, graphs, events (1 minute)
  kernels      Triton kernels against their plain twins
  conformance  the executor's contract, with graphs and without
  load         switches and decode steps beside a long prompt
  parity       tokens of transformers on the card; every policy gives the same
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.bare import prepare
from benchmarks.machine import describe, write_json

EXECUTOR = "tests/gpu/test_executor.py"
# Arguments of pytest, and seconds after which a part is ended.
PARTS: dict[str, tuple[tuple[str, ...], float]] = {
    "partition": (("tests/gpu/test_partition.py",), 90.0),
    "kernels": (("tests/model/test_triton_kernels.py", "tests/model/test_sampler_device.py"), 180.0),
    "conformance": ((EXECUTOR, "-k", "Conformance"), 150.0),
    "load": ((EXECUTOR, "-k", "not Conformance and not parity and not policy"), 120.0),
    "parity": ((EXECUTOR, "-k", "parity or policy"), 240.0),
}
BUDGET = 520.0  # seconds for all of them
COMMON = ("-vv", "-s", "-m", "not slow", "-W", "default", "-rs", "--durations=5", "-p", "no:cacheprovider",
          "-o", "faulthandler_timeout=75")  # fmt: skip


def run_parts(
    parts: Mapping[str, tuple[Sequence[str], float]], folder: Path | None, budget: float = BUDGET
) -> dict[str, Any]:
    """Run them one after another; what came out of each. folder: see above."""
    deadline = time.monotonic() + budget
    found: dict[str, Any] = {"tests": "gpu", "machine": describe()}
    for name, (arguments, limit) in parts.items():
        left = deadline - time.monotonic()
        if left <= 1.0:
            print(f"== {name} left out: the time is up", flush=True)
            found[name] = {"left_out": True}
            continue
        print(f"== {name}", flush=True)
        found[name] = run_part(arguments, min(limit, left))
        print(f"== {name}: {summary(found[name])}", flush=True)
        if folder is not None:
            write_json(folder / "gpu-tests.json", found)
    return found


def run_part(arguments: Sequence[str], limit: float) -> dict[str, Any]:
    """Tests of one process: how many passed, and which did not and why. Its output is ours."""
    # A plugin of the machine's Python could fail before our tests begin; they need none.
    settings = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}
    environment = {**os.environ, **settings}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *COMMON, f"--junitxml={report}", *arguments]
        process = subprocess.Popen(command, env=environment, process_group=0)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        read = read_report(report) if report.exists() else {"passed": 0, "skipped": {}, "failed": {}}
    return {**read, "code": code, "timed_out": code is None, "seconds": time.monotonic() - begin}


def read_report(path: Path) -> dict[str, Any]:
    """Counts and messages out of pytest's report."""
    passed, skipped, failed = 0, {}, {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        trouble = case.find("failure") if case.find("failure") is not None else case.find("error")
        if trouble is not None:
            failed[name] = f"{trouble.get('message', '')}\n{trouble.text or ''}"[-3000:]
        elif (left := case.find("skipped")) is not None:
            skipped[name] = left.get("message", "")
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failed": failed}


def summary(part: Mapping[str, Any]) -> str:
    said = f"{part['passed']} passed, {len(part['failed'])} failed, {len(part['skipped'])} skipped"
    return f"{said}, {part['seconds']:.0f} s" + (" (ended at its limit)" if part["timed_out"] else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--results", type=Path, help="folder for gpu-tests.json")
    options = parser.parse_args(arguments)
    if (why := prepare()) is not None:
        print(f"GPU tests skipped: {why}")
        return 0
    found = run_parts({name: PARTS[name] for name in PARTS if name in options.parts}, options.results)
    outcomes = [found[name] for name in PARTS if name in found]
    print(json.dumps({name: found[name].get("passed", 0) for name in PARTS if name in found}))
    return int(any(outcome.get("code") != 0 for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
