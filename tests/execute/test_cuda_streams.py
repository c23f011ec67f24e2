"""What the GPU executor launches where and when, read off the virtual timeline of a fake device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import semipd.execute.cuda_start as cuda_start
from semipd.core.errors import ConfigError
from semipd.core.ports import ExecutorLost
from semipd.core.types import Batch, BlockAppend, Lane, Sampling, Slice, Split
from semipd.execute.cuda import CudaExecutor
from semipd.execute.cuda_partition import disjoint
from semipd.execute.cuda_start import Shape, start_cuda
from tests.checkpoints import VOCABULARY, make_checkpoint
from tests.execute.conformance import Driver
from tests.execute.fake_cuda import UNITS, DeviceGone, FakeBackend, Span, SpendingOps

PROMPT = [(7 * i + 3) % VOCABULARY for i in range(120)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Bench:
    """An executor on a fake device, driven step by step; `spans` since its start."""

    def __init__(self, folder: Path, graph_sides: int = 0, backend: Any = None, **shape: Any) -> None:
        self.backend = backend or FakeBackend()
        sizes = {"slots": 4, "max_length": 200, "block_size": 4, "blocks": 256, "most_rows": 128, **shape}
        started = start_cuda(self.backend, folder, Shape(**sizes), dtype="float32", graph_sides=graph_sides)
        self.executor: CudaExecutor = started.executor
        self.driver = Driver(self.executor, 4)
        self.backend.spans.clear()

    def prefill(self, slot: int, prompt: list[int], sampling: Sampling = Sampling()) -> int:
        self.driver.open(slot, prompt, sampling)
        return self.driver.run(Lane.PREFILL, Slice(slot, 0, len(prompt))).tokens[0]

    def submit(self, lane: Lane, *slices: Slice) -> None:
        self.executor.submit(lane, self.driver.batch(*slices))

    def split(self, prefill: int, decode: int) -> None:
        self.executor.resize(Split.pair(prefill, decode, UNITS))

    def spans(self, decode: bool) -> list[Span]:
        """Work of one lane: the decode lane runs single rows here, which take the least time."""
        streams = {id(side.stream) for side in self.executor._placement.sides(Lane.DECODE)}
        return [span for span in self.backend.spans if (id(span.side.stream) in streams) is decode]


def overlapping(spans: list[Span]) -> list[tuple[Span, Span]]:
    """Pairs of work that share an SM at the same time."""
    return [
        (one, other)
        for one, other in itertools.combinations(spans, 2)
        if one.begin < other.end - 1e-12 and other.begin < one.end - 1e-12
        and not disjoint(one.side, other.side)
    ]  # fmt: skip


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("graph_sides", [0, 6])
def test_lanes_share_no_sm_whatever_the_splits(checkpoint: Path, known: bool, graph_sides: int) -> None:
    """Splits change under running work, to larger and smaller shares, lone phases and back."""
    bench = Bench(checkpoint, graph_sides, FakeBackend(known=known))
    bench.prefill(0, PROMPT[:20])
    bench.driver.open(1, PROMPT)
    splits = [(68, 64), (100, 32), (12, 120), (UNITS, 0), (36, 96), (0, UNITS), (124, 8), (68, 64)]
    position = 20
    for start, (prefill, decode) in zip(range(0, 120, 15), splits, strict=True):
        bench.split(prefill, decode)
        bench.submit(Lane.PREFILL, Slice(1, start, 15, start == 105))
        for _ in range(3):
            bench.submit(Lane.DECODE, Slice(0, position, 1))
            position += 1
            if position % 3 == 0:
                bench.split(decode, prefill)
            if len(bench.executor._lanes[Lane.DECODE].queue) > 0:
                bench.driver.collect(1)
        while any(state.in_flight for state in bench.executor._lanes.values()):
            bench.executor.wait(bench.backend.time + 1.0)
    assert len(bench.spans(True)) == 3 * 3 * len(splits)
    assert overlapping(bench.backend.spans) == []


def test_the_shrinking_lane_moves_and_the_growing_one_does_not_wait(checkpoint: Path) -> None:
    """100:32 to 68:64 under a running prompt: the next decode step stays on 32 SMs rather than wait for the
    prompt's layers on the old 100; once those are over, it has 64."""
    bench = Bench(checkpoint)
    bench.prefill(0, PROMPT[:20])
    bench.driver.open(1, PROMPT)
    bench.split(100, 32)
    bench.driver.run(Lane.DECODE, Slice(0, 20, 1))
    bench.submit(Lane.PREFILL, Slice(1, 0, 120))
    bench.executor.wait(bench.backend.time)
    bench.backend.spans.clear()
    bench.split(68, 64)
    now = bench.backend.time
    for position in range(21, 31):
        bench.submit(Lane.DECODE, Slice(0, position, 1))
        while bench.executor._lanes[Lane.DECODE].in_flight:
            bench.executor.wait(bench.backend.time + 1.0)
    decode = bench.spans(True)
    assert decode[0].begin == pytest.approx(now, abs=1e-4) and decode[0].side.units == 32
    assert decode[-1].side.units == 64
    assert {span.side.units for span in bench.spans(False)} == {68}
    assert overlapping(bench.backend.spans) == []


