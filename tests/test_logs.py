"""Messages that hold up nobody."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from semipd.logs import StandardError

ROOT = Path(__file__).parents[1]
CLOSED = """
import os
os.closerange(0, 3)
from semipd.logs import fill_standard_streams
fill_standard_streams()
for number in range(3):
    assert os.readlink(f"/proc/self/fd/{number}") == "/dev/null" and os.get_inheritable(number)
"""


def test_a_message_for_which_there_is_no_room_is_dropped() -> None:
    """A supervisor that reads no more stopped the server, and SIGTERM did not end it."""
    reading, writing = os.pipe()
    logger = logging.Logger("any")
    logger.addHandler(StandardError(writing))
    for _ in range(200):
        logger.error("x" * 1000)
    assert len(os.read(reading, 2**20)) >= 2**15
    logger.error("once more: \ud800")
    assert os.read(reading, 2**20) == b"once more: \\ud800\n"
    os.close(reading)
    logger.error("nobody is there")
    os.close(writing)


def test_a_stream_that_the_starter_closed_is_no_place_for_others() -> None:
    subprocess.run([sys.executable, "-c", CLOSED], cwd=ROOT, check=True)
