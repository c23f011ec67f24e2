"""What the training script feeds the model: whole turns, answers alone in the loss, nothing held out."""

import importlib
import sys
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

from semipd.box import format as box_format
from semipd.box import tasks as box_tasks

LONGEST = 4096
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def rows() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("box_rows")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_loss_covers_the_answers_and_their_ends(rows: ModuleType, number: int) -> None:
    stream = rows.STREAMS[number]
    batch = rows.make_batch(stream, seed=1, step=7, longest=LONGEST)
    flat = batch["ids"].flatten()
    indices = batch["indices"].tolist()
    after_assistant = (flat[:-1] == box_format.ASSISTANT).nonzero().flatten()
    assert set(after_assistant.tolist()) <= set(indices)
    assert 0 < len(indices) < flat.numel() / 2 and len(indices) == len(set(indices))
    assert batch["ids"].shape == (stream.rows, stream.length)
    next_ids = flat[batch["indices"] + 1]
    hinted = next_ids != batch["wanted"]
    assert hinted.sum() < len(indices) / 2
    assert set(batch["wanted"][hinted].tolist()) <= set(b"0123456789")
    assert not set(batch["wanted"].tolist()) & {box_format.USER, box_format.ASSISTANT}


def test_hints_are_running_counts_at_the_letters_of_the_string(rows: ModuleType) -> None:
    row = rows.Row(128)
    row.append(box_tasks.Question("sort", "Sort: 21", "12", ""))
    row.append(box_tasks.Question("count", "How many r's are in strawberry?", "3", ""))
    hinted = [(chr(row.ids[index]), chr(target)) for index, target in row.hints]
    assert hinted == list(zip("strawberry", "0011111233", strict=True))


def test_a_step_has_the_same_batch_each_time(rows: ModuleType) -> None:
    first, again = (rows.make_batch(rows.STREAMS[0], 1, 3, LONGEST) for _ in range(2))
    assert all(first[name].equal(again[name]) for name in first)
    other = rows.make_batch(rows.STREAMS[0], 1, 4, LONGEST)
    assert not first["ids"].equal(other["ids"])


def test_no_held_out_question_is_ever_in_a_row(rows: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[box_tasks.Question] = []
    append = rows.Row.append

    def watched(row: object, question: box_tasks.Question, plain: bool = False) -> bool:
        seen.append(question)
        return append(row, question, plain)

    monkeypatch.setattr(rows.Row, "append", watched)
    for step in range(3):
        for stream in rows.STREAMS:
            rows.make_batch(stream, seed=2, step=step, longest=LONGEST)
    assert {question.kind for question in seen} == set(box_tasks.KINDS)
    assert not any(question.held_out for question in seen)


def test_stretched_positions_rise_and_stay_within_the_longest_context(rows: ModuleType) -> None:
    stream = rows.STREAMS[1]
    for step in range(20):
        positions = rows.make_batch(stream, 3, step, LONGEST)["positions"]
        assert (positions.diff(dim=1) >= 1).all()
        assert int(positions.max()) < LONGEST


def test_a_row_holds_whole_turns_only(rows: ModuleType) -> None:
    row = rows.Row(64)
    rows.fill_mixed(row, Random(1), rows.EARLY)
    assert len(row.ids) <= 64
    assert all(row.ids[end - 1] == box_format.END for _, end, _ in row.answers)
