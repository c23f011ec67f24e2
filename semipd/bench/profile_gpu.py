"""From the measurements of `execute.profile_cuda` to a device file that `simulate` and `--split auto`
read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from semipd.bench.step_fit import Timing, fit_prices
from semipd.core.types import Slice, Work
from semipd.execute.step_profile import Beside, StepProfile, shape_of, write_profile
from semipd.model.spec import ModelSpec

Point = tuple[float, float]  # units, seconds


def device_entries(
    found: Mapping[str, Any], spec: ModelSpec, itemsize: int, memory_bytes: int
) -> dict[str, Any]:
    """A device file's content. found: what `profile_cuda.measure` returns. Peak and bandwidth are what the
    longest prompt and the single decode step achieved."""
    units = found["units"]
    timings = timings_by_units(found)
    fits = {count: fit_prices(rows) for count, rows in timings.items()}
    shape = shape_of(spec, itemsize)
    prices = {count: fit.prices for count, fit in fits.items()}
    steps = StepProfile(str(found.get("model", "")), shape, prices, tuple(_beside(found["beside"])))
    whole = {kind: [row for row in found[kind] if row["units"] == units] for kind in ("prefill", "decode")}
    prompt = max(whole["prefill"], key=lambda row: row["tokens"])
    single = min(whole["decode"], key=lambda row: row["seconds"])
    legal = sorted({row["units"] for row in found["decode"]})
    return {
        "name": found["device"],
        "flops_bf16": shape["linear_flops"] * prompt["tokens"] / prompt["seconds"],
        "memory_bandwidth": (shape["linear_bytes"] + shape["head_bytes"]) / single["seconds"],
        "memory_bytes": memory_bytes,
        "units": units,
        "unit_kind": found["unit_kind"],
        "unit_step": legal[0],
        "switch_seconds": found["switch_seconds"],
        "compute": found["curves"]["compute"],
        "memory": found["curves"]["memory"],
        "steps": write_profile(steps),
        "source": f"measured on {found['device']}",
        "fit": {str(count): {"median": round(fit.median_error, 4)} for count, fit in fits.items()},
    }


def timings_by_units(found: Mapping[str, Any]) -> dict[int, list[Timing]]:
    """Every measured kind of step on every number of units that decode was measured on. The two sides of a
    split are not the same sizes, so prompts are read off their curve, straight in the logs."""
    curves: dict[Work, list[Point]] = defaultdict(list)
    for row in found["prefill"]:
        curves[Work.of([Slice(0, 0, row["tokens"])])].append((row["units"], row["seconds"]))
    for row in found["decode"]:
        work = Work.decode(row["batch"], row["batch"] * row["context"])
        curves[work].append((row["units"], row["seconds"]))
    counts = sorted({row["units"] for row in found["decode"]} | {found["units"]})
    return {
        count: [Timing(work, at_units(points, count)) for work, points in curves.items()]
        for count in counts
    }


def at_units(points: Sequence[Point], units: float) -> float:
    """Seconds on so many units; outside of what was measured, in proportion to 1 / units below and the
    same above."""
    ordered = sorted(points)
    below = [point for point in ordered if point[0] <= units]
    above = [point for point in ordered if point[0] >= units]
    if not below:
        return ordered[0][1] * ordered[0][0] / units
    if not above:
        return ordered[-1][1]
    (low, slow), (high, fast) = below[-1], above[0]
    if low == high:
        return slow
    return float(slow * (fast / slow) ** (math.log(units / low) / math.log(high / low)))


def _beside(rows: Iterable[Mapping[str, Any]]) -> list[Beside]:
    """Both lanes' slowdowns of each split, of the measured batch that suffers most."""
    worst: dict[tuple[int, int, bool], float] = {}
    for row in rows:
        prefill, decode = row["prefill_units"], row["decode_units"]
        for key, slowdown in (
            ((prefill, decode, True), row["prefill_slowdown"]),
            ((decode, prefill, False), row["decode_slowdown"]),
        ):
            worst[key] = max(worst.get(key, 1.0), slowdown)
    return [Beside(*key, slowdown) for key, slowdown in worst.items()]
