"""What runs on a lent card for minutes has run here before."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import tests.gpu.__main__ as runner
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


def test_parts_run_by_themselves_and_keep_what_came_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that is ended at its limit, or takes its process with it, costs no other part anything."""
    cases = {
        "hangs": "import time\ndef test_it():\n    time.sleep(600)",
        "dies": "import os\ndef test_it():\n    os._exit(7)",
        "fails": "def test_one():\n    pass\ndef test_two():\n    assert 2 == 3, 'a wrong token'",
        "late": "def test_it():\n    pass",
    }
    for name, text in cases.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: of none\n")
    monkeypatch.chdir(tmp_path)
    parts = {name: ((f"test_{name}.py",), 2.0 if name == "hangs" else 60.0) for name in cases}
    late = (
        tmp_path / "results" / "gpu-tests.json"
    )  # written when the first part ends; the third makes it late
    clock = SimpleNamespace(
        monotonic=lambda: 1000.0 * (late.exists() and "fails" in json.loads(late.read_text()))
    )
    monkeypatch.setattr(runner, "time", clock)
    found = runner.run_parts(parts, tmp_path / "results")
    kept = json.loads((tmp_path / "results" / "gpu-tests.json").read_text())
    assert {**kept, "late": found["late"]} == json.loads(json.dumps(found))
    assert found["hangs"]["timed_out"] and found["dies"]["code"] == 7 and not found["dies"]["timed_out"]
    assert (
        found["fails"]["passed"] == 1
        and "a wrong token" in found["fails"]["failed"]["test_fails::test_two"]
    )
    assert found["late"] == {"left_out": True}
    assert "== fails: 1 passed, 1 failed, 0 skipped" in capfd.readouterr().out


BARE = """
import importlib, sys
for name in {blocked!r}:
    sys.modules[name] = None
for name in {modules!r}:
    importlib.import_module(name)
"""


def test_a_card_s_machine_needs_none_of_our_packages() -> None:
    """Torch, Triton, numpy and safetensors are there; what serves requests and follows grammars is not."""
    root = Path(__file__).parents[2]
    files = [*(root / "benchmarks").glob("gpu*.py"), *(root / "tests/gpu").glob("*.py")]
    named = {
        name
        for path in files
        for name in re.findall(
            r"^ *(?:from|import) ((?:semipd|benchmarks|tests)[\w.]*)", path.read_text(), re.M
        )
    }
    assert {"semipd.execute.cuda_start", "semipd.core.auto", "semipd.bench.profile_gpu"} <= named
    modules = sorted(named - {"semipd.execute.smid"} | {"semipd.execute.cuda_backend"})
    blocked = [
        "fastapi",
        "llguidance",
        "msgspec",
        "openai",
        "pydantic",
        "setproctitle",
        "starlette",
        "uvicorn",
    ]
    code = BARE.format(blocked=blocked, modules=modules)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
