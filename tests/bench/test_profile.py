"""The profile of a CPU: what is fitted, what a device file of it may hold, and who predicts with it."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from semipd.bench import profile_cpu
from semipd.bench.profile import (
    Measured,
    ProfileOptions,
    describe,
    host_seconds,
    profile,
    some_splits,
    some_units,
    write_device,
)
from semipd.bench.profile_cpu import Slowdown, steps_to_measure
from semipd.bench.scenario import Scenario, simulate
from semipd.bench.step_fit import Timing, fit_prices
from semipd.build import make_policy, predictor, resolve
from semipd.config import PolicyConfig, from_mapping
from semipd.core.auto import Auto
from semipd.core.errors import ConfigError
from semipd.core.types import Slice, Work
from semipd.execute.cpu import cpu_device
from semipd.execute.device_file import load_device, read_device
from semipd.execute.step_profile import DECODE as DECODE_PRICES
from semipd.execute.step_profile import (
    PRICES,
    Beside,
    ProfiledCost,
    StepProfile,
    features,
    read_profile,
    shape_of,
    write_profile,
)
from semipd.model.spec import load_spec
from tests.checkpoints import make_checkpoint

# Seconds: a step of 10 ms at one token, memory-bound up to 16 tokens, then 100 us per token.
TRUE = dict.fromkeys(PRICES, 0.0) | {
    "step": 1e-2,
    "token_16": 1e-4,
    "token_32": 1e-4,
    "token_64": 1e-4,
    "token_256": 1e-4,
    "token_1024": 1e-4,
    "head": 2e-3,
    "row_2": 5e-5,
    "row_8": 5e-5,
    "row_32": 5e-5,
    "single_context": 4e-7,
    "pair": 3e-8,
    # A decode step costs half as much as one that also holds a prompt.
    "decode_step": 5e-3,
    "decode_2": 1e-4,
    "decode_16": 2e-4,
    "decode_32": 2e-4,
    "decode_64": 2e-4,
    "decode_context": 2e-7,
}
PROMPT = Work.of([Slice(0, 0, 700)])
DECODE = Work.decode(8, 4000)
MIXED = DECODE + Work.of([Slice(0, 256, 100, False)])
SHAPE = {"linear_flops": 2e9, "head_flops": 3e8, "linear_bytes": 2e9, "head_bytes": 3e8, "kv_bytes": 1e4,
         "attention": 4e4, "layers": 24.0}  # fmt: skip


def seconds_of(work: Work, prices: dict[str, float] = TRUE) -> float:
    return sum(prices[name] * value for name, value in zip(PRICES, features(work), strict=True))


def a_profile() -> StepProfile:
    whole = tuple(TRUE[name] for name in PRICES)
    half = tuple(2.0 * price for price in whole)
    beside = (
        Beside(1, 1, True, 1.2),
        Beside(1, 1, False, 1.5),
        Beside(2, 2, True, 1.9),
        Beside(2, 2, False, 3.0),
    )
    return StepProfile("tiny", SHAPE, {1: half, 2: whole}, beside)


def a_device() -> dict[str, Any]:
    return {
        "name": "cpu-test",
        "flops_bf16": 1e12,
        "memory_bandwidth": 2e10,
        "memory_bytes": 16e9,
        "units": 2,
        "unit_kind": "core",
        "step_seconds": 1e-4,
        "steps": write_profile(a_profile()),
    }


def test_the_fit_finds_the_prices_behind_the_timings() -> None:
    """From times with 1% of noise, steps that were not among them are predicted within 3%."""
    noise = random.Random(3)
    timings = [
        Timing(step.work, seconds_of(step.work) * noise.uniform(0.99, 1.01))
        for step in steps_to_measure(4096, 64, 2**20)
    ]
    fit = fit_prices(timings)
    assert min(fit.prices) >= 0.0
    assert fit.median_error < 0.01 and fit.held_out < 0.02
    found = dict(zip(PRICES, fit.prices, strict=True))
    for work in (PROMPT, DECODE, MIXED, Work.of([Slice(0, 0, 4000)])):
        assert seconds_of(work, found) == pytest.approx(seconds_of(work), rel=0.03)


def test_a_mixed_step_is_not_a_decode_step_and_a_piece() -> None:
    """Decode steps run in another way than steps that hold a piece of a prompt. With one price for both,
    what is measured of the first is charged to the second: `chunked` was up to 43% off."""
    decode, piece = Work.decode(8, 2000), Work.of([Slice(0, 256, 24, False)])
    extra = seconds_of(decode + piece) - seconds_of(decode)
    assert extra > 1.2 * (seconds_of(piece) - TRUE["step"])
    timings = [Timing(s.work, seconds_of(s.work)) for s in steps_to_measure(4096, 64, 2**20)]
    found = dict(zip(PRICES, fit_prices(timings).prices, strict=True))
    assert seconds_of(decode, found) == pytest.approx(seconds_of(decode), rel=0.01)
    assert seconds_of(decode + piece, found) == pytest.approx(seconds_of(decode + piece), rel=0.01)


def test_a_profile_without_prices_of_decode_steps_is_priced_as_it_was() -> None:
    values = a_device()
    for line in values["steps"]["prices"].values():
        for name in DECODE_PRICES:
            del line[name]
    steps = read_device(values, "x").steps
    assert steps is not None
    work = Work.decode(40, 9000)
    expected = 1e-2 + 24e-4 + 2e-3 + 5e-5 * 38 + 4e-7 * 9040
    assert ProfiledCost(steps).seconds(work, 2) == pytest.approx(expected)


def test_a_longer_prompt_than_any_measured_is_not_free() -> None:
    timings = [Timing(s.work, seconds_of(s.work)) for s in steps_to_measure(300, 8, 4096)]
    found = dict(zip(PRICES, fit_prices(timings).prices, strict=True))
    assert found["token_1024"] > 0.5e-4
    long = Work.of([Slice(0, 0, 3000)])
    assert seconds_of(long, found) > 0.8 * seconds_of(long)


def test_steps_stay_within_the_executor() -> None:
    for step in steps_to_measure(100, 4, 256):
        assert step.length < 100 and len(step.pieces) <= 4 and len(step.pieces) * step.length <= 256


def test_a_step_costs_its_units_its_neighbour_and_the_host() -> None:
    cost = ProfiledCost(a_profile(), step_seconds=1e-3, sequence_seconds=1e-4)
    alone = seconds_of(DECODE)
    assert cost.seconds(DECODE, 2) == pytest.approx(alone + 1e-3 + 8e-4)
    assert cost.seconds(DECODE, 1) == pytest.approx(2.0 * alone + 1.8e-3)
    assert cost.seconds(DECODE, 1, PROMPT, 1) == pytest.approx(1.5 * 2.0 * alone + 1.8e-3)
    assert cost.seconds(PROMPT, 2, DECODE, 2) == pytest.approx(1.9 * seconds_of(PROMPT) + 1.1e-3)


def test_a_larger_machine_is_priced_by_parts_of_it() -> None:
    """8 cores from a profile of 2: half of them beside the other half is 1:1, not 2:2."""
    cost = ProfiledCost(a_profile(), units=8)
    assert cost.seconds(DECODE, 8) == pytest.approx(seconds_of(DECODE) / 4)
    assert cost.seconds(DECODE, 4, PROMPT, 4) == pytest.approx(1.5 * seconds_of(DECODE) / 2)
    assert cost.seconds(DECODE, 8, PROMPT, 8) == pytest.approx(3.0 * seconds_of(DECODE) / 4)


def test_another_model_is_priced_by_its_shape() -> None:
    twice = {**SHAPE, "linear_bytes": 4e9, "linear_flops": 4e9}
    scaled = ProfiledCost(a_profile().scaled(twice))
    more = (
        1e-2
        + 84 * 0.0
        + sum(
            TRUE[f"token_{n}"] * value
            for n, value in zip((1, 2, 4, 8, 16, 32, 64, 256, 1024), features(PROMPT)[1:10], strict=True)
        )
    )
    assert scaled.seconds(PROMPT, 2) == pytest.approx(seconds_of(PROMPT) + more)


def test_a_device_file_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    write_device(a_device(), path)
    device = load_device(str(path))
    assert device.steps == a_profile()
    assert device.device().legal_splits == ((1, 1),)
    assert device.varied(slower=2.0).steps == a_profile().slower(2.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda steps: steps.pop("model"), "not an object with model"),
        (lambda steps: steps["shape"].pop("layers"), "shape: not one number for each name: layers"),
        (lambda steps: steps["prices"].pop("2"), "prices of 2 units"),
        (lambda steps: steps["prices"].update({"3": {}}), "'3' is not a number of units"),
        (lambda steps: steps["prices"]["1"].update(pair=-1.0), "pair: -1.0 is not a number"),
        (lambda steps: steps["prices"]["1"].update(pair=float("nan")), "pair: nan is not a number"),
        (lambda steps: steps["prices"].update({"2": dict.fromkeys(PRICES, 0.0)}), "all are 0"),
        (lambda steps: steps["beside"].append([1, 1, "both", 1.0]), "beside: "),
        (lambda steps: steps["beside"].append([1, 3, "decode", 1.0]), "3 is not a number between 1 and 2"),
    ],
)
def test_a_bad_profile_is_named_in_one_line(change: Any, words: str) -> None:
    values = copy.deepcopy(a_device())
    change(values["steps"])
    with pytest.raises(ConfigError, match=words) as refused:
        read_device(values, "device file x")
    assert "\n" not in str(refused.value) and str(refused.value).startswith("device file x: steps")


def test_units_and_splits_to_measure() -> None:
    assert some_units(1) == [1] and some_units(6) == [1, 2, 4, 6]
    legal = tuple((n, 16 - n) for n in range(1, 16))
    assert some_splits(legal)[0] == (1, 15) and some_splits(legal)[-1] == (15, 1)
    assert len(some_splits(legal)) == 5 and some_splits(((1, 1),)) == [(1, 1)]


def test_host_seconds_are_never_negative() -> None:
    step, sequence = host_seconds([(1, 1.1e-4), (8, 1.8e-4), (32, 4.2e-4)])
    assert (step, sequence) == (pytest.approx(1e-4), pytest.approx(1e-5))
    assert host_seconds([(1, 3e-4), (8, 1e-4), (32, 2e-4)]) == (pytest.approx(2e-4), 0.0)
    assert min(host_seconds([(1, -3e-4), (8, -1e-4)])) == 0.0


def test_host_seconds_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down by a fifth from one measurement to the next is no host time."""
    pace = iter([1.0, 1.0, 1.2, 1.2, 1.44, 1.44])

    def under_planner(*_: Any) -> tuple[float, int]:
        return next(pace) * 0.04 + 1e-3, 100

    bench = SimpleNamespace(vocabulary=10, time=lambda *_, **__: [next(pace) * 0.04] * 3)
    engine = SimpleNamespace(executor=SimpleNamespace(device=SimpleNamespace(units=2)))
    monkeypatch.setattr(profile_cpu, "_under_planner", under_planner)
    assert profile_cpu.measure_host(engine, None, bench, 8, 1.0) == (8, pytest.approx(1e-3))  # type: ignore[arg-type]


