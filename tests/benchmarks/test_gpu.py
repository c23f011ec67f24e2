"""The GPU benchmark from its first line to its last on a GPU that is not there, so that a slip of the pen
does not cost the minutes that a real one is lent for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_load
from benchmarks.gpu import PARTS, Scale
from semipd.execute import profile_cuda
from tests.execute.fake_cuda import FakeBackend

SMALL = Scale(
    slots=10,
    longest=96,
    prompts=(16, 64),
    steps=((1, 32), (4, 32)),
    offline=(6, 12, 8),
    chunks=(16, 32),
    long=64,
    typical=12.0,
    outputs=12,
    graph_sides=2,
    profile=20.0,
)
FREE = int(2**34 * 0.1) + 2**30 + 2**21  # leaves 2 MiB for the KV pool


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, values in {
        "PREFILL_TOKENS": (16, 32),
        "DECODE_BATCHES": (1, 4),
        "DECODE_CONTEXTS": (20,),
        "BESIDE_BATCHES": (4,),
        "REPEATS": 1,
    }.items():
        monkeypatch.setattr(profile_cuda, name, values)
    monkeypatch.setattr(gpu_load, "MOST_RATES", 2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(tmp_path: Path, *arguments: str, **card: object) -> dict:
    out = tmp_path / "found.json"
    command = ["--shape", "tiny", "--rate", "8", "--seconds", "0.6", "--out", str(out), *arguments]
    backend = FakeBackend(step=40, free=FREE, **card)
    assert gpu.main(command, lambda: backend, SMALL) == 0
    assert backend.closed
    return json.loads(out.read_text())


def test_every_part_but_the_peer_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, "--parts", *(part for part in PARTS if part != "transformers"))
    said = capsys.readouterr().out
    assert "failed:" not in said and '"error"' not in json.dumps(found), said
    assert found["start"]["graphs_seconds"] > 0 and len(found["legal_splits"]) == 3
    assert found["steps"]["prefill 64"] > found["steps"]["prefill 16"] > 0
    assert set(found["kernels"]) == {"prefill 16", "prefill 64", "decode 1x32", "decode 4x32"}
    assert found["offline"]["tokens"] == 48 and found["offline"]["failed"] == 0
    ways = {"chunked 16", "chunked 32", "prefill-first", "semi-pd shared", "semi-pd 92:40", "auto"}
    assert ways <= set(found["mixed"]["rows"])
    assert {*found["mixed"]["goodput"]} == {*found["predicted"]["goodput"]}
    assert found["predicted"]["itl_ratio"] > 0 and "itl_ratio_difference" in found["predicted"]


def test_a_card_that_cannot_be_cut(tmp_path: Path) -> None:
    found = run(tmp_path, "--parts", "steps", "offline", "mixed", "predicted", parts=False)
    assert found["legal_splits"] == [] and found["predicted"] == {}
    assert not any("error" in found[part] for part in ("steps", "offline", "mixed"))


def test_a_part_that_fails_or_comes_too_late_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: out of resources")

    monkeypatch.setattr(gpu_load, "one_offline", broken)
    found = run(tmp_path, "--parts", "steps", "offline")
    assert found["offline"] == {"error": "RuntimeError: CUDA error: out of resources"} and found["steps"]
    monkeypatch.setattr(gpu, "BUDGET", 0.0)
    assert run(tmp_path, "--parts", "steps")["steps"] == {"left_out": True}
    assert "steps left out: the time is up" in capsys.readouterr().out


def test_what_was_found_is_kept_when_the_rest_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lent card's limit ends the process in the middle of a part."""

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_load, "chosen_ways", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--parts", "steps", "mixed")
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept["steps"]["prefill 64"] > 0 and kept["legal_splits"] and kept["start"]
    assert "chunked 16" in kept["mixed"]["rows"] and kept["mixed"]["unfinished"]


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out == "GPU benchmark skipped: torch sees no CUDA device here\n"


def test_goodput_lies_between_the_rates_that_were_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_load, "MOST_RATES", 6)
    for limit in (4.2, 9.0, 11.0, 24.0):

        def attained(at: float, limit: float = limit) -> float:
            return 1.0 if at <= limit else 0.5

        found = gpu_load.goodput(attained, 10.0, attained(10.0), lambda: True)
        assert limit / gpu_load.STRIDE <= found <= limit * gpu_load.STRIDE
    assert gpu_load.goodput(attained, 10.0, 1.0, lambda: False) == 10.0, "no time to look further"
