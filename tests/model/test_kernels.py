"""Each compiled kernel against its plain twin, at every level of instructions that this processor has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semipd.model.attention import Pool, Ragged, attend, attend_plainly, plan_attention
from semipd.model.kernels import AMX, Kernels, load_kernels

BLOCKS = 600
BEST = load_kernels()

pytestmark = pytest.mark.skipif(BEST is None, reason="the kernels were not built")


def levels() -> list[Kernels]:
    found = [load_kernels(level) for level in range(AMX + 1)]
    return [
        kernels for level, kernels in enumerate(found) if kernels is not None and kernels.level == level
    ]


def best() -> Kernels:
    assert BEST is not None
    return BEST


def make_pool(kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    blocks = -(-5000 // block_size)
    generator = torch.Generator().manual_seed(block_size)
    return torch.randn(2, blocks, kv_heads, block_size, head_dim, generator=generator).to(dtype)


def decode_step(positions: list[int], block_size: int, seed: int = 0) -> Ragged:
    """One-token slices with scattered block tables; entries that nothing may read are nonsense."""
    starts = np.array(positions, np.int64)
    used = starts // block_size + 1
    tables = np.full((len(starts), int(used.max()) + 1), 2**30, np.int32)
    free = np.random.default_rng(seed).permutation(-(-5000 // block_size))
    for i, count in enumerate(used):
        tables[i, :count], free = free[:count], free[count:]
    return Ragged(starts, np.ones_like(starts), tables)


def queries(rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that are wider than the queries, as those of a fused projection are."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, heads + 3, head_dim, generator=generator).to(dtype)[:, :heads]


CASES = [  # heads, KV heads, block size, head_dim, window
    (14, 2, 16, 64, None),
    (7, 1, 1, 64, 100),
    (3, 3, 7, 80, None),
    (32, 8, 64, 128, 700),
    (5, 1, 8, 24, 1),
    (9, 3, 32, 96, 257),
    (16, 1, 16, 256, None),
    (6, 2, 5, 20, 4096),
]


@pytest.mark.parametrize("kernels", levels(), ids=lambda kernels: f"level{kernels.level}")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_attention(kernels: Kernels, case: tuple[int, ...], dtype: torch.dtype) -> None:
    heads, kv_heads, block_size, head_dim, window = case
    layer = make_pool(kv_heads, block_size, head_dim, dtype)
    step = decode_step([0, 1, 15, 16, 255, 256, 300, 511, 1500, 90], block_size)
    q = queries(len(step.starts), heads, head_dim, dtype)
    plan = plan_attention(step, Pool.of(layer[None]), window, kernels)
    exact = attend_plainly(q.float(), layer.float(), plan)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(attend(q, layer, plan).float(), exact, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_attention_has_the_same_bits_in_any_company_and_with_any_threads(dtype: torch.dtype) -> None:
    layer = make_pool(2, 16, 64, dtype)
    step = decode_step([700, 3, 256, 1023, 512, 511], 16)
    q = queries(6, 14, 64, dtype)

    def run(members: list[int]) -> torch.Tensor:
        own = Ragged(step.starts[members], step.counts[members], step.tables[members])
        return attend(q[members], layer, plan_attention(own, Pool.of(layer[None]), None, best()))

    together = run([0, 1, 2, 3, 4, 5])
    for row in range(6):
        assert torch.equal(run([row])[0], together[row])
    torch.set_num_threads(2)
    assert torch.equal(run([0, 1, 2, 3, 4, 5]), together)


def test_decode_attention_ignores_what_it_may_not_see() -> None:
    """Later positions of the last block, and blocks before the window, may hold anything."""
    layer = make_pool(1, 16, 64, torch.bfloat16)
    step = decode_step([500], 16)
    q, pool = queries(1, 7, 64, torch.bfloat16), Pool.of(layer[None])
    plan = plan_attention(step, pool, 100, best())
    clean = attend(q, layer, plan)
    layer[:, int(step.tables[0, 500 // 16]), :, 500 % 16 + 1 :] = torch.nan
    layer[:, torch.from_numpy(step.tables[0, : 401 // 16].astype(np.int64))] = torch.nan
    assert torch.equal(attend(q, layer, plan), clean)
