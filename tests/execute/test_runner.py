from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from semipd.core.types import Slice
from semipd.model.dense import DenseModel, load_model
from semipd.model.step import Chosen
from tests.checkpoints import VOCABULARY, make_checkpoint
from tests.model.conftest import one_thread  # noqa: F401  (a fixture)
from tests.model.stepping import Bench


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", num_key_value_heads=1)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(folder: Path, request: pytest.FixtureRequest) -> DenseModel:
    return load_model(folder, dtype=request.param)


@pytest.fixture(scope="module")
def single(folder: Path) -> DenseModel:
    return load_model(folder, dtype="float32")


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, VOCABULARY, length).tolist()


def test_a_row_has_the_same_bits_in_any_company(model: DenseModel) -> None:
    """Rule 3 of DESIGN.md, on whole logits: decode and prefill alone, and all in one batch."""
    lengths = [3, 50, 51, 120, 200]
    slices = [
        *(Slice(slot, length, 1) for slot, length in enumerate(lengths)),
        Slice(5, 0, 17),
        Slice(6, 30, 40),
    ]
    bench = Bench(model, slots=7)
    for slot, length in enumerate(lengths):
        bench.open(slot, prompt(length))
        bench.run(Slice(slot, 0, length))
    bench.open(5, prompt(17))
    bench.open(6, prompt(70))
    bench.run(Slice(6, 0, 30, False))
    together_tokens = bench.run(*slices)
    together = bench.recorder.logits
    for row, piece in enumerate(slices):
        assert bench.run(piece) == together_tokens[row : row + 1]
        assert torch.equal(bench.recorder.logits[0], together[row]), piece
    decodes = bench.run(*slices[4::-1])
    assert decodes == together_tokens[4::-1]


def test_sampled_tokens_survive_replay_company_and_chunking(single: DenseModel) -> None:
    bench = Bench(single, slots=3)
    for slot in range(3):
        bench.open(slot, prompt(40), temperature=1.0, seed=5, top_p=0.95)
    whole = bench.generate(0, prompt(40), 8)
    chunked = bench.generate(1, prompt(40), 8, chunk=7)
    assert whole == chunked and len(set(whole)) > 3
    bench.run(Slice(2, 0, 40))
    for position in range(40, 47):
        other = bench.run(Slice(0, position, 1), Slice(2, position, 1))
        assert other == [whole[position - 39]] * 2


def test_seeds_and_rules_belong_to_slots(single: DenseModel) -> None:
    bench = Bench(single, slots=3)
    bench.open(0, prompt(20), temperature=2.0, seed=1)
    bench.open(1, prompt(20), temperature=2.0, seed=2)
    bench.open(2, prompt(20))
    one, two, greedy = bench.run(*(Slice(slot, 0, 20) for slot in range(3)))
    assert one != two
    assert greedy == int(bench.recorder.logits[2].argmax())
    bench.open(2, prompt(20), ban_until=21, ban_tokens=(greedy,))
    assert bench.run(Slice(2, 0, 20)) != [greedy]
    bench.open(2, prompt(20), ban_until=20, ban_tokens=(greedy,))
    assert bench.run(Slice(2, 0, 20)) == [greedy]


def test_only_sampled_slices_write_a_token(single: DenseModel) -> None:
    """A chunk in the middle of a prompt must not overwrite the next prompt token."""
    bench = Bench(single)
    tokens = prompt(30)
    bench.open(0, tokens)
    bench.open(1, tokens)
    assert bench.run(Slice(0, 0, 12, False)) == []
    produced = bench.run(Slice(1, 0, 30), Slice(0, 12, 5, False))
    assert bench.table.tokens[0, :30].tolist() == tokens
    assert bench.table.tokens[1, 30] == produced[0]


