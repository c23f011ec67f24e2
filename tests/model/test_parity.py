"""The same checkpoint in transformers and here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semipd.core.types import Slice
from semipd.model.dense import load_model
from semipd.model.rope import rope_frequencies
from semipd.model.spec import ModelSpec
from tests.checkpoints import LLAMA3_ROPE, SHAPE, VOCABULARY, make_checkpoint
from tests.model.stepping import Bench

CLOSE = 1e-4  # logits this close to each other may swap places through rounding
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-odd-heads": {"family": "llama", "num_attention_heads": 3, "num_key_value_heads": 3},
    "llama-one-kv-head": {
        "family": "llama",
        "hidden_size": 60,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 24,
    },
    "llama-3.1-rope-tied": {"family": "llama", "rope_parameters": LLAMA3_ROPE, "tied": True},
    "llama-linear-rope-biases": {
        "family": "llama",
        "rope_parameters": LINEAR_ROPE,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen2-tied": {"family": "qwen2", "tied": True, "num_attention_heads": 7, "num_key_value_heads": 1},
    "qwen2-yarn-sharded": {"family": "qwen2", "rope_parameters": YARN_ROPE, "shard_size": "50KB"},
    "qwen2-window-in-some-layers": {"family": "qwen2", **QWEN_WINDOW},
    "qwen3": {"family": "qwen3", "head_dim": 40, "num_attention_heads": 3, "num_key_value_heads": 1},
    "qwen3-tied-biases": {"family": "qwen3", "tied": True, "attention_bias": True, **QWEN_WINDOW},
    "mistral-window": {"family": "mistral", "sliding_window": 37, "head_dim": 20},
    "mistral-no-window-tied": {"family": "mistral", "sliding_window": None, "tied": True},
}


def reference(folder: Path, dtype: torch.dtype) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def reference_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, VOCABULARY, length).tolist()


@pytest.fixture(params=list(CHECKPOINTS), scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), **CHECKPOINTS[request.param])


def test_prefill_logits_and_greedy_tokens(folder: Path) -> None:
    """Whole and chunked prefill, then 24 tokens by decode, against one forward over all of it."""
    theirs, ours = reference(folder, torch.float32), load_model(folder)
    for length, chunk in ((1, 1000), (2, 1000), (13, 5), (100, 1000), (333, 1000), (333, 64)):
        bench, tokens = Bench(ours), prompt(length)
        bench.open(1, tokens)
        produced = bench.generate(1, tokens, 1, chunk)
        expected = reference_logits(theirs, tokens)[-1]
        assert (bench.recorder.logits[0] - expected).abs().max() < CLOSE
        for position in range(length, length + 23):
            produced += bench.run(Slice(1, position, 1))
        rows = reference_logits(theirs, tokens + produced)[length - 1 : -1]
        best = rows.topk(2, dim=-1)
        clear = best.values[:, 0] - best.values[:, 1] > CLOSE
        assert clear.sum() >= 20
        assert torch.equal(best.indices[clear, 0], torch.tensor(produced)[clear])
        assert (bench.recorder.logits[0] - rows[-1]).abs().max() < CLOSE


def test_bfloat16_is_as_close_to_float32_as_transformers_is(folder: Path) -> None:
    exact, theirs = reference(folder, torch.float32), reference(folder, torch.bfloat16)
    with torch.no_grad():
        for parameter in exact.parameters():  # the same rounded weights, but not rounded rotary frequencies
            parameter.copy_(parameter.bfloat16())
    bench, tokens = Bench(load_model(folder, dtype="bfloat16")), prompt(200)
    ours = []
    for start in range(0, 200, 40):
        bench.open(0, tokens)  # sampling wrote over the next token of the prompt
        bench.run(Slice(0, start, 40))
        ours.append(bench.recorder.logits[0])
    rows = torch.arange(39, 200, 40)
    truth = reference_logits(exact, tokens)[rows]
    their_error = (reference_logits(theirs, tokens)[rows] - truth).square().mean().sqrt()
    our_error = (torch.stack(ours) - truth).square().mean().sqrt()
    assert our_error < 1.25 * their_error


def test_plain_linears_give_the_same_logits(folder: Path) -> None:
    logits = []
    for pack in (True, False):
        bench = Bench(load_model(folder, pack=pack))
        bench.open(0, prompt(50))
        bench.run(Slice(0, 0, 50))
        logits.append(bench.recorder.logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, YARN_ROPE, {**YARN_ROPE, "truncate": False}, LINEAR_ROPE])
def test_rope_frequencies(rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**{**SHAPE, "head_dim": 128, "rope_parameters": dict(rope)})
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    spec = ModelSpec.from_config({"architectures": ["LlamaForCausalLM"], **config.to_dict()})
    frequencies, our_factor = rope_frequencies(spec)
    assert our_factor == pytest.approx(factor)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
