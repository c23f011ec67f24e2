"""Smooth corrections over logarithmic axes, and how one kernel's time follows from them.

A kernel takes `exp(correction) * (overhead + max(compute, memory) + serial)` seconds, where compute is
FLOPs over the share of the device's peak that the kernel reaches at best, memory is bytes over the share
of its bandwidth, and serial is bytes that move before or after the main loop. The correction is a sum of
surfaces, each multilinear between knots on log2 axes; `scripts/fit_cost_model.py` fits them to measured
kernels.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Demand(NamedTuple):
    """What one kernel needs. `features` are the coordinates of its correction, all above 0."""

    flops: float
    moved: float  # bytes that compute can hide
    serial: float  # bytes that it cannot
    features: tuple[float, ...]


@dataclass(frozen=True)
class Surface:
    """Multilinear interpolation. `axes`: which features it reads; `knots`: their log2 positions, rising;
    `values`: row-major, the last axis fastest. Outside its knots it stays at its border."""

    axes: tuple[int, ...]
    knots: tuple[tuple[float, ...], ...]
    values: tuple[float, ...]

    def at(self, logs: Sequence[float]) -> float:
        """The value at log2 coordinates of all features of the operator."""
        corners = [(0, 1.0)]
        for axis, knots in zip(self.axes, self.knots, strict=True):
            below, share = _locate(knots, logs[axis])
            size = len(knots)
            after = [(index * size + below, weight * (1.0 - share)) for index, weight in corners]
            if share > 0.0:
                after += [(index * size + below + 1, weight * share) for index, weight in corners]
            corners = after
        return sum(self.values[index] * weight for index, weight in corners)


def _locate(knots: Sequence[float], value: float) -> tuple[int, float]:
    """(index of the knot at or below, share of the way to the next one), inside the knots."""
    last = len(knots) - 1
    if last == 0 or value <= knots[0]:
        return 0, 0.0
    if value >= knots[last]:
        return last - 1, 1.0
    below = bisect_right(knots, value) - 1
    return below, (value - knots[below]) / (knots[below + 1] - knots[below])


@dataclass(frozen=True)
class Kernel:
    """The fitted coefficients of one operator at one precision.

    overhead: seconds that every launch takes. compute_share, memory_share: best share of the device's peak
    and bandwidth. host: log of the seconds below which the measurement saw its own
    host and not the device (empty: never); captured graphs do not wait for it, so steps leave it out.
    scope: "kernel", or "module" when the projections around it were measured with it.
    """

    overhead: float
    surfaces: tuple[Surface, ...]
    compute_share: float = 1.0
    memory_share: float = 1.0
    host: tuple[Surface, ...] = ()
    scope: str = "kernel"

    def correction(self, features: Sequence[float]) -> float:
        """What the roofline is multiplied by."""
        logs = [math.log2(value) for value in features]
        return math.exp(sum(surface.at(logs) for surface in self.surfaces))

    def seconds(self, demand: Demand, flops: float, bandwidth: float) -> float:
        """Seconds on a whole device with this peak (FLOP/s) and bandwidth (bytes/s)."""
        flops, bandwidth = flops * self.compute_share, bandwidth * self.memory_share
        roof = max(demand.flops / flops, demand.moved / bandwidth) + demand.serial / bandwidth
        return self.correction(demand.features) * (self.overhead + roof)


@dataclass(frozen=True)
class Grid:
    """log2 of a kernel's seconds over two log2 axes with even steps, for cheap look-ups."""

    first: tuple[float, float]
    step: float
    rows: tuple[tuple[float, ...], ...]

    def seconds(self, along: float, across: float) -> float:
        """Seconds at the two features (not their logs); outside the grid, those of its border."""
        rows, step = self.rows, self.step
        x = (math.log2(along) - self.first[0]) / step
        y = (math.log2(across) - self.first[1]) / step
        i, j = int(x), int(y)
        if not (x >= 0.0 and y >= 0.0 and i < len(rows) - 1 and j < len(rows[0]) - 1):
            i, x = _clip(x, len(rows))
            j, y = _clip(y, len(rows[0]))
        x -= i
        y -= j
        low, high = rows[i], rows[i + 1]
        left = low[j] + (high[j] - low[j]) * x
        right = low[j + 1] + (high[j + 1] - low[j + 1]) * x
        return float(2.0 ** (left + (right - left) * y))


def _clip(position: float, size: int) -> tuple[int, float]:
    inside = min(max(position, 0.0), size - 1.0)
    return min(int(inside), size - 2), inside


def rising(
    rows: Sequence[Sequence[float]], since: Sequence[int] | None = None
) -> tuple[tuple[float, ...], ...]:
    """The smallest table above this one that falls neither along a row, nor down a diagonal, nor down
    column j from row `since[j]` on (the first, by default): more work never takes less time, whatever
    noise the fit has followed."""
    table = [list(row) for row in rows]
    for i, row in enumerate(table):
        for j in range(len(row)):
            if j:
                row[j] = max(row[j], row[j - 1])
            if i and j:
                row[j] = max(row[j], table[i - 1][j - 1])
            if i and (since is None or i > since[j]):
                row[j] = max(row[j], table[i - 1][j])
    return tuple(tuple(row) for row in table)
