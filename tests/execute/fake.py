"""A model without arithmetic: its KV cache holds tokens, so a wrong block gives a wrong answer.

The token after position p is a hash of everything the step reads through its block table. Any hazard (a
block freed too early, a table entry missing, a position skipped) changes the output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from semipd.core.types import NO_TOKEN, Batch, Device, Lane, Sampling
from semipd.execute.sim import FixedCost, SimExecutor, VirtualClock

VOCABULARY = 50_000


def reference(tokens: Sequence[int], seed: int = 0) -> int:
    """The token that follows `tokens`."""
    text = f"{seed}:{','.join(map(str, tokens))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % VOCABULARY


def continuation(prompt: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """The `count` tokens that a lone request must produce."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(reference(tokens, seed))
    return tokens[len(prompt) :]


def fake_device(depth: int = 2, units: int = 2) -> Device:
    splits = tuple((prefill, units - prefill) for prefill in range(1, units))
    return Device("fake", units, "core", splits, depth, lanes=frozenset(Lane))


class FakeExecutor(SimExecutor):
    """SimExecutor with a paged cache of tokens and device-side token table."""

    def __init__(self, blocks: int = 64, block_size: int = 4, depth: int = 2, units: int = 2) -> None:
        super().__init__(fake_device(depth, units), FixedCost(units), VirtualClock(), self._run)
        self.block_size = block_size
        self.cache: list[list[int | None]] = [[None] * block_size for _ in range(blocks)]
        self.tokens: dict[int, dict[int, int]] = {}
        self.tables: dict[int, list[int]] = {}
        self.sampling: dict[int, Sampling] = {}
        self.poison: int | None = None  # a token id that makes the step computing it fail
        self.forgiving = False  # what nobody wrote is read as nonsense, as on a device, and fails no step

    def open(self, slot: int, tokens: Sequence[int], sampling: Sampling) -> None:
        super().open(slot, tokens, sampling)
        self.tokens[slot] = dict(enumerate(tokens))
        self.tables[slot] = []
        self.sampling[slot] = sampling

    def close_slot(self, slot: int) -> None:
        super().close_slot(slot)
        for book in (self.tokens, self.tables, self.sampling):
            book.pop(slot, None)

    def submit(self, lane: Lane, batch: Batch) -> None:
        for slot, first, blocks in batch.appends:
            table = self.tables.setdefault(slot, [])
            assert first <= len(table), "a gap in the block table"
            table[first:] = blocks
        super().submit(lane, batch)

    def _run(self, batch: Batch) -> tuple[int, ...]:
        produced = []
        for source, target in batch.copies:
            assert None not in self.cache[source][:1], "copied a block that nobody wrote"
            self.cache[target] = list(self.cache[source])
        if batch.copies:
            return ()
        for slot, start, count, sample in batch.slices:
            table, tokens = self.tables[slot], self.tokens[slot]
            for position in range(start, start + count):
                block, offset = divmod(position, self.block_size)
                token = tokens.get(position, NO_TOKEN) if self.forgiving else tokens[position]
                if token == self.poison:
                    raise RuntimeError("made to fail")
                self.cache[table[block]][offset] = token
            if sample:
                end = start + count
                read = [self.cache[table[p // self.block_size]][p % self.block_size] for p in range(end)]
                assert self.forgiving or None not in read, "read a position that nobody computed"
                token = reference([t for t in read if t is not None], self.sampling[slot].seed)
                constraint = self.sampling[slot].constraint
                if constraint is not None and constraint.allowed and token not in constraint.allowed:
                    token = NO_TOKEN
                tokens[end] = token
                produced.append(token)
        return tuple(produced)
