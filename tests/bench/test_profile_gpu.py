"""A device file made of a GPU's measurements predicts those measurements."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import semipd.bench.profile as command
from semipd.bench.profile_gpu import at_units, device_entries, timings_by_units
from semipd.bench.scenario import Scenario, simulate
from semipd.cli import main
from semipd.config import PolicyConfig
from semipd.core.types import Slice, Work
from semipd.execute import cuda_backend, profile_cuda
from semipd.execute.cuda_start import Shape, start_cuda
from semipd.execute.device_file import load_device, read_device
from semipd.execute.profile_cuda import Sizes, StepTimer
from semipd.execute.step_profile import ProfiledCost, read_profile
from semipd.model.spec import load_spec
from tests.checkpoints import VOCABULARY, make_checkpoint
from tests.execute.fake_cuda import FakeBackend

UNITS = 132
FREE = int(2**34 * 0.1) + 2**30 + 2**22  # leaves 4 MiB for the KV pool


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


def test_the_command_measures_a_card_and_what_it_writes_can_be_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`semipd profile` where there is a GPU: every share, both lanes beside each other, what starting and
    switching cost, pictures."""
    monkeypatch.setattr(command, "has_gpu", lambda: True)
    monkeypatch.setattr(cuda_backend, "CudaBackend", lambda: FakeBackend(step=40, free=FREE))
    for name, values in {
        "PREFILL_TOKENS": (16, 32),
        "DECODE_BATCHES": (1, 4),
        "DECODE_CONTEXTS": (20,),
        "BESIDE_BATCHES": (4,),
        "REPEATS": 2,
    }.items():
        monkeypatch.setattr(profile_cuda, name, values)
    folder = make_checkpoint(tmp_path / "model", "llama", max_position_embeddings=256)
    out, pictures = tmp_path / "gpu.json", tmp_path / "pictures"
    assert main(["profile", str(folder), "--out", str(out), "--plot", str(pictures)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["out"] == str(out)
    assert sorted(path.name for path in pictures.iterdir()) == ["beside.png", "decode.png", "prefill.png"]
    raw = json.loads((tmp_path / "gpu.raw.json").read_text())
    splits = {(row["prefill_units"], row["decode_units"]) for row in raw["beside"]}
    assert splits == {(92, 40), (52, 80), (12, 120)} and raw["splits_left_out"] == 0
    assert {"partitions_seconds", "partitions_bytes", "graphs_seconds", "graphs_bytes"} <= set(raw["start"])
    assert raw["switch_seconds"] > 0 and raw["switched_step_seconds"] > 0
    device = load_device(str(out))
    assert (device.units, device.unit_kind) == (UNITS, "SM")
    result = simulate(
        Scenario(str(folder), str(out), workload="64,16", rate=5.0, requests=20, kv_blocks=400),
        PolicyConfig(ttft_slo=0.3),
    )
    assert result["requests"] == 20 and result["ttft_s"]["mean"] > 0.0


def test_asking_for_a_card_that_is_not_there_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    folder = make_checkpoint(tmp_path, "llama")
    assert main(["profile", str(folder), "--device", "cuda", "--out", str(tmp_path / "x.json")]) == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err


def test_a_profile_whose_time_is_up_still_makes_a_device_file(tmp_path: Path) -> None:
    """The whole device is measured first, so that a card that is lent for minutes leaves something."""
    shape = Shape(slots=5, max_length=64, block_size=4, blocks=128, most_rows=64)
    folder = make_checkpoint(tmp_path, "llama")
    started = start_cuda(FakeBackend(step=40), folder, shape, dtype="float32", graph_sides=1)
    timer = StepTimer(started.executor, Sizes(5, 128, 4, 64, 64), VOCABULARY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_cuda, "PREFILL_TOKENS", (16, 32))
        patch.setattr(profile_cuda, "DECODE_BATCHES", (1, 4))
        patch.setattr(profile_cuda, "DECODE_CONTEXTS", (20,))
        clock = iter([0.0, 0.0, 0.0, *[100.0] * 10])
        patch.setattr(
            profile_cuda,
            "time",
            SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter),
        )
        found = profile_cuda.measure(timer, lambda line: None, budget=1.0)
    assert found["splits_left_out"] == 3 and {row["units"] for row in found["prefill"]} == {UNITS}
    device = read_device(device_entries(found, load_spec(folder), 4, 10**9), "test")
    assert device.units == UNITS
    started.executor.close()
