"""A resident that was started and has no model yet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from semipd.execute.launch import PATIENCE, ResidentProcess
from tests.execute.cpu_tools import dead, eventually

ROOT = Path(__file__).parents[2]
ENDLESS = """
import pathlib, time
pathlib.Path(__file__).with_name("begun").touch()
time.sleep(600)
"""
PARENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from semipd.execute.launch import ResidentProcess
print(ResidentProcess().pid, flush=True)
time.sleep(600)
"""


def test_it_ends_with_its_parent_while_it_imports_torch(tmp_path: Path) -> None:
    """It lingered until it had torch, whose import may take seconds."""
    (tmp_path / "torch.py").write_text(ENDLESS)
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        eventually((tmp_path / "begun").exists)
        parent.kill()
    eventually(lambda: dead(pid))


def test_it_says_how_it_ended_whatever_ended_it() -> None:
    """Signals of real time have no name."""
    resident = ResidentProcess()
    os.kill(resident.pid, signal.SIGRTMIN + 6)
    assert resident.why_dead() == f"the resident process was killed by signal {signal.SIGRTMIN + 6}"
    resident.close()


def test_closing_it_does_not_wait_until_it_can_hear() -> None:
    """A command that cannot work says so at once."""
    resident = ResidentProcess()
    began = time.monotonic()
    resident.close()
    assert time.monotonic() - began < PATIENCE
    assert dead(resident.pid)
    resident.close()
