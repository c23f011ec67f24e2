"""Driver of transformers: `generate` on one batch of equal lengths, or its continuous batching for a mix.

Settings: {"folder": ..., "dtype": "bfloat16", "threads": 2, "continuous": false, "tokens": in the cache}.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import torch
from answer import Generate, Steps, answer, settings
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, StoppingCriteria

PAGE = 256  # the best of 32 and 256


class Clock(StoppingCriteria):
    """Stops nothing; notes when each step ended."""

    def __init__(self) -> None:
        self.steps: Steps = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.steps.append((time.perf_counter(), len(input_ids)))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def one_batch(model: Any, prompts: list[list[int]], new: list[int]) -> Steps:
    """`generate`: prompts of one length, as many new tokens for each."""
    clock = Clock()
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new[0],
            min_new_tokens=new[0],
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
    return clock.steps


def continuous(manager: Any, prompts: list[list[int]], new: list[int]) -> Steps:
    """All at once into a manager that runs; each with its own number of new tokens."""
    for prompt, count in zip(prompts, new, strict=True):
        manager.add_request(prompt, max_new_tokens=count, eos_token_id=-1, record_timestamps=True)
    moments: list[float] = []
    left = len(prompts)
    while left:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("the generation thread ended")
        elif result.is_finished():
            if result.error:
                raise RuntimeError(result.error)
            left -= 1
            moments += result.timestamps
    return [(moment, 1) for moment in sorted(moments)]


def start() -> tuple[Generate, dict[str, object]]:
    given: dict[str, Any] = settings()
    torch.set_num_threads(given["threads"])
    kind = {"attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(
        given["folder"], dtype=getattr(torch, given["dtype"]), **kind
    ).eval()
    facts: dict[str, object] = {"engine": "transformers", "version": version("transformers")}
    if not given["continuous"]:
        return lambda prompts, new: one_batch(model, prompts, new), facts
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=given["tokens"] // PAGE,
            max_batch_tokens=512,
            allow_block_sharing=False,
        ),
    )
    manager.start()
    return lambda prompts, new: continuous(manager, prompts, new), facts


if __name__ == "__main__":
    answer(start)
