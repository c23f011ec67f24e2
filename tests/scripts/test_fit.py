"""The fit: made-up tables with a known answer come back, and a bad table is one clear line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from semipd.execute.cost_surface import Demand, Kernel, Surface
from semipd.execute.device_file import load_device

pa = pytest.importorskip("pyarrow", reason="reading kernel tables needs pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="reading kernel tables needs pyarrow")

ROOT = Path(__file__).parents[2]
PROFILES = ROOT.parent / "shared" / "data" / "profiles"
PEAK, BANDWIDTH = 400e12, 2e12  # what the made-up kernels reach
HEAD = {
    "name": "made-up",
    "flops_bf16": 500e12,
    "memory_bandwidth": 2.5e12,
    "memory_bytes": 96e9,
    "units": 100,
    "unit_kind": "SM",
}


def run(profiles: Path, spec: Path, *more: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts" / "fit_cost_model.py"
    command = [sys.executable, str(script), "--profiles", str(profiles), "--device-spec", str(spec), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def gemm_rows() -> dict[str, list[Any]]:
    """Rooflines with a start of 4 us, and a ripple that no smooth fit can follow."""
    rows: dict[str, list[Any]] = {"gemm_dtype": [], "m": [], "n": [], "k": [], "latency": []}
    for n in (512, 1024, 2048, 4096, 8192, 14336):
        for k in (1024, 4096, 8192):
            for m in (1, 2, 4, 8, 16, 64, 128, 256, 512, 1024, 4096):
                compute, memory = 2 * m * n * k / PEAK, 2 * (m * n + m * k + n * k) / BANDWIDTH
                ripple = 1 + 0.04 * ((m * 7 + n // 128 * 3 + k // 128) % 5 - 2) / 2
                for name, value in zip(rows, ("bfloat16", m, n, k, 0.0), strict=True):
                    rows[name].append(value)
                rows["latency"][-1] = 1e3 * ripple * (4e-6 + max(compute, memory))
    return rows


def write(folder: Path, operator: str, rows: dict[str, list[Any]]) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(rows), folder / f"{operator}.parquet")


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(HEAD))
    return path


def test_a_made_up_device_is_recovered(tmp_path: Path, spec: Path) -> None:
    write(tmp_path / "tables", "gemm", gemm_rows())
    out = tmp_path / "device.json"
    done = run(tmp_path / "tables", spec, "--out", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report["held_out_median_error"]) == {"gemm"}
    assert report["held_out_median_error"]["gemm"] < 0.05
    assert report["held_out_rows"]["gemm"] == 6 * 11  # a third of 18 shapes, whole
    assert "moe" in report["skipped"] and "skipped: moe" in done.stdout
    kernel = load_device(str(out)).kernel("gemm", "bfloat16")
    assert kernel.compute_share == pytest.approx(PEAK / HEAD["flops_bf16"], rel=0.1)
    m, n, k = 100.0, 3000.0, 3000.0  # no such row
    demand = Demand(2 * m * n * k, 2 * (m * n + m * k + n * k), 0.0, (m, n, k))
    truth = 4e-6 + max(demand.flops / PEAK, demand.moved / BANDWIDTH)
    assert kernel.seconds(demand, HEAD["flops_bf16"], HEAD["memory_bandwidth"]) == pytest.approx(
        truth, rel=0.1
    )


def test_the_same_tables_give_the_same_device_file(tmp_path: Path, spec: Path) -> None:
    rows = gemm_rows()
    write(tmp_path / "tables", "gemm", rows)
    shuffled = {name: values[::-1] for name, values in rows.items()}
    write(tmp_path / "again", "gemm", shuffled)
    outs = []
    for folder in ("tables", "again"):
        out = tmp_path / f"{folder}.json"
        done = run(tmp_path / folder, spec, "--out", str(out), "--json")
        assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
        outs.append(out.read_text())
    assert outs[0] == outs[1]


def test_times_that_rest_on_the_host_are_not_taken_for_the_device(tmp_path: Path, spec: Path) -> None:
    """A kernel launched from Python never shows less than its launch; a captured graph has no such
    floor."""
    rows = gemm_rows()
    rows["latency"] = [max(value, 0.06) for value in rows["latency"]]
    write(tmp_path / "tables", "gemm", rows)
    out = tmp_path / "device.json"
    done = run(tmp_path / "tables", spec, "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["held_out_median_error"]["gemm"] < 0.05
    kernel = load_device(str(out)).kernel("gemm", "bfloat16")
    small = Demand(2.0 * 1024 * 1024, 2.0 * 1024 * 1024, 0.0, (1.0, 1024.0, 1024.0))
    assert kernel.host and kernel.seconds(small, 500e12, 2.5e12) < 20e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows.pop("n"), "column n is missing"),
        (lambda rows: rows.pop("latency"), "column latency is missing"),
        (lambda rows: rows["latency"].__setitem__(6, 0.0), "row 7: latency 0"),
        (lambda rows: rows["latency"].__setitem__(6, float("nan")), "row 7: latency nan"),
        (lambda rows: rows["m"].__setitem__(2, -4), "row 3: m -4"),
        (lambda rows: rows.update(k=["wide"] * len(rows["k"])), "column k does not hold numbers"),
        (lambda rows: [values.clear() for values in rows.values()], "no rows"),
        (lambda rows: rows.update(gemm_dtype=["int1"] * len(rows["m"])), "no table that can be fitted"),
    ],
)
def test_a_bad_table_is_one_line_and_exit_code_2(
    tmp_path: Path, spec: Path, change: Any, words: str
) -> None:
    rows = gemm_rows()
    change(rows)
    write(tmp_path / "tables", "gemm", rows)
    done = run(tmp_path / "tables", spec)
    assert done.returncode == 2
    assert words in done.stderr and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def test_bad_folders_files_and_specs_are_refused_too(tmp_path: Path, spec: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "gemm.parquet").write_bytes(b"not parquet")
    write(tmp_path / "tables", "gemm", gemm_rows())
    headless = tmp_path / "headless.json"
    headless.write_text(json.dumps({key: value for key, value in HEAD.items() if key != "units"}))
    cases = [
        (tmp_path / "nowhere", spec, "no folder"),
        (tmp_path / "empty", spec, "no table"),
        (tmp_path / "broken", spec, "gemm.parquet"),
        (tmp_path / "tables", headless, "units is missing"),
        (tmp_path / "tables", tmp_path / "none.json", "none.json"),
    ]
    for folder, head, words in cases:
        done = run(folder, head)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_array_and_scalar_predictions_agree() -> None:
    """The report is made with arrays, the simulator runs on floats: one formula, two codes."""
    import numpy as np

    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from surface_fit import predict
    finally:
        sys.path.pop(0)
    surface = Surface((0, 1), ((0.0, 3.0, 5.0), (0.0, 2.0)), (0.1, 0.4, -0.2, 0.3, 0.0, 0.5))
    kernel = Kernel(3e-6, (surface,), 0.8, 0.7)
    first, second = np.array([0.5, 1.0, 6.0, 20.0, 99.0]), np.array([9.0, 1.0, 2.0, 3.0, 0.1])
    demand = Demand(1e9 * first, 1e6 * second, 1e5 * second, (first, second))
    together = predict(kernel, demand, 1e12, 1e11)
    for index, seconds in enumerate(together):
        features = (float(first[index]), float(second[index]))
        one = Demand(*(float(part[index]) for part in demand[:3]), features)
        assert seconds == pytest.approx(kernel.seconds(one, 1e12, 1e11))


@pytest.mark.slow
@pytest.mark.skipif(not PROFILES.is_dir(), reason="the measured tables are not here")
@pytest.mark.parametrize(("device", "tables"), [("a100-80g", "a100_sxm"), ("h200", "h200_sxm")])
def test_the_committed_devices_are_what_the_tables_say(device: str, tables: str, tmp_path: Path) -> None:
    committed = ROOT / "semipd" / "devices" / f"{device}.json"
    out = tmp_path / "device.json"
    done = run(PROFILES / tables, committed, "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)["held_out_median_error"]
    assert all(error <= 0.10 for error in errors.values()), errors
    assert json.loads(out.read_text())["fit"]["held_out_rows"] == load_device(device).fit["held_out_rows"]
