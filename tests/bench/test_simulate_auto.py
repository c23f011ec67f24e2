"""auto on the fitted cost model of a real card."""

from __future__ import annotations

import pytest

from semipd.bench.scenario import Scenario, simulate
from semipd.config import PolicyConfig


@pytest.mark.parametrize("seed", [105, 106])
def test_near_saturation_auto_keeps_up_with_the_best_static_split(seed: int) -> None:
    """The slack of TPOT must go to prompts before they are late, also to those yet to come: when it
    did not, auto missed three to four times the targets that the static split missed."""
    scenario = Scenario(rate=22.0, requests=300, seed=seed)
    targets = {"max_num_seqs": 512, "ttft_slo": 0.3, "tpot_slo": 0.15}
    auto = simulate(scenario, PolicyConfig(split="auto", slo_attainment=0.99, **targets))
    static = simulate(scenario, PolicyConfig(split="static:92,16", **targets))
    assert auto["attainment"] > static["attainment"] - 0.02
    assert auto["ttft_s"]["p90"] < 0.245
    assert auto["e2e_s"]["mean"] < 1.05 * static["e2e_s"]["mean"], (
        "targets are not to be bought with latency"
    )


def test_what_is_above_the_wanted_attainment_is_traded_for_latency() -> None:
    scenario = Scenario(rate=21.0, requests=500, seed=105)
    targets = {"max_num_seqs": 512, "ttft_slo": 0.3, "tpot_slo": 0.15}
    found = [
        simulate(scenario, PolicyConfig(split="auto", slo_attainment=share, **targets))
        for share in (None, 0.95, 0.99)
    ]
    latency = [result["e2e_s"]["mean"] for result in found]
    kept = [result["attainment"] for result in found]
    assert latency == sorted(latency) and latency[0] < 0.97 * latency[2]
    assert kept == sorted(kept) and kept[0] >= 0.88 and kept[1] >= 0.93


def test_long_prompts_that_are_given_up_do_not_press() -> None:
    """At 26 a second some of the long prompts cannot be in time. Their backlog must not make auto take from
    decode what would save none of them: it then kept 88% of the targets, at 1.8 times the latency."""
    scenario = Scenario(rate=26.0, requests=500, seed=105, workload="mixed")
    targets = {"max_num_seqs": 512, "ttft_slo": 1.0, "tpot_slo": 0.1}
    auto = simulate(scenario, PolicyConfig(split="auto", **targets))
    static = simulate(scenario, PolicyConfig(split="static:92,16", prompt_order="deadline", **targets))
    assert auto["attainment"] > static["attainment"] - 0.02
    assert auto["e2e_s"]["mean"] < static["e2e_s"]["mean"]


def test_under_too_much_load_more_prefill_still_saves_some_long_prompts() -> None:
    """When all of them counted as lost, auto met 2% fewer targets than the static split."""
    scenario = Scenario(rate=31.0, requests=800, seed=105, workload="mixed")
    targets = {"max_num_seqs": 512, "ttft_slo": 1.0, "tpot_slo": 0.1}
    auto = simulate(scenario, PolicyConfig(split="auto", **targets))
    static = simulate(scenario, PolicyConfig(split="static:92,16", prompt_order="deadline", **targets))
    assert auto["attainment"] > static["attainment"] - 0.01
    assert auto["e2e_s"]["mean"] < 0.95 * static["e2e_s"]["mean"]


@pytest.mark.parametrize("seed", [105, 106])
def test_in_bursts_short_prompts_do_not_wait_for_those_that_could_share_their_step(seed: int) -> None:
    scenario = Scenario(rate=6.2, requests=600, seed=seed, arrivals="gamma:3")
    targets = {"max_num_seqs": 512, "ttft_slo": 0.3, "tpot_slo": 0.1}
    auto = simulate(scenario, PolicyConfig(split="auto", **targets))
    static = simulate(scenario, PolicyConfig(split="static:100,8", prompt_order="deadline", **targets))
    assert auto["attainment"] > static["attainment"] - 0.01
    assert auto["e2e_s"]["mean"] < 0.98 * static["e2e_s"]["mean"]
