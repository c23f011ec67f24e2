"""What every executor with logits must do under constraints: checks for tests of each kind.

Random weights follow no grammar by themselves, so a mask that is missing once shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from semipd.core.ports import Executor
from semipd.core.types import NO_TOKEN, Constraint, Lane, Sampling, Slice
from semipd.model.grammar_text import grammar_of_schema
from tests.checkpoints import VOCABULARY
from tests.execute.conformance import Driver

PROMPT = [(7 * i + 3) % VOCABULARY for i in range(13)]
SCHEMA = {"type": "string", "pattern": "^[a-z]{4}[0-9]{6}[A-Z]{3}$"}
END = 0  # of the tests' tokenizer

Check = Callable[[Driver], None]


def rule(temperature: float = 0.0, seed: int = 0) -> Sampling:
    constraint = Constraint(grammar_of_schema(json.dumps(SCHEMA)), ends=(END,))
    return Sampling(temperature=temperature, seed=seed, prompt_length=13, constraint=constraint)


def follow(driver: Driver, slot: int, sampling: Sampling) -> list[int]:
    """All tokens of a lone request, to its end."""
    driver.open(slot, PROMPT, sampling)
    tokens = list(driver.run(Lane.PREFILL, Slice(slot, 0, 13)).tokens)
    while tokens[-1] != END:
        assert len(tokens) < 20 and min(tokens) >= 0
        tokens += driver.run(Lane.DECODE, Slice(slot, 12 + len(tokens), 1)).tokens
    return tokens


def holds_in_company_in_either_lane_and_anew(driver: Driver) -> None:
    """A text of its own, then again beside others and with lanes in turn; then a preempted one, opened anew
    with what it had, and steps that run again."""
    for sampling in (rule(), rule(1.0, seed=3)):
        expected = follow(driver, 0, sampling)
        driver.open(1, PROMPT, sampling)
        driver.open(2, PROMPT[:4])
        tokens = list(driver.run(Lane.DECODE, Slice(2, 0, 2, False), Slice(1, 0, 13)).tokens)
        for place in range(len(expected) - 1):
            lane = (Lane.PREFILL, Lane.DECODE)[place % 2]
            tokens += driver.run(lane, Slice(2, 0, 3, False), Slice(1, 13 + place, 1)).tokens
        assert tokens == expected
        half = len(expected) // 2
        driver.open(3, PROMPT + expected[:half], sampling)
        assert driver.run(Lane.PREFILL, Slice(3, 0, 13 + half)).tokens[0] == expected[half]
        for place in (half, 3, half):
            assert driver.run(Lane.DECODE, Slice(0, 12 + place, 1)).tokens[0] == expected[place]


def runs_ahead_where_the_device_says_so(driver: Driver) -> None:
    if driver.executor.device.constrained_depth < 2:
        return
    expected = follow(driver, 0, rule())
    driver.open(1, PROMPT, rule())
    driver.run(Lane.DECODE, Slice(1, 0, 13))
    for place in range(1, 9, 2):
        for ahead in range(2):
            driver.executor.submit(Lane.DECODE, driver.batch(Slice(1, 12 + place + ahead, 1)))
        found = [token for result in driver.collect(2) for token in result.tokens]
        assert found == expected[place : place + 2]


def rules_out_tokens_and_words(driver: Driver) -> None:
    """Among three tokens, without some sequences of them, there is one way to go on; what a slot had before
    does not count, nor does the prompt."""
    follow(driver, 0, rule())
    constraint = Constraint(allowed=(21, 22, 40), bad_words=((22, 22), (21, 21), (40,), (7, 8, 9)))
    for temperature in (0.0, 1.5):
        sampling = Sampling(temperature, seed=5, prompt_length=13, constraint=constraint)
        firsts = set()
        for last in (21, 22):
            prompt = [*PROMPT[:12], last]
            driver.open(0, prompt, sampling)
            tokens = driver.generate(0, prompt, 12)
            assert tokens in ([21, 22] * 6, [22, 21] * 6)
            firsts.add(tokens[0])
        assert firsts <= {21, 22}


def leaves_others_alone_where_nothing_is_left(driver: Driver) -> None:
    driver.open(0, PROMPT)
    expected = driver.run(Lane.PREFILL, Slice(0, 0, 13)).tokens
    nothing = Constraint(allowed=(21,), bad_words=((21,),))
    broken = Constraint(grammar="no grammar", ends=(END,))
    for slot, constraint in ((1, nothing), (2, broken)):
        for temperature in (0.0, 1.0):
            rule = Sampling(temperature, prompt_length=13, logprobs=1, constraint=constraint)
            driver.open(slot, PROMPT, rule)
            mixed = driver.run(Lane.PREFILL, Slice(slot, 0, 13), Slice(0, 0, 13))
            assert mixed.error is None and mixed.tokens == (NO_TOKEN, *expected)
            single = driver.run(Lane.DECODE, Slice(slot, 12, 1), Slice(0, 12, 1))
            assert single.error is None and single.tokens == (NO_TOKEN, *expected)
            ahead = driver.run(Lane.DECODE, Slice(slot, 13, 1), Slice(0, 12, 1))
            assert ahead.error is None and ahead.tokens == (NO_TOKEN, *expected)


def survives_a_death(driver: Driver, kill: Callable[[Executor, Lane], None]) -> None:
    """The next worker knows nothing of the text but the slot table."""
    expected = follow(driver, 0, rule(1.0, seed=3))
    driver.open(1, PROMPT, rule(1.0, seed=3))
    driver.run(Lane.PREFILL, Slice(1, 0, 13))
    tokens = [driver.run(Lane.DECODE, Slice(1, 13 + place, 1)).tokens[0] for place in range(4)]
    driver.executor.submit(Lane.DECODE, driver.batch(Slice(1, 17, 1)))
    kill(driver.executor, Lane.DECODE)
    tokens += driver.collect(1)[0].tokens
    tokens += driver.run(Lane.DECODE, Slice(1, 18, 1)).tokens
    assert tokens == expected[1:7]


CHECKS: tuple[Check, ...] = (
    holds_in_company_in_either_lane_and_anew,
    runs_ahead_where_the_device_says_so,
    rules_out_tokens_and_words,
    leaves_others_alone_where_nothing_is_left,
)
