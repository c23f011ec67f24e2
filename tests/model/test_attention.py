from __future__ import annotations

import numpy as np
import pytest
import torch

from semipd.model import attention
from semipd.model.attention import Pool, Ragged, attend, attend_plainly, plan_attention, write_kv

BLOCKS, BLOCK_SIZE, HEAD_DIM = 300, 8, 16


def make_pool(kv_heads: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(kv_heads)
    return torch.randn(2, 2, BLOCKS, kv_heads, BLOCK_SIZE, HEAD_DIM, generator=generator).to(dtype)


def ragged(slices: list[tuple[int, int]], seed: int = 0) -> Ragged:
    """Slices (start, count) whose block tables are scattered over the pool; unused entries are nonsense."""
    starts, counts = np.array(slices, dtype=np.int64).T
    generator = np.random.default_rng(seed)
    width = -(-int((starts + counts).max()) // BLOCK_SIZE) + 1
    tables = np.full((len(slices), width), 2**30, np.int32)
    free = generator.permutation(BLOCKS)
    for i, end in enumerate(starts + counts):
        used = -(-int(end) // BLOCK_SIZE)
        tables[i, :used], free = free[:used], free[used:]
    return Ragged(starts, counts, tables)


def queries(step: Ragged, heads: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(int(step.counts.sum()), heads, HEAD_DIM, generator=generator).to(dtype)


SHAPES = [
    [(0, 1)],
    [(0, 7)],
    [(99, 1), (100, 1), (0, 1), (640, 1), (7, 1), (8, 1)],
    [(0, 300)],
    [(130, 300), (20, 1), (0, 5), (64, 1)],
    [(3, 2), (255, 1), (17, 257), (0, 256), (400, 3)],
    [(511, 513)],
]


@pytest.mark.parametrize("window", [None, 1, 5, 64, 300, 4096])
@pytest.mark.parametrize("slices", SHAPES, ids=str)
def test_the_fast_way_agrees_with_the_definition(slices: list[tuple[int, int]], window: int | None) -> None:
    for heads, kv_heads in ((6, 2), (3, 1), (2, 2)):
        pool, step = make_pool(kv_heads), ragged(slices)
        plan = plan_attention(step, Pool.of(pool), window)
        q = queries(step, heads)
        with torch.inference_mode():
            fast, plain = attend(q, pool[1], plan), attend_plainly(q, pool[1], plan)
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


def test_random_ragged_steps_agree_with_the_definition() -> None:
    generator = np.random.default_rng(5)
    pool = make_pool(2)
    for seed in range(25):
        slices = [
            (int(generator.integers(0, 90)), int(generator.choice([1, 1, 1, 2, 9, 40])))
            for _ in range(generator.integers(1, 12))
        ]
        step = ragged(slices, seed)
        window = int(generator.integers(1, 120)) if seed % 2 else None
        plan, q = plan_attention(step, Pool.of(pool), window), queries(step, 4)
        with torch.inference_mode():
            fast, plain = attend(q, pool[0], plan), attend_plainly(q, pool[0], plan)
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 70])
def test_a_row_has_the_same_bits_in_any_company(
    dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding one sequence to the longest of its batch would change the order of its sums."""
    slices = [(100 + 9 * i, 1) for i in range(12)] + [(0, 40), (37, 20), (150, 300)]
    pool, step = make_pool(2, dtype), ragged(slices)
    q = queries(step, 6, dtype)
    ends = np.cumsum(step.counts)
    with torch.inference_mode():
        together = attend(q, pool[0], plan_attention(step, Pool.of(pool), window))
        monkeypatch.setattr(attention, "GATHER_BYTES", 1)  # and no two slices in one call
        apart = attend(q, pool[0], plan_attention(step, Pool.of(pool), window))
        assert torch.equal(together, apart)
        for i, end in enumerate(ends):
            own = Ragged(step.starts[i : i + 1], step.counts[i : i + 1], step.tables[i : i + 1])
            rows = slice(end - step.counts[i], end)
            alone = attend(q[rows], pool[0], plan_attention(own, Pool.of(pool), window))
            assert torch.equal(alone, together[rows]), slices[i]


def test_bfloat16_is_within_its_rounding() -> None:
    pool, step = make_pool(2, torch.bfloat16), ragged(SHAPES[4])
    q = queries(step, 6, torch.bfloat16)
    plan = plan_attention(step, Pool.of(pool), None)
    with torch.inference_mode():
        fast, exact = attend(q, pool[0], plan), attend_plainly(q.float(), pool[0].float(), plan)
    assert (fast.float() - exact).abs().max() < 0.03


def test_a_window_reads_no_block_before_it() -> None:
    """What lies before the window may be garbage, even NaN in a block that has a new owner."""
    pool, step = make_pool(1), ragged([(200, 1), (160, 30)])
    plan = plan_attention(step, Pool.of(pool), 20)
    q = queries(step, 3)
    with torch.inference_mode():
        clean = attend(q, pool[0], plan)
        for table, start in zip(step.tables, step.starts, strict=True):
            pool[0][:, torch.from_numpy(table[: (start - 19) // BLOCK_SIZE].astype(np.int64))] = torch.nan
        assert torch.equal(attend(q, pool[0], plan), clean)


def test_long_decode_batches_gather_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(2)
    step = ragged([(60, 1)] * 10)
    monkeypatch.setattr(attention, "GATHER_BYTES", 40_000)  # each slice gathers 16 KiB
    plan = plan_attention(step, Pool.of(pool), None)
    assert [group.mask.shape[0] for group in plan.decode] == [2] * 5
    q = queries(step, 4)
    with torch.inference_mode():
        torch.testing.assert_close(attend(q, pool[0], plan), attend_plainly(q, pool[0], plan))


def test_keys_and_values_are_written_where_tables_say() -> None:
    pool = torch.zeros(1, 2, 5, 2, 4, 3)
    kv = torch.arange(1.0, 25.0).view(2, 4, 3)  # two positions, keys of two heads, then values of two heads
    rows = Pool.of(pool).rows(np.array([3, 0]), np.array([1, 2]))
    write_kv(kv, pool[0], rows)
    for token, (block, offset) in enumerate(((3, 1), (0, 2))):
        written = pool[0, :, block, :, offset].reshape(4, 3)
        assert torch.equal(written, kv[token])
    assert int(pool.count_nonzero()) == 24
