"""Benchmarks beside peers: the figures that follow from what engines report, and engines that misbehave."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest

from benchmarks.peers.checkpoint import tensor_sizes
from benchmarks.peers.tasks import Task, mixed_tasks, step_seconds, worst_gap
from benchmarks.peers.worker import HERE, Launch, PeerFailed, Worker
from benchmarks.shapes import SHAPES

DRIVER = f"""
import sys, time
sys.path.insert(0, {str(HERE)!r})
from answer import answer
def generate(prompts, new):
    print("noise on standard output")
    if len(prompts[0]) == 3:
        raise ValueError("three")
    if len(prompts[0]) == 4:
        sys.exit("I give up")
    if len(prompts[0]) == 5:
        time.sleep(60)
    now = time.perf_counter()
    return [(now, count) for count in new]
answer(lambda: (generate, {{"engine": "fake"}}))
"""


def test_only_steps_of_the_whole_batch_count() -> None:
    steps = [(1.0, 1), (1.5, 2), (1.6, 2), (1.7, 2), (1.9, 2), (2.9, 1)]
    assert step_seconds(steps, 2) == pytest.approx(0.1)
    assert math.isnan(step_seconds(steps, 3))


def test_figures() -> None:
    steps = [(0.5, 1), (0.6, 1), (0.7, 1)]
    assert Task("", "stream", (8,), (3,)).figure(steps) == pytest.approx(10.0)
    assert Task("", "step", (8,), (3,)).figure(steps) == pytest.approx(100.0)
    assert Task("", "prompt", (8,), (1,)).figure([(0.5, 1)]) == pytest.approx(16.0)
    assert Task("", "output", (8,), (3,)).figure(steps) == pytest.approx(3 / 0.7)


def test_mixed_lengths_are_the_same_every_time() -> None:
    assert mixed_tasks([16, 64]) == mixed_tasks([16, 64])
    assert [len(task.new) for task in mixed_tasks([16, 64])] == [16, 64]


def test_the_worst_gap_is_one_that_the_prompt_touched() -> None:
    early, during, late = [0.0, 5.0, 5.1], [5.0, 5.4, 5.5, 6.1, 6.2], [6.2, 9.0]
    assert worst_gap([early], 5.05, 6.0) == pytest.approx(
        0.9
    )  # nothing came since: it counts until the end
    assert worst_gap([during], 5.05, 6.0) == pytest.approx(0.6)  # the gap it ended in counts whole
    assert worst_gap([early, during, late], 5.05, 6.0) == pytest.approx(0.9)
    assert math.isnan(worst_gap([], 0.0, 1.0))


def test_a_checkpoint_has_the_weights_of_its_shape() -> None:
    weights = sum(math.prod(size) for size in tensor_sizes(SHAPES["12m"]).values())
    layer = 4 * 384 * 384 + 3 * 384 * 1024 + 2 * 384
    assert weights == 2 * 8192 * 384 + 6 * layer + 384
    assert "lm_head.weight" not in tensor_sizes(SHAPES["0.5b"])
    assert tensor_sizes(SHAPES["0.5b"])["model.layers.23.self_attn.k_proj.bias"] == (128,)


def test_a_driver_answers_refuses_dies_and_is_late(tmp_path: Path) -> None:
    launch = Launch([sys.executable, "-c", DRIVER])
    log, cores = tmp_path / "log", sorted(os.sched_getaffinity(0))
    worker = Worker.start("fake", launch, log, cores, 60.0)
    try:
        assert worker.facts == {"engine": "fake"}
        assert [count for _, count in worker.ask([[1], [2, 3]], [4, 5], 60.0)] == [4, 5]
        with pytest.raises(PeerFailed, match="ValueError: three"):
            worker.ask([[1, 2, 3]], [1], 60.0)
        with pytest.raises(PeerFailed, match="I give up"):
            worker.ask([[1, 2, 3, 4]], [1], 60.0)
    finally:
        worker.end()
    worker = Worker.start("fake", launch, log, cores, 60.0)
    try:
        with pytest.raises(PeerFailed, match="within"):
            worker.ask([[1, 2, 3, 4, 5]], [1], 0.2)
    finally:
        worker.end()
    assert worker.process.poll() is not None


def test_a_report_names_no_folder_of_this_machine() -> None:
    launch = Launch(["/a/b/python", '{"folder": "/c/d", "n": 2}'], {"X": "/e/f.so:/g/h.so", "Y": None})
    facts = launch.facts()
    assert facts["command"] == ["python", '{"folder": "d", "n": 2}']
    assert facts["environment"] == {"X": "f.so:h.so", "Y": ""}