def test_a_lone_phase_has_the_whole_device(checkpoint: Path) -> None:
    bench = Bench(checkpoint)
    bench.executor.resize(Split.lone(Lane.PREFILL, UNITS))
    bench.prefill(0, PROMPT)
    bench.executor.resize(Split.lone(Lane.DECODE, UNITS))
    bench.driver.run(Lane.DECODE, Slice(0, 120, 1))
    assert {span.side.units for span in bench.backend.spans} == {UNITS}


def test_shares_overlap_when_that_is_meant(checkpoint: Path) -> None:
    bench = Bench(checkpoint)
    bench.prefill(0, PROMPT[:20])
    bench.driver.open(1, PROMPT)
    bench.split(UNITS, UNITS)
    bench.backend.spans.clear()
    bench.submit(Lane.PREFILL, Slice(1, 0, 120))
    bench.submit(Lane.DECODE, Slice(0, 20, 1))
    bench.driver.collect(2)
    assert overlapping(bench.backend.spans)


def test_decode_steps_get_in_between_the_layers_of_a_prompt(checkpoint: Path) -> None:
    """A prompt is launched a few milliseconds at a time: otherwise a decode step that becomes due has to
    wait for all of it to be launched, and the split could not change before its end."""
    bench = Bench(checkpoint)
    bench.prefill(0, PROMPT[:20])
    bench.driver.open(1, PROMPT)
    bench.split(124, 8)
    bench.submit(Lane.PREFILL, Slice(1, 0, 120))
    for _ in range(3):
        bench.executor.wait(bench.backend.time)
    assert len(bench.executor._lanes[Lane.PREFILL].groups) == 2, "two groups ahead, no more"
    assert bench.executor._lanes[Lane.PREFILL].queue, "the third layer is still to be launched"


def test_a_decode_step_waits_for_the_prompt_it_reads(checkpoint: Path) -> None:
    """Handover by an event: the first decode step is submitted before the host has seen the prompt end."""
    bench = Bench(checkpoint)
    bench.prefill(0, PROMPT[:60])
    expected = bench.driver.run(Lane.DECODE, Slice(0, 60, 1)).tokens
    bench.backend.spans.clear()
    bench.split(68, 64)
    bench.driver.open(1, PROMPT[:60])
    bench.submit(Lane.PREFILL, Slice(1, 0, 60))
    bench.submit(Lane.DECODE, Slice(1, 60, 1))
    results = {result.lane: result.tokens for result in bench.driver.collect(2)}
    assert results[Lane.DECODE] == expected
    assert min(s.begin for s in bench.spans(True)) >= max(s.end for s in bench.spans(False)) - 1e-12


def test_times_are_those_of_the_device(checkpoint: Path) -> None:
    """Two steps in flight: the second one's time must not contain its wait for the first."""
    bench = Bench(checkpoint)
    bench.prefill(0, PROMPT[:20])
    for position in (20, 21):
        bench.submit(Lane.DECODE, Slice(0, position, 1))
    one, two = bench.driver.collect(2)
    assert two.finished - two.started == pytest.approx(one.finished - one.started)


