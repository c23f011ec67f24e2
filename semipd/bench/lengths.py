"""How long prompts and outputs are: fixed, uniform, or like a published data set.

A data set is given by a few quantiles (value at a share of all requests). Between them the logarithm of
the length is linear in the normal score of the share, that is, a log-normal distribution piece by piece;
beyond the outer ones the last piece goes on, cut at `low` and `high`. So the published quantiles are met
exactly. Prompt and output are drawn independently (in the Azure conversation trace their correlation is
-0.11).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

import numpy as np

from semipd.bench.workload import Counts, Lengths
from semipd.core.errors import ConfigError
from semipd.trace import MAX_TOKENS
from semipd.units import parse_size


class Side(Protocol):
    """A distribution of one length."""

    def draw(self, generator: np.random.Generator, count: int) -> Counts: ...


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every whole number from `low` to `high`, equally likely; a fixed length when they are equal."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high <= MAX_TOKENS:
            raise ConfigError(f"lengths from {self.low} to {self.high} are not within 1 to {MAX_TOKENS}")

    def draw(self, generator: np.random.Generator, count: int) -> Counts:
        return generator.integers(self.low, self.high + 1, count)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Piecewise log-normal through (share, length) points; two or more, both rising."""

    points: tuple[tuple[float, float], ...]
    high: int
    low: int = 1

    def draw(self, generator: np.random.Generator, count: int) -> Counts:
        scores = np.array([NormalDist().inv_cdf(share) for share, _ in self.points])
        logs = np.log([length for _, length in self.points])
        slopes = np.diff(logs) / np.diff(scores)
        normal = generator.standard_normal(count)
        piece = np.clip(np.searchsorted(scores, normal) - 1, 0, len(slopes) - 1)
        values = np.exp(logs[piece] + slopes[piece] * (normal - scores[piece]))
        whole: Counts = np.clip(np.rint(values), self.low, self.high).astype(np.int64)
        return whole


@dataclass(frozen=True, slots=True)
class Pair:
    """Prompt and output drawn independently."""

    prompt: Side
    output: Side

    def draw(self, generator: np.random.Generator, first: int, count: int) -> tuple[Counts, Counts]:
        return self.prompt.draw(generator, count), self.output.draw(generator, count)


@dataclass(frozen=True, slots=True)
class Mix:
    """Each request comes from `rare` with probability `share`, else from `common`."""

    common: Lengths
    rare: Lengths
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"a share of {self.share:g} is not between 0 and 1")

    def draw(self, generator: np.random.Generator, first: int, count: int) -> tuple[Counts, Counts]:
        return _choose(self.common, self.rare, np.full(count, self.share), generator, first)


