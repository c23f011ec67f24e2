"""The cost model: prices that a policy could exploit if they were wrong."""

from __future__ import annotations

import subprocess
import sys
import timeit
from collections.abc import Callable
from time import thread_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semipd.core.errors import ConfigError
from semipd.core.types import Slice, Work
from semipd.execute.cost import StepCost, kv_capacity
from semipd.execute.device_file import Curve, load_device
from semipd.model.catalogue import CATALOGUE, named_spec

A100, H200 = load_device("a100-80g"), load_device("h200")
ON_A100 = StepCost(named_spec("llama3-8b"), A100)
ON_H200 = StepCost(named_spec("llama3-8b"), H200)


def prompt(tokens: int, cached: int = 0) -> Work:
    return Work.of([Slice(0, cached, tokens)])


def decode(sequences: int, context: int) -> Work:
    """Each sequence reads `context` positions, its new one included."""
    return Work.decode(sequences, sequences * (context - 1))


def whole(cost: StepCost, work: Work) -> float:
    return cost.seconds(work, cost.device.units)


# -- against published figures -------------------------------------------------------------------------

# Qwen3-8B bf16 on an H200, milliseconds: sums of measured kernels, without norms, head and launches.
ANCHORS = [
    (prompt(512), 9.8),
    (prompt(2048), 37.5),
    (prompt(8192), 177.5),
    (decode(1, 1024), 4.66),
    (decode(64, 1024), 7.24),
    (decode(64, 2048), 9.37),
    (decode(128, 1024), 9.80),
    (decode(256, 1024), 15.4),
]


@pytest.mark.parametrize(("work", "milliseconds"), ANCHORS)
def test_sums_of_measured_kernels_are_met_within_eight_percent(work: Work, milliseconds: float) -> None:
    parts = StepCost(named_spec("qwen3-8b"), H200).parts(work)
    kernels = parts["linears"] + parts["prompt attention"] + parts["generation attention"]
    assert kernels * 1e3 == pytest.approx(milliseconds, rel=0.08)


# Llama-3-8B on an H200 at 790 TFLOP/s and 4.3 TB/s, milliseconds: the physical limit.
BOUNDS = [
    (prompt(512), 9.1),
    (prompt(2048), 37.6),
    (prompt(8192), 167.0),
    (prompt(32768), 935.0),
    (decode(1, 1024), 3.5),
    (decode(32, 1024), 4.5),
    (decode(64, 2048), 7.5),
    (decode(128, 1024), 7.5),
    (decode(64, 8192), 19.5),
]


@pytest.mark.parametrize(("work", "milliseconds"), BOUNDS)
def test_no_step_beats_the_published_lower_bound(work: Work, milliseconds: float) -> None:
    seconds = whole(ON_H200, work)
    assert milliseconds <= seconds * 1e3 <= 1.5 * milliseconds


@pytest.mark.parametrize(
    ("cost", "work", "curve"),
    [
        (ON_A100, prompt(4096), A100.compute),
        (ON_A100, decode(64, 1024), A100.memory),
        (ON_H200, prompt(16384), H200.compute),
        (ON_H200, decode(64, 1024), H200.memory),
    ],
)
def test_the_published_curves_over_units_come_back(cost: StepCost, work: Work, curve: Curve) -> None:
    for units, slowdown in curve.points:
        measured = cost.seconds(work, int(units)) / whole(cost, work)
        # Starts of kernels and the host do not scale, so a whole step scales a little less than its curve.
        assert 0.88 * slowdown <= measured <= slowdown + 1e-9


# -- order ---------------------------------------------------------------------------------------------

SIZES = st.integers(1, 8192)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.sampled_from([ON_A100, ON_H200]))
def test_longer_prompts_take_longer(one: int, other: int, cost: StepCost) -> None:
    short, long = sorted((one, other))
    assert whole(cost, prompt(short)) <= whole(cost, prompt(long)) * 1.001


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 2048), SIZES, SIZES, st.sampled_from([ON_A100, ON_H200]))
def test_more_cached_context_takes_longer(tokens: int, one: int, other: int, cost: StepCost) -> None:
    near, far = sorted((one, other))
    assert whole(cost, prompt(tokens, near)) <= whole(cost, prompt(tokens, far)) * 1.01


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 512), st.integers(1, 512), SIZES, SIZES, st.sampled_from([ON_A100, ON_H200]))
def test_more_sequences_and_more_context_take_longer(
    one: int, other: int, context: int, longer: int, cost: StepCost
) -> None:
    few, many = sorted((one, other))
    short, long = sorted((context, longer))
    assert whole(cost, decode(few, short)) <= whole(cost, decode(many, long)) * 1.001


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 256), st.integers(1, 4096), st.integers(1, 2048), st.integers(1, 131))
def test_fewer_units_are_never_faster(sequences: int, context: int, tokens: int, units: int) -> None:
    for work in (decode(sequences, context), prompt(tokens), decode(sequences, context) + prompt(tokens)):
        assert ON_H200.seconds(work, units) >= ON_H200.seconds(work, units + 1) - 1e-12


