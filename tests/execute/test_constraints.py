"""Texts under a grammar in one process: what one of them may cost, and what it may not cost others."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from semipd.core.types import Constraint, Sampling
from semipd.execute import constraints as limits
from semipd.execute.constraints import Constraints
from semipd.execute.storage import SlotTable
from semipd.model import grammar_text
from semipd.model.grammar_text import grammar_of_schema
from tests.checkpoints import VOCABULARY, write_tokenizer

END = 0


class Texts:
    """Slots of a table, all without a prompt worth naming, each with a text so far."""

    def __init__(self, folder: Path) -> None:
        self.table = SlotTable(bytearray(SlotTable.nbytes(4, 512, 16)), 4, 512, 16)
        self.constraints = Constraints(self.table, folder, VOCABULARY)
        self.length = dict.fromkeys(range(4), 1)

    def open(self, slot: int, schema: Any) -> None:
        constraint = Constraint(grammar_of_schema(json.dumps(schema)), ends=(END,))
        self.table.open(slot, array("i", [9]), Sampling(prompt_length=1, constraint=constraint))
        self.length[slot] = 1

    def choices(self, slot: int) -> list[int]:
        return np.flatnonzero(self.constraints.mask(slot, self.length[slot])).tolist()

    def say(self, slot: int, token: int) -> None:
        self.table.tokens[slot, self.length[slot]] = token
        self.length[slot] += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


HARD = {
    "type": "string",
    "pattern": "^[a-z]*[a-m][a-z]{20}[n-z]$",
}  # what a text has in it decides what may follow


def test_a_long_text_uses_nothing_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All texts of a grammar share what they learn of it, within a bound. A text that came to it ended with
    an error, and so did every other of that grammar, then and later."""
    monkeypatch.setattr(grammar_text, "_LEXER_STATES", 1200)
    texts, rng = Texts(folder), np.random.default_rng(0)
    compiled = []
    follower = texts.constraints._follower
    monkeypatch.setattr(texts.constraints, "_follower", lambda rule: compiled.append(1) or follower(rule))
    for slot in range(3):
        texts.open(slot, HARD)
    quote = texts.choices(0)
    assert texts.choices(1) == quote
    texts.say(0, min(quote))
    for place in range(400):
        choices = sorted(set(texts.choices(0)) - set(quote))
        assert choices, f"after {place} tokens"
        texts.say(0, int(rng.choice(choices)))
        if place % 100 == 0:
            assert texts.choices(1) and texts.choices(2)
    assert len(compiled) > 3, "the bound was never met"


def test_a_slow_grammar_ends_its_request_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody in the batch waits for a mask."""
    seconds = iter(np.arange(0.0, 1000.0, limits.SLOW * 1.5))
    monkeypatch.setattr(limits, "time", SimpleNamespace(thread_time=lambda: next(seconds)))
    texts = Texts(folder)
    texts.open(0, {"type": "string"})
    masks = 0
    while choices := texts.choices(0):
        texts.say(0, max(choices))
        masks += 1
        assert masks < 500
    assert masks * limits.SLOW / 2 == pytest.approx(limits.ALLOWED, abs=limits.SLOW)
    texts.open(0, {"type": "string"})
    assert texts.choices(0)


def test_a_grammar_that_is_slow_at_first_may_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 0.9 * limits.ALLOWED, *np.arange(10.0, 1000.0, limits.SLOW / 2)])
    monkeypatch.setattr(limits, "time", SimpleNamespace(thread_time=lambda: next(seconds)))
    texts = Texts(folder)
    texts.open(0, {"type": "string"})
    for _ in range(200):
        texts.say(0, max(texts.choices(0)))