@dataclass(frozen=True, slots=True)
class Drift:
    """Goes over from one distribution to another, linearly during the first `over` requests."""

    before: Lengths
    after: Lengths
    over: int

    def __post_init__(self) -> None:
        if not 1 <= self.over <= 2**40:
            raise ConfigError(f"a drift over {self.over} requests is not within 1 to 2^40")

    def draw(self, generator: np.random.Generator, first: int, count: int) -> tuple[Counts, Counts]:
        progress = np.minimum(np.arange(first, first + count) / self.over, 1.0)
        return _choose(self.before, self.after, progress, generator, first)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Another distribution with every length multiplied by `factor` (a token at least)."""

    lengths: Lengths
    factor: float

    def __post_init__(self) -> None:
        if not 1e-4 <= self.factor <= 1e3:
            raise ConfigError(f"a length scale of {self.factor:g} is not between 0.0001 and 1000")

    def draw(self, generator: np.random.Generator, first: int, count: int) -> tuple[Counts, Counts]:
        prompts, outputs = (
            np.clip(np.rint(side * self.factor), 1, MAX_TOKENS).astype(np.int64)
            for side in self.lengths.draw(generator, first, count)
        )
        return prompts, outputs


def _choose(
    one: Lengths, other: Lengths, share: np.ndarray, generator: np.random.Generator, first: int
) -> tuple[Counts, Counts]:
    """Both are drawn in full, so the choice of one request does not shift the draws of the next."""
    count = len(share)
    pick = generator.random(count) < share
    ones, others = one.draw(generator, first, count), other.draw(generator, first, count)
    return np.where(pick, others[0], ones[0]), np.where(pick, others[1], ones[1])


def parse_side(text: str | int) -> Uniform:
    """One length: "1024", "4K", or "128:1024" for uniform. Raises ConfigError."""
    low, colon, high = str(text).partition(":")
    return Uniform(parse_size(low), parse_size(high if colon else low))


# Data sets. Points at 50, 95 and 99% are published ones (ShareGPT, arXiv summarization and
# LongDataCollections as cut for the Nexus paper, arXiv 2507.06608); the point at 25% (ShareGPT output:
# 75%) is ours, chosen so that the mean agrees with the published mean. `high` is 1.5 times the 99%
# quantile unless the source states a limit.
_SHAREGPT_OUTPUT = Quantiles(((0.5, 37), (0.75, 167), (0.95, 383), (0.99, 474)), 711)
_SHAREGPT = Pair(
    Quantiles(((0.25, 328), (0.5, 432), (0.95, 970), (0.99, 1367)), 2050), _SHAREGPT_OUTPUT
)  # means 496 and 97
_SHAREGPT_SHORT = Pair(
    Quantiles(((0.25, 166), (0.5, 219), (0.95, 491), (0.99, 692)), 1038), _SHAREGPT_OUTPUT
)  # the same shape at the prompt mean of 251 that the semi-PD paper (arXiv 2504.19867) states
_ARXIV = Pair(
    Quantiles(((0.25, 2926), (0.5, 3575), (0.95, 6460), (0.99, 6894)), 10341),
    Quantiles(((0.25, 145), (0.5, 181), (0.95, 357), (0.99, 443)), 665),
)  # means 3832 and 200
_LONGDATA = Pair(
    Quantiles(((0.25, 4791), (0.5, 5461), (0.95, 9292), (0.99, 9817)), 14726),
    Quantiles(((0.25, 124), (0.5, 159), (0.95, 339), (0.99, 454)), 681),
)  # means 5905 and 180
# DistServe (arXiv 2401.09670) gives LongBench's means only, 1738 and 91; the log-normal spreads (0.4 and
# 0.6) are our assumption.
_LONGBENCH = Pair(Quantiles(((0.5, 1604), (0.95, 3097)), 8192), Quantiles(((0.5, 76), (0.95, 204)), 1024))
# MATH-500 problems have 267 characters in the mean, 91 to 1804 with their instruction (as counted by
# EvalScope); at about three characters to a token that is 89 tokens. The length of worked answers
# (622 tokens in the mean) is our assumption.
_MATH = Pair(Quantiles(((0.5, 76), (0.95, 189)), 600, 30), Quantiles(((0.5, 520), (0.95, 1395)), 4096, 32))
# Quantiles at 1, 10, 25, 50, 75, 90, 95 and 99% of the Azure LLM inference trace 2023, conversation
# (CC-BY-4.0; means 1155 and 211) and of the Mooncake conversation trace (Apache-2.0; 12,035 and 343).
_SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_AZURE = Pair(
    Quantiles(tuple(zip(_SHARES, (29, 207, 396, 1020, 1189, 2735, 4083, 4142), strict=True)), 14050, 2),
    Quantiles(tuple(zip(_SHARES, (16, 54, 85, 129, 395, 424, 451, 601), strict=True)), 1000, 7),
)
_MOONCAKE = Pair(
    Quantiles(
        tuple(zip(_SHARES, (894, 964, 2307, 6909, 15367, 27367, 39551, 85400), strict=True)), 126195, 891
    ),
    Quantiles(tuple(zip(_SHARES, (3, 24, 157, 350, 472, 597, 698, 1119), strict=True)), 2000),
)
# 95% chat, 5% long documents: the load that stalls token streams in a unified engine.
_MIXED = Mix(_SHAREGPT, _LONGDATA, 0.05)

NAMED: dict[str, Lengths] = {
    "sharegpt": _SHAREGPT,
    "sharegpt-251": _SHAREGPT_SHORT,
    "longbench": _LONGBENCH,
    "arxiv": _ARXIV,
    "math500": _MATH,
    "longdata": _LONGDATA,
    "azure": _AZURE,
    "mooncake": _MOONCAKE,
    "mixed": _MIXED,
    "drifting": Drift(_MATH, _ARXIV, 2000),
}

_MIX = re.compile(r"^(?P<common>[\w-]+)\+(?P<percent>[0-9.]+)%(?P<rare>[\w-]+)$")


def named(text: str) -> Lengths:
    """A data set by name, or a mix such as "sharegpt+5%longdata". Raises ConfigError."""
    if match := _MIX.match(text):
        try:
            share = float(match["percent"]) / 100
        except ValueError:
            raise ConfigError(f"{match['percent']!r} is not a percentage") from None
        return Mix(named(match["common"]), named(match["rare"]), share)
    if text in NAMED:
        return NAMED[text]
    near = difflib.get_close_matches(text, NAMED, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known ones: {', '.join(NAMED)}"
    raise ConfigError(f"unknown workload {text!r}; {hint}")
