"""The block pool against a naive model of it, over random histories that shrink when they fail.

The model looks everything up by scanning. It knows which block holds which tokens of whom, which the pool
does not, so a block that is shared wrongly shows as wrong contents and not only as a wrong count.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from semipd.core.keys import block_keys, root
from semipd.core.kv import BlockPool
from semipd.core.types import Request

SIZE = 2
SALTS = (None, "one", "two")
Prefix = tuple[str | None, tuple[int, ...]]  # a salt, and all tokens up to the end of a block


@dataclass
class Block:
    """holders: how many requests use it. prefix: what it is known to hold, once published."""

    holders: int = 0
    prefix: Prefix | None = None
    released: int = 0  # when it was last given up


@dataclass(eq=False)
class Held:
    """A request, its salt, and the model's names of its blocks."""

    request: Request
    salt: str | None
    tokens: list[int]
    blocks: list[int]
    computed: int
    written: int = 0  # full blocks whose contents are this request's own work or what it found

    def prefix(self, index: int) -> Prefix:
        return self.salt, tuple(self.tokens[: (index + 1) * SIZE])


class PoolMachine(RuleBasedStateMachine):
    @initialize(total=st.integers(2, 10), first=st.sampled_from((0, 100)))
    def begin(self, total: int, first: int) -> None:
        self.pool = BlockPool(total, SIZE, first=first)
        self.ids = range(first, first + total)
        self.model = [Block() for _ in range(total)]
        self.held: list[Held] = []
        self.away: list[Held] = []  # preempted: without blocks, to enter again
        self.contents: dict[int, Prefix] = {}  # what the pool's blocks really hold
        self.now = 0

    # -- the model -----------------------------------------------------------------------------------

    def find(self, prefix: Prefix) -> int | None:
        found = [index for index, block in enumerate(self.model) if block.prefix == prefix]
        assert len(found) <= 1
        return found[0] if found else None

    def hits(self, held: Held) -> list[int]:
        found: list[int] = []
        for index in range((len(held.tokens) - 1) // SIZE):
            block = self.find(held.prefix(index))
            if block is None:
                break
            found.append(block)
        return found

    def take(self) -> int:
        unused = [index for index, block in enumerate(self.model) if not block.holders]
        index = min(unused, key=lambda i: (self.model[i].prefix is not None, self.model[i].released))
        self.model[index] = Block(1)
        return index

    def unused(self) -> int:
        return sum(not block.holders for block in self.model)

    # -- what the planner does -----------------------------------------------------------------------

    def enter(self, held: Held) -> None:
        hits = self.hits(held)
        wanted = -(-len(held.tokens) // SIZE)
        revived = sum(not self.model[block].holders for block in hits)
        fits = wanted - len(hits) <= self.unused() - revived
        assert self.pool.match(held.request) == len(hits) * SIZE
        assert self.pool.reserve(held.request, len(held.tokens)) == fits
        if not fits:
            assert not held.request.blocks and held.request.pool is None
            return
        for block in hits:
            self.model[block].holders += 1
        held.blocks = hits + [self.take() for _ in range(wanted - len(hits))]
        held.computed, held.written = len(hits) * SIZE, len(hits)
        request = held.request
        assert request.computed == request.planned == held.computed < len(held.tokens)
        assert len(request.blocks) == len(held.blocks) and request.pool is self.pool
        for index in range(len(hits)):
            assert self.contents[request.blocks[index]] == held.prefix(index), "a hit on other tokens"
        self.held.append(held)

    def leave(self, held: Held) -> None:
        self.held.remove(held)
        self.pool.release(held.request)
        assert held.request.blocks == [] and held.request.pool is None
        for block in reversed(held.blocks):
            self.now += 1
            self.model[block].holders -= 1
            self.model[block].released = self.now
        held.blocks = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), salt=st.sampled_from(SALTS))
    def arrive(self, tokens: list[int], salt: str | None) -> None:
        keys = block_keys(tokens, SIZE, root(salt))
        self.enter(
            Held(Request("r", list(tokens), 9, block_keys=keys, salt=root(salt)), salt, tokens, [], 0)
        )

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(1, 4))
    def compute(self, data: st.DataObject, count: int) -> None:
        """Positions are computed, then published: never the other way round."""
        held = data.draw(st.sampled_from(self.held))
        held.computed = min(held.computed + count, len(held.tokens))
        for index in range(held.written, held.computed // SIZE):
            prefix = held.prefix(index)
            self.contents[held.request.blocks[index]] = prefix
            if self.find(prefix) is None:  # else a twin was first, and ours stays private
                self.model[held.blocks[index]].prefix = prefix
        held.written = held.computed // SIZE
        self.pool.publish(held.request, held.computed)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), token=st.integers(0, 1))
    def produce(self, data: st.DataObject, token: int) -> None:
        """One more token, and room for it."""
        held = data.draw(st.sampled_from(self.held))
        missing = -(-(len(held.tokens) + 1) // SIZE) - len(held.blocks)
        fits = missing <= self.unused()
        before = list(held.request.blocks)
        assert self.pool.reserve(held.request, len(held.tokens) + 1) == fits
        if not fits:
            assert held.request.blocks == before
            return
        held.blocks += [self.take() for _ in range(missing)]
        held.tokens.append(token)
        held.request.output.append(token)
        held.request.block_keys[:] = block_keys(held.tokens, SIZE, root(held.salt))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), for_good=st.booleans())
    def release(self, data: st.DataObject, for_good: bool) -> None:
        held = data.draw(st.sampled_from(self.held))
        self.leave(held)
        if not for_good:
            self.away.append(held)

    @precondition(lambda self: self.away)
    @rule()
    def come_back(self) -> None:
        """A preempted request enters with the tokens that it has produced, and may find its own blocks."""
        self.enter(self.away.pop())

    @invariant()
    def the_pool_agrees(self) -> None:
        self.pool.check()
        assert self.pool.available == self.unused()
        used = [block for held in self.held for block in held.request.blocks]
        assert set(used) <= set(self.ids)
        assert sorted(map(used.count, set(used))) == sorted(b.holders for b in self.model if b.holders)
        for held in self.held:
            assert len(held.request.blocks) == len(held.blocks)


TestPool = PoolMachine.TestCase
# A busy machine is slow at drawing too; that is no failure.
slow = [HealthCheck.too_slow]
TestPool.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=slow
)
