"""The memory that the planner's process, the resident and the workers all map: one anonymous file with a
page of control words, then the slot table. No torch here.

Anonymous (memfd) and not in /dev/shm, which containers keep small; it lives as long as one of the
processes does, so a worker's death loses nothing.

The control words are 64-bit, aligned, and each has one writer, so plain loads and stores are enough; what
they mean together is told in `semipd.execute.cores`.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from semipd.core.types import Lane, Split
from semipd.execute.storage import SlotTable

LANES = (Lane.PREFILL, Lane.DECODE)  # a lane's number in messages and control words

_PAGE = 4096
_TARGET = 0
_HELD = 8  # words of different writers lie on cache lines of their own
_RUNNING = 24
_SPACING = 8
_HALF = 32


class Words:
    """The control words. Lanes are given by number (0 is prefill, 1 is decode).

    target: cores per lane that the split asks for; both in one word, so never seen half-written.
    held: cores that a lane holds now. running: the step that its present worker started last, 0 before its
    first. Both are written by that worker, or by the resident once the worker is dead.
    """

    def __init__(self, buffer: mmap.mmap) -> None:
        self._words = memoryview(buffer)[:_PAGE].cast("Q")
        self.target_address = ctypes.addressof(ctypes.c_uint64.from_buffer(buffer, 8 * _TARGET))

    def set_target(self, split: Split) -> None:
        self._words[_TARGET] = split.of(LANES[0]) << _HALF | split.of(LANES[1])

    def target(self) -> int:
        """Both lanes' shares in one number; compare it, or take it apart with `share`."""
        return self._words[_TARGET]

    @staticmethod
    def share(target: int, lane: int) -> int:
        return target & ((1 << _HALF) - 1) if lane else target >> _HALF

    def held(self, lane: int) -> int:
        return self._words[_HELD + _SPACING * lane]

    def hold(self, lane: int, count: int) -> None:
        self._words[_HELD + _SPACING * lane] = count

    def running(self, lane: int) -> int:
        return self._words[_RUNNING + _SPACING * lane]

    def run(self, lane: int, step: int) -> None:
        self._words[_RUNNING + _SPACING * lane] = step

    def forget(self, lane: int) -> None:
        """The lane's worker is dead: it holds nothing and runs nothing."""
        self.hold(lane, 0)
        self.run(lane, 0)

    def close(self) -> None:
        self._words.release()


class SharedMemory:
    """A mapping of the shared file. `descriptor` is owned: `close` closes it."""

    def __init__(self, descriptor: int, slots: int, max_length: int, block_size: int) -> None:
        self.descriptor = descriptor
        size = _PAGE + SlotTable.nbytes(slots, max_length, block_size)
        os.ftruncate(descriptor, size)  # sizes a new file, and leaves one of this size as it is
        buffer = mmap.mmap(descriptor, size)
        self.words = Words(buffer)
        self.table = SlotTable(memoryview(buffer)[_PAGE:], slots, max_length, block_size)

    @classmethod
    def new(cls, slots: int, max_length: int, block_size: int) -> SharedMemory:
        return cls(os.memfd_create("semipd-slots"), slots, max_length, block_size)

    def close(self) -> None:
        """Close the descriptor. The mapping goes with the last view of it, so drop the table."""
        self.words.close()
        del self.table
        os.close(self.descriptor)
