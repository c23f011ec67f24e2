"""A device file made of a GPU's measurements predicts those measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from semipd.bench.profile_gpu import at_units, device_entries, timings_by_units
from semipd.core.types import Slice, Work
from semipd.execute.device_file import read_device
from semipd.execute.step_profile import ProfiledCost, read_profile
from semipd.model.spec import load_spec
from tests.checkpoints import make_checkpoint

UNITS = 132


def seconds(work: Work, units: int) -> float:
    """A device whose prompts scale with units and whose decode steps saturate at 64."""
    prompt = 2e-5 * (work.tokens - work.decodes) * UNITS / units
    return 1e-3 + prompt + (2e-5 * work.decodes + 2e-9 * work.decode_context) * UNITS / min(units, 64)


def profile() -> dict[str, Any]:
    sides = range(8, 125, 8)
    return {
        "device": "test GPU",
        "units": UNITS,
        "unit_kind": "SM",
        "switch_seconds": 1e-5,
        "prefill": [
            {"units": units, "tokens": n, "seconds": seconds(Work.of([Slice(0, 0, n)]), units)}
            for units in (*(UNITS - side for side in sides), UNITS)
            for n in (512, 2048, 8192)
        ],
        "decode": [
            {"units": units, "batch": b, "context": c, "seconds": seconds(Work.decode(b, b * c), units)}
            for units in (*sides, UNITS)
            for b in (1, 16, 64, 256)
            for c in (1024, 4096)
        ],
        "beside": [
            {"prefill_units": 68, "decode_units": 64, "batch": b, "context": 1024, "tokens": 2048,
             "prefill_slowdown": 1.05, "decode_slowdown": slow}
            for b, slow in ((16, 1.2), (128, 1.4))
        ],
        "curves": {"compute": [[66.0, 2.0], [132.0, 1.0]], "memory": [[32.0, 2.0], [132.0, 1.0]]},
    }  # fmt: skip


def test_the_file_is_one_and_predicts_what_was_measured(tmp_path: Path) -> None:
    spec = load_spec(make_checkpoint(tmp_path, "llama"))
    entries = device_entries(profile(), spec, 2, 10**11)
    device = read_device(entries, "test")
    assert (device.units, device.unit_step, device.unit_kind) == (UNITS, 8, "SM")
    cost = ProfiledCost(read_profile(entries["steps"], UNITS, "test"))
    for work in (Work.of([Slice(0, 0, 2048)]), Work.decode(64, 64 * 4096)):
        for units in (24, 64, UNITS):
            assert cost.seconds(work, units) == pytest.approx(seconds(work, units), rel=0.1)
    step = Work.decode(64, 64 * 1024)
    slowed = cost.seconds(step, 64, Work.of([Slice(0, 0, 512)]), 68) / cost.seconds(step, 64)
    assert slowed == pytest.approx(1.4)


def test_prompts_are_read_off_where_decode_was_measured() -> None:
    """Decode's sides are multiples of 8 and prefill's are not: a table of both needs the same units."""
    table = timings_by_units(profile())
    assert sorted(table) == [*range(8, 125, 8), UNITS]
    assert all(len(rows) == 3 + 8 for rows in table.values())
    assert at_units([(12, 8.0), (132, 1.0)], 6) == 16.0
    assert at_units([(12, 8.0), (100, 1.0)], 132) == 1.0
    assert at_units([(10, 8.0), (40, 2.0)], 20) == pytest.approx(4.0)
