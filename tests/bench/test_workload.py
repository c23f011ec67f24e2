"""Generators: reproducible, lazy, and true to the statistics they claim."""

from __future__ import annotations

import math
import tracemalloc
from itertools import islice

import numpy as np
import pytest

from semipd.bench.lengths import NAMED, Drift, Mix, Pair, Scaled, Uniform, named, parse_side
from semipd.bench.workload import (
    Gamma,
    OnOff,
    Poisson,
    Times,
    generate,
    parse_rate,
    parse_times,
    prefix_keys,
)
from semipd.core.errors import ConfigError
from semipd.trace import Arrival

FIXED = Pair(Uniform(10, 10), Uniform(5, 5))


def times(process: Times, count: int = 20000, seed: int = 1) -> np.ndarray:
    return np.array([row.time for row in generate(process, FIXED, seed, requests=count)])


def test_a_seed_names_one_workload() -> None:
    def rows(seed: int) -> list[Arrival]:
        return list(generate(Poisson(3), named("mixed"), seed, requests=2500))

    assert rows(7) == rows(7)
    assert rows(7) != rows(8)


def test_what_is_read_does_not_change_what_comes() -> None:
    """Draws come in chunks; a shorter run must be the beginning of a longer one."""
    whole = list(generate(Poisson(3), named("drifting"), 7, requests=2500))
    assert list(generate(Poisson(3), named("drifting"), 7, requests=1030)) == whole[:1030]
    assert list(islice(generate(Poisson(3), named("drifting"), 7), 1030)) == whole[:1030]


def test_rates_share_their_random_numbers() -> None:
    """Otherwise a comparison of two rates compares two samples, too."""
    slow = list(generate(Poisson(2), named("sharegpt"), 3, requests=2000))
    fast = list(generate(Poisson(8), named("sharegpt"), 3, requests=2000))
    assert [row.prompt_tokens for row in slow] == [row.prompt_tokens for row in fast]
    np.testing.assert_allclose([row.time for row in slow], [4 * row.time for row in fast])


def test_limits() -> None:
    assert len(list(generate(Poisson(100), FIXED, 0, requests=17))) == 17
    rows = list(generate(Poisson(100), FIXED, 0, duration=20.0))
    assert 1800 < len(rows) < 2200 and rows[-1].time <= 20.0
    assert {row.time for row in generate(Poisson(math.inf), FIXED, 0, requests=9)} == {0.0}


def test_memory_stays_flat() -> None:
    stream = generate(Poisson(3), named("sharegpt"), 1)
    tracemalloc.start()
    for _ in islice(stream, 30000):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


@pytest.mark.parametrize(("process", "cv"), [(Poisson(4), 1.0), (Gamma(4, 3.0), 3.0), (Gamma(4, 0.3), 0.3)])
def test_gaps_have_the_rate_and_the_variation_asked_for(process: Times, cv: float) -> None:
    gaps = np.diff(times(process, 60000))
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize("quiet", [0.0, 0.25])
def test_on_and_off(quiet: float) -> None:
    moments = times(OnOff(5.0, on_seconds=2.0, off_seconds=6.0, quiet=quiet), 40000)
    assert np.all(np.diff(moments) >= 0)
    assert len(moments) / moments[-1] == pytest.approx(5.0, rel=0.03)
    off = np.mean(moments % 8.0 > 2.0)
    assert off == pytest.approx(6 * quiet / (2 + 6 * quiet), abs=0.01)


