"""The model in the box through the engine: a wrong KV block shows as a wrong answer.

Recall questions of mixed lengths, 32 at once, several about the same remembered pairs (so that prefixes are
shared), under every policy and with a pool that forces preemption: the answers are those of a solo run.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from semipd import LLM, SamplingParams
from semipd.box import format as box_format
from semipd.box import tasks as box_tasks
from semipd.model.folder import default_model

WAYS: dict[str, dict[str, Any]] = {
    "semi-pd": {"policy": "semi-pd", "kv_blocks": 2048},
    "shared": {"policy": "semi-pd", "split": "shared", "kv_blocks": 2048},
    "prefill-first": {"policy": "prefill-first", "kv_blocks": 2048},
    "chunked": {"policy": "chunked", "chunk_tokens": 96, "kv_blocks": 2048},
    "no prefix cache": {"policy": "semi-pd", "prefix_cache": False, "kv_blocks": 2048},
    "preempted": {"policy": "semi-pd", "block_size": 1, "kv_blocks": 1100},
}
# Going on after the answer fills the pool, and gives more tokens to compare.
PARAMS = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)

Ids = list[int]


def questions() -> tuple[list[Ids], list[Ids]]:
    """32 prompts of up to 1,024 tokens, four about each set of pairs, and their answers with the end."""
    rng = Random(5)
    prompts, answers = [], []
    for length in (64, 100, 160, 256, 400, 512, 800, 1024):
        remembered = box_tasks.recall_of_length(rng, length - 3, questions=4)
        opening, values = box_tasks.recall_opening(remembered.pairs), dict(remembered.pairs)
        for name, phrase in zip(remembered.asked, remembered.phrases, strict=True):
            question = box_tasks.Question("recall", opening + phrase.format(name), values[name], name)
            prompt, answer = box_format.encode_turn(question)
            prompts.append(prompt)
            answers.append(answer)
    return prompts, answers


def right(outputs: list[Ids], answers: list[Ids]) -> float:
    """Share of the outputs that begin with the answer and its end."""
    pairs = zip(outputs, answers, strict=True)
    return sum(output[: len(answer)] == answer for output, answer in pairs) / len(answers)


@pytest.fixture(scope="module")
def solo() -> list[Ids]:
    """The answers one at a time, without a prefix cache."""
    with LLM(str(default_model()), dtype="float32", prefix_cache=False, kv_blocks=512) as llm:
        return [llm.generate(prompt, PARAMS)[0].outputs[0].token_ids for prompt in questions()[0]]


def test_the_solo_run_recalls(solo: list[Ids]) -> None:
    assert right(solo, questions()[1]) >= 0.9


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_the_solo_run(way: str, solo: list[Ids]) -> None:
    prompts, answers = questions()
    with LLM(str(default_model()), dtype="float32", max_model_len=1088, **WAYS[way]) as llm:
        outputs = llm.generate(prompts, PARAMS)
        stats = llm.stats()
    together = [output.outputs[0].token_ids for output in outputs]
    assert right(together, answers) == right(solo, answers)
    assert together == solo
    assert (stats.metrics.preemptions > 0) == (way == "preempted")
    if way == "semi-pd":
        assert stats.prefix_hits > 0, "questions about the same pairs share their prefix"
