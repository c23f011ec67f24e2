"""Every Triton kernel against its plain twin, over random shapes, under Triton's interpreter on the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from semipd.model.ops import TILE, DeviceStep, Heads, PlainOps
from semipd.model.ops_triton import TritonOps, decode_splits, prefill_tile
from tests.model.conftest import one_thread  # noqa: F401  (a fixture)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN = PlainOps()
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = list(TOLERANCE)


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=TOLERANCE[one.dtype], atol=TOLERANCE[one.dtype])


class Case:
    """Random slices over a scattered pool whose unwritten places hold a value that would show.

    longest: tokens of the longest slice; a kernel that works row by row learns nothing from many, and the
    interpreter takes its time for each."""

    def __init__(
        self, seed: int, dtype: torch.dtype, normed: bool = False, longest: int = 140, length: int = 200
    ) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        kv = int(rng.integers(1, 3))
        self.heads = Heads(kv * int(rng.integers(1, 5)), kv, int(rng.choice([8, 16, 40, 64])), 1e-5)
        if normed:
            self.heads = replace(
                self.heads,
                query_norm=self.random(self.heads.dim, dtype=dtype),
                key_norm=self.random(self.heads.dim, dtype=dtype),
            )
        self.dtype = dtype
        self.block_size = int(rng.choice([4, 16]))
        self.slots, self.length, self.longest = 5, length, longest
        each = self.length // self.block_size + 1
        blocks = self.slots * each
        order = rng.permutation(blocks).reshape(self.slots, each)
        self.tables = torch.from_numpy(order).int().to(DEVICE)
        self.tokens = torch.from_numpy(rng.integers(0, 50, (self.slots, self.length + 1))).int().to(DEVICE)
        shape = (2, blocks, kv, self.block_size, self.heads.dim)
        self.layer = self.random(*shape, dtype=dtype)
        self.slices = self.random_slices()
        self.step = self.make_step(self.slices)
        self.qkv = self.random(self.step.rows, (self.heads.query + 2 * kv) * self.heads.dim, dtype=dtype)

    def random(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype).to(DEVICE)

    def random_slices(self) -> list[tuple[int, int, int]]:
        slices = []
        for slot in self.rng.permutation(self.slots)[: int(self.rng.integers(1, self.slots + 1))]:
            count = int(self.rng.choice([1, 1, 2, 17, self.longest]))
            slices.append((int(slot), int(self.rng.integers(0, self.length - count)), count))
        return slices

    def make_step(self, slices: list[tuple[int, int, int]]) -> DeviceStep:
        row_slots, positions, tiles, singles = [], [], [], []
        for slot, start, count in slices:
            if count == 1:
                singles.append(len(positions))
            for offset in range(0, count if count > 1 else 0, TILE):
                tiles.append((slot, start + offset, len(positions) + offset, min(TILE, count - offset)))
            row_slots += [slot] * count
            positions += range(start, start + count)

        def array(values: list, *shape: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=DEVICE).reshape(*shape)

        return DeviceStep(
            array(row_slots, -1),
            array(positions, -1),
            self.tokens,
            self.tables,
            array(tiles, -1, 4),
            array(singles, -1),
            None,
        )

    def triton(self, units: int = 8) -> TritonOps:
        return TritonOps(DEVICE, max(self.step.singles.shape[0], 1), self.heads, units)


@pytest.mark.parametrize(
    ("seed", "window", "dtype"),
    [
        (0, None, torch.float32), (1, None, torch.bfloat16), (2, None, torch.float16),
        (3, None, torch.float32), (4, 1, torch.float32), (5, 33, torch.float32), (6, 33, torch.bfloat16),
    ],
)  # fmt: skip
def test_attention(seed: int, window: int | None, dtype: torch.dtype) -> None:
    """Ragged, with prefixes, single rows among tiles, any window, heads that are no power of two."""
    case = Case(seed, dtype)
    shape = (case.step.rows, case.heads.query * case.heads.dim)
    expected, found = (torch.full(shape, 9.0, dtype=dtype, device=DEVICE) for _ in range(2))
    PLAIN.attend(case.qkv, case.layer, case.step, case.heads, window, 8, expected)
    case.triton().attend(case.qkv, case.layer, case.step, case.heads, window, 8, found)
    same(found, expected)


@pytest.mark.parametrize("window", [None, 40])
def test_tiles_in_parts(window: int | None) -> None:
    """Wide heads in float32 leave registers for few rows at a time, fewer than those of a tile, of which
    the last may be none."""
    case = Case(9, torch.float32)
    case.step = case.make_step([(0, 30, 100), (1, 70, 1), (2, 0, 33), (3, 100, 2)])
    case.qkv = case.random(case.step.rows, case.qkv.shape[1], dtype=torch.float32)
    shape = (case.step.rows, case.heads.query * case.heads.dim)
    expected, found = (torch.full(shape, 9.0, device=DEVICE) for _ in range(2))
    PLAIN.attend(case.qkv, case.layer, case.step, case.heads, window, 8, expected)
    ops = case.triton()
    ops.prefill_tiles = dict.fromkeys(ops.prefill_tiles, prefill_tile(128, torch.float32, False, 0))
    assert ops.prefill_tiles[torch.float32, False].rows < TILE
    ops.attend(case.qkv, case.layer, case.step, case.heads, window, 8, found)
    same(found, expected)


@pytest.mark.parametrize("window", [70, 200, 450])
def test_long_windows_have_a_middle_that_all_rows_see(window: int) -> None:
    """Blocks of it are computed without comparing; those before and after it are not."""
    case = Case(8, torch.float32, length=500)
    case.step = case.make_step([(0, 340, 130), (1, 450, 1), (2, 0, 129), (3, 470, 17), (4, 199, 2)])
    case.qkv = case.random(case.step.rows, case.qkv.shape[1], dtype=torch.float32)
    shape = (case.step.rows, case.heads.query * case.heads.dim)
    expected, found = (torch.empty(shape, device=DEVICE) for _ in range(2))
    PLAIN.attend(case.qkv, case.layer, case.step, case.heads, window, 8, expected)
    case.triton().attend(case.qkv, case.layer, case.step, case.heads, window, 8, found)
    same(found, expected)


@pytest.mark.parametrize("units", [1, 8, 32])
def test_decode_cut_into_any_number_of_parts(units: int) -> None:
    """More parts than blocks of context leaves some empty: they must weigh nothing."""
    case = Case(3, torch.float32)
    case.step = case.make_step([(0, 0, 1), (1, 63, 1), (2, 64, 1), (3, 190, 1)])
    case.qkv = case.random(4, case.qkv.shape[1], dtype=torch.float32)
    shape = (4, case.heads.query * case.heads.dim)
    expected, found = (torch.empty(shape, device=DEVICE) for _ in range(2))
    PLAIN.attend(case.qkv, case.layer, case.step, case.heads, None, units, expected)
    case.triton(units).attend(case.qkv, case.layer, case.step, case.heads, None, units, found)
    same(found, expected)


def test_parts_follow_the_units_of_the_lane() -> None:
    assert decode_splits(1, 8, 132) == 64 and decode_splits(256, 8, 132) == 1
    assert decode_splits(16, 8, 132) > decode_splits(16, 8, 32) >= 1
    assert decode_splits(0, 8, 0) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_rotary_and_kv_write(seed: int, normed: bool, dtype: torch.dtype) -> None:
    case = Case(seed, dtype, normed, longest=20)
    angles = torch.randn(case.length, case.heads.dim // 2, generator=case.generator).to(DEVICE)
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    plain, found = case.qkv.clone(), case.qkv.clone()
    layer, other = case.layer.clone(), case.layer.clone()
    PLAIN.rotate_and_store(plain, layer, case.step, case.heads, *tables)
    case.triton().rotate_and_store(found, other, case.step, case.heads, *tables)
    queries = case.heads.query * case.heads.dim
    same(found[:, :queries], plain[:, :queries])
    same(other, layer)
    assert not torch.equal(layer, case.layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 48, 1000])
def test_norms(width: int, dtype: torch.dtype) -> None:
    case = Case(width, dtype)
    x, delta, weight = (case.random(*shape, dtype=dtype) for shape in ((5, width), (5, width), (width,)))
    one, other = torch.empty_like(x), torch.empty_like(x)
    PLAIN.norm(x, weight, 1e-5, one)
    case.triton().norm(x, weight, 1e-5, other)
    same(other, one)
    hidden, same_hidden = x.clone(), x.clone()
    PLAIN.add_norm(hidden, delta, weight, 1e-5, one)
    case.triton().add_norm(same_hidden, delta, weight, 1e-5, other)
    same(other, one)
    same(same_hidden, hidden)
    assert not torch.equal(hidden, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 80, 1500])
def test_gated(width: int, dtype: torch.dtype) -> None:
    case = Case(width, dtype)
    both = case.random(3, 2 * width, dtype=dtype) * 4
    one, other = (torch.empty(3, width, dtype=dtype, device=DEVICE) for _ in range(2))
    PLAIN.gated(both, one)
    case.triton().gated(both, other)
    same(other, one)


@pytest.mark.parametrize("width", [48, 1200])
def test_embedding_reads_the_token_table(width: int) -> None:
    case = Case(1, torch.float32)
    table = case.random(50, width, dtype=torch.float32)
    one, other = (torch.empty(case.step.rows, width, device=DEVICE) for _ in range(2))
    PLAIN.embed(case.step, table, one)
    case.triton().embed(case.step, table, other)
    assert torch.equal(one, other)
