"""Who computes on which core: the share of one lane, followed by its worker while steps run.

Prefill takes cores from the low end of the list, decode from the high end, so a lane's share is a number:
prefill with 3 of 8 holds cores 0 to 2, decode with 5 holds 3 to 7, and growing or shrinking moves one edge.

Three control words (`shared.Words`) say everything:

    target    both shares as the planner wants them, in one word; written by the planner alone
    held[l]   cores that lane l uses now, 0 when it has nothing to run; written by l's worker alone
              (by the resident when it has seen that the worker is dead)

The rules, applied before a step (`take`), at each boundary inside it, and after the last one (`give_back`):

1.  A lane with a step strives for max(target, 1) cores, since a step without a core would never end.
2.  It shrinks at once: first its threads leave the cores, then `held` says so.
3.  It grows only into room: all of its target when the other lane holds no more than its own target (if
    both targets overlap, that is meant), otherwise what the other lane does not hold. A lane that was
    given nothing takes only what nobody holds. `held` says so before the threads move.
4.  Growing happens under one lock (a POSIX record lock: the kernel drops it when its owner dies), and the
    target is read inside it. So of two lanes that grow at the same moment, one sees the other's claim, and
    no core is claimed under an old target after the other lane took it under a new one. The lock is only
    tried: a stopped process that owns it cannot stop the other lane, which grows at a later boundary.
5.  A lane that has a step and finds no room waits for the other's next boundary: polling first every few
    microseconds, then every half millisecond. After `PATIENCE` it overlaps: slow is better than stuck
    (the other may be stopped, or inside a very long layer), and the other's next boundary repairs it.

So shares are disjoint except where the split overlaps on purpose and after rule 5; and nothing waits for
ever: 2 and 4 never wait, 5 is bounded.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import random
import time
from collections.abc import Callable, Sequence

from semipd.execute.cgroup import processor_quota
from semipd.execute.linux import read_text, thread_ids
from semipd.execute.shared import Words

PATIENCE = 0.1  # seconds that a step waits for a core before it overlaps
REST = 0.05  # seconds without a step after which threads may be asleep
_FIRST_PAUSE = 20e-6
_LONGEST_PAUSE = 500e-6


class Share:
    """The cores of lane number `lane`, out of `cores` (system numbers, ascending).

    lock: a descriptor of the shared file, for rule 4. set_threads: told the number of cores, on change.
    tie: told the cores before a step that follows a rest; ties one thread to each, this one to the first.
    """

    def __init__(
        self,
        words: Words,
        lane: int,
        cores: Sequence[int],
        lock: int,
        set_threads: Callable[[int], None],
        tie: Callable[[Sequence[int]], None],
    ) -> None:
        self._words = words
        self._lane = lane
        self._cores = tuple(cores)
        self._lock = lock
        self._set_threads, self._tie = set_threads, tie
        self._held = 0  # what our word in shared memory says
        self._applied = 0  # where the threads are: stays when the lane goes idle
        self._target = -1
        self._settled = False
        self._tied = False
        self._rested_since = -math.inf  # when the lane had its last step

    def boundary(self) -> tuple[int, int] | None:
        """Follow the target. Costs a fraction of a microsecond when there is nothing to do. Returns the
        address and the value of the target's word when there is nothing to do until it changes."""
        if not self._settled or self._words.target() != self._target:
            self._follow()
        return (self._words.target_address, self._target) if self._settled else None

    def take(self) -> None:
        """Before a step: follow the target, and wait until there is at least one core."""
        resting = not self._held
        self.boundary()
        if self._held:
            self._spread(resting and time.monotonic() - self._rested_since > REST)
            return
        pause, deadline = _FIRST_PAUSE, time.monotonic() + PATIENCE
        while not self._held:
            if time.monotonic() >= deadline:
                self._claim(self._goal(self._words.target()))
                return
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            self._follow()

    def give_back(self) -> None:
        """After the last step: hold nothing, so that the other lane may have everything."""
        self._held = 0
        self._settled = False
        self._words.hold(self._lane, 0)
        self._rested_since = time.monotonic()

    def _follow(self) -> None:
        target = self._words.target()
        goal = self._goal(target)
        if goal < self._held:
            self._apply(goal)
            self._held = goal
            self._words.hold(self._lane, goal)
        elif goal > self._held:
            self._grow()
        self._target = target
        self._settled = self._held == goal

    def _grow(self) -> None:
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # the other lane grows at this moment; the next boundary tries again
        try:
            target = self._words.target()
            count = min(self._goal(target), self._room(target))
            if count > self._held:
                self._held = count
                self._words.hold(self._lane, count)
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)
        self._apply(self._held)

    def _claim(self, count: int) -> None:
        self._held = count
        self._words.hold(self._lane, count)
        self._apply(count)

    def _goal(self, target: int) -> int:
        return max(self._words.share(target, self._lane), 1)

    def _room(self, target: int) -> int:
        """Rule 3: how many cores this lane may hold now."""
        other = 1 - self._lane
        held = self._words.held(other)
        mine, theirs = self._words.share(target, self._lane), self._words.share(target, other)
        return len(self._cores) if mine and held <= theirs else len(self._cores) - held

    def _apply(self, count: int) -> None:
        """Move every thread of this process to the lane's first `count` cores, and use as many threads."""
        if count in (0, self._applied):
            return
        self._applied = count
        self._move(count)
        self._set_threads(count)

    def _move(self, count: int) -> None:
        cores = sorted(self._first(count))
        for thread in thread_ids():
            with contextlib.suppress(OSError):  # a thread that ended, or a core that was taken from us
                os.sched_setaffinity(thread, cores)
        self._tied = False

    def _first(self, count: int) -> tuple[int, ...]:
        """The lane's first so many cores: that which it keeps longest comes first."""
        return (self._cores[::-1] if self._lane else self._cores)[:count]

    def _spread(self, rested: bool) -> None:
        """The threads of a team that slept are all woken on the core of the one that wakes them, sleep at
        every barrier and are woken there again: a first step ran on one core of two from end to end, in 1.5
        times the time. So they are tied apart for this step. Afterwards they stay apart, and are free to go
        out of the way of others."""
        if rested and self._held > 1:
            self._tie(self._first(self._held))
            self._tied = True
        elif self._tied:
            self._move(self._held)


def available_cores() -> tuple[int, ...]:
    """System numbers of the cores that this process may use: one hardware thread of each (two on one core
    share its arithmetic units), and no more than a quota of time allows, rounded up. Under a quota they
    begin anywhere, since every container of the machine sees the same numbers."""
    cores: dict[str, int] = {}
    for number in sorted(os.sched_getaffinity(0)):
        siblings = read_text(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        cores.setdefault(siblings or str(number), number)
    numbers = tuple(cores.values())
    quota = processor_quota()
    count = len(numbers) if quota is None else min(max(math.ceil(quota), 1), len(numbers))
    first = random.randrange(len(numbers) - count + 1)
    return numbers[first : first + count]
