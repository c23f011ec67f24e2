"""Device files: those of the package hold what was promised, and a bad one is refused by its entry."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from semipd.core.errors import ConfigError
from semipd.core.types import Work
from semipd.execute.cost import StepCost
from semipd.execute.device_file import device_names, load_device, read_device
from semipd.model.catalogue import named_spec

HEAD = {
    "name": "box",
    "flops_bf16": 1e12,
    "memory_bandwidth": 1e11,
    "memory_bytes": 1e10,
    "units": 16,
    "unit_kind": "core",
}


def one_surface(axes: list[int], knots: list[list[float]], values: list[object]) -> dict[str, object]:
    surface = {"axes": axes, "knots": knots, "values": values}
    return {"kernels": {"gemm": {"bfloat16": {"surfaces": [surface]}}}}


@pytest.mark.parametrize("name", device_names())
def test_the_devices_of_the_package(name: str) -> None:
    file = load_device(name)
    device = file.device()
    assert file.name == name and file.source
    step = 8 if file.unit_kind == "SM" else 1
    for first, second in device.legal_splits:
        assert first >= step and second >= step and second % step == 0
        assert first + second == device.units
    if file.unit_kind == "SM" and file.scaled_from is None:  # fitted to kernel tables
        errors = file.fit["held_out_median_error"]
        assert errors and all(error <= 0.10 for error in errors.values())
        assert file.fit["summed_steps"]["held_out"]["median"] <= 0.10


def test_a_scaled_device_says_so_and_follows_its_own_head() -> None:
    scaled = load_device("h100-80g")
    assert scaled.scaled_from == "h200" and "not measured" in scaled.source and not scaled.fit
    spec, step = named_spec("llama3-8b"), Work.decode(64, 64 * 1024)
    slower = StepCost(spec, scaled).seconds(step, 132) / StepCost(spec, load_device("h200")).seconds(
        step, 132
    )
    assert 1.2 < slower < 4.8 / 3.35 + 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"units": 0}, "units"),
        ({"units": 2.5}, "units"),
        ({"units": True}, "units"),
        ({"flops_bf16": "many"}, "flops_bf16"),
        ({"memory_bandwidth": float("nan")}, "memory_bandwidth"),
        ({"name": 7}, "name"),
        ({"name": ""}, "name"),
        ({"memory_bandwith": 1}, "did you mean memory_bandwidth"),
        ({"unit_step": 17}, "unit_step"),
        ({"compute": [[8, 1.0], [4, 2.0]]}, "compute"),
        ({"compute": [[4, 1.0], [8, 2.0]]}, "compute"),
        ({"memory": [[4]]}, "memory"),
        ({"memory": "steep"}, "memory"),
        ({"kernels": {"gem": {}}}, "unknown operator"),
        ({"kernels": {"gemm": {"bfloat16": {}}}}, "surfaces"),
        (one_surface([9], [[0]], [0]), "axes"),
        (one_surface([0.5], [[0]], [0]), "axes"),
        (one_surface([0, 0], [[0], [0]], [0]), "named twice"),
        (one_surface([0], [[0, 1]], [0]), "1 values for 2 knots"),
        (one_surface([0], [[1, 0]], [0, 0]), "rise"),
        (one_surface([0], [[0]], ["x"]), "values"),
        ({"scaled_from": "box"}, "scaled_from"),
        ({"scaled_from": "../../etc/passwd"}, "scaled_from"),
        ({"fit": 3}, "fit"),
    ],
)
def test_a_bad_device_file_is_refused_by_the_entry(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        read_device(HEAD | change, "device file box.json")
    assert "box.json" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("missing", sorted(HEAD))
def test_every_entry_of_the_head_is_needed(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"{missing} is missing"):
        read_device({key: value for key, value in HEAD.items() if key != missing}, "x")


def test_device_files_are_found_by_name_or_path(tmp_path: Path) -> None:
    path = tmp_path / "box.json"
    path.write_text(json.dumps(HEAD))
    assert load_device(str(path)) == read_device(HEAD, "")
    assert load_device(str(path)).device().legal_splits[0] == (1, 15)
    with pytest.raises(ConfigError, match="did you mean h200"):
        load_device("h2000")
    for text in ("{", "[1]", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "[" * 100_000):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=r"box\.json"):
            load_device(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"box\.json"):
        load_device(str(path))


def test_a_device_without_a_fit_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="no kernel gemm"):
        StepCost(named_spec("tiny-1m"), read_device(HEAD, "x"))


def test_a_file_that_is_no_device_is_not_read_whole(tmp_path: Path) -> None:
    """A sparse file of more than any memory holds, as a wrong path may name one."""
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(ConfigError, match="are no device file"):
        load_device(str(path))