def test_targets_choose_auto_on_a_cpu(tmp_path: Path) -> None:
    spec = load_spec(make_checkpoint(tmp_path / "model", "llama"))
    device = cpu_device(2)
    write_device(a_device(), tmp_path / "cpu.json")
    for settings in (
        PolicyConfig(ttft_slo=0.3),
        PolicyConfig(split="auto"),
        PolicyConfig(tpot_slo=0.1, device_file=str(tmp_path / "cpu.json")),
    ):
        cost = predictor(settings, spec, "float32", device)
        assert isinstance(make_policy(settings, device, cost), Auto)
    assert predictor(PolicyConfig(split="shared", ttft_slo=0.3), spec, "float32", device) is None
    with pytest.raises(ConfigError, match="has SMs, not cores"):
        predictor(PolicyConfig(split="auto", device_file="h200"), spec, "float32", device)
    with pytest.raises(ConfigError, match="--device-file belongs to the policy semi-pd"):
        from_mapping({"policy": "chunked", "device_file": "cpu.json"})


def test_rounds_of_a_profile_are_fitted_together(tmp_path: Path) -> None:
    """A machine that was four times as fast in one round as in the other is priced in between."""
    resolved = resolve(
        from_mapping({"model": str(make_checkpoint(tmp_path / "model", "llama")), "device": "cpu"})
    )
    works = [Work.decode(count, 32 * count) for count in (1, 2, 4, 8)] + [Work.of([Slice(0, 0, 64)])]

    def round_of(pace: float) -> Measured:
        timings = [Timing(work, pace * 1e-3 * work.tokens) for work in works]
        slow = [Slowdown(1, 1, 2.0 * pace, pace, 1.0 + pace)]
        return Measured(resolved, {1: timings}, slow, [(1, 0.0)], 0.0)

    alone, slower, both = (
        describe(rounds) for rounds in ([round_of(1.0)], [round_of(4.0)], [*map(round_of, (1.0, 4.0))])
    )
    assert [entry[3] for entry in both["steps"]["beside"]] == pytest.approx([4.0, 2.0])
    assert both["fit"]["slowdown_spread"] == {"1:1": 5.0}
    costs = [ProfiledCost(read_profile(found["steps"], 1, "x")) for found in (alone, slower, both)]
    for work in works:
        quick, slow, between = (cost.seconds(work, 1) for cost in costs)
        assert between == pytest.approx(2.0 * quick) and slow == pytest.approx(4.0 * quick)


def test_profile_of_a_tiny_model_can_be_simulated(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", max_position_embeddings=256)
    found = profile(str(folder), ProfileOptions(seconds=0.5))
    path = tmp_path / "cpu.json"
    write_device(json.loads(json.dumps(found)), path)
    device = load_device(str(path))
    assert device.steps is not None
    assert device.steps.shape == shape_of(load_spec(folder), 4)
    assert read_profile(write_profile(device.steps), device.units, "x") == device.steps
    assert set(found["fit"]["error_by_units"]) == {str(units) for units in device.steps.prices}
    scenario = Scenario(
        model=str(folder), device=str(path), workload="64,16", rate=5.0, requests=20, kv_blocks=400
    )
    for policy in (PolicyConfig(), PolicyConfig(policy="chunked"), PolicyConfig(ttft_slo=0.3)):
        result = simulate(scenario, policy)
        assert result["requests"] == 20 and result["ttft_s"]["mean"] > 0.0
