"""A step in a few calls against the same step layer by layer: the same bits, whatever the family."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semipd.core.types import Slice
from semipd.model import dense
from semipd.model.dense import DenseModel, load_model
from semipd.model.kernels import AMX, AVX2, AVX512, AVX512_BF16, AVX512_VNNI, load_kernels
from tests.checkpoints import LLAMA3_ROPE, make_checkpoint
from tests.model.stepping import Bench

BEST = load_kernels()
pytestmark = pytest.mark.skipif(
    BEST is None or BEST.level < AVX512, reason="needs compiled kernels and AVX-512"
)

WIDE = {"hidden_size": 64, "intermediate_size": 96}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE, "tied": True}, {"dtype": "float32"}),
    "odd sizes": (
        "llama",
        {"hidden_size": 60, "intermediate_size": 50, "head_dim": 20},
        {"dtype": "float32"},
    ),
    "biases": ("qwen2", WIDE, {"dtype": "float32"}),
    "norms of heads": ("qwen3", {"num_key_value_heads": 1, **WIDE}, {"dtype": "float32"}),
    "window": ("mistral", {"sliding_window": 300, **WIDE}, {"dtype": "float32"}),
    "tiles": ("qwen2", WIDE, {"dtype": "bfloat16"}),
    "tiles, window": ("mistral", {"sliding_window": 37, **WIDE}, {"dtype": "bfloat16"}),
    "pairs": ("qwen2", WIDE, {"dtype": "bfloat16"}),
    "widened": ("qwen3", WIDE, {"dtype": "bfloat16"}),
    "AVX2": ("qwen2", WIDE, {"dtype": "bfloat16"}),
    "int8": ("qwen2", WIDE, {"dtype": "bfloat16", "quantization": "int8"}),
    "int8, tiles": ("qwen2", WIDE, {"dtype": "bfloat16", "quantization": "int8"}),
    "int4": ("qwen3", WIDE, {"dtype": "bfloat16", "quantization": "int4", "quantize_head": True}),
}
LEVELS = {"tiles": AMX, "tiles, window": AMX, "pairs": AVX512_BF16, "widened": AVX512, "AVX2": AVX2}
LEVELS |= {"int8": AVX512_VNNI, "int8, tiles": AMX, "int4": AVX512_VNNI}
LENGTHS = (600, 1, 256, 17, 255, 33)


def load(name: str, folder: Path) -> DenseModel:
    """With the kernels of an older processor where `LEVELS` says so."""
    family, shape, options = MODELS[name]
    level = LEVELS.get(name, AVX512)
    if BEST is None or BEST.level < level:
        pytest.skip(f"needs level {level}")
    with pytest.MonkeyPatch.context() as patch:
        if name in LEVELS:
            patch.setattr(dense, "load_kernels", lambda: load_kernels(level))
        return load_model(make_checkpoint(folder, family, **shape), **options)


def filled(model: DenseModel, fused: bool, **sampling: Any) -> Bench:
    """Six sequences whose last token is still to come; the first has a context of several parts."""
    bench = Bench(model, slots=len(LENGTHS), length=700, fused=fused)
    for slot, length in enumerate(LENGTHS):
        bench.open(slot, np.random.default_rng(slot).integers(0, 320, length).tolist(), **sampling)
        bench.run(Slice(slot, 0, length))
    return bench


def step_of(bench: Bench, ahead: int = 0) -> list[Slice]:
    return [Slice(slot, length + ahead, 1) for slot, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_step_has_the_bits_of_the_layers(name: str, tmp_path: Path) -> None:
    model = load(name, tmp_path)
    fused, plain = filled(model, True), filled(model, False)
    for ahead in range(3):
        assert fused.run(*step_of(fused, ahead)) == plain.run(*step_of(plain, ahead))
        assert torch.equal(fused.recorder.logits, plain.recorder.logits)
        assert torch.equal(fused.kv, plain.kv)
    alone = fused.run(Slice(0, LENGTHS[0], 1))
    assert alone == plain.run(Slice(0, LENGTHS[0], 1))
    torch.set_num_threads(2)
    fused.run(*step_of(fused))
    torch.set_num_threads(1)
    assert plain.run(*step_of(plain)) and torch.equal(fused.recorder.logits, plain.recorder.logits)
    assert torch.equal(fused.kv, plain.kv)


@pytest.mark.parametrize("name", [name for name in MODELS if "tiles" in name])
@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_of_prompts_share_a_fused_step(name: str, threads: int, tmp_path: Path) -> None:
    """Single tokens between longer slices, some of which want no token, one of them across the window."""
    model = load(name, tmp_path)
    fused, plain = filled(model, True), filled(model, False)
    mixed = [
        Slice(0, 520, 80, False),
        Slice(1, 1, 1),
        Slice(2, 200, 57),
        Slice(3, 17, 1, False),
        Slice(5, 0, 34),
    ]
    torch.set_num_threads(threads)
    for slices in (mixed, [Slice(4, 100, 3, False)], [Slice(4, 254, 2)], mixed[::-1]):
        assert fused.run(*slices) == plain.run(*slices)
        if any(piece.sample for piece in slices):
            assert torch.equal(fused.recorder.logits, plain.recorder.logits)
        assert torch.equal(fused.kv, plain.kv)
    torch.set_num_threads(1)


def test_the_boundary_is_asked_again_only_when_its_word_changed(tmp_path: Path) -> None:
    """A share that is settled costs one call a step; one that is not, or was moved, four calls a layer."""
    model = load("llama", tmp_path)
    bench, word, calls = filled(model, True), ctypes.c_uint64(7), []

    def boundary(watch: tuple[int, int] | None) -> tuple[int, int] | None:
        calls.append(watch)
        return watch

    plain = filled(model, False).run(*step_of(bench))
    address, layers = ctypes.addressof(word), model.spec.layers
    for watch, expected in ((None, 4 * layers + 1), ((address, 7), 1), ((address, 6), 4 * layers + 1)):
        calls.clear()
        assert bench.runner.run(step_of(bench), partial(boundary, watch)).tokens == plain
        assert len(calls) == expected


def test_sampled_banned_and_greedy_rows_share_a_step(tmp_path: Path) -> None:
    model = load("llama", tmp_path)
    results = []
    for fused in (True, False):
        bench = filled(model, fused)
        greedy = bench.run(*step_of(bench))
        tokens = bench.table.tokens.copy()
        bench.open(1, tokens[1, :2], temperature=2.0, seed=3)
        bench.open(2, tokens[2, :257], ban_until=300, ban_tokens=(greedy[2],))
        results.append(bench.run(*step_of(bench)))
        assert results[-1][2] != greedy[2]
        assert [results[-1][row] for row in (0, 3, 4, 5)] == [greedy[row] for row in (0, 3, 4, 5)]
    assert results[0] == results[1]
