"""Fit a kernel's correction surfaces to measured times: robust, smooth, deterministic. Needs numpy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semipd.execute.cost_surface import Demand, Kernel, Surface

Array = NDArray[np.float64]

ROUNDS = 8  # of reweighting; the errors settle well before
TOLERANCE = 0.03  # relative error below which a residual counts quadratically, above it linearly
BEND = 0.05  # weight of the second differences of a surface against one row's residual
SLOPE = 0.05  # weight of first differences, relative to the second ones: flat where there is no data
BEST = 0.98  # quantile that counts as the best, a few lucky rows aside
HIDDEN_START = 5e-6  # assumed start of a kernel whose measurements show only the host's
BELOW = 0.02  # trust in the plain roofline where the host hides the device


@dataclass(frozen=True)
class Shape:
    """A surface to fit: which features, at most how many knots along each, and how strongly it is drawn
    to zero, against one row's residual."""

    axes: tuple[int, ...]
    knots: tuple[int, ...]
    pull: float = 1e-4


def fit_kernel(
    demand: Demand,
    seconds: Array,
    at_floor: NDArray[np.bool_],
    shapes: Sequence[Shape],
    flops: float,
    bandwidth: float,
    scope: str,
) -> Kernel:
    """The coefficients that explain `seconds` on a device with this peak and bandwidth."""
    overhead = float(np.quantile(seconds, 0.01))
    if at_floor.any():
        overhead = min(overhead, HIDDEN_START)
    compute, memory = _best_shares(demand, seconds, flops, bandwidth)
    target = np.log(seconds / (overhead + roofline(demand, flops * compute, bandwidth * memory)))
    logs = np.log2(np.stack([np.broadcast_to(line, seconds.shape) for line in demand.features], axis=1))
    surfaces = _surfaces(logs, target, at_floor, shapes)
    host: tuple[Surface, ...] = ()
    if at_floor.any():
        coarse = [Shape(shape.axes, tuple(min(most, 9) for most in shape.knots)) for shape in shapes[:1]]
        nothing = np.zeros(int(at_floor.sum()), bool)
        host = _surfaces(logs[at_floor], np.log(seconds[at_floor]), nothing, coarse)
    return Kernel(_short(overhead), surfaces, compute, memory, host, scope)


def _surfaces(
    logs: Array, target: Array, at_floor: NDArray[np.bool_], shapes: Sequence[Shape]
) -> tuple[Surface, ...]:
    frames = [(shape, [_knots(logs[:, a], n) for a, n in _pairs(shape)]) for shape in shapes]
    coefficients = _solve(logs, target, frames, at_floor)
    surfaces, start = [], 0
    for shape, knots in frames:
        size = int(np.prod([len(line) for line in knots]))
        values = coefficients[start : start + size]
        start += size
        lines = tuple(tuple(round(float(knot), 4) for knot in line) for line in knots)
        surfaces.append(Surface(shape.axes, lines, tuple(round(float(value), 3) for value in values)))
    return tuple(surfaces)


def predict(kernel: Kernel, demand: Demand, flops: float, bandwidth: float) -> Array:
    """`Kernel.seconds` for arrays, with the host's floor: what the tables would show."""
    roof = roofline(demand, flops * kernel.compute_share, bandwidth * kernel.memory_share)
    logs = np.log2(np.stack([np.broadcast_to(line, roof.shape) for line in demand.features], axis=1))
    seconds = np.exp(_sum_at(kernel.surfaces, logs)) * (kernel.overhead + roof)
    if kernel.host:
        seconds = np.maximum(seconds, np.exp(_sum_at(kernel.host, logs)))
    return np.asarray(seconds, np.float64)


def _sum_at(surfaces: Sequence[Surface], logs: Array) -> Array:
    total = np.zeros(len(logs))
    for surface in surfaces:
        index, weight = _corners(logs[:, surface.axes], [np.array(line) for line in surface.knots])
        total += (np.array(surface.values)[index] * weight).sum(axis=1)
    return total


def _best_shares(demand: Demand, seconds: Array, flops: float, bandwidth: float) -> tuple[float, float]:
    """Shares of peak and bandwidth that hardly any row exceeds. They decide which of the two bounds a row:
    a kernel that reaches a tenth of the peak is bound by compute ten times earlier."""
    compute = float(np.quantile(demand.flops / flops / seconds, BEST))
    memory = float(np.quantile((demand.moved + demand.serial) / bandwidth / seconds, BEST))
    return _short(min(max(compute, 1e-6), 1.0)), _short(min(max(memory, 1e-6), 1.0))


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def roofline(demand: Demand, flops: float, bandwidth: float) -> Array:
    """Seconds at the peaks."""
    return np.asarray(
        np.maximum(demand.flops / flops, demand.moved / bandwidth) + demand.serial / bandwidth, float
    )


