"""`semipd simulate`: the engine in virtual time, as a library and as a command."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from semipd.bench.scenario import Scenario, find_goodput, simulate
from semipd.cli import main
from semipd.config import PolicyConfig
from semipd.core.errors import ConfigError

QUICK = Scenario(workload="512,32", rate=8.0, requests=60, seed=1)
TARGETS: dict[str, Any] = {"ttft_slo": 0.3, "tpot_slo": 0.05}
WAYS: dict[str, tuple[PolicyConfig, int]] = {
    "static": (PolicyConfig(split="static:54,54"), 1),
    "shared": (PolicyConfig(split="shared"), 1),
    "paper": (PolicyConfig(split="paper", **TARGETS), 1),
    "auto": (PolicyConfig(split="auto", **TARGETS), 1),
    "prefill-first": (PolicyConfig(policy="prefill-first"), 1),
    "chunked": (PolicyConfig(policy="chunked", chunk_tokens=128, long_prompt_threshold=64), 1),
    "two halves": (PolicyConfig(policy="disaggregated"), 1),
    "two devices": (PolicyConfig(policy="disaggregated", transfer_bandwidth=10**10), 2),
}
KEYS = {
    *("ttft_s", "tpot_s", "itl_s", "e2e_s", "attainment", "request_throughput", "output_throughput"),
    *("kv_peak", "split_switches"),
}


def command(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """The JSON object on the last line of what the command prints."""
    assert main(["simulate", *words]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refusal(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which the command refuses."""
    try:
        code = main(["simulate", "--requests", "20", *words])
    except SystemExit as end:  # argparse
        code = end.code  # type: ignore[assignment]
    captured = capfd.readouterr()
    assert code == 2 and not captured.out and "Traceback" not in captured.err
    return captured.err.strip()


def write_trace(folder: Path, text: str) -> str:
    path = folder / "trace"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", WAYS)
def test_every_policy_runs_to_the_end(name: str) -> None:
    """`simulate` itself asserts that no request and no block is left."""
    policy, devices = WAYS[name]
    result = simulate(dataclasses.replace(QUICK, devices=devices), policy)
    assert result["requests"] == 60 and result["refused"] == 0
    assert result["output_throughput"] * result["simulated_s"] == pytest.approx(60 * 32)
    assert 0.0 < result["kv_peak"] <= 1.0
    assert result["ttft_s"]["p50"] > 0.0 and result["tpot_s"]["p50"] > 0.0
    assert result["e2e_s"]["mean"] > result["ttft_s"]["mean"]


def test_a_run_is_a_function_of_its_seed() -> None:
    scenario, policy = dataclasses.replace(QUICK, workload="sharegpt"), WAYS["auto"][0]
    first = simulate(scenario, policy)
    assert simulate(scenario, policy) == first
    assert simulate(dataclasses.replace(scenario, seed=2), policy) != first


def test_memory_does_not_grow_with_the_number_of_requests() -> None:
    def peak(requests: int) -> int:
        gc.collect()
        tracemalloc.start()
        try:
            simulate(Scenario(workload="32,2", rate=200.0, requests=requests), PolicyConfig(split="shared"))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(50)  # what is cached once is not counted
    small, large = peak(2000), peak(6000)
    assert large < small + 200_000, f"{small} and {large} bytes: {(large - small) / 4000:.0f} a request"


