"""Tokens that compiled kernels choose (csrc/draw.inc), against the same rules in numpy."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from semipd.core.types import NO_TOKEN
from semipd.model.kernels import AMX, AVX2, AVX512, BASELINE, Kernels, load_kernels
from semipd.model.sampler import SamplingRows, sample
from tests.model.conftest import one_thread  # noqa: F401  (a fixture)
from tests.model.test_sampler import logits, rules

BEST = load_kernels()
pytestmark = pytest.mark.skipif(BEST is None, reason="needs compiled kernels")

RULES = tuple(itertools.product((0.0, 0.3, 1.0, 4.0), (0, 1, 7, 5000), (0.0, 0.2, 0.9, 1.0), (0.0, 0.02)))


@pytest.fixture(scope="module", params=[BASELINE, AVX2, AVX512, AMX])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found = load_kernels(request.param)
    assert found is not None
    if found.level != request.param:
        pytest.skip(f"needs level {request.param}")
    return found


def every_rule(count: int) -> SamplingRows:
    """`count` rows of each of `RULES`."""
    columns = np.repeat(np.array(RULES), count, axis=0).T
    names = ("temperature", "top_k", "top_p", "min_p")
    types = (np.float32, np.int32, np.float32, np.float32)
    fields = {name: column.astype(kind) for name, column, kind in zip(names, columns, types, strict=True)}
    return rules(len(RULES) * count, **fields)


@pytest.mark.parametrize(("vocabulary", "scale"), [(1, 1.0), (31, 1.0), (1000, 0.1), (6001, 4.0)])
def test_tokens_are_those_of_numpy(kernels: Kernels, vocabulary: int, scale: float) -> None:
    """Weights differ in their last bits, so one draw in many may fall to the other side of an edge."""
    rule = every_rule(3)
    rows = logits(len(rule.seed), vocabulary, scale=scale)
    expected, found = sample(rows.clone(), rule), sample(rows, rule, kernels)
    assert sum(one != other for one, other in zip(expected, found, strict=True)) <= 2
    assert vocabulary < 31 or len(set(found)) > 10


def test_cuts_among_many_equals(kernels: Kernels) -> None:
    """Rounded logits tie, and equals stay or go together, wherever the cut falls among weights' bits."""
    rule = every_rule(3)
    count = len(rule.seed)
    for rows in (
        logits(count, 700).round(),
        torch.zeros(count, 700),
        logits(count, 700).bfloat16().float(),
    ):
        expected = sample(rows.clone(), rule)
        differ = [one != other for one, other in zip(expected, sample(rows, rule, kernels), strict=True)]
        assert sum(differ) <= 2


def test_a_cut_beyond_the_weights_that_are_searched_first(kernels: Kernels) -> None:
    """One weight of 1, whole vectors of small ones: the first sixteen alone would settle neither rule."""
    row = torch.full((1, 4096), -12.0)
    row[0, :16] = 0.0
    count = 400
    for rule in (rules(count, top_k=2000), rules(count, top_k=17), rules(count, top_p=0.9985)):
        rows = row.repeat(count, 1)
        rows[:, 16:] += torch.linspace(0, 3, 4080)
        expected = sample(rows.clone(), rule)
        differ = [one != other for one, other in zip(expected, sample(rows, rule, kernels), strict=True)]
        assert sum(differ) <= 2


def test_a_row_is_drawn_alike_in_any_company(kernels: Kernels) -> None:
    rule, rows = every_rule(1), logits(len(RULES), 5000)
    alone = sample(rows.clone(), rule, kernels)
    torch.set_num_threads(2)
    try:
        assert sample(rows.clone(), rule, kernels) == alone
    finally:
        torch.set_num_threads(1)
    one = replace(
        rules(1), **{name: getattr(rule, name)[70:71] for name in ("temperature", "top_k", "top_p")}
    )
    one = replace(one, min_p=rule.min_p[70:71], position=rule.position[70:71])
    assert sample(rows[70:71].clone(), one, kernels) == alone[70:71]


def test_what_is_not_finite_is_told(kernels: Kernels) -> None:
    rows = logits(3, 40)
    masks = {1: np.zeros(40, bool)}
    assert sample(rows.clone(), rules(3, temperature=0.5), kernels)[1] != NO_TOKEN
    masked = replace(rules(3, temperature=0.5), masks=masks)
    assert sample(rows.clone(), masked, kernels)[1] == NO_TOKEN
    rows[0, 3] = -np.inf
    sample(rows.clone(), rules(3), kernels)
    for value in (np.nan, np.inf):
        rows[2, 39] = value
        with pytest.raises(FloatingPointError, match="row 2"):
            sample(rows.clone(), rules(3), kernels)
