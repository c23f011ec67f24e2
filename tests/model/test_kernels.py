"""Each compiled kernel against its plain twin, at every level of instructions that this processor has."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semipd.core.types import Slice
from semipd.model import dense
from semipd.model.attention import Pool, Ragged, attend, attend_plainly, plan_attention
from semipd.model.compiled import CompiledGated, CompiledLinear, compiled_kind
from semipd.model.dense import load_model
from semipd.model.kernels import AMX, AVX2, AVX512, Kernels, load_kernels
from semipd.model.layers import PLAIN, PlainGated, PlainLinear
from semipd.model.row_ops import CompiledRowOps, Heads, PlainRowOps
from tests.checkpoints import make_checkpoint
from tests.model.stepping import Bench

BEST = load_kernels()
tiles_needed = pytest.mark.skipif(BEST is None or BEST.level < AMX, reason="needs AMX")

pytestmark = pytest.mark.skipif(BEST is None, reason="the kernels were not built")


def levels() -> list[Kernels]:
    found = [load_kernels(level) for level in range(AMX + 1)]
    return [
        kernels for level, kernels in enumerate(found) if kernels is not None and kernels.level == level
    ]


def vector_levels() -> list[Kernels]:
    """Those with linear layers in bfloat16."""
    return [kernels for kernels in levels() if kernels.level >= AVX2]


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


PREFILL = [  # heads, KV heads, block size, head_dim, window, slices
    (14, 2, 16, 64, None, [(0, 300), (511, 40), (0, 2), (256, 256)]),
    (3, 3, 1, 32, 33, [(0, 70), (300, 65), (31, 33)]),
    (8, 2, 64, 128, 700, [(900, 100), (0, 17), (5, 1)]),
    (5, 1, 7, 96, 1, [(0, 40)]),
    (2, 1, 16, 256, 257, [(250, 300), (3, 5)]),
]


@tiles_needed
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill_attention(case: tuple[Any, ...]) -> None:
    heads, kv_heads, block_size, head_dim, window, slices = case
    layer = make_pool(kv_heads, block_size, head_dim, torch.bfloat16)
    ends = decode_step([start + count - 1 for start, count in slices], block_size)
    step = Ragged(*np.array(slices, np.int64).T, ends.tables)
    q = queries(int(step.counts.sum()), heads, head_dim, torch.bfloat16)
    plan = plan_attention(step, Pool.of(layer[None]), window, best())
    assert not plan.prefill
    exact = attend_plainly(q.float(), layer.float(), plan)
    fast = attend(q, layer, plan)
    torch.testing.assert_close(fast.float(), exact, rtol=2**-6, atol=0.02)
    torch.set_num_threads(2)
    assert torch.equal(attend(q, layer, plan), fast)


@tiles_needed
def test_prefill_attention_of_a_row_does_not_depend_on_the_cut() -> None:
    layer = make_pool(2, 16, 64, torch.bfloat16)
    q = queries(600, 14, 64, torch.bfloat16)
    tables = decode_step([599], 16).tables
    pool = Pool.of(layer[None])

    def run(start: int, count: int) -> torch.Tensor:
        step = Ragged(np.array([start]), np.array([count]), tables)
        return attend(q[start : start + count], layer, plan_attention(step, pool, 300, best()))

    whole = run(0, 600)
    for start, count in ((0, 100), (100, 500), (255, 2), (256, 33)):
        assert torch.equal(run(start, count), whole[start : start + count])


@tiles_needed
def test_prefill_attention_ignores_what_it_may_not_see() -> None:
    layer = make_pool(1, 16, 64, torch.bfloat16)
    tables = decode_step([529], 16).tables
    q, step = queries(30, 7, 64, torch.bfloat16), Ragged(np.array([500]), np.array([30]), tables)
    plan = plan_attention(step, Pool.of(layer[None]), 100, best())
    clean = attend(q, layer, plan)
    layer[:, int(tables[0, 529 // 16]), :, 529 % 16 + 1 :] = torch.nan
    layer[:, torch.from_numpy(tables[0, : 401 // 16].astype(np.int64))] = torch.nan
    assert torch.equal(attend(q, layer, plan), clean)


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


@pytest.mark.parametrize("kernels", levels(), ids=lambda kernels: f"level{kernels.level}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [5, 64, 896, 1000])
def test_norms(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    compiled, plain = CompiledRowOps(kernels, dtype), PlainRowOps(dtype)
    generator = torch.Generator().manual_seed(width)
    x, delta, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (70, 70, 1))
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
    weight = weight[0]
    torch.testing.assert_close(compiled.norm(x, weight, 1e-6), plain.norm(x, weight, 1e-6), **close)
    ours, theirs = x.clone(), x.clone()
    normed = compiled.add_norm(ours, delta, weight, 1e-5)
    torch.testing.assert_close(normed, plain.add_norm(theirs, delta, weight, 1e-5), **close)
    assert torch.equal(ours, theirs)
    assert torch.equal(compiled.norm(x[:1], weight, 1e-6), compiled.norm(x, weight, 1e-6)[:1])


@pytest.mark.parametrize("kernels", levels(), ids=lambda kernels: f"level{kernels.level}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", [(14, 2, 64), (3, 3, 80), (5, 1, 24), (2, 2, 2), (9, 3, 128)], ids=str)
def test_rotation_and_storing(
    kernels: Kernels, dtype: torch.dtype, normed: bool, shape: tuple[int, int, int]
) -> None:
    heads, kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(head_dim)
    qkv = torch.randn(37, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    norms = [torch.randn(head_dim, generator=generator).to(dtype) if normed else None for _ in range(2)]
    positions = torch.randint(0, 30000, (37,), generator=generator)
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2) / head_dim)
    blocks, offsets = np.random.default_rng(0).permutation(40)[:37], np.arange(37) % 5
    results = []
    for ops in (CompiledRowOps(kernels, dtype), PlainRowOps(dtype)):
        layer, rows = torch.zeros(2, 40, kv_heads, 5, head_dim, dtype=dtype), qkv.clone()
        where = Pool.of(layer[None]).rows(blocks, offsets)
        turns = ops.rotations(positions, frequencies, 1.0, where)
        ops.rotate_and_store(rows, layer, turns, Heads(heads, kv_heads, head_dim, 1e-6), *norms)
        results.append((rows[:, :heads].float(), layer.float()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(
            ours,
            theirs,
            **({"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 0.06}),
        )


LAYERS = [(1, 32), (100, 96), (96, 2080), (333, 64)]  # outputs, inputs; 2080 is more than one block deep


def parameters(outputs: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    return weight.bfloat16(), torch.randn(outputs, generator=generator).bfloat16()


def inputs_of(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("kernels", vector_levels(), ids=lambda kernels: f"level{kernels.level}")
@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_linears(kernels: Kernels, shape: tuple[int, int], biased: bool) -> None:
    gate, bias = parameters(*shape)
    up, up_bias = parameters(*shape, seed=1)
    biases = (bias, up_bias) if biased else (None, None)
    linear, gated = (
        CompiledLinear(kernels, gate, biases[0]),
        CompiledGated(kernels, gate, biases[0], up, biases[1]),
    )
    wide = [None if one is None else one.double() for one in biases]
    exact_linear = PlainLinear(gate.double(), wide[0])
    exact_gated = PlainGated(gate.double(), wide[0], up.double(), wide[1])
    for rows in (1, 2, 3, 5, 7, 16, 17, 32, 63, 130, 600):
        x = inputs_of(rows, shape[1])
        close = {"rtol": 2**-7, "atol": 1e-2}
        torch.testing.assert_close(linear(x).double(), exact_linear(x.double()), **close)
        torch.testing.assert_close(gated(x).double(), exact_gated(x.double()), **close)


@pytest.mark.parametrize("kernels", vector_levels(), ids=lambda kernels: f"level{kernels.level}")
def test_a_linear_gives_a_row_the_same_bits_in_any_company_and_with_any_threads(kernels: Kernels) -> None:
    x = inputs_of(600, 2080)
    gate, up = parameters(200, 2080)[0], parameters(200, 2080, 1)[0]
    for layer in (CompiledLinear(kernels, gate, None), CompiledGated(kernels, gate, None, up, None)):
        whole = layer(x)
        for rows in (1, 2, 3, 5, 9, 16, 33, 64, 65, 200):
            assert torch.equal(layer(x[:rows]), whole[:rows]), rows
        assert torch.equal(layer(x[599:]), whole[599:])
        torch.set_num_threads(2)
        assert torch.equal(layer(x), whole)
        torch.set_num_threads(1)


def test_linears_take_rows_of_a_wider_matrix() -> None:
    weight, _ = parameters(40, 64)
    x = inputs_of(5, 200)[:, 20:84]
    for kernels in levels():
        ours = compiled_kind(kernels, torch.bfloat16, PLAIN).linear(weight, None)(x)
        torch.testing.assert_close(ours, PlainLinear(weight, None)(x), rtol=2**-7, atol=1e-2)


def test_where_kernels_do_not_apply_the_other_linears_are_used() -> None:
    weight, _ = parameters(40, 48)
    assert compiled_kind(None, torch.bfloat16, PLAIN) is PLAIN
    assert compiled_kind(load_kernels(AVX512 - 1), torch.float32, PLAIN) is PLAIN
    assert compiled_kind(load_kernels(AVX2 - 1), torch.bfloat16, PLAIN) is PLAIN
    assert isinstance(compiled_kind(BEST, torch.bfloat16, PLAIN).linear(weight, None), PlainLinear)


@pytest.mark.parametrize(
    ("dtype", "most"), [("float32", AMX), *(("bfloat16", level) for level in range(AMX + 1))]
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_a_model_with_kernels_agrees_with_one_without(
    family: str, dtype: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "load_kernels", lambda: load_kernels(most))
    window = {"mistral": {"sliding_window": 37}}.get(family, {})
    folder = make_checkpoint(tmp_path, family, hidden_size=64, intermediate_size=96, **window)
    tokens = np.random.default_rng(0).integers(0, 320, 300).tolist()
    logits = []
    for kernels in (True, False):
        bench = Bench(load_model(folder, dtype=dtype, kernels=kernels))
        rows = []
        bench.open(0, tokens)
        for start, count in ((0, 100), (100, 1), (101, 1), (102, 150), (252, 1)):
            bench.table.tokens[0, : len(tokens)] = tokens  # sampling writes over what follows a slice
            bench.run(Slice(0, start, count))
            rows.append(bench.recorder.logits)
        logits.append(torch.cat(rows))
    close = 1e-4 if dtype == "float32" else 0.05 * float(logits[1].std())
    assert float((logits[0] - logits[1]).square().mean().sqrt()) < close


def test_without_a_compiler_or_with_an_old_library_torch_alone_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = make_checkpoint(tmp_path, "llama")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert load_kernels() is None
        Bench(load_model(folder)).open(0, [1, 2])
    assert sum("no compiled kernels" in record.message for record in caplog.records) == 2
    other = importlib.util.find_spec("_ctypes")  # a library without our functions
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: other)
        patch.setattr("semipd.model.kernels.SOURCES", tmp_path / "none")
        assert load_kernels() is None
    assert "cannot be loaded" in caplog.text
    (tmp_path / "changed.c").touch()
    monkeypatch.setattr("semipd.model.kernels.SOURCES", tmp_path)
    assert load_kernels() is None
    assert "older than their sources" in caplog.text


OPTIONS: list[dict[str, Any]] = [
    {},
    {"kernels": False},
    {"quantization": "int8"},
    {"quantization": "int4", "quantize_head": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_replay_and_isolation_hold_in_every_way(options: dict[str, Any], tmp_path: Path) -> None:
    """A decode step gives a slot the same bits alone, in company, and when it runs again."""
    folder = make_checkpoint(tmp_path, "qwen2", hidden_size=64, intermediate_size=96)
    bench = Bench(load_model(folder, dtype="bfloat16", **options))
    lengths = (70, 9, 130, 33)
    for slot, length in enumerate(lengths):
        tokens = np.random.default_rng(slot).integers(0, 320, length).tolist()
        bench.open(slot, tokens)
        bench.run(Slice(slot, 0, length))
    together = [Slice(slot, length, 1) for slot, length in enumerate(lengths)]
    first, logits = bench.run(*together), bench.recorder.logits
    assert bench.run(*together) == first
    assert torch.equal(bench.recorder.logits, logits)
    for slot, one in enumerate(together):
        assert bench.run(one) == first[slot : slot + 1]
        assert torch.equal(bench.recorder.logits[0], logits[slot])