def _pairs(shape: Shape) -> list[tuple[int, int]]:
    return list(zip(shape.axes, shape.knots, strict=True))


def _knots(values: Array, most: int) -> Array:
    """The values themselves where they are few, else evenly spaced."""
    distinct = np.unique(np.round(values, 4))
    if len(distinct) <= most:
        return distinct
    return np.asarray(np.round(np.linspace(distinct[0], distinct[-1], most), 4), np.float64)


def _corners(logs: Array, knots: Sequence[Array]) -> tuple[NDArray[np.int64], Array]:
    """(index, weight) of the 2^d knots around each row, in row-major order of the surface's values."""
    index = np.zeros((len(logs), 1), np.int64)
    weight = np.ones((len(logs), 1))
    for column, line in enumerate(knots):
        if len(line) == 1:
            continue
        below = np.clip(np.searchsorted(line, logs[:, column], side="right") - 1, 0, len(line) - 2)
        share = (logs[:, column] - line[below]) / (line[below + 1] - line[below])
        share = np.clip(share, 0.0, 1.0)[:, None]
        index = index * len(line) + below[:, None]
        index = np.concatenate([index, index + 1], axis=1)
        weight = np.concatenate([weight * (1.0 - share), weight * share], axis=1)
    return index, weight


def _solve(
    logs: Array,
    target: Array,
    frames: Sequence[tuple[Shape, list[Array]]],
    at_floor: NDArray[np.bool_],
) -> Array:
    """Iteratively reweighted least squares with a smoothness penalty. Rows at the host's floor only say
    that the device takes no longer than that."""
    indices, weights, start = [], [], 0
    for shape, knots in frames:
        index, weight = _corners(logs[:, shape.axes], knots)
        indices.append(index + start)
        weights.append(weight)
        start += int(np.prod([len(line) for line in knots]))
    index, weight = np.concatenate(indices, axis=1), np.concatenate(weights, axis=1)
    penalty = _penalty([(shape.pull, [len(line) for line in knots]) for shape, knots in frames], start)
    trust: Array = np.ones(len(target))
    aim = target
    solution: Array = np.zeros(start)
    for _ in range(ROUNDS):
        normal, right = penalty.copy(), np.zeros(start)
        for column in range(index.shape[1]):
            scaled = weight * (weight[:, column] * trust)[:, None]
            cell = index[:, column, None] * start + index
            counts = np.bincount(cell.ravel(), scaled.ravel(), minlength=start * start)
            normal += counts.reshape(start, start)
            right += np.bincount(index[:, column], weight[:, column] * trust * aim, minlength=start)
        solution = np.asarray(np.linalg.solve(normal, right), np.float64)
        residual = target - (solution[index] * weight).sum(axis=1)
        trust = np.asarray(TOLERANCE / np.maximum(np.abs(residual), TOLERANCE), np.float64)
        hidden = at_floor & (residual > 0.0)
        trust[hidden] = BELOW
        aim = np.where(hidden, 0.0, target)
    return solution


def _penalty(sizes: Sequence[tuple[float, list[int]]], total: int) -> Array:
    """Squares of the values and of their second and, weakly, first differences along every axis."""
    matrix = np.zeros((total, total))
    start = 0
    for pull, lengths in sizes:
        numbers = start + np.arange(int(np.prod(lengths))).reshape(lengths)
        start += numbers.size
        matrix[numbers.ravel(), numbers.ravel()] += pull
        for axis, length in enumerate(lengths):
            lines = np.moveaxis(numbers, axis, 0).reshape(length, -1)
            for stencil, factor in (((1.0, -2.0, 1.0), BEND), ((-1.0, 1.0), BEND * SLOPE**2)):
                span = len(stencil)
                windows = [lines[offset : length - span + 1 + offset] for offset in range(span)]
                if length < span:
                    continue
                for (a, x), (b, y) in itertools.product(zip(windows, stencil, strict=True), repeat=2):
                    np.add.at(matrix, (a.ravel(), b.ravel()), factor * x * y)
    return matrix
