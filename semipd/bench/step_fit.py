"""Prices of whole steps from measured ones: least squares of the relative error, no price below 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import geometric_mean

import numpy as np
from numpy.typing import NDArray

from semipd.core.types import Work
from semipd.execute.step_profile import DECODES, PRICES, ROWS, TOKENS, features

ENOUGH = 1e-9  # gain from one more price that is none
HELD_OUT = 4  # every so manyth step is left out when the error is estimated


@dataclass(frozen=True)
class Timing:
    """A step and the seconds that it took."""

    work: Work
    seconds: float


@dataclass(frozen=True)
class Fit:
    """Prices in the order of `PRICES`. Errors are relative; held_out: of a second fit without those steps
    that it is judged by (0 when there are too few)."""

    prices: tuple[float, ...]
    median_error: float
    largest_error: float
    held_out: float


def mean_timings(rounds: Iterable[Sequence[Timing]]) -> list[Timing]:
    """Each step once, with the geometric mean of its times: least squares lean to the quicker round."""
    found: dict[Work, list[float]] = {}
    for timings in rounds:
        for timing in timings:
            found.setdefault(timing.work, []).append(timing.seconds)
    return [Timing(work, geometric_mean(seconds)) for work, seconds in found.items()]


def fit_prices(timings: Sequence[Timing]) -> Fit:
    """Fit the steps of one number of units. There must be at least one."""
    prices = _solve(timings)
    errors = _errors(prices, timings)
    held = [timing for index, timing in enumerate(timings) if index % HELD_OUT == 1]
    rest = [timing for index, timing in enumerate(timings) if index % HELD_OUT != 1]
    held_out = float(np.median(_errors(_solve(rest), held))) if len(rest) > len(PRICES) / 2 else 0.0
    return Fit(tuple(prices.tolist()), float(np.median(errors)), float(errors.max()), held_out)


def _errors(prices: NDArray[np.float64], timings: Sequence[Timing]) -> NDArray[np.float64]:
    rows = np.array([features(timing.work) for timing in timings])
    seconds = np.array([timing.seconds for timing in timings])
    found: NDArray[np.float64] = np.abs(rows @ prices / seconds - 1.0)
    return found


def _solve(timings: Sequence[Timing]) -> NDArray[np.float64]:
    """Non-negative least squares: prices enter one by one (the one that helps most), and leave when they
    would become negative (Lawson and Hanson, 1974)."""
    rows = np.array([features(timing.work) for timing in timings])
    rows /= np.array([timing.seconds for timing in timings])[:, None]
    lengths = np.sqrt((rows**2).sum(axis=0))
    seen = lengths > 0.0
    scaled, goal = rows[:, seen] / lengths[seen], np.ones(len(timings))
    found = np.zeros(scaled.shape[1])
    free = np.zeros(len(found), dtype=bool)
    for _ in range(3 * len(found)):
        gain = np.where(free, -np.inf, scaled.T @ (goal - scaled @ found))
        if gain.max() <= ENOUGH:
            break
        free[int(gain.argmax())] = True
        found = _free_prices(scaled, goal, found, free)
    prices = np.zeros(len(PRICES))
    prices[seen] = found / lengths[seen]
    return _continued(prices, seen)


def _free_prices(
    rows: NDArray[np.float64],
    goal: NDArray[np.float64],
    found: NDArray[np.float64],
    free: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """The best values of the free prices, from `found`; those that reach 0 on the way are freed no more."""
    while free.any():
        best = np.zeros(len(found))
        best[free] = np.linalg.lstsq(rows[:, free], goal, rcond=None)[0]
        negative = free & (best <= 0.0)
        if not negative.any():
            return best
        way = float((found[negative] / np.maximum(found[negative] - best[negative], 1e-300)).min())
        found = found + way * (best - found)
        free &= found > 1e-12
        found = np.where(free, found, 0.0)
    return np.zeros(len(found))


def _continued(prices: NDArray[np.float64], seen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Where no step was long enough to say, a token or row costs what the one before it did."""
    for prefix, knots in (("token", TOKENS), ("row", ROWS), ("decode", DECODES)):
        indices = [PRICES.index(f"{prefix}_{knot}") for knot in knots]
        for before, index in pairwise(indices):
            if not seen[index]:
                prices[index] = prices[before]
    return prices
