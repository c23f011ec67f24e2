"""Admission that learns must hear what happens: without that it knows of no output shorter than allowed."""

from __future__ import annotations

import pytest

from semipd.bench.scenario import Scenario, simulate
from semipd.build import make_policy
from semipd.config import PolicyConfig
from semipd.core.policies import observers_of
from semipd.core.types import Device
from semipd.execute.sim import FixedCost

DEVICE = Device("d", 2, "core", ((1, 1),), 2)
WAYS = [
    {"split": "static:1,1"},
    {"policy": "prefill-first"},
    {"policy": "chunked"},
    {"split": "auto", "ttft_slo": 1.0},
]


@pytest.mark.parametrize("way", WAYS)
def test_every_policy_lets_its_admission_learn(way: dict[str, object]) -> None:
    policy = make_policy(PolicyConfig(**way, admission="past-future"), DEVICE, FixedCost(2))  # type: ignore[arg-type]
    admission = policy.limits.admission  # type: ignore[attr-defined]
    assert admission in observers_of(policy)
    assert (policy in observers_of(policy)) is callable(policy)


def test_past_future_admits_more_than_the_worst_case_would() -> None:
    """Everybody may say 4,096 tokens and says a few hundred. Once that is known, more fit the pool."""
    scenario = Scenario(requests=60, rate=20.0, kv_blocks=700, seed=100)
    expecting, worst = (
        simulate(scenario, PolicyConfig(policy="prefill-first", admission=name))
        for name in ("past-future", "conservative")
    )
    assert expecting["e2e_s"]["mean"] < 0.7 * worst["e2e_s"]["mean"]