# mean, 50, 95 and 99% as published
PUBLISHED = {
    "sharegpt": ((496, 432, 970, 1367), (97, 37, 383, 474)),
    "arxiv": ((3832, 3575, 6460, 6894), (200, 181, 357, 443)),
    "longdata": ((5905, 5461, 9292, 9817), (180, 159, 339, 454)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_data_sets_have_the_published_quantiles(name: str) -> None:
    rows = list(generate(Poisson(1), named(name), 5, requests=40000))
    sides = ([row.prompt_tokens for row in rows], [row.output_tokens for row in rows])
    for values, published in zip(sides, PUBLISHED[name], strict=True):
        measured = [np.mean(values), *np.quantile(values, [0.5, 0.95, 0.99])]
        np.testing.assert_allclose(measured, published, rtol=0.03)


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [("sharegpt-251", 251, 97), ("longbench", 1738, 91), ("azure", 1155, 211), ("mooncake", 12035, 343)],
)
def test_data_sets_have_the_stated_means(name: str, prompt: int, output: int) -> None:
    rows = list(generate(Poisson(1), named(name), 5, requests=40000))
    assert np.mean([row.prompt_tokens for row in rows]) == pytest.approx(prompt, rel=0.03)
    assert np.mean([row.output_tokens for row in rows]) == pytest.approx(output, rel=0.03)


def test_every_named_workload_yields_usable_lengths() -> None:
    for lengths in NAMED.values():
        rows = list(generate(Poisson(1), lengths, 0, requests=3000))
        assert min(min(row.prompt_tokens, row.output_tokens) for row in rows) >= 1


def test_a_mix_has_its_shares_and_a_drift_goes_over() -> None:
    short, long = FIXED, Pair(Uniform(9000, 9000), Uniform(5, 5))
    rows = generate(Poisson(1), Mix(short, long, 0.05), 0, requests=40000)
    assert np.mean([row.prompt_tokens > 10 for row in rows]) == pytest.approx(0.05, abs=0.004)
    drifted = [row.prompt_tokens > 10 for row in generate(Poisson(1), Drift(short, long, 4000), 0, 8000)]
    assert np.mean(drifted[:1000]) < 0.2 and np.mean(drifted[1500:2500]) == pytest.approx(0.5, abs=0.05)
    assert all(drifted[4000:])
    assert named("sharegpt+20%arxiv") == Mix(named("sharegpt"), named("arxiv"), 0.2)


def test_a_scaled_length_never_vanishes() -> None:
    rows = list(generate(Poisson(1), Scaled(named("sharegpt"), 0.01), 0, requests=2000))
    assert np.mean([row.prompt_tokens for row in rows]) == pytest.approx(4.96, rel=0.05)
    assert min(row.output_tokens for row in rows) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: parse_times("poison", 1),
        lambda: parse_times("gamma:x", 1),
        lambda: parse_times("gamma:0", 1),
        lambda: parse_times("onoff:2", 1),
        lambda: parse_times("onoff:0,2", 1),
        lambda: parse_times("gamma:2", math.inf),
        lambda: parse_times("poisson", -1),
        lambda: parse_rate("nan"),
        lambda: parse_rate("0"),
        lambda: parse_rate("many"),
        lambda: parse_side("0"),
        lambda: parse_side("20:10"),
        lambda: parse_side("1T"),
        lambda: parse_side("long"),
        lambda: named("sharegtp"),
        lambda: named("sharegpt+1.2.3%arxiv"),
        lambda: named("sharegpt+120%arxiv"),
        lambda: Scaled(FIXED, math.nan),
    ],
)
def test_nonsense_is_refused(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]


def test_an_unknown_workload_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean sharegpt"):
        named("sharegtp")


def test_prefix_keys_follow_the_trace() -> None:
    """A wrong boundary here shows as prefix hits that no real cache would have."""
    one = Arrival(0, 1100, 1, (7, 8, 9))
    other = Arrival(0, 1030, 1, (7, 8, 10))
    keys, others = prefix_keys(one, 16), prefix_keys(other, 16)
    assert len(keys) == 1100 // 16 and len(others) == 1030 // 16
    shared = 1024 // 16
    assert keys[:shared] == others[:shared] and not set(keys[shared:]) & set(others[shared:])
    assert len(set(keys)) == len(keys)
    assert len(prefix_keys(one, 1000)) == 1
    assert prefix_keys(one, 1000) == prefix_keys(Arrival(0, 1024, 1, (7, 8)), 1000)
    assert prefix_keys(Arrival(0, 1100, 1), 16) == []
    assert len(prefix_keys(Arrival(0, 1100, 1, (7,)), 16)) == 32  # only what the trace tells
