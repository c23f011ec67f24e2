"""Penalties, biases and log probabilities: against their statements elsewhere, and the device's against the
CPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from semipd.model.logprobs import chances
from semipd.model.sampler import Adjustment, SamplingRows, adjust, sample
from semipd.model.sampler_device import (
    DeviceAdjustments,
    DeviceRules,
    adjust_on_device,
    chances_on_device,
    sample_on_device,
)
from tests.model.conftest import one_thread  # noqa: F401  (a fixture)

VOCABULARY = 50


def adjustment(
    seen: list[int],
    prompt_length: int = 0,
    presence: float = 0.0,
    frequency: float = 0.0,
    repetition: float = 1.0,
    bias: dict[int, float] | None = None,
) -> Adjustment:
    numbers = (np.float32(value) for value in (presence, frequency, repetition))
    bias = bias or {}
    return Adjustment(
        np.array(seen, np.int32),
        prompt_length,
        *numbers,
        np.array(list(bias), np.int32),
        np.array(list(bias.values()), np.float32),
    )


def on_device(rules: list[Adjustment], rows: list[int]) -> DeviceAdjustments:
    longest = max(len(rule.seen) for rule in rules) + 3
    width = max(1, *(len(rule.bias) for rule in rules))
    # What another sequence left behind in a slot must not count.
    seen = torch.full((len(rules), longest), 7, dtype=torch.int32)
    tokens = torch.zeros((len(rules), width), dtype=torch.int64)
    bias = torch.zeros((len(rules), width))
    for row, rule in enumerate(rules):
        seen[row, : len(rule.seen)] = torch.from_numpy(rule.seen)
        tokens[row, : len(rule.bias)] = torch.from_numpy(rule.bias_tokens)
        bias[row, : len(rule.bias)] = torch.from_numpy(rule.bias)

    def column(name: str) -> torch.Tensor:
        return torch.tensor([float(getattr(rule, name)) for rule in rules])

    return DeviceAdjustments(
        torch.tensor(rows),
        seen,
        torch.tensor([len(rule.seen) for rule in rules]),
        torch.tensor([rule.prompt_length for rule in rules]),
        *map(column, ("presence", "frequency", "repetition")),
        tokens,
        bias,
    )


def logits(rows: int, seed: int = 0, size: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


tokens = st.integers(0, VOCABULARY - 1)


@settings(deadline=None, max_examples=50)
@given(st.lists(tokens, min_size=1, max_size=30), st.floats(0.015625, 100.0, width=32), st.integers(0, 9))
def test_the_repetition_penalty_is_that_of_transformers(seen: list[int], penalty: float, seed: int) -> None:
    row = logits(1, seed)
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([seen]), row.clone())
    adjust(row.numpy()[0], adjustment(seen, len(seen) // 2, repetition=penalty))
    torch.testing.assert_close(row, expected)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(tokens, max_size=30),
    st.integers(0, 30),
    *(st.floats(-2.0, 2.0, width=32),) * 2,
    st.dictionaries(tokens, st.floats(-100.0, 100.0, width=32), max_size=5),
)
def test_other_penalties_follow_the_formula_of_the_api(
    seen: list[int], prompt_length: int, presence: float, frequency: float, bias: dict[int, float]
) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, over produced tokens alone; then the bias."""
    row = logits(1)
    expected = row.double().clone()
    for token in range(VOCABULARY):
        count = seen[prompt_length:].count(token)
        expected[0, token] += bias.get(token, 0.0) - count * frequency - (count > 0) * presence
    adjust(row.numpy()[0], adjustment(seen, prompt_length, presence, frequency, 1.0, bias))
    torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.builds(
            adjustment,
            st.lists(tokens, min_size=1, max_size=20),
            st.integers(0, 20),
            *(st.floats(-2.0, 2.0, width=32),) * 2,
            st.floats(0.015625, 100.0, width=32),
            st.dictionaries(tokens, st.floats(-100.0, 100.0, width=32), max_size=5),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_device_applies_the_same(rules: list[Adjustment]) -> None:
    values = logits(len(rules) + 2)
    expected = values.clone()
    rows = list(range(len(rules) + 1, 1, -1))
    for row, rule in zip(rows, rules, strict=True):
        adjust(expected[row].numpy(), rule)
    adjust_on_device(values, on_device(rules, rows))
    torch.testing.assert_close(values, expected)


def test_both_samplers_adjust_before_they_choose() -> None:
    """A ban outweighs a bias; a row without rules is as it was."""
    values = logits(4, size=1000)
    values[3, 9] = 1.0
    rules = {
        0: adjustment([3], 1, bias={3: 100.0}),
        1: adjustment([5, 5], 0, frequency=2.0, bias={5: 100.0}),
        3: adjustment([9], 0, repetition=100.0, bias={9: 60.0}),
    }
    banned = np.full((4, 1), 3, np.int64)
    rows = SamplingRows(
        *(np.full(4, value, np.float32) for value in (0.7, 0.9)),
        *(np.full(4, 20), np.full(4, 0.01, np.float32)),
        *(np.arange(4), np.full(4, 6), np.full(4, 7), np.ones(4, np.int64)),
        ban_tokens=banned,
        adjustments=rules,
    )
    device = DeviceRules(
        *(torch.from_numpy(column) for column in (rows.temperature, rows.top_p, rows.min_p)),
        *(torch.from_numpy(column) for column in (rows.top_k, rows.seed, rows.position, banned)),
        torch.ones(4, dtype=torch.bool),
        filtered=True,
        adjustments=on_device(list(rules.values()), list(rules)),
    )
    chosen = sample(values.clone(), rows)
    assert chosen[1] == 5 and chosen[0] != 3 and chosen[3] == 9
    assert sample_on_device(values.clone(), device).tolist() == chosen
    assert sample_on_device(values.bfloat16(), device).tolist()[1] == 5


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_log_probabilities_are_those_of_torch(rows: int) -> None:
    values = logits(rows, size=3000)
    expected = values.double().log_softmax(dim=1)
    wanted = [(7 * row) % 3000 for row in range(rows)]
    counts = [row % 21 for row in range(rows)]
    found = chances(values, wanted, counts)
    told = chances_on_device(values, torch.tensor(wanted), 20)
    for row, (logprob, ids, best) in enumerate(found):
        assert logprob == pytest.approx(float(expected[row, wanted[row]]), abs=1e-5)
        top = expected[row].topk(counts[row])
        assert list(ids) == top.indices.tolist()
        assert best == pytest.approx(top.values.tolist(), abs=1e-5)
        assert told[row, : 1 + counts[row]].tolist() == pytest.approx([logprob, *best], abs=1e-5)
        assert told[row, 21 : 21 + counts[row]].tolist() == list(ids)


def test_the_best_token_has_the_largest_number_bit_for_bit() -> None:
    values = logits(200, size=1000)
    best = values.argmax(dim=1)
    for logprob, _, top in chances(values, best.tolist(), [3] * 200):
        assert logprob == top[0]
    told = chances_on_device(values, best, 3)
    assert torch.equal(told[:, 0], told[:, 1])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 2000), st.integers(0, 30), st.integers(1, 40), st.integers(0, 9))