def test_adding_a_chunk_to_a_decode_step_costs_more_than_either_and_less_than_both() -> None:
    """A mixed batch reads the weights once; priced as all prompt or all decode it would be far off."""
    steps, chunk = decode(64, 1024), prompt(448, 1024)
    mixed = whole(ON_A100, steps + chunk)
    assert max(whole(ON_A100, steps), whole(ON_A100, chunk)) < mixed
    assert mixed < whole(ON_A100, steps) + whole(ON_A100, chunk)


def test_a_batch_of_single_positions_is_recognised_without_its_decode_features() -> None:
    known = decode(64, 1024)
    bare = Work(known.tokens, known.context, known.square, known.sequences, known.sampled)
    assert whole(ON_A100, bare) == pytest.approx(whole(ON_A100, known))


# -- two phases ----------------------------------------------------------------------------------------


def test_contention_slows_both_and_a_lone_phase_is_not_slowed() -> None:
    first, second = prompt(2048), decode(64, 1024)
    for left, right in A100.device().legal_splits:
        lone = ON_A100.seconds(first, left), ON_A100.seconds(second, right)
        both = ON_A100.seconds(first, left, second, right), ON_A100.seconds(second, right, first, left)
        assert lone[0] < both[0] <= lone[0] * 1.2
        assert lone[1] < both[1] <= lone[1] * (1 + A100.contention) + 1e-9
        assert ON_A100.seconds(first, left, None, 0) == lone[0]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 512), st.integers(16, 8192), st.integers(16, 8192), st.integers(0, 8192), st.data())
def test_two_phases_never_get_more_than_the_device_has(
    sequences: int, context: int, tokens: int, cached: int, data: st.DataObject
) -> None:
    """Bytes per second and FLOPs per second of both together stay under the ceilings, on every split."""
    splits = (*A100.device().legal_splits, (A100.units, A100.units))
    left, right = data.draw(st.sampled_from(splits))
    first, second = prompt(tokens, cached), decode(sequences, context)
    one = ON_A100.seconds(first, left, second, right)
    two = ON_A100.seconds(second, right, first, left)
    loads = ON_A100.load(first, left), ON_A100.load(second, right)
    assert loads[0].moved / one + loads[1].moved / two <= A100.ceiling_bandwidth * 1.001
    assert loads[0].flops / one + loads[1].flops / two <= A100.ceiling_flops * 1.001


def test_overlapping_units_are_shared_out() -> None:
    """Both on everything cannot be better for both than the even split is."""
    first, second = prompt(2048), decode(64, 1024)
    shared = ON_A100.seconds(first, 108, second, 108), ON_A100.seconds(second, 108, first, 108)
    half = ON_A100.seconds(first, 54, second, 54), ON_A100.seconds(second, 54, first, 54)
    assert shared[0] >= half[0] and shared[1] >= half[1]
    assert shared[0] > 1.2 * whole(ON_A100, first)


def test_the_knobs_of_a_sensitivity_study_do_what_they_say() -> None:
    spec, work, beside = named_spec("llama3-8b"), decode(64, 1024), prompt(2048)
    calm = StepCost(spec, A100.varied(contention=0.0))
    rough = StepCost(spec, A100.varied(contention=0.4))
    assert calm.seconds(work, 40, beside, 68) < rough.seconds(work, 40, beside, 68)
    assert calm.seconds(work, 40) == rough.seconds(work, 40)
    late = StepCost(spec, A100.varied(knee=1.5))
    assert late.seconds(work, 40) > ON_A100.seconds(work, 40)
    assert whole(late, work) == pytest.approx(whole(ON_A100, work))
    slow = StepCost(spec, A100.varied(slower=1.3))
    for batch in (work, beside, prompt(100, 3000)):
        assert slow.seconds(batch, 64) == pytest.approx(1.3 * ON_A100.seconds(batch, 64), rel=1e-6)
    assert A100.varied(switch_seconds=0.05).device().switch_seconds == 0.05


