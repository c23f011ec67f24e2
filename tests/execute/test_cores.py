"""Shares of cores: the protocol by itself, first step by step, then with two processes racing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from semipd.core.types import Lane, Split
from semipd.execute import cores
from semipd.execute.cores import Share
from semipd.execute.shared import SharedMemory

ROOT = Path(__file__).parents[2]
UNITS = 8


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = SharedMemory.new(slots=1, max_length=4, block_size=4)
    yield memory
    memory.close()


class Pair:
    """Both lanes' shares of eight pretended cores, and where their threads were sent last."""

    def __init__(self, memory: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
        self.words = memory.words
        self.where: tuple[int, ...] = ()
        self.threads = [0, 0]
        monkeypatch.setattr(os, "sched_setaffinity", self._move)
        self.tied: list[list[int]] = []
        self.prefill, self.decode = (self._share(memory, lane) for lane in (0, 1))

    def _share(self, memory: SharedMemory, lane: int) -> Share:
        def tie(cores: Sequence[int]) -> None:
            self.tied.append([*cores])

        return Share(memory.words, lane, range(UNITS), memory.descriptor, self._count(lane), tie)

    def split(self, prefill: int, decode: int) -> None:
        self.words.set_target(Split.pair(prefill, decode, UNITS))

    @property
    def held(self) -> tuple[int, int]:
        return self.words.held(0), self.words.held(1)

    def _move(self, thread: int, where: tuple[int, ...]) -> None:
        self.where = tuple(where)

    def _count(self, lane: int):  # type: ignore[no-untyped-def]
        return lambda count: self.threads.__setitem__(lane, count)


@pytest.fixture
def pair(memory: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> Pair:
    return Pair(memory, monkeypatch)


def test_prefill_takes_the_low_end_and_decode_the_high_end(pair: Pair) -> None:
    pair.split(3, 5)
    pair.prefill.take()
    assert pair.where == (0, 1, 2)
    pair.decode.take()
    assert pair.where == (3, 4, 5, 6, 7)
    assert pair.held == (3, 5) and pair.threads == [3, 5]


def test_threads_are_tied_apart_for_the_first_step_after_a_rest(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread is tied to the core that its lane keeps longest. One core needs no tie."""
    clock = [100.0]
    monkeypatch.setattr(cores.time, "monotonic", lambda: clock[0])
    pair.split(3, 5)
    for share in (pair.prefill, pair.decode):
        share.give_back()
    clock[0] += 2.0 * cores.REST
    pair.prefill.take()
    pair.decode.take()
    assert pair.tied == [[0, 1, 2], [7, 6, 5, 4, 3]]
    pair.where = ()
    pair.prefill.take()
    assert pair.where == (0, 1, 2)  # free again: the step after it
    pair.where = ()
    pair.prefill.give_back()
    clock[0] += 0.5 * cores.REST
    pair.prefill.take()
    assert len(pair.tied) == 2 and pair.where == ()
    pair.split(1, 5)
    pair.prefill.give_back()
    clock[0] += 2.0 * cores.REST
    pair.prefill.take()
    assert len(pair.tied) == 2


def test_a_lane_grows_only_after_the_other_shrank(pair: Pair) -> None:
    pair.split(6, 2)
    pair.prefill.take()
    pair.decode.take()
    pair.split(2, 6)
    pair.decode.boundary()
    assert pair.held == (6, 2)  # prefill has not heard of it yet
    pair.prefill.boundary()
    assert pair.held == (2, 2)
    pair.decode.boundary()
    assert pair.held == (2, 6)


def test_a_lone_phase_has_everything_and_hands_back_at_its_next_boundary(pair: Pair) -> None:
    pair.split(4, 4)
    pair.decode.take()
    pair.decode.give_back()
    assert pair.held == (0, 0)
    pair.split(8, 0)
    pair.prefill.take()
    assert pair.held == (8, 0)
    pair.split(4, 4)
    pair.prefill.boundary()
    pair.decode.take()
    assert pair.held == (4, 4)


def test_a_step_that_was_given_nothing_runs_on_one_core_that_nobody_holds(pair: Pair) -> None:
    """A draining lane would otherwise never finish, and hold its requests for ever."""
    pair.split(4, 4)
    pair.decode.take()
    pair.split(8, 0)
    pair.decode.boundary()
    assert pair.held == (0, 1)
    pair.prefill.take()
    assert pair.held == (7, 1)
    pair.decode.give_back()
    pair.prefill.boundary()
    assert pair.held == (8, 0)


def test_a_split_that_overlaps_is_followed(pair: Pair) -> None:
    pair.split(8, 8)
    pair.prefill.take()
    pair.decode.take()
    assert pair.held == (8, 8)
    pair.split(6, 4)
    pair.decode.boundary()
    assert pair.held == (8, 4)
    pair.prefill.boundary()
    assert pair.held == (6, 4)


def test_a_lane_that_never_yields_delays_the_other_but_does_not_stop_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other worker may be stopped, or inside one very long layer."""
    monkeypatch.setattr(cores, "PATIENCE", 0.02)
    pair.split(8, 0)
    pair.prefill.take()
    pair.split(4, 4)
    began = time.monotonic()
    pair.decode.take()
    assert time.monotonic() - began >= 0.02
    assert pair.held == (8, 4)
    pair.prefill.boundary()
    assert pair.held == (4, 4)


def test_an_unchanged_share_is_not_applied_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step between two others costs no system calls for affinity."""
    monkeypatch.setattr(cores, "REST", 1000.0)
    pair.split(4, 4)
    for _ in range(2):
        pair.decode.take()
        pair.decode.give_back()
    pair.where = ()
    pair.decode.take()
    assert pair.held == (0, 4) and pair.where == ()


def test_a_boundary_without_news_is_cheap(pair: Pair) -> None:
    pair.split(4, 4)
    pair.decode.take()
    best = min(_seconds_of(pair.decode.boundary, 1000) for _ in range(20))
    assert best < 2e-6  # measured: 0.15 us


@pytest.mark.parametrize(
    ("siblings", "quota", "expected"),
    [
        ({}, None, [0, 1, 2, 3]),
        ({}, 9.0, [0, 1, 2, 3]),
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, None, [0, 1]),
        ({}, 1.5, 2),
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, 0.001, 1),
    ],
)
def test_a_unit_is_a_whole_core_that_may_be_used(
    siblings: dict[int, str],
    quota: float | None,
    expected: list[int] | int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two hardware threads of one core in different lanes would fight for it; more threads than a quota's
    worth would all be stopped for most of every period."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(
        cores, "read_text", lambda path: siblings.get(int(path.split("/cpu")[2].split("/")[0]), "")
    )
    monkeypatch.setattr(cores, "processor_quota", lambda: quota)
    found = list(cores.available_cores())
    assert found == expected if isinstance(expected, list) else len(found) == expected


def _seconds_of(call, times: int) -> float:  # type: ignore[no-untyped-def]
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


# One lane in a process of its own. `owners` has a byte per lane and core: 1 while that lane computes there.
# A core that the other lane owns must never be among ours.
RACER = """
import os, random, sys, time
from semipd.execute import cores
from semipd.execute.shared import SharedMemory

lane, descriptor, owners_descriptor, units, seed = map(int, sys.argv[1:])
import mmap
owners = mmap.mmap(owners_descriptor, 4096)
memory = SharedMemory(descriptor, 1, 4, 4)
cores.PATIENCE = 60.0
chance = random.Random(seed)
mine = ()

def move(thread, where):
    global mine
    for core in set(mine) - set(where):
        owners[lane * units + core] = 0
    for core in set(where) - set(mine):
        owners[lane * units + core] = 1
    mine = tuple(where)
    check()

def check():
    clash = [core for core in mine if owners[(1 - lane) * units + core]]
    if clash:
        sys.exit(f"lane {lane} computes on {mine}, and so does the other on {clash}")

def rest():
    global held, mine
    held, mine = mine, ()
    for core in held:
        owners[lane * units + core] = 0
    share.give_back()

os.sched_setaffinity = move
share = cores.Share(memory.words, lane, range(units), descriptor, lambda count: None, lambda cores: None)
end = time.monotonic() + 1.0
steps = 0
while time.monotonic() < end:
    share.take()
    if share._applied and not mine:  # same cores as before the pause: no system call told us
        move(0, held)
    for _ in range(chance.randrange(20)):
        share.boundary()
        check()
    steps += 1
    if chance.random() < 0.7:
        rest()
        time.sleep(chance.random() * 2e-4)
rest()  # or the other would wait for our cores
print(steps)
"""


def test_two_racing_lanes_never_share_a_core(memory: SharedMemory) -> None:
    """Growing on both sides at the same moment, under targets that change all the time."""
    owners = os.memfd_create("owners")
    os.ftruncate(owners, 4096)
    memory.words.set_target(Split.pair(4, 4, UNITS))
    descriptors = (memory.descriptor, owners)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, *map(str, (lane, *descriptors, UNITS, lane))],
            pass_fds=descriptors,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for lane in (0, 1)
    ]
    splits = [Split.pair(p, UNITS - p, UNITS) for p in range(UNITS + 1)]
    splits += [Split.pair(2, 2, UNITS), Split.lone(Lane.DECODE, UNITS), Split.lone(Lane.PREFILL, UNITS)]
    turn = 0
    while any(racer.poll() is None for racer in racers):
        turn += 1
        memory.words.set_target(splits[(turn * 7) % len(splits)])
        time.sleep(1e-4)
    outputs = [racer.communicate()[0] for racer in racers]
    os.close(owners)
    assert [racer.returncode for racer in racers] == [0, 0]
    assert all(int(output) > 100 for output in outputs)
