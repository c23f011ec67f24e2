"""Greedy tokens of the whole engine against transformers, whatever the policy, split, chunk or pool size.

The two may part only where the two best logits lie within `CLOSE`: there rounding decides. From such a
point on the sequences are different texts, so the comparison of that request ends there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from semipd import LLM, SamplingParams
from tests.checkpoints import LLAMA3_ROPE, make_checkpoint

CLOSE = 1e-4
TOKENS = 24
LENGTHS = (1, 2, 3, 5, 15, 16, 17, 33, 64, 100, 171, 256, 333)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "num_attention_heads": 3, "num_key_value_heads": 1},
    "llama3": {"family": "llama", "rope_parameters": LLAMA3_ROPE, "tied": True},
    "qwen2": {"family": "qwen2", "head_dim": 12, "num_attention_heads": 4},
    "qwen3": {"family": "qwen3", "head_dim": 32, "num_key_value_heads": 1, "tied": True},
    "mistral": {"family": "mistral", "sliding_window": 40},
}

# A pool of little more than the longest sequence, in small blocks: what was admitted outgrows it.
WAYS: dict[str, dict[str, Any]] = {
    "semi-pd": {"policy": "semi-pd", "kv_blocks": 512},
    "shared": {"policy": "semi-pd", "split": "shared", "kv_blocks": 512},
    "auto": {"policy": "semi-pd", "split": "auto", "kv_blocks": 512},
    "targets": {"ttft_slo": 0.05, "tpot_slo": 0.002, "kv_blocks": 512},
    "prefill-first": {"policy": "prefill-first", "kv_blocks": 512},
    "chunked-16": {"policy": "chunked", "chunk_tokens": 16, "kv_blocks": 512},
    "chunked-100": {"policy": "chunked", "chunk_tokens": 100, "kv_blocks": 512},
    "no prefix cache": {"policy": "semi-pd", "prefix_cache": False, "kv_blocks": 512},
    "small blocks": {"policy": "semi-pd", "block_size": 3, "kv_blocks": 1000},
    "preempted": {"policy": "semi-pd", "block_size": 4, "kv_blocks": 104},
    "preempted, auto": {"split": "auto", "tpot_slo": 0.01, "block_size": 4, "kv_blocks": 104},
    "preempted, chunked": {"policy": "chunked", "chunk_tokens": 64, "block_size": 4, "kv_blocks": 104},
}

EVERY_WAY = [("llama3", way) for way in WAYS]
EVERY_FAMILY = [(family, way) for family in FAMILIES for way in ("semi-pd", "preempted")]


def some_prompts() -> list[list[int]]:
    """13 prompts; every second one begins like the longest."""
    generator = torch.Generator().manual_seed(7)
    shared = torch.randint(5, 320, (max(LENGTHS),), generator=generator).tolist()
    prompts = []
    for index, length in enumerate(LENGTHS):
        own = torch.randint(5, 320, (length,), generator=generator).tolist()
        prompts.append(shared[: length - 1] + own[-1:] if index % 2 else own)
    return prompts


Reference = list[tuple[list[int], list[float]]]


def reference(folder: Path) -> Reference:
    """Greedy continuation by transformers, and the gap between the two best logits at each step."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: Reference = []
    with torch.inference_mode():
        for prompt in some_prompts():
            tokens, gaps, cache = [], [], None
            step = torch.tensor([prompt])
            for _ in range(TOKENS):
                output = model(step, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                best = output.logits[0, -1].topk(2)
                gaps.append(float(best.values[0] - best.values[1]))
                tokens.append(int(best.indices[0]))
                step = best.indices[:1][None]
            found.append((tokens, gaps))
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Reference]]:
    made: dict[str, tuple[Path, Reference]] = {}

    def get(name: str) -> tuple[Path, Reference]:
        if name not in made:
            folder = make_checkpoint(tmp_path_factory.mktemp(name), **FAMILIES[name])
            made[name] = (folder, reference(folder))
        return made[name]

    return get


@pytest.mark.parametrize(("family", "way"), list(dict.fromkeys(EVERY_WAY + EVERY_FAMILY)))
def test_greedy_tokens_equal(
    family: str, way: str, checkpoint: Callable[[str], tuple[Path, Reference]]
) -> None:
    folder, wanted = checkpoint(family)
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    with LLM(str(folder), dtype="float32", max_model_len=400, **WAYS[way]) as llm:
        outputs = llm.generate(some_prompts(), params)
        preemptions = llm.stats().metrics.preemptions
    for length, output, (tokens, gaps) in zip(LENGTHS, outputs, wanted, strict=True):
        got = output.outputs[0].token_ids
        assert len(got) == TOKENS
        for position, (mine, theirs, gap) in enumerate(zip(got, tokens, gaps, strict=True)):
            if mine != theirs:
                assert gap < CLOSE, f"prompt of {length}, token {position}: {mine}, not {theirs} (by {gap})"
                break
    assert (preemptions > 0) == ("preempted" in way)


def test_sampled_tokens_do_not_depend_on_the_way(
    checkpoint: Callable[[str], tuple[Path, Reference]],
) -> None:
    """Counter-based sampling: a seed names its tokens, alone, in a batch, and recomputed."""
    folder, _ = checkpoint("llama3")
    prompts = some_prompts()[:8]
    params = [
        SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=seed, max_tokens=TOKENS, ignore_eos=True)
        for seed in range(8)
    ]
    seen = []
    for way in ("semi-pd", "chunked-16", "preempted"):
        with LLM(str(folder), dtype="float32", max_model_len=400, **WAYS[way]) as llm:
            together = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
            alone = llm.generate(prompts[3], params[3])[0].outputs[0].token_ids
        assert alone == together[3]
        seen.append(together)
    assert seen[0] == seen[1] == seen[2]