# -- models and degrees --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_every_model_of_the_catalogue_can_be_priced(name: str) -> None:
    device = H200 if name == "deepseek-v3" else A100
    cost = StepCost(CATALOGUE[name], device, tensor_ranks=1)
    spec = CATALOGUE[name]
    bytes_per_weight = 1 if spec.dtype == "fp8_block" else 2
    for work in (prompt(300), decode(16, 500)):
        seconds = whole(cost, work)
        read = spec.read_bytes(work.tokens, bytes_per_weight) / device.ceiling_bandwidth
        assert 0.9 * read < seconds < 10 * read + 0.05


def test_experts_are_read_as_far_as_tokens_reach_them() -> None:
    """A mixture that paid for all experts on every step would never show its advantage at batch 1."""
    cost = StepCost(named_spec("deepseek-v2-lite"), A100)
    alone, crowd = (cost.parts(decode(batch, 512))["experts"] for batch in (1, 64))
    assert crowd > 3 * alone


def test_latent_attention_keeps_little_and_reads_little() -> None:
    dense, latent = named_spec("llama3-8b"), named_spec("deepseek-v3")
    assert latent.kv_bytes_per_token(2) < dense.kv_bytes_per_token(2)
    cost = StepCost(latent, H200, tensor_ranks=8)
    near, far = (cost.parts(decode(64, length))["generation attention"] for length in (128, 8192))
    assert near < far < 4 * near


def test_more_ranks_are_faster_and_pay_for_their_sums() -> None:
    spec = named_spec("llama3-70b")
    single, four = StepCost(spec, A100), StepCost(spec, A100, tensor_ranks=4)
    assert "collectives" not in single.parts(prompt(1024))
    assert four.parts(prompt(1024))["collectives"] > 0
    assert whole(four, prompt(1024)) < whole(single, prompt(1024)) < 4 * whole(four, prompt(1024))


def test_pipeline_stages_share_a_large_batch_and_do_not_help_a_small_one() -> None:
    spec = named_spec("llama3-70b")
    flat, staged = StepCost(spec, A100, 4), StepCost(spec, A100, 4, pipeline_stages=4)
    assert whole(staged, prompt(8192)) < 0.4 * whole(flat, prompt(8192))
    assert whole(staged, decode(1, 1024)) >= 0.95 * whole(flat, decode(1, 1024))


def test_the_grid_agrees_with_the_kernels_it_was_made_from() -> None:
    for work in (prompt(777), prompt(3001, 1000), decode(37, 900), decode(200, 3000) + prompt(123)):
        assert whole(ON_A100, work) == pytest.approx(sum(ON_A100.parts(work).values()), rel=0.02)


def test_what_fits_the_memory() -> None:
    spec = named_spec("llama3-8b")
    tokens = kv_capacity(spec, A100)
    used = tokens * spec.kv_bytes_per_token(2) + spec.weight_bytes(2)
    assert used == pytest.approx(0.9 * A100.memory_bytes, rel=1e-3)
    with pytest.raises(ConfigError, match="more devices"):
        kv_capacity(named_spec("llama3-70b"), A100)


@pytest.mark.parametrize(
    ("spec", "device", "options", "words"),
    [
        ("deepseek-v3", "a100-80g", {}, "no kernel"),
        ("llama3-8b", "h200", {"tensor_ranks": 5}, "do not divide"),
        ("llama3-8b", "h200", {"dtype": "int3"}, "no cost is known for int3"),
        ("llama3-8b", "h200", {"pipeline_stages": 99}, "do not divide"),
    ],
)
def test_what_cannot_be_priced_is_refused_in_one_line(
    spec: str, device: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        StepCost(named_spec(spec), load_device(device), **options)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


def test_prices_are_quick() -> None:
    """The simulator asks several times per step, thousands of steps per second. As a ratio, because
    machines are slow and shared: about 7 us and 25 us on an idle core."""
    steps = [decode(1 + index, 500 + index) for index in range(40)]
    beside = prompt(1000)
    pieces = [Slice(slot, 100, 1) for slot in range(256)]

    def ask() -> None:
        for work in steps:
            ON_A100.seconds(work, 40, beside, 68)

    def least(run: Callable[[], object], setup: Callable[[], object]) -> float:
        return min(timeit.repeat(run, setup, timer=thread_time, repeat=50, number=1))

    price = least(ask, ON_A100._recent.clear) / len(steps)
    assert price < least(lambda: Work.of(pieces), lambda: None)


def test_simulating_needs_neither_torch_nor_numpy() -> None:
    program = (
        "import sys\n"
        "from semipd.execute.cost import StepCost\n"
        "from semipd.execute.device_file import load_device\n"
        "from semipd.model.catalogue import named_spec\n"
        "StepCost(named_spec('llama3-8b'), load_device('a100-80g'))\n"
        "assert not {'torch', 'numpy', 'pyarrow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
