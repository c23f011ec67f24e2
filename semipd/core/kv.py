"""One pool of KV blocks: who holds which block, and which unheld ones still hold a known prefix.

    free ──reserve──> held ──release──> free            (never published)
                       │ └───release──> cached ──┐      (published)
                       └<──────reserve (match)───┤
    free <───────────────reserve (evict)─────────┘

A block is in exactly one of the three states: free + cached + held == total.
"""

from __future__ import annotations

from collections import OrderedDict

from semipd.core.types import Request


class BlockPool:
    """Reference-counted blocks with a prefix index. Implements `core.ports.KVManager`.

    `reserve` checks and takes in one call, so two phases can never be promised the same block.
    """

    def __init__(self, total: int, block_size: int, prefix_cache: bool = True, first: int = 0) -> None:
        """first: id of the first block, so that two pools can name parts of one storage."""
        if total < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks and tokens, not {total} of {block_size}")
        self.total = total
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self._free = list(range(first + total - 1, first - 1, -1))
        self._references = dict.fromkeys(self._free, 0)
        self._key_of: dict[int, bytes | None] = dict.fromkeys(self._free)
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # unheld but indexed; oldest first
        self.queried_tokens = 0
        self.hit_tokens = 0

    @property
    def available(self) -> int:
        return len(self._free) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the pool that live requests hold, 0 to 1."""
        return 1.0 - self.available / self.total

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def reserve(self, request: Request, upto: int) -> bool:
        blocks = request.blocks
        wanted = self.blocks_for(upto)
        if not blocks:
            return self._enter(request, wanted)
        missing = wanted - len(blocks)
        if missing > self.available:
            return False
        for _ in range(missing):
            blocks.append(self._take())
        return True

    def match(self, request: Request) -> int:
        """Tokens of the request that a `reserve` would now find in the cache. Changes nothing."""
        return len(self._hits(request)) * self.block_size

    def publish(self, request: Request, computed: int) -> None:
        keys, blocks = request.block_keys, request.blocks
        full = min(computed // self.block_size, len(keys))
        for index in range(request.published, full):
            # A twin may have published the same content first; then ours stays private.
            if self._prefix_cache and keys[index] not in self._block_of:
                block = blocks[index]
                self._block_of[keys[index]] = block
                self._key_of[block] = keys[index]
        # Blocks without a key stay private for good: keys are extended before, never after.
        request.published = max(request.published, computed // self.block_size)

    def release(self, request: Request) -> None:
        # Last block first, so that eviction (oldest first) shortens a prefix from its end.
        for block in reversed(request.blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._key_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
        request.blocks = []
        request.published = 0
        request.pool = None

    def check(self) -> None:
        """Raise AssertionError unless every block is in exactly one state."""
        held = {block for block, count in self._references.items() if count > 0}
        free, cached = set(self._free), set(self._cached)
        assert all(count >= 0 for count in self._references.values()), "negative reference count"
        assert len(free) == len(self._free), "a block is free twice"
        assert not (held & free or held & cached or free & cached), "a block is in two states"
        assert len(held) + len(free) + len(cached) == self.total, "a block is lost"
        assert all(self._key_of[block] is None for block in free), "a free block is still indexed"
        assert {block for key, block in self._block_of.items() if self._key_of[block] == key} == {
            block for block, key in self._key_of.items() if key is not None
        }, "the index and the blocks disagree"

    def _enter(self, request: Request, wanted: int) -> bool:
        hits = self._hits(request)
        missing = max(wanted - len(hits), 0)
        revived = sum(1 for block in hits if self._references[block] == 0)
        if missing > self.available - revived:
            return False
        for block in hits:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
        request.blocks = hits + [self._take() for _ in range(missing)]
        request.pool = self
        request.published = len(hits)
        request.computed = request.planned = len(hits) * self.block_size
        self.queried_tokens += request.known
        self.hit_tokens += request.computed
        return True

    def _hits(self, request: Request) -> list[int]:
        """Blocks of the longest cached prefix, stopping before the block of the last known token: that
        token must be computed to get logits, and a shared block is never rewritten."""
        hits: list[int] = []
        for key in request.block_keys[: (request.known - 1) // self.block_size]:
            block = self._block_of.get(key)
            if block is None:
                break
            hits.append(block)
        return hits

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            key = self._key_of[block]
            assert key is not None
            del self._block_of[key]
            self._key_of[block] = None
        self._references[block] = 1
        return block
