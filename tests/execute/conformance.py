"""What every executor must do. A subclass names a harness; pytest runs the same tests on each.

The tests drive `core.ports.Executor` directly, without the planner, as the planner would.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from semipd.core.ports import Executor, ExecutorLost
from semipd.core.types import Batch, BlockAppend, Lane, Sampling, Score, Slice, Split, StepResult


class Harness(ABC):
    """How the suite gets an executor of one kind, and what that kind can do."""

    block_size: int = 4
    vocabulary: int = 100
    slots: int | None = 4  # None: without limit
    logits: bool = True  # whether tokens come from any, so that there is something to score and to bias

    @abstractmethod
    def make(self) -> Executor: ...

    def kill(self, executor: Executor, lane: Lane) -> None:
        """Kill what runs the lane's present step."""
        pytest.skip("this executor has no worker to kill")

    def now(self, executor: Executor) -> float:
        return time.monotonic()


class Driver:
    """Opens slots, keeps block tables and collects results: the planner's part, without its decisions."""

    def __init__(self, executor: Executor, block_size: int) -> None:
        self.executor = executor
        self.block_size = block_size
        self._steps = itertools.count(1)
        self._blocks = itertools.count()
        self._tables: dict[int, int] = {}

    def open(self, slot: int, tokens: Sequence[int], sampling: Sampling = Sampling()) -> None:
        self.executor.open(slot, tokens, sampling)
        self._tables[slot] = 0

    def batch(self, *slices: Slice) -> Batch:
        appends = []
        for slot, start, count, _ in slices:
            have = self._tables.get(slot, 0)
            need = -(-(start + count) // self.block_size)
            if need > have:
                blocks = tuple(itertools.islice(self._blocks, need - have))
                appends.append(BlockAppend(slot, have, blocks))
                self._tables[slot] = need
        return Batch(next(self._steps), slices, tuple(appends))

    def collect(self, count: int, patience: float = 30.0) -> list[StepResult]:
        results: list[StepResult] = []
        deadline = time.monotonic() + patience
        while len(results) < count and time.monotonic() < deadline:
            results += self.executor.wait(None)
        assert len(results) == count
        return results

    def run(self, lane: Lane, *slices: Slice) -> StepResult:
        self.executor.submit(lane, self.batch(*slices))
        return self.collect(1)[0]

    def generate(self, slot: int, prompt: Sequence[int], count: int) -> list[int]:
        """A lone request, step by step."""
        tokens = list(self.run(Lane.PREFILL, Slice(slot, 0, len(prompt))).tokens)
        for position in range(len(prompt), len(prompt) + count - 1):
            tokens += self.run(Lane.DECODE, Slice(slot, position, 1)).tokens
        return tokens


def same_scores(found: Sequence[Score], expected: Sequence[Score]) -> None:
    """Equal but for rounding and the row."""
    assert [score.position for score in found] == [score.position for score in expected]
    for one, two in zip(found, expected, strict=True):
        numbers = (one.logprob, *one.logprobs)
        assert numbers == pytest.approx((two.logprob, *two.logprobs), abs=1e-4)


def skip_without_logits(harness: Harness) -> None:
    if not harness.logits:
        pytest.skip("this executor has no logits")


class ExecutorConformance(ABC):
    """Inherit, implement `harness`, and name the class Test...."""

    @pytest.fixture
    @abstractmethod
    def harness(self) -> Harness: ...

    @pytest.fixture
    def executor(self, harness: Harness) -> Iterator[Executor]:
        executor = harness.make()
        executor.resize(Split.pair(1, 1, executor.device.units))
        yield executor
        executor.close()

    @pytest.fixture
    def driver(self, harness: Harness, executor: Executor) -> Driver:
        return Driver(executor, harness.block_size)

    @pytest.fixture
    def prompt(self, harness: Harness) -> list[int]:
        return [(7 * i + 3) % harness.vocabulary for i in range(13)]

    def test_every_batch_comes_back_once_and_in_order(
        self, harness: Harness, driver: Driver, prompt: list[int]
    ) -> None:
        driver.open(0, prompt)
        driver.open(1, prompt[::-1])
        batches = [driver.batch(Slice(0, 0, 13)), driver.batch(Slice(1, 0, 13))]
        before = harness.now(driver.executor)
        driver.executor.submit(Lane.PREFILL, batches[0])
        driver.executor.submit(Lane.DECODE, batches[1])
        results = driver.collect(2)
        after = harness.now(driver.executor)
        assert all(before <= result.started <= result.finished <= after for result in results)
        assert {(r.lane, r.step) for r in results} == {
            (Lane.PREFILL, batches[0].step),
            (Lane.DECODE, batches[1].step),
        }
        assert all(r.error is None and len(r.tokens) == 1 and r.attempts == 1 for r in results)
        assert driver.executor.wait(0.0) == []

    def test_only_sampled_slices_return_tokens(self, driver: Driver, prompt: list[int]) -> None:
        driver.open(0, prompt)
        driver.open(1, prompt)
        result = driver.run(Lane.PREFILL, Slice(0, 0, 5, False), Slice(1, 0, 13))
        assert len(result.tokens) == 1

    def test_a_step_runs_ahead_of_its_input(self, driver: Driver, prompt: list[int]) -> None:
        """Depth 2: the second step is submitted before the host has seen the token that it reads."""
        if driver.executor.device.depth < 2:
            pytest.skip("this device has depth 1")
        driver.open(0, prompt)
        expected = driver.generate(0, prompt, 4)
        driver.open(1, prompt)
        tokens = list(driver.run(Lane.PREFILL, Slice(1, 0, 13)).tokens)
        for start in (13, 14):
            driver.executor.submit(Lane.DECODE, driver.batch(Slice(1, start, 1)))
        results = driver.collect(2)
        assert [r.step for r in results] == sorted(r.step for r in results)
        tokens += [token for r in results for token in r.tokens]
        assert tokens == expected[:3]

    def test_a_replayed_step_gives_the_same_tokens(self, driver: Driver, prompt: list[int]) -> None:
        sampling = Sampling(temperature=1.0, seed=11)
        driver.open(0, prompt, sampling)
        first = driver.run(Lane.PREFILL, Slice(0, 0, 13))
        second = driver.run(Lane.DECODE, Slice(0, 13, 1))
        assert driver.run(Lane.PREFILL, Slice(0, 0, 13)).tokens == first.tokens
        assert driver.run(Lane.DECODE, Slice(0, 13, 1)).tokens == second.tokens

    def test_chunks_give_the_tokens_of_the_whole(self, driver: Driver, prompt: list[int]) -> None:
        driver.open(0, prompt)
        whole = driver.run(Lane.PREFILL, Slice(0, 0, 13)).tokens
        driver.open(1, prompt)
        driver.run(Lane.PREFILL, Slice(1, 0, 6, False))
        driver.run(Lane.DECODE, Slice(1, 6, 4, False))
        assert driver.run(Lane.PREFILL, Slice(1, 10, 3)).tokens == whole

    def test_tokens_do_not_depend_on_company(self, driver: Driver, prompt: list[int]) -> None:
        for slot in range(4):
            driver.open(slot, prompt[slot:], Sampling(temperature=0.8, seed=slot))
        alone = [driver.run(Lane.PREFILL, Slice(slot, 0, 13 - slot)).tokens[0] for slot in range(4)]
        together = driver.run(Lane.DECODE, *(Slice(slot, 0, 13 - slot) for slot in range(4)))
        assert list(together.tokens) == alone

    def test_a_mixed_batch_is_just_a_batch(self, driver: Driver, prompt: list[int]) -> None:
        driver.open(0, prompt)
        expected = driver.generate(0, prompt, 2)
        driver.open(1, prompt)
        driver.open(2, prompt)
        driver.run(Lane.PREFILL, Slice(1, 0, 13))
        mixed = driver.run(Lane.DECODE, Slice(1, 13, 1), Slice(2, 0, 7, False))
        assert list(mixed.tokens) == expected[1:]

    def test_scores_are_those_of_the_model_in_any_company_and_chunking(
        self, harness: Harness, driver: Driver, prompt: list[int]
    ) -> None:
        """Prompt tokens and produced ones; a row with rules of its own has the scores of a plain one."""
        skip_without_logits(harness)
        rule = Sampling(logprobs=2, prompt_logprobs=3, prompt_length=13)
        biased = Sampling(logprobs=1, logit_bias=((5, 100.0),), prompt_length=13)
        driver.open(0, prompt, rule)
        driver.open(1, prompt, biased)
        driver.open(2, prompt)
        whole = driver.run(Lane.PREFILL, Slice(0, 0, 13))
        assert [score.position for score in whole.scores] == list(range(1, 14))
        assert [len(score.ids) for score in whole.scores] == [3] * 12 + [2]
        last = whole.scores[-1]
        assert (last.ids[0], last.logprobs[0]) == (whole.tokens[0], last.logprob)
        company = driver.run(Lane.DECODE, Slice(2, 0, 13), Slice(1, 0, 13), Slice(0, 0, 13))
        assert company.tokens == (whole.tokens[0], 5, whole.tokens[0])
        assert [score.row for score in company.scores if score.position == 13] == [1, 2]
        one, two = (score for score in company.scores if score.position == 13)
        assert one.ids == two.ids[:1] and one.logprob < one.logprobs[0]
        assert one.logprobs[0] == pytest.approx(two.logprobs[0], abs=1e-4)
        same_scores([score for score in company.scores if score.row == 2], whole.scores)
        driver.open(3, prompt, rule)
        chunks = [Slice(3, 0, 1, False), Slice(3, 1, 6, False), Slice(3, 7, 5, False), Slice(3, 12, 1)]
        results = [driver.run(Lane.PREFILL, piece) for piece in chunks]
        same_scores([score for result in results for score in result.scores], whole.scores)
        again = driver.run(Lane.PREFILL, Slice(3, 12, 1))
        assert again.scores == results[-1].scores

    def test_penalties_count_what_the_sequence_holds(
        self, harness: Harness, driver: Driver, prompt: list[int]
    ) -> None:
        """Greedy over raw scores less the penalties of what was produced: with a step ahead, after a replay
        and after a recomputation from the tokens so far."""
        skip_without_logits(harness)
        start = Sampling(logprobs=harness.vocabulary, prompt_length=13)
        driver.open(0, prompt, start)
        first = driver.run(Lane.PREFILL, Slice(0, 0, 13)).scores[-1]
        # Five tokens that are far ahead of all others, one of the prompt among them, close to each other.
        raw = dict(zip(first.ids, first.logprobs, strict=True))
        bias = tuple((token, 50.0 - raw[token]) for token in (prompt[0], *first.ids[:4]))
        assert len(dict(bias)) == 5
        rule = replace(start, presence_penalty=1.5, frequency_penalty=2.0, logit_bias=bias)
        driver.open(1, prompt, rule)
        results = [driver.run(Lane.PREFILL, Slice(1, 0, 13))]
        for position in range(13, 23, 2):
            for ahead in range(2):
                driver.executor.submit(Lane.DECODE, driver.batch(Slice(1, position + ahead, 1)))
                if driver.executor.device.depth < 2:
                    results += driver.collect(1)
            results += driver.collect(2) if driver.executor.device.depth > 1 else []
        tokens = [token for result in results for token in result.tokens]
        for place, result in enumerate(results):
            values = dict(zip(result.scores[0].ids, result.scores[0].logprobs, strict=True))
            for token, added in bias:
                values[token] += added
            for token in set(tokens[:place]):
                values[token] -= 1.5 + 2.0 * tokens[:place].count(token)
            assert values[tokens[place]] == pytest.approx(max(values.values()), abs=1e-4), place
        assert len(set(tokens)) > 3
        assert driver.run(Lane.DECODE, Slice(1, 17, 1)).tokens[0] == tokens[5]
        driver.open(2, prompt + tokens[:6], rule)
        assert driver.run(Lane.PREFILL, Slice(2, 0, 19)).tokens[0] == tokens[6]

    def test_lanes_overlap_in_time(self, driver: Driver, prompt: list[int]) -> None:
        driver.open(0, prompt)
        driver.open(1, prompt)
        for _ in range(200):  # a step is so short that a busy machine may run them in turn for a while
            driver.executor.submit(Lane.PREFILL, driver.batch(Slice(0, 0, 13)))
            driver.executor.submit(Lane.DECODE, driver.batch(Slice(1, 0, 13)))
            one, two = driver.collect(2)
            if max(one.started, two.started) < min(one.finished, two.finished):
                return
        raise AssertionError("no two steps overlapped")

    def test_resize_under_a_running_batch(self, driver: Driver, prompt: list[int]) -> None:
        units = driver.executor.device.units
        driver.open(0, prompt)
        expected = driver.generate(0, prompt, 3)
        driver.open(1, prompt)
        produced: list[int] = []
        steps = [Slice(1, 0, 13), Slice(1, 13, 1), Slice(1, 14, 1)]
        splits = [
            Split.lone(Lane.DECODE, units),
            Split.pair(units, units, units),
            Split.lone(Lane.PREFILL, units),
        ]
        for piece, split in zip(steps, splits, strict=True):
            driver.executor.submit(Lane.DECODE, driver.batch(piece))
            driver.executor.resize(split)
            driver.executor.resize(Split.lone(Lane.DECODE, units))
            produced += driver.collect(1)[0].tokens
        assert produced == expected

    def test_a_closed_slot_leaves_nothing_behind(self, driver: Driver, prompt: list[int]) -> None:
        driver.open(0, prompt[::-1])
        expected = driver.generate(0, prompt[::-1], 2)
        driver.open(1, prompt)
        driver.generate(1, prompt, 4)
        driver.executor.close_slot(1)
        driver.open(1, prompt[::-1])
        assert driver.generate(1, prompt[::-1], 2) == expected

    def test_a_bad_batch_fails_alone(self, harness: Harness, driver: Driver, prompt: list[int]) -> None:
        driver.open(0, prompt)
        expected = driver.run(Lane.PREFILL, Slice(0, 0, 13)).tokens
        bad = driver.run(Lane.PREFILL, Slice(3, 0, 5))
        assert bad.error and bad.tokens == ()
        assert driver.run(Lane.PREFILL, Slice(0, 0, 13)).tokens == expected

    def test_a_death_is_repaired(self, harness: Harness, driver: Driver, prompt: list[int]) -> None:
        rule = Sampling(
            repetition_penalty=1.5, frequency_penalty=0.5, logprobs=3, prompt_logprobs=3, prompt_length=13
        )
        driver.open(0, prompt, rule)
        before = driver.run(Lane.PREFILL, Slice(0, 0, 13))
        expected = driver.generate(0, prompt, 3)
        driver.open(1, prompt, rule)
        driver.executor.submit(Lane.PREFILL, driver.batch(Slice(1, 0, 13)))
        harness.kill(driver.executor, Lane.PREFILL)
        result = driver.collect(1)[0]
        assert (result.error, list(result.tokens)) == (None, expected[:1])
        assert result.scores == before.scores
        assert driver.run(Lane.DECODE, Slice(1, 13, 1)).tokens[0] == expected[1]
        assert driver.run(Lane.PREFILL, Slice(1, 14, 1)).tokens[0] == expected[2]

    def test_wake_and_until_cut_a_wait_short(self, harness: Harness, driver: Driver) -> None:
        executor = driver.executor
        executor.wake()
        assert executor.wait(None) == []
        executor.wake()
        executor.wake()  # two before a wait are one
        assert executor.wait(None) == []
        assert executor.wait(harness.now(executor) - 1.0) == []
        until = harness.now(executor) + 0.02
        assert executor.wait(until) == []
        assert harness.now(executor) >= until

    def test_what_cannot_be_is_refused_and_harms_nothing(
        self, harness: Harness, driver: Driver, prompt: list[int]
    ) -> None:
        """By ValueError at once: a batch that was taken comes back, so one that never can must not be."""
        executor, device = driver.executor, driver.executor.device
        for slot in (-1, *(() if harness.slots is None else (harness.slots,))):
            with pytest.raises(ValueError, match="slot"):
                executor.open(slot, [1], Sampling())
        driver.open(0, prompt)
        batches = [driver.batch(Slice(0, 0, 13)) for _ in range(device.depth + 1)]
        for lane in set(Lane) - device.lanes:
            with pytest.raises(ValueError, match=lane.value):
                executor.submit(lane, batches[0])
        with pytest.raises(ValueError, match="units"):
            executor.resize(Split.lone(Lane.DECODE, device.units + 1))
        for batch in batches[:-1]:
            executor.submit(Lane.PREFILL, batch)
        with pytest.raises(ValueError, match="in flight"):
            executor.submit(Lane.PREFILL, batches[-1])
        results = driver.collect(device.depth)
        assert [result.step for result in results] == [batch.step for batch in batches[:-1]]
        assert all(result.error is None for result in results)

    def test_a_closed_executor_says_so(self, harness: Harness, prompt: list[int]) -> None:
        """With a batch in flight, and twice; only a late wake is no mistake."""
        executor = harness.make()
        units = executor.device.units
        executor.resize(Split.pair(1, 1, units))
        driver = Driver(executor, harness.block_size)
        driver.open(0, prompt)
        executor.submit(Lane.PREFILL, driver.batch(Slice(0, 0, 13)))
        executor.close()
        executor.close()
        executor.wake()
        late = driver.batch(Slice(0, 0, 13))
        calls: list[Callable[[], object]] = [
            lambda: executor.wait(0.0),
            lambda: executor.open(1, prompt, Sampling()),
            lambda: executor.submit(Lane.DECODE, late),
            lambda: executor.resize(Split.pair(1, 1, units)),
        ]
        for call in calls:
            with pytest.raises(ExecutorLost, match="closed"):
                call()