class TestGraphs:
    def test_replays_give_the_tokens_of_launches(self, checkpoint: Path) -> None:
        """Greedy, sampled and banned rows in one batch, padded to the graph's size."""
        tokens = []
        for sides in (0, 3):
            bench = Bench(checkpoint, sides)
            rules = [
                Sampling(),
                Sampling(temperature=1.0, seed=5, top_p=0.9),
                Sampling(ban_until=200, ban_tokens=tuple(range(80))),
            ]
            found = [bench.prefill(slot, PROMPT[: 20 + slot], rule) for slot, rule in enumerate(rules)]
            for step in range(6):
                slices = [Slice(slot, 20 + slot + step, 1) for slot in range(3)]
                found += bench.driver.run(Lane.DECODE, *slices).tokens
            tokens.append(found)
            assert (bench.backend.replays > 0) is (sides > 0)
        assert tokens[0] == tokens[1]
        assert all(token >= 80 for token in tokens[0][2::3])

    def test_a_split_without_graphs_gets_them_when_the_device_is_idle(self, checkpoint: Path) -> None:
        """All sides end with graphs; a batch that comes meanwhile waits for one of them at most."""
        bench = Bench(checkpoint, 2)
        before = len(bench.backend.captures)
        bench.split(124, 8)
        bench.prefill(0, PROMPT[:20])
        bench.driver.run(Lane.DECODE, Slice(0, 20, 1))
        assert bench.backend.replays == 0 and len(bench.backend.captures) == before
        bench.executor.wake()
        bench.executor.wait(None)
        assert len(bench.backend.captures) <= before + 1
        bench.executor.wait(bench.backend.time + 60.0)
        assert set(bench.backend.captures) == set(bench.executor._placement.sides(Lane.DECODE))
        bench.driver.run(Lane.DECODE, Slice(0, 21, 1))
        assert bench.backend.replays == 1

    def test_a_side_that_cannot_be_captured_runs_without_graphs(
        self, checkpoint: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Streams of partitions may refuse it: that costs their graphs, not the start, nor a token."""

        class Refusing(FakeBackend):
            def capture(self, side: Any, launch: Any) -> Any:
                if side.pair >= 0:
                    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nHint")
                return super().capture(side, launch)

        bench = Bench(checkpoint, 2, Refusing(step=40))
        bench.prefill(0, PROMPT[:20])
        expected = bench.driver.generate(0, PROMPT[:20], 6)
        assert bench.backend.replays > 0, "the whole device has its graphs"
        before = bench.backend.replays
        bench.driver.open(1, PROMPT[:20])
        bench.split(92, 40)
        assert bench.driver.generate(1, PROMPT[:20], 6) == expected and bench.backend.replays == before
        bench.executor.wait(bench.backend.time + 1.0)
        assert caplog.text.count("on 40 SMs, such steps run without: CUDA error: operation") == 1
        assert "Hint" not in caplog.text

    def test_graphs_stay_within_their_budget(self, checkpoint: Path) -> None:
        bench = Bench(checkpoint, 2)
        graphs = bench.executor.graphs
        graphs.nbytes = graphs._budget
        bench.split(124, 8)
        bench.prefill(0, PROMPT[:20])
        bench.driver.run(Lane.DECODE, Slice(0, 20, 1))
        assert not graphs.capture_next()

    @pytest.mark.parametrize("blocks", [1, 2, 7])
    def test_new_blocks_travel_with_a_replay(self, checkpoint: Path, blocks: int) -> None:
        """In the graph's inputs, or before it where a step brings more blocks than the graph has rows."""
        tokens = []
        for sides in (0, 3):
            bench = Bench(checkpoint, sides)
            found = [bench.prefill(0, PROMPT[:20])]
            step = itertools.count(1000)
            for position in range(20, 32):
                added = (BlockAppend(0, 5, tuple(range(100, 100 + blocks))),) if position == 20 else ()
                if position >= 20 + 4 * blocks:
                    break
                batch = Batch(next(step), (Slice(0, position, 1),), added)
                bench.executor.submit(Lane.DECODE, batch)
                found += bench.driver.collect(1)[0].tokens
            tokens.append(found)
            assert (bench.backend.replays > 0) is (sides > 0)
        assert tokens[0] == tokens[1] and len(tokens[0]) == 1 + min(4 * blocks, 12)


def test_kernels_see_aligned_pointers_only(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles a kernel anew for a pointer that is not a multiple of 16 bytes: an odd number of rows
    would have made a request wait for a compiler."""
    seen = []
    attend = SpendingOps.attend

    def watched(self: Any, qkv: Any, layer: Any, step: Any, *rest: Any) -> None:
        read = [step.row_slots, step.positions, step.tokens, step.tables]
        read += [part for part in (step.tiles, step.singles) if part.numel()]
        seen.append((step.rows, [tensor.data_ptr() % 16 for tensor in read]))
        attend(self, qkv, layer, step, *rest)

    monkeypatch.setattr(SpendingOps, "attend", watched)
    for graph_sides in (0, 2):
        bench = Bench(checkpoint, graph_sides)
        for slot in range(3):
            bench.prefill(slot, PROMPT[: 21 + slot])
        bench.driver.run(Lane.DECODE, *(Slice(slot, 21 + slot, 1) for slot in range(3)))
        bench.driver.run(Lane.DECODE, Slice(0, 22, 1), Slice(1, 0, 7), Slice(2, 24, 1))
    assert {rows for rows, _ in seen} >= {1, 3, 9, 21}
    assert all(not any(rests) for _, rests in seen)


class TestFaults:
    def test_an_error_in_one_lane_fails_its_batch_alone(self, checkpoint: Path) -> None:
        bench = Bench(checkpoint)
        expected = bench.prefill(0, PROMPT[:20])
        bench.driver.open(1, PROMPT[:20])
        bench.backend.poison = RuntimeError("CUDA error: out of resources")
        failed = bench.driver.run(Lane.PREFILL, Slice(1, 0, 20))
        assert failed.error == "RuntimeError: CUDA error: out of resources" and failed.tokens == ()
        assert bench.prefill(1, PROMPT[:20]) == expected

    def test_memory_that_runs_out_in_a_step_is_that_step_s_error(self, checkpoint: Path) -> None:
        bench = Bench(checkpoint)
        bench.driver.open(0, PROMPT[:20])
        bench.backend.poison = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        assert "out of memory" in str(bench.driver.run(Lane.PREFILL, Slice(0, 0, 20)).error)

    @pytest.mark.parametrize("when", ["poison", "broken"])
    def test_a_lost_context_is_reported_at_once(self, checkpoint: Path, when: str) -> None:
        """At a launch, or found by an event long after it: nothing later can succeed."""
        bench = Bench(checkpoint)
        bench.driver.open(0, PROMPT[:20])
        bench.submit(Lane.PREFILL, Slice(0, 0, 20))
        setattr(bench.backend, when, DeviceGone("an illegal memory access was encountered"))
        with pytest.raises(ExecutorLost, match="illegal memory access"):
            bench.executor.wait(None)
        for call in (
            lambda: bench.executor.wait(0.0),
            lambda: bench.submit(Lane.DECODE, Slice(0, 20, 1)),
            lambda: bench.executor.open(1, [1], Sampling()),
        ):
            with pytest.raises(ExecutorLost, match="illegal memory access"):
                call()
        bench.executor.close()

    def test_after_close_everything_is_refused(self, checkpoint: Path) -> None:
        bench = Bench(checkpoint)
        bench.executor.close()
        assert bench.backend.closed
        with pytest.raises(ExecutorLost, match="closed"):
            bench.executor.wait(0.0)

    def test_bad_batches_are_refused_and_harm_nothing(self, checkpoint: Path) -> None:
        bench = Bench(checkpoint, slots=3)
        expected = bench.prefill(0, PROMPT[:20])
        bench.driver.open(1, [VOCABULARY, 1])
        bad = {
            "vocabulary": [Slice(1, 0, 2)],
            "not open": [Slice(0, 0, 20), Slice(2, 0, 2)],
            "does not fit": [Slice(0, 195, 6)],
            "at most 128": [Slice(0, 0, 129)],
            "without slices": [],
        }
        for reason, slices in bad.items():
            bench.submit(Lane.PREFILL, *slices)
            result = bench.driver.collect(1)[0]
            assert reason in str(result.error) and result.tokens == ()
        assert bench.driver.run(Lane.PREFILL, Slice(0, 0, 20)).tokens == (expected,)

    def test_logits_that_are_no_numbers_fail_their_batch(self, checkpoint: Path) -> None:
        """And the next step, already launched, reads a token that exists."""
        bench = Bench(checkpoint, 2)
        bench.prefill(0, PROMPT[:20])
        norm = bench.executor._model._norm
        with torch.inference_mode():
            kept = norm.clone()
            norm[0] = float("nan")
        for position in (20, 21):
            bench.submit(Lane.DECODE, Slice(0, position, 1))
        assert ["finite" in str(result.error) for result in bench.driver.collect(2)] == [True, True]
        with torch.inference_mode():
            norm.copy_(kept)
        assert bench.prefill(1, PROMPT[:20]) == bench.prefill(0, PROMPT[:20])

    def test_too_many_steps_and_unknown_lanes_are_refused(self, checkpoint: Path) -> None:
        bench = Bench(checkpoint)
        bench.prefill(0, PROMPT[:20])
        for position in (20, 21):
            bench.submit(Lane.DECODE, Slice(0, position, 1))
        with pytest.raises(ValueError, match="more than 2 steps"):
            bench.submit(Lane.DECODE, Slice(0, 22, 1))
        with pytest.raises(ValueError, match="no lane transfer"):
            bench.submit(Lane.TRANSFER)
        with pytest.raises(ValueError, match="units"):
            bench.executor.resize(Split.pair(1, 1, 2))
        assert len(bench.driver.collect(2)) == 2


class TestMemory:
    def test_too_little_memory_says_how_much_and_what_to_lower(self, checkpoint: Path) -> None:
        backend = FakeBackend(free=5 * 2**29)  # less than the tenth that stays free
        with pytest.raises(ConfigError, match=r"needs 0\.00 GiB for 1024 tokens.*lower --max-model-len"):
            Bench(checkpoint, backend=backend)
        assert backend.closed

    def test_weights_that_do_not_fit_are_refused_before_they_are_read(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With what they need, what there is, and what to lower."""
        monkeypatch.setattr(cuda_start, "load_device_model", None)
        backend = FakeBackend(free=2**18)
        with pytest.raises(
            ConfigError, match=r"weights need 0\.00 GiB and .* 0\.00 of 16\.0 GiB are free.*lower"
        ):
            Bench(checkpoint, backend=backend)
        assert backend.closed

    def test_a_buffer_that_does_not_fit_says_what_to_lower(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Memory that runs out between two looks at what is free: the allocator's error."""

        def full(*_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        monkeypatch.setattr(cuda_start, "_lanes", full)
        backend = FakeBackend()
        with pytest.raises(
            ConfigError, match=r"out of GPU memory: the weights take .* lower --max-num-seqs"
        ):
            Bench(checkpoint, backend=backend)
        assert backend.closed

    def test_what_other_streams_read_is_there_first(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Weights, the pool and the graphs' inputs are filled on the default stream, which no stream
        of ours waits for."""
        made, when = cuda_start.DecodeGraphs, []

        def graphs(backend: FakeBackend, *rest: Any) -> Any:
            when.append(backend.settled)
            return made(backend, *rest)

        monkeypatch.setattr(cuda_start, "DecodeGraphs", graphs)
        bench = Bench(checkpoint)
        assert when == [0], "their inputs were filled after the last wait"
        assert bench.backend.settled == 1
        bench.executor.fill_with_noise()
        assert bench.backend.settled == 2

    def test_without_a_stated_pool_all_that_is_left_becomes_it(self, checkpoint: Path) -> None:
        free = int(2**34 * 0.1) + 2**30 + 2**21
        sizes = {"slots": 4, "max_length": 200, "block_size": 4, "most_rows": 128}
        started = start_cuda(
            FakeBackend(free=free), checkpoint, Shape(**sizes), dtype="float32", graph_sides=0
        )
        token_bytes = 3 * 2 * 2 * 16 * 4
        assert 0.95 * 2**21 < started.blocks * 4 * token_bytes < 2**21

    def test_an_unstated_length_follows_the_memory(self, checkpoint: Path) -> None:
        free = int(2**34 * 0.1) + 2**30 + 2**18
        shape = Shape(slots=4, max_length=512, block_size=4, most_rows=128, fixed_length=False)
        started = start_cuda(FakeBackend(free=free), checkpoint, shape, dtype="float32", graph_sides=0)
        assert started.max_length == started.blocks * 4 < 512

    def test_a_stated_pool_below_one_sequence_is_refused(self, checkpoint: Path) -> None:
        with pytest.raises(ConfigError, match="less than one sequence of 200"):
            Bench(checkpoint, blocks=10)