def test_a_step_reads_the_token_that_the_step_before_wrote(single: DenseModel) -> None:
    """Depth 2: nobody tells the second step which token the first one chose."""
    bench = Bench(single)
    bench.open(0, prompt(9))
    first = bench.run(Slice(0, 0, 9))
    second = bench.run(Slice(0, 9, 1))
    bench.open(1, prompt(9) + first)
    assert bench.run(Slice(1, 0, 10)) == second


def test_nothing_else_in_the_pool_is_touched(single: DenseModel) -> None:
    bench = Bench(single, slots=2)
    bench.open(0, prompt(20))
    before = bench.kv.clone()
    bench.run(Slice(0, 0, 20))
    changed = (bench.kv != before).flatten(3).any(-1).any(0).any(0).nonzero().flatten()
    written = (bench.kv != before).any(-1).sum().item()
    assert set(changed.tolist()) <= set(bench.order[0, :3].tolist())
    spec = single.spec
    assert written == 20 * spec.layers * 2 * spec.kv_heads


def test_bad_slices_are_refused_and_harm_nothing(single: DenseModel) -> None:
    bench = Bench(single, slots=3, length=50)
    bench.open(0, prompt(20))
    expected = bench.run(Slice(0, 0, 20))
    for bad in (Slice(1, 0, 5), Slice(3, 0, 5), Slice(-1, 0, 5)):
        with pytest.raises(ValueError, match="not open"):
            bench.run(Slice(0, 0, 20), bad)
    for bad in (Slice(0, 0, 51), Slice(0, -1, 5), Slice(0, 0, 0), Slice(0, 50, 1)):
        with pytest.raises(ValueError, match="does not fit"):
            bench.run(bad)
    bench.open(1, [VOCABULARY])
    with pytest.raises(ValueError, match="vocabulary"):
        bench.run(Slice(1, 0, 1))
    assert bench.run() == []
    assert bench.run(Slice(0, 0, 20)) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_numbers_fail_their_batch_and_leave_nothing_behind(folder: Path, value: float) -> None:
    """One token has a broken embedding. The next owner of the blocks must not meet what it left there."""
    model = load_model(folder)
    with torch.inference_mode():
        model._embedding[7] = value
    bench = Bench(model)
    good = [token for token in prompt(60) if token != 7][:18]
    bench.open(0, good)
    expected = bench.generate(0, good, 4)
    bench.order[1] = bench.order[0]
    bench.open(1, [*good, 7, 7, 7])
    bench.run(Slice(1, 0, 20, False))
    with pytest.raises(FloatingPointError, match="row 0"):
        bench.run(Slice(1, 20, 1))
    bench.open(0, good)
    assert bench.generate(0, good, 4) == expected


def test_the_boundary_is_called_often_enough_to_resize(single: DenseModel) -> None:
    calls = []
    bench = Bench(single)
    bench.open(0, prompt(5))
    bench.runner.run([Slice(0, 0, 5)], lambda: calls.append(torch.get_num_threads()))
    assert len(calls) >= 4 * single.spec.layers


@pytest.mark.parametrize("fused", [True, False])
def test_the_host_work_of_a_step_is_small(single: DenseModel, fused: bool) -> None:
    """Everything but the arithmetic, for 16 slices: a median, so that a busy machine does not fail it."""
    bench = Bench(single, slots=16, fused=fused)
    for slot in range(16):
        bench.open(slot, prompt(200))
    logits, tokens = torch.randn(16, VOCABULARY), list(range(16))
    free = {"forward": lambda self, *rest: logits, "run": lambda self, *rest: Chosen(tokens, [])}
    bench.recorder.model = type("Free", (), free)()  # type: ignore
    if bench.runner._step is not None:
        bench.runner._step._step = bench.recorder.model  # type: ignore
        bench.runner._step.logits = lambda rows: logits
    slices = [Slice(slot, 150 + slot, 1) for slot in range(16)]
    times = []
    for _ in range(60):
        begin = time.thread_time()
        bench.run(*slices)
        times.append(time.thread_time() - begin)
    assert sorted(times)[len(times) // 2] < 600e-6
