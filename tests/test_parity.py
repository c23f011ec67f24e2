"""Greedy tokens of the whole engine against transformers: every family under every policy, split, chunk
and pool size.

The two may part only where the two best logits lie within `CLOSE`: there rounding decides. From such a
point on the sequences are different texts, so the comparison of that request ends there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from semipd import LLM, SamplingParams
from semipd.execute.cores import available_cores
from tests.checkpoints import LLAMA3_ROPE, make_checkpoint
from tests.one_executor import OneModel

CLOSE = 1e-4
TOKENS = 24
LENGTHS = (100, 1, 171, 2, 64, 3, 333, 5, 16, 256, 15, 33, 17)  # what fits a small pool is no sorted list

# Odd numbers of heads, one KV head, heads that do not divide the hidden size, tied and not.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "num_attention_heads": 3, "num_key_value_heads": 1},
    "llama3": {"family": "llama", "rope_parameters": LLAMA3_ROPE, "tied": True},
    "qwen2": {"family": "qwen2", "num_attention_heads": 7, "num_key_value_heads": 1, "tied": True},
    "qwen3": {"family": "qwen3", "head_dim": 32, "num_key_value_heads": 1},
    "mistral": {
        "family": "mistral",
        "sliding_window": 17,
        "head_dim": 20,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
    },
}
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "llama, tied": {
        "family": "llama",
        "hidden_size": 60,
        "head_dim": 24,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "tied": True,
    },
    "llama3, one KV head": {"family": "llama", "rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1},
    "qwen2, untied": {"family": "qwen2", "head_dim": 12},
    "qwen2, window in some layers": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
    },
    "qwen3, tied": {
        "family": "qwen3",
        "head_dim": 40,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "tied": True,
    },
    "mistral, tied": {"family": "mistral", "sliding_window": 40, "num_key_value_heads": 1, "tied": True},
    "mistral, no window": {"family": "mistral", "sliding_window": None},
}

# A pool of little more than the longest sequence, in small blocks: what was admitted outgrows it.
SMALL: dict[str, Any] = {"block_size": 3, "kv_blocks": 120}
TARGETS: dict[str, Any] = {"ttft_slo": 0.05, "tpot_slo": 0.002}
WAYS: dict[str, dict[str, Any]] = {
    "semi-pd": {"policy": "semi-pd"},
    "static:1,1": {"split": "static:1,1"},
    "static:2,1": {"split": "static:2,1"},
    "static:1,2": {"split": "static:1,2"},
    "shared": {"split": "shared"},
    "paper": {"split": "paper", **TARGETS},
    "auto": {"split": "auto"},
    "targets": TARGETS,
    "prefill-first": {"policy": "prefill-first"},
    "chunked-7": {"policy": "chunked", "chunk_tokens": 7},
    "chunked-16": {"policy": "chunked", "chunk_tokens": 16},
    "chunked-100": {"policy": "chunked", "chunk_tokens": 100},
    "chunked-256": {"policy": "chunked"},
    "chunked-64, pieces of 24": {"policy": "chunked", "chunk_tokens": 64, "long_prompt_threshold": 24},
    "no prefix cache": {"prefix_cache": False},
    "small blocks": {"block_size": 3},
    "conservative": {"admission": "conservative", **SMALL},
    "past-future": {"admission": "past-future"},
    "preempted": SMALL,
    "preempted, shared": {"split": "shared", **SMALL},
    "preempted, auto": {"split": "auto", "tpot_slo": 0.01, **SMALL},
    "preempted, prefill-first": {"policy": "prefill-first", **SMALL},
    "preempted, chunked": {"policy": "chunked", "chunk_tokens": 64, **SMALL},
    "preempted, no prefix cache": {"prefix_cache": False, **SMALL},
}


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


def assert_equal(outputs: list[list[int]], wanted: Reference) -> None:
    for length, got, (tokens, gaps) in zip(LENGTHS, outputs, wanted, strict=True):
        assert len(got) == TOKENS
        for position, (mine, theirs, gap) in enumerate(zip(got, tokens, gaps, strict=True)):
            if mine != theirs:
                assert gap < CLOSE, f"prompt of {length}, token {position}: {mine}, not {theirs} (by {gap})"
                break


class Family(OneModel):
    """A checkpoint, what transformers makes of it, and engines on it."""

    @functools.cached_property
    def wanted(self) -> Reference:
        return reference(self.folder)


EVERY_FAMILY = [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAMILIES)]


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    shape = {**FAMILIES, **MORE_FAMILIES}[request.param]
    folder = make_checkpoint(tmp_path_factory.mktemp("family"), **shape)
    family = Family(folder)
    yield family
    family.close()


@pytest.mark.parametrize("way", list(WAYS))
def test_greedy_tokens_equal(family: Family, way: str) -> None:
    settings = WAYS[way]
    if "2" in settings.get("split", "") and len(available_cores()) < 2:
        pytest.skip("a split of more cores than there are")
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    outputs, preemptions = family.run(some_prompts(), params, **settings)
    assert_equal(outputs, family.wanted)
    assert (preemptions > 0) == ("preempted" in way)


def test_sampled_tokens_do_not_depend_on_the_way(family: Family) -> None:
    """Counter-based sampling: a seed names its tokens, alone, in a batch, and recomputed."""
    prompts = some_prompts()[:8]
    params = [
        SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=seed, max_tokens=TOKENS, ignore_eos=True)
        for seed in range(8)
    ]
    seen = []
    for way in ("semi-pd", "chunked-16", "preempted"):
        together, preemptions = family.run(prompts, params, **WAYS[way])
        assert family.run([prompts[3]], [params[3]], **WAYS[way])[0] == [together[3]]
        assert (preemptions > 0) == (way == "preempted")
        seen.append(together)
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("family", ["llama3"], indirect=True)
def test_the_same_through_llm(family: Family) -> None:
    """With processes, threads and a pool of its own."""
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    with LLM(str(family.folder), device="cpu", dtype="float32", max_model_len=360, **SMALL) as llm:
        outputs = llm.generate(some_prompts(), params)
    assert_equal([output.outputs[0].token_ids for output in outputs], family.wanted)
