"""Pictures of a profile: step times over shares of the device, and what the other lane costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from semipd.bench.report import Curve, plot_curves
from semipd.core.types import Slice, Work
from semipd.execute.step_profile import ProfiledCost, StepProfile

PROMPTS = (64, 256, 1024)  # tokens, of a CPU's pictures
BATCHES = (1, 8, 32)
CONTEXT = 256


def plot_measured(folder: Path, found: Mapping[str, Any]) -> None:
    """`prefill.png`, `decode.png` and `beside.png` of what `profile_cuda.measure` returns. Raises
    ConfigError where matplotlib is missing or the folder cannot be written."""
    unit = f"{found['unit_kind']}s"
    prompts = _curves((f"{row['tokens']} tokens", row["units"], row["seconds"]) for row in found["prefill"])
    steps = _curves(
        (f"{row['batch']} x {row['context']}", row["units"], row["seconds"]) for row in found["decode"]
    )
    name = found["device"]
    _plot(folder / "prefill.png", prompts, f"{name}: a prompt", unit)
    _plot(folder / "decode.png", steps, f"{name}: a decode step (batch x context)", unit)
    beside = _curves(
        (f"{lane}, {row['batch']} x {row['context']}", row["decode_units"], row[f"{lane}_slowdown"] / 1e3)
        for row in found["beside"]
        for lane in ("decode", "prefill")
    )
    title, x = f"{name}: beside the other lane", f"{unit} of decode"
    plot_curves(folder / "beside.png", beside, title=title, x=x, y="times as long")


def plot_fitted(folder: Path, steps: StepProfile, unit_kind: str) -> None:
    """`prefill.png` and `decode.png` of a device file's fitted prices. Raises as `plot_measured`."""
    cost, counts = ProfiledCost(steps), sorted(steps.prices)
    prompts = [(f"{tokens} tokens", Work.of([Slice(0, 0, tokens)])) for tokens in PROMPTS]
    batches = [(f"{batch} x {CONTEXT}", Work.decode(batch, batch * CONTEXT)) for batch in BATCHES]
    for name, what, works in (
        ("prefill", "a prompt", prompts),
        ("decode", "a decode step (batch x context)", batches),
    ):
        rows = ((label, units, cost.seconds(work, units)) for label, work in works for units in counts)
        _plot(folder / f"{name}.png", _curves(rows), f"{steps.model}: {what}", f"{unit_kind}s")


def _plot(path: Path, curves: Sequence[Curve], title: str, unit: str) -> None:
    plot_curves(path, curves, title=title, x=unit, y="milliseconds", log_y=True)


def _curves(rows: Any) -> list[Curve]:
    """From (label, units, seconds) in any order: one curve a label, in milliseconds, units rising."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for label, units, seconds in rows:
        found[label].append((units, 1e3 * seconds))
    return [
        (label, [units for units, _ in sorted(points)], [value for _, value in sorted(points)])
        for label, points in found.items()
    ]
