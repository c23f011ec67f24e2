"""Penalties, biases and log probabilities of the whole engine against transformers: in batches, under
several policies, with chunks, a step ahead, and after preemptions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from semipd.serve.params import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.one_executor import OneModel
from tests.test_parity import CLOSE, LENGTHS, WAYS, some_prompts

TOKENS = 20
BIAS = {7: 3.0, 11: 2.5, 13: -100.0}
RULES: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.3, "prompt_logprobs": 2},
    {"presence_penalty": 1.5, "frequency_penalty": 1.0},
    {"logit_bias": BIAS, "prompt_logprobs": 0},
    {},
    {"repetition_penalty": 0.9, "presence_penalty": -0.5, "frequency_penalty": 2.0, "logit_bias": BIAS},
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneModel]:
    folder = make_checkpoint(tmp_path_factory.mktemp("family"), "qwen3", head_dim=32, num_key_value_heads=1)
    family = OneModel(folder)
    yield family
    family.close()


@pytest.fixture(scope="module")
def reference(family: OneModel) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(family.folder, dtype=torch.float32)


def params_of(index: int) -> SamplingParams:
    rule = RULES[index % len(RULES)]
    return SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=3, **rule)


def penalised(logits: torch.Tensor, prompt: list[int], produced: list[int], rule: SamplingParams) -> Any:
    """The logits of one position as the rule leaves them."""
    logits = logits.double()
    factor = rule.repetition_penalty or 1.0
    for token in {*prompt, *produced}:
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(produced):
        logits[token] -= produced.count(token) * rule.frequency_penalty + rule.presence_penalty
    for token, bias in rule.biases:
        logits[token] += bias
    return logits


@pytest.mark.parametrize(
    "way",
    [
        "semi-pd",
        "chunked-7",
        "preempted",
        pytest.param("preempted, shared", marks=pytest.mark.slow),
        pytest.param("preempted, chunked", marks=pytest.mark.slow),
    ],
)
def test_tokens_and_scores_are_those_of_transformers(family: OneModel, reference: Any, way: str) -> None:
    """Every token is the best of the reference's logits under the rule, every score is the reference's."""
    prompts = some_prompts()
    rules = [params_of(index) for index in range(len(prompts))]
    outputs, preemptions = family.run(prompts, rules, **WAYS[way])
    assert (preemptions > 0) == ("preempted" in way)
    for prompt, output, rule, scores in zip(prompts, outputs, rules, family.scores, strict=True):
        tokens = prompt + output
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits[0]
        expected = logits.log_softmax(dim=-1)
        first = 1 if rule.prompt_logprobs is not None else len(prompt)
        assert [score.position for score in scores] == list(range(first, len(tokens)))
        for score in scores:
            row = expected[score.position - 1]
            assert score.logprob == pytest.approx(float(row[tokens[score.position]]), abs=1e-4)
            best = rule.logprobs if score.position >= len(prompt) else rule.prompt_logprobs
            assert len(score.ids) == best
            assert list(score.logprobs) == pytest.approx(row[list(score.ids)].tolist(), abs=1e-4)
            assert list(score.logprobs) == pytest.approx(row.topk(best).values.tolist(), abs=1e-4)
        for place, token in enumerate(output):
            left = penalised(logits[len(prompt) + place - 1], prompt, output[:place], rule)
            assert float(left[token]) > float(left.max()) - CLOSE, (len(prompt), place)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_greedy_tokens_are_those_of_generate(family: OneModel, reference: Any, penalty: float) -> None:
    prompts = [prompt for prompt, length in zip(some_prompts(), LENGTHS, strict=True) if length < 70]
    rule = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, repetition_penalty=penalty)
    outputs, _ = family.run(prompts, rule, **WAYS["semi-pd"])
    for prompt, output in zip(prompts, outputs, strict=True):
        whole = reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=TOKENS, repetition_penalty=penalty, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert output == whole[0, len(prompt) :].tolist()


def test_drawn_tokens_with_penalties_do_not_depend_on_the_way(family: OneModel) -> None:
    prompts = some_prompts()[:8]
    rules = [
        SamplingParams(
            temperature=0.9, top_p=0.95, seed=seed, max_tokens=TOKENS, ignore_eos=True,
            repetition_penalty=1.2, frequency_penalty=0.7, logit_bias=BIAS,
        )
        for seed in range(8)
    ]  # fmt: skip
    seen = []
    for way in ("semi-pd", "chunked-16", "preempted"):
        together, preemptions = family.run(prompts, rules, **WAYS[way])
        assert family.run([prompts[3]], [rules[3]], **WAYS[way])[0] == [together[3]]
        assert (preemptions > 0) == (way == "preempted")
        seen.append(together)
    assert seen[0] == seen[1] == seen[2]


def test_texts_of_a_schema_do_not_depend_on_the_way(family: OneModel) -> None:
    """Random weights, which know no JSON: all of them valid, alone and beside others, greedy and drawn."""
    schema = {
        "type": "object",
        "properties": {
            "size": {"type": "integer", "minimum": -5, "maximum": 20_000},
            "names": {"type": "array", "items": {"enum": ["fox", "dog", "böse"]}, "maxItems": 2},
        },
        "required": ["size", "names"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "animals", "schema": schema}}
    prompts = [prompt for prompt in some_prompts() if len(prompt) < 120]
    rules = [
        SamplingParams(
            temperature=0.4 * (index % 3), seed=index, max_tokens=250, response_format=form,
            bad_words=["dog"],
        ) if index % 4 else SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        for index in range(len(prompts))
    ]  # fmt: skip
    seen = []
    for way in ("semi-pd", "chunked-16", "preempted"):
        together, preemptions = family.run(prompts, rules, **WAYS[way])
        assert (preemptions > 0) == (way == "preempted")
        seen.append(together)
    assert seen[0] == seen[1] == seen[2]
    assert family.run([prompts[3]], [rules[3]], **WAYS["semi-pd"])[0] == [seen[0][3]]
    for output, rule in zip(seen[0], rules, strict=True):
        if rule.response_format is not None:
            value = json.loads(family.tokenizer.decode(output))
            assert set(value) == {"size", "names"} and -5 <= value["size"] <= 20_000
            assert len(value["names"]) <= 2 and set(value["names"]) <= {"fox", "böse"}
