"""Prices of groups of kernels, tabulated so that a look-up takes about a microsecond.

A `Load` is what a step, or a part of one, costs on some units and how that changes when memory or compute
get slower. Loads add up: the kernels of a step run one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from semipd.execute.cost_surface import Demand, Grid, Kernel, rising
from semipd.execute.device_file import DeviceFile

_EXACT = 16  # positions of the token grid that are whole numbers of tokens; then eight to an octave
_EXACT_LOG = math.log2(_EXACT)
_OCTAVES = 14  # beyond them: up to 256K tokens in one step
_TALLEST, _WIDEST = 20, 26  # log2 of the longest reach and of the most rows that attention is tabulated for


class Load(NamedTuple):
    """Seconds of a piece of work on its units; how many more it takes when memory, or compute, runs at
    half speed; bytes it moves and FLOPs (at bfloat16's pace) it computes, on one device."""

    seconds: float
    memory_slope: float
    compute_slope: float
    moved: float
    flops: float


# Inside the look-ups a load is a plain tuple: making a named one takes as long as the rest.
Numbers = tuple[float, float, float, float, float]
Timing = tuple[float, float, float]  # the first three of them; the others are the same on any units
# A place on a curve of the amount: grid point at or below, share of the way to the next one (above the
# grid: -1, and how many times the last one), bytes moved, FLOPs.
Place = tuple[int, float, float, float]
# A piece of attention: how far the fit is from the roofline; seconds to start, of compute and of memory on
# the whole device; FLOPs; bytes moved.
Piece = tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class Item:
    """A kernel that runs `count` times per step. fixed: its time does not depend on units (a collective).
    Without a kernel it is plain memory traffic that starts in `overhead` seconds."""

    name: str
    count: float
    demand: Callable[[float], Demand]
    kernel: Kernel | None = None
    overhead: float = 0.0
    fixed: bool = False

    def whole_seconds(self, device: DeviceFile, amount: float) -> float:
        """One run on the whole device, as fitted."""
        demand = self.demand(amount)
        kernel = self.kernel or Kernel(self.overhead, ())
        bandwidth = device.memory_bandwidth if self.kernel else device.ceiling_bandwidth
        return kernel.seconds(demand, device.flops_bf16, bandwidth)


class Scale:
    """How a device's kernels scale to fewer units, and the speed that none of them exceeds."""

    def __init__(self, device: DeviceFile, units: float) -> None:
        self.device = device
        self.compute = device.compute.slowdown(units)
        self.memory = device.memory.slowdown(units)

    def load(self, demand: Demand, whole: float, reference: Demand, kernel: Kernel, count: float) -> Load:
        """The load of `count` kernels that take `whole` seconds each for the demand `reference` on all
        units, here for `demand`. Compute and memory slow down by their own curves, overheads do not, and
        nothing is faster than the device's ceilings."""
        device = self.device
        peak = device.flops_bf16 * kernel.compute_share
        bandwidth = device.memory_bandwidth * kernel.memory_share
        known = max(reference.flops / peak, reference.moved / bandwidth) + reference.serial / bandwidth
        factor = whole / (kernel.overhead + known) if whole > 0.0 else 0.0
        compute = demand.flops / peak * self.compute
        memory = demand.moved / bandwidth * self.memory
        serial = demand.serial / bandwidth * self.memory
        moved = demand.moved + demand.serial
        least_compute = demand.flops / device.ceiling_flops * self.compute
        least_memory = moved / device.ceiling_bandwidth * self.memory

        def seconds(slow_memory: float, slow_compute: float) -> float:
            roof = max(compute * slow_compute, memory * slow_memory) + serial * slow_memory
            fitted = factor * (kernel.overhead + roof)
            return max(fitted, least_compute * slow_compute, least_memory * slow_memory)

        now = seconds(1.0, 1.0)
        return Load(
            count * now,
            count * (seconds(2.0, 1.0) - now),
            count * (seconds(1.0, 2.0) - now),
            count * moved,
            count * demand.flops,
        )


def amount_at(position: float) -> float:
    """The amount (tokens, rows) at a position of the grid."""
    if position <= _EXACT - 1:
        return position + 1.0
    return float(2.0 ** (_EXACT_LOG + (position - _EXACT + 1) / 8.0))


class TokenCurve:
    """The load of all kernels whose work follows from one amount, per number of units."""

    def __init__(self, device: DeviceFile, items: Sequence[Item]) -> None:
        self._device = device
        self.items = tuple(items)
        points = _EXACT + 8 * _OCTAVES
        self._amounts = [amount_at(float(index)) for index in range(points)]
        self._whole = [
            rising([[item.whole_seconds(device, amount) for amount in self._amounts]])[0]
            for item in self.items
        ]
        self._tables: dict[int, list[Numbers]] = {}

    def place(self, amount: float) -> Place:
        """Where the amount lies, the same on any units. Between grid points, loads are interpolated
        linearly; above the grid they are proportional."""
        place = amount - 1.0 if amount <= _EXACT else _EXACT - 1 + 8.0 * (math.log2(amount) - _EXACT_LOG)
        table = self._table(self._device.units)
        if place <= 0.0:
            return (0, 0.0, *table[0][3:])
        index = int(place)
        if index >= len(table) - 1:
            factor = amount / self._amounts[-1]
            return -1, factor, table[-1][3] * factor, table[-1][4] * factor
        share = place - index
        if not share:
            return (index, 0.0, *table[index][3:])
        rest = 1.0 - share
        (_, _, _, d, e), (_, _, _, s, t) = table[index : index + 2]
        return index, share, d * rest + s * share, e * rest + t * share

    def at(self, place: Place, units: int) -> Timing:
        """The load there, without what it moves and computes."""
        table = self._tables.get(units) or self._table(units)
        index, share, _, _ = place
        a, b, c, _, _ = table[index]
        if not share:
            return a, b, c
        if index < 0:
            return a * share, b * share, c * share
        rest = 1.0 - share
        p, q, r, _, _ = table[index + 1]
        return a * rest + p * share, b * rest + q * share, c * rest + r * share

    def parts(self, amount: float, units: float) -> dict[str, float]:
        """Seconds by item name, without the grid."""
        result: dict[str, float] = {}
        scale = Scale(self._device, units)
        for item in self.items:
            load = self._item_load(item, amount, item.whole_seconds(self._device, amount), scale)
            result[item.name] = result.get(item.name, 0.0) + load.seconds
        return result

    def _table(self, units: int) -> list[Numbers]:
        """The load at every grid point, on so many units."""
        if units in self._tables:
            return self._tables[units]
        rows = self._tables[units] = []
        scale = Scale(self._device, units)
        for index, amount in enumerate(self._amounts):
            items = zip(self.items, self._whole, strict=True)
            loads = [self._item_load(item, amount, whole[index], scale) for item, whole in items]
            columns = (sum(column) for column in zip(*loads, strict=True))
            seconds, memory_slope, compute_slope, moved, flops = columns
            rows.append((seconds, memory_slope, compute_slope, moved, flops))
        return rows

    def _item_load(self, item: Item, amount: float, whole: float, scale: Scale) -> Load:
        if item.fixed:
            return Load(item.count * whole, 0.0, 0.0, 0.0, 0.0)
        demand = item.demand(amount)
        share = self._device.ceiling_bandwidth / self._device.memory_bandwidth
        kernel = item.kernel or Kernel(item.overhead, (), 1.0, share)
        return scale.load(demand, whole, demand, kernel, item.count)


class Affine:
    """A demand that is affine in (tokens, pairs, context), as attention's is, read off by differences."""

    def __init__(self, demand: Callable[[float, float, float], Demand]) -> None:
        base = demand(1.0, 1.0, 1.0)
        steps = (demand(2.0, 1.0, 1.0), demand(1.0, 2.0, 1.0), demand(1.0, 1.0, 2.0))
        self.flops = tuple(step.flops - base.flops for step in steps)
        self.moved = tuple(step.moved - base.moved for step in steps)
        self.flops_rest = base.flops - sum(self.flops)
        self.moved_rest = base.moved - sum(self.moved)


class Attention:
    """The load of one attention kernel in every layer, from tokens, pairs and context.

    rows_per_token: what the second axis of the fit counts per token. from_context: the first axis is
    context per token (generation), else pairs per token (prompts).
    """

    def __init__(
        self,
        device: DeviceFile,
        kernel: Kernel,
        count: float,
        demand: Callable[[float, float, float], Demand],
        rows_per_token: float,
        from_context: bool,
    ) -> None:
        self._device, self._kernel, self._count = device, kernel, count
        self._rows, self._from_context = rows_per_token, from_context
        self._affine = Affine(demand)
        self._per_flop = 1.0 / (device.flops_bf16 * kernel.compute_share)
        self._per_byte = 1.0 / (device.memory_bandwidth * kernel.memory_share)
        self._paces: dict[int, tuple[float, float, float, float]] = {}
        self._grid = self._make_grid(demand)

    def piece(self, tokens: float, pairs: float, context: float) -> Piece:
        """What `at` needs of the work, the same on any units.

        tokens above 0; pairs at least tokens / 2; context: KV rows read."""
        kernel, affine = self._kernel, self._affine
        reach = (context if self._from_context else pairs) / tokens
        whole = self._grid.seconds(reach, tokens * self._rows)
        by_tokens, by_pairs, by_context = affine.flops
        flops = by_tokens * tokens + by_pairs * pairs + by_context * context + affine.flops_rest
        by_tokens, _, by_context = affine.moved
        moved = by_tokens * tokens + by_context * context + affine.moved_rest
        usual = moved if self._from_context else moved + by_context * (tokens - context)
        start = kernel.overhead
        compute, memory = flops * self._per_flop, moved * self._per_byte
        fitted = usual * self._per_byte
        factor = whole / (start + (compute if compute > fitted else fitted))
        return factor, start * factor, compute, memory, flops, moved

    def traffic(self, piece: Piece) -> tuple[float, float]:
        """Bytes that the piece moves and FLOPs that it computes."""
        return self._count * piece[5], self._count * piece[4]

    def at(self, piece: Piece, units: int) -> Timing:
        """The load of the piece, without its traffic. Comparisons are written out: `max` takes as long as
        all the rest."""
        factor, start, compute, memory, flops, moved = piece
        paces = self._paces.get(units)
        if paces is None:
            paces = self._paces[units] = self._make_paces(units)
        slow_compute, slow_memory, least_flop, least_byte = paces
        compute *= factor * slow_compute
        memory *= factor * slow_memory
        least_compute, least_memory = flops * least_flop, moved * least_byte
        twice_compute, twice_memory = 2.0 * compute, 2.0 * memory
        now = start + (compute if compute > memory else memory)
        slower = start + (compute if compute > twice_memory else twice_memory)
        busier = start + (memory if memory > twice_compute else twice_compute)
        if now < least_memory:  # the device's ceilings bind
            now = least_memory
        if now < least_compute:
            now = least_compute
        # At half speed the other ceiling stays where it was.
        if slower < 2.0 * least_memory or slower < least_compute:
            slower = max(2.0 * least_memory, least_compute)
        if busier < 2.0 * least_compute or busier < least_memory:
            busier = max(2.0 * least_compute, least_memory)
        count = self._count
        return count * now, count * (slower - now), count * (busier - now)

    def _make_paces(self, units: int) -> tuple[float, float, float, float]:
        """(slowdown of compute, of memory, least seconds per FLOP, per byte)."""
        device = self._device
        compute, memory = device.compute.slowdown(units), device.memory.slowdown(units)
        return compute, memory, compute / device.ceiling_flops, memory / device.ceiling_bandwidth

    def _make_grid(self, demand: Callable[[float, float, float], Demand]) -> Grid:
        """Seconds of one kernel for fresh prompts (context = tokens), or for single positions.

        At equal tokens, a longer reach means fewer and longer prompts down to the reach of a single
        prompt, which may be faster; only beyond that it means cached context, which is not."""
        device, step = self._device, 0.5
        first = (-1.0, 0.0)
        rows = []
        for i in range(int((_TALLEST - first[0]) / step) + 1):
            reach = 2.0 ** (first[0] + i * step)
            row = []
            for j in range(int((_WIDEST - first[1]) / step) + 1):
                tokens = 2.0 ** (first[1] + j * step) / self._rows
                context = reach * tokens if self._from_context else tokens
                one = demand(tokens, reach * tokens, context)
                row.append(self._kernel.seconds(one, device.flops_bf16, device.memory_bandwidth))
            rows.append(row)
        since = None
        if not self._from_context:
            single = [j * step + first[1] - math.log2(self._rows) - 1.0 for j in range(len(rows[0]))]
            since = [math.ceil((log - first[0]) / step) for log in single]
        logs = [[math.log2(value) for value in row] for row in rising(rows, since)]
        return Grid(first, step, tuple(tuple(row) for row in logs))
