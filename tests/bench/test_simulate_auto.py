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
    auto = simulate(scenario, PolicyConfig(split="auto", **targets))
    static = simulate(scenario, PolicyConfig(split="static:92,16", **targets))
    assert auto["attainment"] > static["attainment"] - 0.02
    assert auto["ttft_s"]["p90"] < 0.245
    assert auto["e2e_s"]["mean"] < 1.05 * static["e2e_s"]["mean"], (
        "targets are not to be bought with latency"
    )