def test_the_best_come_in_order_and_the_first_of_equals_first(
    size: int, count: int, levels: int, seed: int
) -> None:
    """Equal logits are common in bfloat16."""
    values = np.random.default_rng(seed).integers(0, levels, size).astype(np.float32)
    ((_, ids, _),) = chances(torch.from_numpy(values)[None], [0], [count])
    assert list(ids) == sorted(range(size), key=lambda token: (-values[token], token))[:count]


def test_a_row_is_scored_alike_in_any_company_and_on_any_threads() -> None:
    values = logits(9, size=20_000)
    together = chances(values, [5] * 9, [4] * 9)
    torch.set_num_threads(2)
    assert [chances(values[row : row + 1], [5], [4])[0] for row in range(9)] == together


def test_more_alternatives_than_the_vocabulary_has() -> None:
    ((_, ids, _),) = chances(logits(1, size=3), [0], [20])
    assert len(ids) == 3
    assert chances_on_device(logits(1, size=3), torch.tensor([0]), 20).shape == (1, 7)


def test_what_is_not_finite_is_no_score() -> None:
    values = logits(2)
    values[1, 3] = float("nan")
    with pytest.raises(FloatingPointError):
        chances(values, [0, 0], [1, 1])
    assert chances_on_device(values, torch.tensor([0, -1]), 1)[:, 0].isnan().tolist() == [False, True]
