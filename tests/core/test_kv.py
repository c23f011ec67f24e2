"""The block pool: conservation, sharing, eviction order. Random histories check every state."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semipd.core.keys import block_keys, next_key, root
from semipd.core.kv import BlockPool
from semipd.core.types import Request
from tests.core.harness import make_request


def entered(pool: BlockPool, name: str, prompt: list[int]) -> Request:
    request = make_request(name, prompt, 4, block_size=pool.block_size)
    assert pool.reserve(request, len(prompt))
    return request


def test_reserve_is_all_or_nothing() -> None:
    pool = BlockPool(4, 4)
    first = entered(pool, "first", list(range(9)))
    second = make_request("second", list(range(50, 59)), 4)
    assert not pool.reserve(second, 9)
    assert second.blocks == [] and pool.available == 1
    assert not pool.reserve(first, 20)
    assert len(first.blocks) == 3 and pool.available == 1


def test_nothing_is_shared_before_it_is_published() -> None:
    pool = BlockPool(8, 4)
    first = entered(pool, "first", list(range(9)))
    second = entered(pool, "second", list(range(9)))
    assert not set(first.blocks) & set(second.blocks)
    pool.publish(first, 8)
    pool.publish(second, 8)  # the twin's blocks stay its own
    pool.release(first)
    pool.release(second)
    pool.check()
    third = entered(pool, "third", list(range(9)))
    assert third.computed == 8


def test_only_computed_blocks_are_published() -> None:
    pool = BlockPool(8, 4)
    first = entered(pool, "first", list(range(12)))
    pool.publish(first, 7)
    second = make_request("second", list(range(12)), 4)
    assert pool.match(second) == 4


def test_eviction_takes_the_oldest_prefix_from_its_end() -> None:
    pool = BlockPool(6, 4)
    for name, start in (("old", 0), ("new", 100)):
        request = entered(pool, name, list(range(start, start + 12)))
        pool.publish(request, 12)
        pool.release(request)
    entered(pool, "taker", list(range(500, 504)))
    assert pool.match(make_request("x", [*range(12), 9], 1)) == 8
    assert pool.match(make_request("x", [*range(100, 112), 9], 1)) == 12
    pool.check()


def test_an_evicted_block_is_forgotten() -> None:
    pool = BlockPool(2, 4)
    first = entered(pool, "first", list(range(8)))
    pool.publish(first, 8)
    pool.release(first)
    entered(pool, "second", list(range(50, 58)))
    assert pool.match(make_request("x", list(range(8)), 1)) == 0


def test_matched_blocks_count_as_taken_when_room_is_checked() -> None:
    """The hazard: cached blocks that the match itself pins must not also be counted as evictable."""
    pool = BlockPool(3, 4)
    first = entered(pool, "first", list(range(8)))
    pool.publish(first, 8)
    pool.release(first)
    second = make_request("second", [*range(8), *range(90, 98)], 4)
    assert not pool.reserve(second, 16)
    pool.check()
    assert pool.reserve(make_request("third", [*range(8), 90], 4), 9)


def test_salts_separate_and_chains_depend_on_everything_before() -> None:
    tokens = list(range(8))
    assert block_keys(tokens, 4, root("a"))[0] != block_keys(tokens, 4, root("b"))[0]
    assert block_keys(tokens, 4)[1] != block_keys([9, *tokens[1:]], 4)[1]
    assert next_key(block_keys(tokens, 4)[0], tokens[4:]) == block_keys(tokens, 4)[1]
    assert len(block_keys(tokens[:7], 4)) == 1


def test_a_salt_cannot_pretend_to_be_a_block() -> None:
    """A text that reads like the bytes of a block of tokens must not begin where that block ends: its
    sender would find the blocks of whoever sent these tokens without a salt."""
    block = [0, 97, 98, 99]
    forged = array("q", block).tobytes()[1:].decode()
    assert root(forged) != next_key(root(), block)
    assert root(forged) not in block_keys(block * 3, 4)


@pytest.mark.parametrize(("total", "size"), [(0, 4), (4, 0)])
def test_an_empty_pool_is_an_error(total: int, size: int) -> None:
    with pytest.raises(ValueError):
        BlockPool(total, size)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), total=st.integers(4, 24), prefix_cache=st.booleans())
def test_random_histories_conserve_blocks(seed: int, total: int, prefix_cache: bool) -> None:
    rng = random.Random(seed)
    pool = BlockPool(total, 4, prefix_cache)
    stems = [[rng.randrange(9) for _ in range(20)] for _ in range(2)]
    held: list[Request] = []
    for index in range(80):
        action = rng.choice(("enter", "grow", "publish", "release"))
        if action == "enter" or not held:
            stem = rng.choice(stems)
            prompt = [*stem[: rng.randrange(20)], rng.randrange(9)]
            request = make_request(str(index), prompt, 4)
            before = pool.available
            if pool.reserve(request, len(prompt)):
                held.append(request)
                assert request.computed <= (len(prompt) - 1) // 4 * 4
                assert len(request.blocks) == pool.blocks_for(len(prompt))
            else:
                assert pool.available == before
        else:
            request = rng.choice(held)
            if action == "grow":
                pool.reserve(request, len(request.blocks) * 4 + rng.randrange(6))
            elif action == "publish":
                pool.publish(request, rng.randrange(len(request.prompt) + 1))
            else:
                held.remove(request)
                pool.release(request)
        pool.check()
        if not prefix_cache:
            assert all(request.computed == 0 for request in held)
    for request in held:
        pool.release(request)
    pool.check()
    assert pool.available == total