def test_no_torch_is_loaded() -> None:
    script = (
        "import sys\n"
        "from semipd.bench.scenario import Scenario, simulate\n"
        "from semipd.config import PolicyConfig\n"
        "simulate(Scenario(workload='64,4', requests=5), PolicyConfig())\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"


def test_a_simulation_is_much_faster_than_its_traffic() -> None:
    """benchmarks/simulator_speed.py has the figures; this only notices when something goes badly wrong."""
    scenario = Scenario(rate=10.0, requests=200)
    began = time.process_time()
    result = simulate(scenario, PolicyConfig(split="static:54,54"))
    assert result["simulated_s"] > 20.0 * (time.process_time() - began)


def test_the_command_prints_a_table_and_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--workload", "512,32", "--requests", "40", "--rate", "8", "--split", "shared")
    assert main(["simulate", *words, "--ttft-slo", "300ms", "--tpot-slo", "150ms"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert any("TTFT" in line for line in table) and any("attainment" in line for line in table)
    result = json.loads(last)
    assert result.keys() >= KEYS
    for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
        assert result[name].keys() == {"mean", "p50", "p90", "p99"}
        assert 0.0 < result[name]["p50"] <= result[name]["p90"] <= result[name]["p99"]
    assert 0.0 < result["attainment"] <= 1.0 and "goodput" not in result
    assert main(["simulate", *words, "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_goodput_lies_where_attainment_falls_below_the_goal(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--workload", "2K,16", "--requests", "120", "--policy", "prefill-first", "--rate", "1")
    result = command(capsys, *words, "--ttft-slo", "0.5", "--find-goodput", "--json")
    goodput = result["goodput"]
    assert result["attainment"] >= 0.9 and result["rate"] == goodput > 1.0

    def attained(factor: float) -> float:
        scenario = Scenario(workload="2K,16", requests=120, rate=factor * goodput)
        policy = PolicyConfig(policy="prefill-first", ttft_slo=0.5)
        return simulate(scenario, policy, steady=True)["attainment"]

    assert attained(0.7) >= 0.9 > attained(1.3)


def test_impossible_targets_have_no_goodput() -> None:
    result = find_goodput(
        Scenario(workload="2K,4", requests=5), PolicyConfig(split="shared", ttft_slo=1e-5)
    )
    assert result["goodput"] == 0.0 and result["attainment"] == 0.0


def test_timeline_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    timeline, pictures = tmp_path / "trace.json", tmp_path / "new" / "pictures"
    words = ("--workload", "256,8", "--requests", "20", "--rate", "20", "--split", "static:54,54")
    command(capsys, *words, "--timeline", str(timeline), "--plot", str(pictures))
    events = json.loads(timeline.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    steps = [event for event in events if event["ph"] == "X"]
    assert {names[step["tid"]] for step in steps} == {"prefill", "decode"}
    for lane in {step["tid"] for step in steps}:  # one step after another within a lane
        ordered = sorted((step["ts"], step["dur"]) for step in steps if step["tid"] == lane)
        assert all(a + d <= b + 1e-3 for (a, d), (b, _) in itertools.pairwise(ordered))
    assert any(event["ph"] == "C" and event["args"].keys() == {"prefill", "decode"} for event in events)
    for name in ("split.png", "latency.png"):
        assert (pictures / name).read_bytes().startswith(b"\x89PNG")


ROWS = 40
TRACES = {
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    + "".join(f"2023-11-16 18:15:{second:02}.5,{100 + second},8\n" for second in range(ROWS)),
    "burstgpt": "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,"
    "Log Type\n" + "".join(f"{second},1,2.0,x,{100 + second},8,9,y\n" for second in range(ROWS)),
    "mooncake": "".join(
        json.dumps({"timestamp": 3000 * row, "input_length": 1200, "output_length": 8, "hash_ids": ids})
        + "\n"
        for row, ids in enumerate([[1, 2, 100 + row] for row in range(ROWS)])
    ),
    "semipd": "".join(
        json.dumps({"time": row, "prompt_tokens": 100 + row, "output_tokens": 8}) + "\n"
        for row in range(ROWS)
    ),
}


@pytest.mark.parametrize("format", TRACES)
def test_traces_are_replayed_whole(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--trace",
        write_trace(tmp_path, TRACES[format]),
        "--trace-format",
        format,
        "--split",
        "shared",
    )
    result = command(capsys, *words, "--json")
    assert result["requests"] == ROWS
    assert result["output_throughput"] * result["simulated_s"] == pytest.approx(8 * ROWS)
    assert command(capsys, *words, "--json", "--requests", "7")["requests"] == 7
    faster = command(capsys, *words, "--json", "--trace-speed", "10")
    assert faster["simulated_s"] == pytest.approx(result["simulated_s"] / 10, rel=0.1)


def test_shared_prefixes_of_a_trace_are_computed_once(tmp_path: Path) -> None:
    """1,024 of the 1,200 prompt tokens of every Mooncake row above are the same."""
    alone = "".join(
        json.dumps(
            {"timestamp": 3000 * row, "input_length": 1200, "output_length": 8, "hash_ids": [9 * row + 9]}
        )
        + "\n"
        for row in range(ROWS)
    )
    means = []
    for text in (TRACES["mooncake"], alone):
        scenario = Scenario(trace=write_trace(tmp_path, text), trace_format="mooncake")
        means.append(simulate(scenario, PolicyConfig(split="shared"))["ttft_s"]["mean"])
    assert means[0] < 0.5 * means[1]


BAD = [
    (("--model", "llama9-8b"), "llama9-8b"),
    (("--model", "./no-such-folder"), "no model folder"),
    (("--device", "a1000"), "a1000"),
    (("--workload", "sharegtp"), "sharegtp"),
    (("--workload", "16,none"), "none"),
    (("--arrivals", "uniform"), "uniform"),
    (("--rate", "0"), "--rate"),
    (("--requests", "0"), "--requests"),
    (("--trace-format", "vidur"), "vidur"),
    (("--trace", "no-such-file"), "no-such-file"),
    (("--split", "static:1"), "--split"),
    (("--split", "static:0,108"), "--split"),
    (("--policy", "chunked", "--split", "shared"), "--split"),
    (("--split", "paper"), "--ttft-slo"),
    (("--find-goodput",), "--ttft-slo"),
    (("--tensor-parallel", "99"), "--tensor-parallel"),
    (("--model", "llama3-70b"), "do not fit"),
    (("--timeline", "no/such/folder/trace.json"), "--timeline"),
    (("--reqests", "4"), "did you mean --requests"),
]


@pytest.mark.parametrize(("words", "reason"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_line(
    words: tuple[str, ...], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    error = refusal(capfd, *words)
    assert reason in error
    assert len(error.splitlines()) == 1 or "--help" in error  # argparse adds where to look


BAD_ROWS = [
    ("azure", 9, "2023-11-16 18:16:00,many,8\n", "row 10: ContextTokens is 'many'"),
    ("burstgpt", 3, "nan,1,2.0,x,5,8,9,y\n", "row 4: Timestamp"),
    ("mooncake", 5, '{"timestamp": 15000, "input_length": -4, "output_length": 1}\n', "row 6: "),
    ("semipd", 0, '{"time": 0, "prompt_tokens": 3}\n', "row 1: "),
]


@pytest.mark.parametrize(("format", "place", "row", "reason"), BAD_ROWS, ids=[row[0] for row in BAD_ROWS])
def test_a_malformed_row_is_named(
    format: str, place: int, row: str, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = TRACES[format].splitlines(keepends=True)
    lines[place] = row
    error = refusal(capfd, "--trace", write_trace(tmp_path, "".join(lines)), "--trace-format", format)
    assert reason in error and len(error.splitlines()) == 1


def test_pictures_need_a_folder_that_can_be_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "--plot" in refusal(capfd, "--plot", str(tmp_path / "file" / "pictures"))


def test_goodput_of_a_trace_is_refused(tmp_path: Path) -> None:
    scenario = Scenario(trace=write_trace(tmp_path, TRACES["semipd"]))
    with pytest.raises(ConfigError, match="trace"):
        find_goodput(scenario, PolicyConfig(ttft_slo=1.0))


def test_a_request_that_never_fits_counts_as_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama-3-8B has 8,192 positions."""
    rows = (
        {"time": 0, "prompt_tokens": 9000, "output_tokens": 8},
        {"time": 1, "prompt_tokens": 9, "output_tokens": 8},
    )
    path = write_trace(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    result = simulate(Scenario(trace=path), PolicyConfig(split="shared"))
    assert (result["requests"], result["refused"], result["counted"]) == (1, 1, 2)
    assert result["attainment"] == 0.5
    assert main(["simulate", "--trace", path]) == 0
    assert "refused: too long" in capsys.readouterr().out


def test_classes_of_a_trace_have_targets_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (
        {"time": row, "prompt_tokens": 500, "output_tokens": 8, "service_class": name}
        for row, name in enumerate(("strict", "easy", "unknown", "easy"))
    )
    path = write_trace(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    classes = '{"strict": {"ttft": "1us"}, "easy": {"ttft": 60}}'
    words = ("--trace", path, "--classes", classes, "--ttft-slo", "2us", "--split", "auto", "--json")
    assert command(capsys, *words)["attainment"] == 0.5
