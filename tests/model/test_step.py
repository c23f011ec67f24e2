"""A decode step in a few calls against the same step layer by layer: the same bits, whatever the family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semipd.core.types import Slice
from semipd.model.dense import DenseModel, load_model
from semipd.model.kernels import AMX, AVX512, load_kernels
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
    "int8": ("qwen2", WIDE, {"dtype": "bfloat16", "quantization": "int8"}),
    "int4": ("qwen3", WIDE, {"dtype": "bfloat16", "quantization": "int4", "quantize_head": True}),
}
LENGTHS = (600, 1, 256, 17, 255, 33)


def load(name: str, folder: Path) -> DenseModel:
    family, shape, options = MODELS[name]
    if options["dtype"] == "bfloat16" and (BEST is None or BEST.level < AMX):
        pytest.skip("needs AMX")
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
