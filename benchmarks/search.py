"""The rate at which attainment falls below its goal, in as few runs as it takes."""

from __future__ import annotations

from collections.abc import Callable

GRID = 1.025  # rates are nominal * GRID**index, so that ways and seeds are compared at the same ones
GOAL = 0.9
STEP = 3  # grid points, of the first move away from the guess
LOWEST, HIGHEST = -180, 120  # from a hundredth of the nominal rate to twenty times


def goodput_index(attainment: Callable[[int], float], guess: int) -> float:
    """The index, between two neighbouring grid points by interpolation, where `attainment` crosses GOAL.

    It is taken to fall with the index. First strides of growing length from the guess, then bisection: with
    a guess within a stride four or five runs. LOWEST or HIGHEST when it crosses nowhere between."""
    low = high = None
    index, stride = guess, STEP
    found: dict[int, float] = {}
    while low is None or high is None:
        found[index] = attainment(index)
        if found[index] >= GOAL:
            low, index = index, index + stride
        else:
            high, index = index, index - stride
        stride *= 2
        if not LOWEST <= index <= HIGHEST:
            return float(min(max(index, LOWEST), HIGHEST))
    while high - low > 1:
        middle = (low + high) // 2
        found[middle] = attainment(middle)
        low, high = (middle, high) if found[middle] >= GOAL else (low, middle)
    return low + (found[low] - GOAL) / (found[low] - found[high])


def rate_at(nominal: float, index: float) -> float:
    """Requests per second of a place on the grid."""
    return float(nominal * GRID**index)
