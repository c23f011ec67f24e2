from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from semipd.core.types import NO_TOKEN
from semipd.model.sampler import SamplingRows, draw, filtered_weights, sample, uniform


def rules(count: int, **fields: Any) -> SamplingRows:
    """`count` rows of one rule; a field may also be given row by row."""
    plain: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": 7,
        "position": np.arange(count),
        "ban_until": 0,
    }
    banned = np.array(fields.pop("ban", ()), dtype=np.int32)
    columns = {
        name: np.broadcast_to(np.asarray(value), count) for name, value in {**plain, **fields}.items()
    }
    return SamplingRows(
        **columns,
        ban_count=np.full(count, banned.size, np.int32),
        ban_tokens=np.tile(np.pad(banned, (0, 4)), (count, 1)),
    )


def logits(count: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def test_temperature_zero_takes_the_best() -> None:
    rows = logits(5, 100)
    assert sample(rows, rules(5, temperature=0.0)) == rows.argmax(-1).tolist()


def test_the_first_of_equal_bests_is_taken_in_any_company() -> None:
    """bfloat16 logits tie often; which one wins must not depend on the batch."""
    row = torch.zeros(1, 3000)
    row[0, [40, 7, 2999]] = 2.0
    assert sample(row.clone(), rules(1, temperature=0.0)) == [7]
    assert sample(row.repeat(9, 1), rules(9, temperature=0.0)) == [7] * 9


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 positions; 30 degrees of freedom exceed 60 about once in a thousand seeds."""
    row = logits(1, 31, scale=1.0)
    count = 20_000
    drawn = sample(row.repeat(count, 1), rules(count, temperature=0.8))
    expected = (row[0].double() / 0.8).softmax(-1).numpy() * count
    observed = np.bincount(drawn, minlength=31)
    assert ((observed - expected) ** 2 / expected).sum() < 60


def test_neighbouring_seeds_and_positions_are_independent() -> None:
    """A weak mix would correlate streams of requests whose seeds are 0, 1, 2, ..."""
    numbers = np.array([[uniform(seed, position) for position in range(200)] for seed in range(200)])
    assert abs(numbers.mean() - 0.5) < 0.005
    for one, two in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):
        assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.02
    assert uniform(-1, 5) != uniform(1, 5)


def test_a_row_does_not_depend_on_the_batch() -> None:
    count, vocabulary = 12, 5000
    rows = logits(count, vocabulary)
    rule = rules(
        count,
        temperature=np.linspace(0.3, 2.0, count),
        top_p=np.linspace(0.5, 1.0, count),
        top_k=np.arange(count) * 20,
        seed=np.arange(count) * 31,
    )
    together = sample(rows.clone(), rule)
    order = np.random.default_rng(0).permutation(count)
    shuffled = sample(rows[torch.from_numpy(order)], _pick(rule, order))
    assert [together[i] for i in order] == shuffled
    for i in range(count):
        assert sample(rows[i : i + 1].clone(), _pick(rule, np.array([i]))) == [together[i]]


def _pick(rule: SamplingRows, order: np.ndarray) -> SamplingRows:
    by_row = ("adjustments", "masks")
    return SamplingRows(
        **{name: column[order] for name, column in vars(rule).items() if name not in by_row}
    )


def test_a_mask_rules_out_the_best_and_may_leave_nothing() -> None:
    """Of the masked row alone; NaN is still an error, since no mask explains it."""
    rows = logits(4, 100)
    expected = rows.argmax(-1).tolist()
    masks = {row: np.ones(100, np.bool_) for row in (1, 2)}
    masks[1][expected[1]] = False
    masks[2][:] = False
    second = rows[1].argsort(descending=True)[1].item()
    rule = replace(rules(4, temperature=np.array([0.0, 0.0, 1.0, 0.0])), masks=masks)
    assert sample(rows.clone(), rule) == [expected[0], second, NO_TOKEN, expected[3]]
    masks[1][:], masks[1][7] = False, True
    assert sample(rows.clone(), replace(rule, temperature=np.full(4, 2.0)))[1:3] == [7, NO_TOKEN]
    rows[1, 7] = float("nan")
    with pytest.raises(FloatingPointError, match="row 1"):
        sample(rows, rule)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 10, 1.0, 0.0),
        (0.7, 0, 0.9, 0.0),
        (1.3, 0, 0.01, 0.0),
        (1.0, 0, 0.999, 0.0),
        (0.8, 0, 1.0, 0.1),
        (0.9, 50, 0.8, 0.02),
        (5.0, 900, 0.97, 0.001),
        (1.0, 5000, 1.0, 0.0),
    ],
)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_filters_keep_what_the_usual_warpers_keep(
    temperature: float, top_k: int, top_p: float, min_p: float, scale: float
) -> None:
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    rows = logits(4, 1000, seed=3, scale=scale)
    scores = TemperatureLogitsWarper(temperature)(None, rows.double())
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    scores = MinPLogitsWarper(min_p)(None, scores) if min_p else scores
    expected = scores.softmax(-1).numpy()
    for row, probabilities in zip(rows.numpy(), expected, strict=True):
        weights = filtered_weights(row, temperature, top_k, top_p, min_p).astype(np.float64)
        assert (weights > 0).tolist() == (probabilities > 0).tolist()
        np.testing.assert_allclose(weights / weights.sum(), probabilities, rtol=1e-4, atol=1e-9)


def test_the_best_token_survives_every_filter() -> None:
    row = logits(1, 50)[0].numpy()
    for top_k, top_p, min_p in ((1, 1.0, 0.0), (0, 0.0, 0.0), (0, 1e-9, 0.0), (0, 1.0, 1.0)):
        assert np.flatnonzero(filtered_weights(row, 1.0, top_k, top_p, min_p)).tolist() == [row.argmax()]


def test_extreme_temperatures_stay_finite() -> None:
    rows = logits(1, 50)
    assert sample(rows.clone(), rules(1, temperature=1e-30)) == [int(rows.argmax())]
    count = 4000
    drawn = sample(rows.repeat(count, 1), rules(count, temperature=1e6))
    assert len(set(drawn)) == 50


def test_banned_tokens_come_back_when_the_ban_ends() -> None:
    rows = logits(1, 30).repeat(4, 1)
    best, second = rows[0].topk(2).indices.tolist()
    rule = rules(4, temperature=[0, 0, 1, 1], position=[8, 9, 8, 9], ban_until=9, ban=[best], top_k=1)
    assert sample(rows, rule) == [second, best, second, best]


def test_draw_never_takes_an_entry_without_weight() -> None:
    weights = np.zeros(1000, np.float32)
    weights[[255, 256, 700]] = 1.0
    almost_one = np.nextafter(1.0, 0.0)
    assert [draw(weights, u) for u in (0.0, 0.34, 0.67, almost_one)] == [255, 256, 700, 700]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error_not_a_token(bad: float, temperature: float) -> None:
    rows = logits(3, 40)
    rows[1, 12] = bad
    with pytest.raises(FloatingPointError, match="row 1"):
        sample(rows, rules(3, temperature=temperature))
    with pytest.raises(FloatingPointError, match="row 0"):
        sample(torch.full((1, 40), -torch.inf), rules(1, temperature=temperature))
