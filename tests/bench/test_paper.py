"""The paper's evaluation: the search for a goodput, its tables, and the engine of the sensitivity table."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import paper, sensitivity
from benchmarks.paper_cases import CASES, fixed_ways, policy_of, ways
from benchmarks.paper_plot import plot_curves, plot_goodput
from benchmarks.paper_table import document, goodput_table, grouped, order_table
from benchmarks.search import GOAL, HIGHEST, LOWEST, goodput_index, rate_at
from semipd.bench.scenario import Scenario, simulate
from semipd.config import PolicyConfig
from semipd.core.partition import Targets

SMALL = Scenario(workload="512,32", rate=20.0, requests=40, seed=100)
POLICY = PolicyConfig(split="static:84,24", ttft_slo=0.2, tpot_slo=0.05)


@pytest.mark.parametrize("crossing", [-40.3, -3.0, -0.6, 0.4, 7.5, 61.2])
@pytest.mark.parametrize("guess", [-30, 0, 5])
def test_the_search_finds_where_a_falling_attainment_crosses(crossing: float, guess: int) -> None:
    asked: list[int] = []

    def attainment(index: int) -> float:
        asked.append(index)
        return GOAL - 0.01 * (index - crossing)

    assert goodput_index(attainment, guess) == pytest.approx(crossing)
    assert len(asked) == len(set(asked)) <= 6 + 2 * math.log2(abs(crossing - guess) + 1)


def test_the_search_is_cheap_beside_a_good_guess_and_ends_when_nothing_meets() -> None:
    asked: list[int] = []
    goodput_index(lambda index: asked.append(index) or float(index < 12), 10)  # type: ignore[func-returns-value]
    assert len(asked) <= 4
    assert goodput_index(lambda index: 0.0, 0) == LOWEST
    assert goodput_index(lambda index: 1.0, 0) == HIGHEST


def test_a_hopeless_run_is_broken_off_with_the_verdict_it_would_have_had() -> None:
    slow = dataclasses.replace(POLICY, ttft_slo=1e-4)
    runs = paper.Runs(SMALL, slow)
    assert runs.attainment(0) == 1.0 - paper.HOPELESS < GOAL and not runs.points
    assert runs.point(0)["attainment"] == 0.0  # a point of the curve goes to its end, however bad
    fair = paper.Runs(SMALL, POLICY)
    assert fair.attainment(-20) == simulate_at(-20)["attainment"] >= GOAL


def simulate_at(index: int) -> dict[str, Any]:
    scenario = dataclasses.replace(SMALL, rate=rate_at(SMALL.rate, index))
    return simulate(scenario, POLICY, steady=True)


def test_every_case_names_legal_ways_and_the_guess_of_a_cell_is_its_nearest_relative() -> None:
    for case in CASES.values():
        names = [name for name, _ in fixed_ways(case)]
        assert len(set(names)) == len(names) and sum(name.startswith("static") for name in names) == 5
        for slo in case.slos:
            assert all(policy_of(case, slo, way).ttft_slo for way in ways(case))
    done = {
        paper.key_of(row): row for row in (cell("shared", 1, 5.0, index=-3), cell("paper", 1, 6.0, index=4))
    }
    assert paper.guess_for(("8b-sharegpt", "tight", "shared", 2), done) == -3  # another seed of it
    assert paper.guess_for(("8b-sharegpt", "tight", "prefill-first", 1), done) == 4  # the way before it
    assert paper.guess_for(("8b-sharegpt", "tight", "shared, by deadline", 1), done) == -3
    assert paper.guess_for(("8b-mixed", "tight", "shared", 1), done) == 0


def cell(way: str, seed: int, rate: float, index: float = 0.0) -> dict[str, Any]:
    case = CASES["8b-sharegpt"]
    rates = [rate_at(case.rate, index) for index in paper.curve_indices(case)]
    curve = [{"rate": each, "attainment": 1.0, "e2e_mean_s": 10.0 / rate} for each in rates]
    return {
        "case": "8b-sharegpt", "slo": "tight", "way": way, "seed": seed, "goodput": rate, "index": index,
        "curve": curve, "tried": [[4.0, 1.0, 10.0 / rate, 0.1, 0.1]], "commit": "abc", "requests": 800,
    }  # fmt: skip


def table_of(*rows: dict[str, Any]) -> dict[tuple[str, str], Any]:
    ways: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        ways.setdefault(row["way"], {})[row["seed"]] = row
    return {("8b-sharegpt", "tight"): ways}


def test_the_best_fixed_way_is_one_way_for_all_seeds_and_ratios_are_taken_seed_by_seed(
    tmp_path: Path,
) -> None:
    cells = table_of(
        *(cell("auto", seed, rate) for seed, rate in ((1, 12.0), (2, 10.0), (3, 11.0))),
        *(cell("shared", seed, rate) for seed, rate in ((1, 6.0), (2, 9.9), (3, 8.0))),  # best of seed 2
        *(cell("static 84:24", seed, rate) for seed, rate in ((1, 10.0), (2, 8.0), (3, 10.0))),
        cell("chunked 512", 1, 99.0),  # seeds 2 and 3 are missing: no best of anything
        *(cell("static 100:8", seed, 50.0) | {"requests": 400} for seed in (1, 2, 3)),  # not the same load
        *(cell("shared, by deadline", seed, 12.0) for seed in (1, 2, 3)),
        *(cell("auto, as they came", seed, 10.0) for seed in (1, 2, 3)),
    )
    row = goodput_table(cells)[2]
    assert "11.00 (10.00 to 12.00)" in row and "1.20 (1.10 to 1.25) | static 84:24 |" in row
    assert "1.38 (1.01 to 2.00)" in row and "99" not in row and "50" not in row
    order = order_table(cells)[2]
    assert "1.00 (1.00 to 1.25)" in order  # all as they came: 10 over static's 10, 8 and 10
    assert "0.92 (0.83 to 1.00)" in order  # all by deadline
    page = document(cells)
    assert "**auto**" in page and "static 100:8 [400 requests, 3 seeds] | 50.00" in page
    plot_goodput(cells, tmp_path / "goodput.png")
    plot_curves(cells, tmp_path / "curves.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_seed_that_was_only_screened_does_not_join_the_others(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    rows = [cell("auto", 1, 9.0) | {"requests": 400}, cell("auto", 2, 8.0), cell("auto", 2, 7.0)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["goodput"] for row in grouped(path)["8b-sharegpt", "tight"]["auto"].values()] == [7.0]


def test_the_varied_engine_is_the_simulator_when_nothing_is_varied_and_slower_when_it_should_be() -> None:
    def run(variation: sensitivity.Variation) -> dict[str, Any]:
        return sensitivity.simulate(variation, scenario, settings, steady=True, observers=())

    scenario, settings = SMALL, dataclasses.replace(POLICY, split="auto")
    plain = run(sensitivity.Variation())
    assert plain == simulate(scenario, settings, steady=True)
    settings = POLICY
    known = run(sensitivity.Variation())["e2e_s"]["mean"]
    assert run(sensitivity.Variation(contention=0.4))["e2e_s"]["mean"] > known
    assert run(sensitivity.Variation(switch_seconds=0.05))["e2e_s"]["mean"] > known


def test_what_auto_alone_is_told_wrong_changes_no_fixed_way() -> None:
    for name, variation in sensitivity.VARIATIONS.items():
        assert sensitivity.source_of(name, "auto") == name
        assert sensitivity.source_of(name, "chunked 512") == next(iter(sensitivity.VARIATIONS))
        source = sensitivity.VARIATIONS[sensitivity.source_of(name, "static 84:24")]
        assert source.device == variation.device and not source.untold


def test_a_misled_policy_gets_its_request_back_as_it_was() -> None:
    settings = dataclasses.replace(POLICY, split="auto")
    right, wrong = (
        sensitivity.simulate(
            sensitivity.Variation(lengths=factor), SMALL, settings, steady=False, observers=()
        )
        for factor in (1.0, 4.0)
    )
    assert wrong["requests"] == 40 and wrong["output_throughput"] > 0.0
    assert wrong["output_throughput"] * wrong["simulated_s"] == pytest.approx(
        right["output_throughput"] * right["simulated_s"]
    )


def test_misses_are_counted_as_the_summary_counts_them() -> None:
    assert Targets(0.2, 0.05) == sensitivity.targets_of(POLICY)["default"]
    give_up = paper.GiveUp(POLICY, (0.0, math.inf), math.inf)
    scenario = dataclasses.replace(SMALL, rate=60.0)
    result = simulate(scenario, POLICY, observers=(give_up,))
    assert 0 < give_up.missed == round((1.0 - result["attainment"]) * result["counted"])
